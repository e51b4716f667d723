"""Every convention by which polyp segmentation is reported, by name: formula, source, rule for empty masks, code.

Each is a table of numbers an image, the mean over images, and what is computed from the means; so each has an interval.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from polypseg.errors import unknown_name
from polypseg.evaluation.aggregation import (
    SIZE_CUTS,
    Images,
    calibration_scores,
    calibration_sums,
    columns,
    image_scores,
    lesion_rates,
    lesion_sums,
    mean_and_max,
    pixel_sums,
    pooled_scores,
    ratio,
    size_strata,
    structure_columns,
    structure_scores,
    threshold_scores,
    two_class_scores,
    two_class_sums,
)
from polypseg.evaluation.image_metrics import CALIBRATION_BINS, Floats
from polypseg.evaluation.metrics import mean_with_interval
from polypseg.statistics.scores import METRICS
from polypseg.tables import Column, Table

_RESAMPLES = 5000


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
    rng, n = np.random.default_rng(0), len(table)
    step = max(1, 10**7 // n)
    draws = [
        reduce(rng.multinomial(n, np.full(n, 1 / n), size=min(step, _RESAMPLES - start)) / n @ table)
        for start in range(0, _RESAMPLES, step)
    ]
    sample = np.concatenate(draws)
    lost = np.isnan(sample).all(axis=0)
    low, high = np.nanpercentile(np.where(lost, 0, sample), [2.5, 97.5], axis=0)
    return np.where(lost, np.nan, low), np.where(lost, np.nan, high)


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


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
                "per image at p > 0.5, contours of 4-neighbours: share of contour pixels within the tolerance (2 px "
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
    columns = [
        Column("name", "name", "`{}`".format),
        Column("outputs", "outputs", ", ".join),
        Column("definition", "formula"),
        Column("empty masks", "empty"),
        Column("source", "source"),
    ]
    return Table(columns=columns, records=list(CONVENTIONS.values())).markdown() + "\n"
