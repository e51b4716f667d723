"""Scores of predicted masks, per image first: Dice, IoU, precision, recall, under named conventions.

All conventions start from three pixel counts an image: intersection I, predicted P, true T.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from polypseg.errors import unknown_name

Scores = dict[str, NDArray[np.float64]]
_SMOOTH = 1e-8


def pixel_counts(prediction: NDArray[np.bool_], target: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Intersection, predicted and true pixels of two boolean masks (H, W). Raises ValueError when the shapes differ."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {prediction.shape} and target {target.shape} differ in shape")
    return tuple(int(np.count_nonzero(mask)) for mask in (prediction & target, prediction, target))  # type: ignore[return-value]


def standard_scores(intersection: ArrayLike, predicted: ArrayLike, true: ArrayLike) -> Scores:
    """Textbook scores of counts (N,) -> (N,) in [0, 1], defined for empty masks.

    Nothing to find and nothing predicted: all four are 1. Otherwise a 0/0 counts as 0: the precision of an image
    whose polyp was missed entirely, the recall of a false alarm on an image without polyp.
    """
    i, p, t = (np.asarray(x, dtype=np.float64) for x in (intersection, predicted, true))
    both_empty = (p == 0) & (t == 0)

    def ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
        quotient = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
        return np.where(both_empty, 1.0, quotient)

    return {
        "dice": ratio(2 * i, p + t),
        "iou": ratio(i, p + t - i),
        "precision": ratio(i, p),
        "recall": ratio(i, t),
    }


def ssl4gie_scores(intersection: ArrayLike, predicted: ArrayLike, true: ArrayLike) -> Scores:
    """The reference's formulas, smoothed by 1e-8 in numerator and denominator.

    On non-empty masks they equal the standard ones to 1e-7, but for one case: a polyp missed entirely has precision 1
    here. Two empty masks have Dice 2 (sic) and the others 1.
    """
    i, p, t = (np.asarray(x, dtype=np.float64) for x in (intersection, predicted, true))
    return {
        "dice": 2 * (i + _SMOOTH) / (p + t + _SMOOTH),
        "iou": (i + _SMOOTH) / (p + t - i + _SMOOTH),
        "precision": (i + _SMOOTH) / (p + _SMOOTH),
        "recall": (i + _SMOOTH) / (t + _SMOOTH),
    }


CONVENTIONS: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], Scores]] = {
    "standard": standard_scores,
    "ssl4gie": ssl4gie_scores,
}


def score(counts: ArrayLike, *, convention: str = "standard") -> Scores:
    """Counts (N, 3): intersection, predicted, true -> four scores (N,). Raises UsageError for another convention."""
    if convention not in CONVENTIONS:
        raise unknown_name("metric convention", convention, CONVENTIONS)
    intersection, predicted, true = np.asarray(counts).reshape(-1, 3).T
    return CONVENTIONS[convention](intersection, predicted, true)


def mean_with_interval(values: ArrayLike, *, resamples: int = 5000, seed: int = 0) -> dict[str, Any]:
    """{"mean", "low", "high"}: 95 % percentile bootstrap interval over images; no interval for one image."""
    sample = np.asarray(values, dtype=np.float64)
    if not len(sample) or not np.isfinite(sample).all():
        raise ValueError("a mean needs at least one value, and finite ones")
    mean = float(sample.mean())
    if len(sample) < 2:
        return {"mean": mean, "low": None, "high": None}
    if np.ptp(sample) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, 10**7 // len(sample)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"mean": mean, "low": float(interval.low), "high": float(interval.high)}
