"""Every convention by which polyp segmentation is reported, by name: formula, source, rule for empty masks, code.

Each is a table of numbers per image, the mean over images, and what is computed from the means; so each has an
interval. Sums stand in the tables as they are: scores of a whole set are ratios, for which means serve as well as sums.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polypseg.errors import unknown_name
from polypseg.evaluation.image_metrics import CALIBRATION_BINS, Floats, ImageMeasures, e_measure
from polypseg.evaluation.metrics import mean_with_interval, score, standard_scores
from polypseg.statistics.resampling import times_drawn
from polypseg.statistics.scores import METRICS
from polypseg.tables import Column, Table

SIZE_CUTS = (0.05, 0.15)
"""Small polyps cover less than the first share of the frame, large ones at least the second."""
_RESAMPLES = 5000
Images = Sequence[ImageMeasures]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """One way from the measures of N images to a few numbers."""

    name: str
    title: str
    formula: str
    empty: str
    """What happens when a mask, a prediction or both are empty."""
    source: str
    outputs: tuple[str, ...]
    table: Callable[[Images], Floats]
    """N images -> (N, K)."""
    needs: tuple[str, ...] = ()
    """Those of ``measures.MEASURES`` that the table is made of; pixel counts and sizes there always are."""
    reduce: Callable[[Floats], Floats] | None = None
    """Means over images (..., K) -> (..., len(outputs)). None: the means of the columns are the outputs."""

    def numbers(self, images: Images) -> Floats:
        """N images -> (N, K), the table. Raises ValueError where an image was measured without what is needed."""
        for name in self.needs:
            if any(getattr(image, name) is None for image in images):
                raise ValueError(f"{name} was not measured, which the convention {self.name!r} needs")
        return self.table(images)

    def per_image(self, images: Images) -> dict[str, Floats] | None:
        """output -> (N,), NaN where an image has no such score; None when scores exist for the whole set only."""
        if self.reduce is not None:
            return None
        return dict(zip(self.outputs, self.numbers(images).T, strict=True))

    def values(self, images: Images) -> dict[str, float]:
        """output -> the set's score; NaN where nothing in the set defines it."""
        table = self.numbers(images)
        found = _column_means(table) if self.reduce is None else self.reduce(table.mean(axis=0))
        return {name: float(value) for name, value in zip(self.outputs, found, strict=True)}

    def summary(self, images: Images) -> dict[str, dict[str, Any]]:
        """output -> {"mean", "low", "high", "n"}: score, 95 % percentile bootstrap interval over images, images.

        Like mean_with_interval: 5000 resamples, seed 0, no interval for one image. An undefined score is None.
        """
        scores = self.per_image(images)
        if scores is not None:
            return {name: _mean_of_defined(values) for name, values in scores.items()}
        low, high = _bootstrap(self.numbers(images), self.reduce) if len(images) > 1 else (None, None)
        return {
            name: {
                "mean": _or_none(value),
                "low": None if low is None else _or_none(low[k]),
                "high": None if high is None else _or_none(high[k]),
                "n": len(images),
            }
            for k, (name, value) in enumerate(self.values(images).items())
        }


def _column_means(table: Floats) -> Floats:
    defined = np.isfinite(table)
    return ratio(np.where(defined, table, 0).sum(axis=0), defined.sum(axis=0))


def _mean_of_defined(values: Floats) -> dict[str, Any]:
    defined = values[np.isfinite(values)]
    if not len(defined):
        return {"mean": None, "low": None, "high": None, "n": 0}
    return mean_with_interval(defined, resamples=_RESAMPLES) | {"n": len(defined)}


