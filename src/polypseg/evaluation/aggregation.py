"""From the measures of N images to a table of numbers an image, and from the means of its columns to scores.

The parts of which conventions.py builds every convention. Sums stand in the tables as they are: scores of a whole set
are ratios, for which means over images serve as well as sums.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polypseg.evaluation.image_metrics import CALIBRATION_BINS, Floats, ImageMeasures, e_measure
from polypseg.evaluation.metrics import score, standard_scores

SIZE_CUTS = (0.05, 0.15)
"""Small polyps cover less than the first share of the frame, large ones at least the second."""
Images = Sequence[ImageMeasures]


def ratio(numerator: Floats, denominator: Any) -> Floats:
    """Quotient; NaN for a zero denominator."""
    below = np.broadcast_to(np.asarray(denominator, dtype=np.float64), np.shape(numerator))
    return np.divide(numerator, below, out=np.full(np.shape(numerator), np.nan), where=below > 0)


# -- tables: images -> (N, K) ------------------------------------------------------------------------------------------


def pixel_sums(images: Images) -> Floats:
    return np.array([(i.intersection, i.predicted, i.true) for i in images], dtype=np.float64)


def image_scores(convention: str) -> Callable[[Images], Floats]:
    return lambda images: np.stack(list(score(pixel_sums(images), convention=convention).values()), axis=1)


def columns(*measures: Callable[[ImageMeasures], float]) -> Callable[[Images], Floats]:
    return lambda images: np.array([[measure(i) for measure in measures] for i in images], dtype=np.float64)


def two_class_sums(images: Images) -> Floats:
    """(N, 6): the three counts of the polyp and, in the same order, of the background."""
    polyp, pixels = pixel_sums(images), np.array([i.pixels for i in images], dtype=np.float64)
    correct_background = pixels - polyp[:, 1] - polyp[:, 2] + polyp[:, 0]
    background = np.stack([correct_background, pixels - polyp[:, 1], pixels - polyp[:, 2]], axis=1)
    return np.concatenate([polyp, background], axis=1)


def two_class_scores(counts: Floats) -> Floats:
    """Counts (..., 6) -> (..., 2): Dice and IoU, each the mean of the polyp's and the background's."""
    polyp, background = (standard_scores(*np.moveaxis(half, -1, 0)) for half in (counts[..., :3], counts[..., 3:]))
    return np.stack([(polyp[name] + background[name]) / 2 for name in ("dice", "iou")], axis=-1)


def threshold_scores(which: str) -> Callable[[Images], Floats]:
    """(N, 512): Dice, then IoU, at each of the 256 thresholds; 0 wherever the intersection is empty."""

    def table(images: Images) -> Floats:
        curves = np.array([getattr(i, which) for i in images], dtype=np.float64)  # (N, 2, 256)
        true = np.array([[i.true] for i in images], dtype=np.float64)
        intersection, predicted = curves[:, 0], curves[:, 1]
        dice = np.nan_to_num(ratio(2 * intersection, predicted + true))
        return np.concatenate([dice, np.nan_to_num(ratio(intersection, predicted + true - intersection))], axis=1)

    return table


def structure_columns(images: Images) -> Floats:
    """(N, 4 + 256): MAE, S-measure, weighted F, adaptive E-measure; then the E-measure's curve."""
    return np.array(
        [
            (i.mae, i.s_measure, i.weighted_f, i.e_adaptive, *e_measure(i.curve[0], i.curve[1], i.true, i.pixels))
            for i in images
        ]
    )


def size_strata(images: Images) -> Floats:
    """(N, 6): Dice and IoU under each stratum of size, NaN in the others and on images without polyp."""
    scores, share = image_scores("standard")(images)[:, :2], np.array([[i.share] for i in images])
    lows, highs = (0.0, *SIZE_CUTS), (*SIZE_CUTS, np.inf)
    inside = [(share > 0) & (share >= low) & (share < high) for low, high in zip(lows, highs, strict=True)]
    return np.concatenate([np.where(chosen, scores, np.nan) for chosen in inside], axis=1)


def lesion_sums(images: Images) -> Floats:
    return columns(
        lambda i: i.lesions,
        lambda i: i.found,
        lambda i: i.found_iou,
        lambda i: i.false_components,
        lambda i: i.false_components_iou,
        lambda i: i.true == 0,
        lambda i: i.true == 0 and i.predicted > 0,
    )(images)


def calibration_sums(images: Images) -> Floats:
    """(N, 2 + 2 x bins x 3): squared error outside and inside, then the bins' sums."""
    return np.array([(*i.squared_error, *i.calibration.ravel()) for i in images])


# -- reductions: means over images (..., K) -> outputs -----------------------------------------------------------------


def pooled_scores(means: Floats) -> Floats:
    return np.stack(list(standard_scores(*np.moveaxis(means, -1, 0)).values()), axis=-1)


def mean_and_max(means: Floats) -> Floats:
    dice, iou = means[..., :256], means[..., 256:]
    return np.stack([dice.mean(axis=-1), dice.max(axis=-1), iou.mean(axis=-1), iou.max(axis=-1)], axis=-1)


def structure_scores(means: Floats) -> Floats:
    curve = means[..., 4:]
    return np.concatenate([means[..., :4], np.stack([curve.mean(axis=-1), curve.max(axis=-1)], axis=-1)], axis=-1)


def lesion_rates(means: Floats) -> Floats:
    lesions, found, found_iou, false, false_iou, without_polyp, alarms = np.moveaxis(means, -1, 0)
    rates = (ratio(found, lesions), false, ratio(found_iou, lesions), false_iou, ratio(alarms, without_polyp))
    return np.stack(rates, axis=-1)


def calibration_scores(means: Floats) -> Floats:
    """ECE, then Brier score: inside the polyp, outside it, over all pixels."""
    squared, bins = means[..., :2], means[..., 2:].reshape(*means.shape[:-1], 2, CALIBRATION_BINS, 3)
    parts = [(bins[..., 1, :, :], squared[..., 1]), (bins[..., 0, :, :], squared[..., 0])]
    parts.append((bins.sum(axis=-3), squared.sum(axis=-1)))
    errors = [ratio(np.abs(b[..., 1] - b[..., 2]).sum(axis=-1), b[..., 0].sum(axis=-1)) for b, _ in parts]
    return np.stack([*errors, *(ratio(s, b[..., 0].sum(axis=-1)) for b, s in parts)], axis=-1)