def _bootstrap(table: Floats, reduce: Any) -> tuple[Floats, Floats]:
    """Percentile interval of ``reduce(mean of the rows)``: rows are drawn with replacement, as weights."""
    n = len(table)
    blocks = times_drawn(n, resamples=_RESAMPLES, step=max(1, 10**7 // n), seed=0)
    sample = np.concatenate([reduce(times / n @ table) for times in blocks])
    lost = np.isnan(sample).all(axis=0)
    low, high = np.nanpercentile(np.where(lost, 0, sample), [2.5, 97.5], axis=0)
    return np.where(lost, np.nan, low), np.where(lost, np.nan, high)


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


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


# -- the table of conventions ------------------------------------------------------------------------------------------

_THRESHOLD_OUTPUTS = ("mean_dice", "max_dice", "mean_iou", "max_iou")
_THRESHOLD_FORMULA = (
    "per image and threshold t = k/255 (k = 0..255, p >= t): Dice, IoU; mean over images per threshold; then the mean "
    "and the maximum over the thresholds"
)
_ZERO_RULE = "0 wherever the intersection is empty, so also for two empty masks"
_PACKAGE = __name__.split(".", maxsplit=1)[0]
_STANDARD_RULE = "nothing to find and nothing predicted: 1; any other 0/0: 0"

CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention(
            name="paper",
            title="mean over images",
            formula="per image at p > 0.5: Dice 2I/(P+T), IoU I/(P+T-I), precision I/P, recall I/T; mean over images",
            empty=_STANDARD_RULE,
            # Stands in every receipt so far: the function's first place, which is now evaluation/metrics.py.
            source=f"the study's protocol with a rule for empty masks; {_PACKAGE}.metrics.standard_scores",
            outputs=METRICS,
            table=image_scores("standard"),
        ),
        Convention(
            name="ssl4gie",
            title="mean over images, the reference's smoothing",
            formula="as `paper` with s = 1e-8: Dice 2(I+s)/(P+T+s), the others (I+s)/(...+s); mean over images",
            empty="two empty masks: Dice 2 (sic), the others 1; a missed polyp has precision 1, a false alarm recall 1",
            source="SSL4GIE's evaluation code",
            outputs=METRICS,
            table=image_scores("ssl4gie"),
        ),
        Convention(
            name="pooled",
            title="pixels of the whole set as one image",
            formula="the four scores of `paper` from the sums of I, P and T over all images; IoU = Dice/(2 - Dice)",
            empty="as `paper`, for the whole set; images without polyp enter by their false pixels only",
            source="what published tables obey in which IoU = Dice/(2 - Dice); scikit-learn's scores of all pixels",
            outputs=METRICS,
            table=pixel_sums,
            reduce=pooled_scores,
        ),
        Convention(
            name="pranet",
            title="256 thresholds",
            formula=_THRESHOLD_FORMULA,
            empty=_ZERO_RULE,
            source="PraNet's MATLAB toolbox (Fmeasure_calu), without its stretching of each map to 0..1",
            outputs=_THRESHOLD_OUTPUTS,
            needs=("curve",),
            table=threshold_scores("curve"),
            reduce=mean_and_max,
        ),
        Convention(
            name="pranet_rescaled",
            title="256 thresholds, each map stretched to 0..1",
            formula=f"as `pranet` after (p - min p)/(max p - min p) per image: {_THRESHOLD_FORMULA}",
            empty=f"{_ZERO_RULE}; stretching invents a mask where the model saw nothing",
            source="PraNet's MATLAB toolbox as published (mapminmax)",
            outputs=_THRESHOLD_OUTPUTS,
            needs=("rescaled_curve",),
            table=threshold_scores("rescaled_curve"),
            reduce=mean_and_max,
        ),
        Convention(
            name="fg_bg_mean",
            title="mean of polyp and background, mean over images",
            formula="per image at p > 0.5: (polyp's Dice + background's Dice)/2, IoU likewise; mean over images",
            empty=f"per class: {_STANDARD_RULE}",
            source="two-class mDice and mIoU as several segmentation repositories print them",
            outputs=("dice", "iou"),
            table=lambda images: two_class_scores(two_class_sums(images)),
        ),
        Convention(
            name="fg_bg_pooled",
            title="mean of polyp and background, pixels of the whole set",
            formula="Dice and IoU of the polyp and of the background from the set's summed counts; mean of the two",
            empty=f"per class and for the whole set: {_STANDARD_RULE}",
            source="mDice and mIoU of toolboxes that sum a confusion matrix, such as MMSegmentation",
            outputs=("dice", "iou"),
            table=two_class_sums,
            reduce=two_class_scores,
        ),
        Convention(
            name="structure",
            title="structure measures",
            formula=(
                "mean over images of MAE, S-measure (alpha 0.5), weighted F (beta 1) and E-measure at the threshold "
                "min(2 mean p, 1); E-measure's mean and maximum over the 256 thresholds of its mean over images"
            ),
            empty="no polyp: S = 1 - mean p, weighted F = 0 (sic), E = share of pixels left out",
            source="Fan et al. 2017 and 2018, Margolin et al. 2014; equal to pysodmetrics 1.6.2 without its stretching",
            outputs=("mae", "s_measure", "weighted_f", "e_adaptive", "e_mean", "e_max"),
            needs=("curve", "mae", "s_measure", "weighted_f", "e_adaptive"),
            table=structure_columns,
            reduce=structure_scores,
        ),
        Convention(
            name="surface",
            title="surface measures",
            formula=(
                "per image at p > 0.5, contours of 4-neighbors: share of contour pixels within the tolerance (2 px "
                "unless stated), 95 % Hausdorff distance in pixels and over the frame's diagonal; mean over images"
            ),
            empty="both empty: 1 and 0; one empty: 0 and the diagonal; the last output leaves such images out",
            source="equal to MONAI 1.6.1's compute_surface_dice and compute_hausdorff_distance on non-empty masks",
            outputs=("surface_dice", "hd95", "hd95_relative", "hd95_both_present"),
            needs=("surface_dice", "hd95"),
            table=columns(
                lambda i: i.surface_dice,
                lambda i: i.hd95,
                lambda i: i.hd95 / i.diagonal,
                lambda i: i.hd95 if i.true and i.predicted else np.nan,
            ),
        ),
        Convention(
            name="lesions",
            title="lesion-wise",
            formula=(
                "8-connected components of at least 10 pixels at p > 0.5. Found: any pixel of the lesion is predicted; "
                "false: the component touches no lesion. With `_iou`: partners with IoU > 0.5. Sensitivity: found / "
                "lesions of the set; false positives an image; false alarms: share of images without polyp where "
                "anything is predicted"
            ),
            empty="images without polyp count in the false positives; undefined without lesions or such images",
            source="this package",
            outputs=(
                "sensitivity",
                "false_positives",
                "sensitivity_iou",
                "false_positives_iou",
                "false_alarms",
            ),
            needs=("lesions", "found", "found_iou", "components", "false_components", "false_components_iou"),
            table=lesion_sums,
            reduce=lesion_rates,
        ),
        Convention(
            name="calibration",
            title="calibration inside and outside the polyp",
            formula=(
                f"over the set's pixels: ECE = sum over {CALIBRATION_BINS} equal bins of max(p, 1 - p) in [0.5, 1] of "
                "|sum of confidence - correct pixels| / pixels; Brier = mean of (p - y)^2"
            ),
            empty="undefined inside when the set has no polyp pixel, outside when it has no other",
            source="Guo et al. 2017 for the ECE, Brier 1950; reported by region since the background hides the polyp",
            outputs=("ece_inside", "ece_outside", "ece", "brier_inside", "brier_outside", "brier"),
            needs=("calibration", "squared_error"),
            table=calibration_sums,
            reduce=calibration_scores,
        ),
        Convention(
            name="size",
            title="by polyp size",
            formula=(
                f"`paper`'s Dice and IoU, mean over the images whose polyp covers less than {SIZE_CUTS[0]:.0%} of the "
                f"frame (small), less than {SIZE_CUTS[1]:.0%} (medium), or more (large)"
            ),
            empty="images without polyp are in no stratum; an empty stratum is undefined",
            source="this package's cut points",
            outputs=("dice_small", "iou_small", "dice_medium", "iou_medium", "dice_large", "iou_large"),
            table=size_strata,
        ),
    )
}


def choose_conventions(names: Iterable[str]) -> tuple[Convention, ...]:
    """The conventions of these names, in the order given. Raises UsageError for another name, with the closest one."""
    chosen = tuple(names)
    for name in chosen:
        if name not in CONVENTIONS:
            raise unknown_name("metric convention", name, CONVENTIONS)
    return tuple(CONVENTIONS[name] for name in chosen)


def needed_measures(names: Iterable[str]) -> frozenset[str]:
    """Those of ``measures.MEASURES`` that the conventions of these names need."""
    return frozenset(name for convention in choose_conventions(names) for name in convention.needs)


def conventions_markdown() -> str:
    """The table of definitions for the documentation: one row a convention."""
    shown = [
        Column("name", "name", "`{}`".format),
        Column("outputs", "outputs", ", ".join),
        Column("definition", "formula"),
        Column("empty masks", "empty"),
        Column("source", "source"),
    ]
    return Table(columns=shown, records=list(CONVENTIONS.values())).markdown() + "\n"
