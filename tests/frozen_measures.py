"""The measures as they were first written, plainly, one after another: what image_metrics.py must equal to 1e-9."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from polypseg.evaluation.metrics import pixel_counts

THRESHOLDS = np.arange(256, dtype=np.float32) / np.float32(255)
"""The 256 thresholds k / 255; a pixel counts as predicted where its probability reaches the threshold (>=)."""
TOLERANCE = 2.0
"""Pixels by which a contour may be off and still count as right in the surface Dice."""
CALIBRATION_BINS = 10
"""Equal bins of the confidence max(p, 1 - p) over [0.5, 1]."""
MATCH_IOU = 0.5
"""A lesion and a predicted component match one to one when their IoU exceeds this."""
SMALLEST_COMPONENT = 10
"""Pixels. Of 587 components in 500 masks of Kvasir-SEG, 65 are single pixels (JPEG), the others have 200 and more."""
_EPS = float(np.spacing(1))
_OFFSETS = np.arange(-3, 4)
_GAUSSIAN = np.exp(-(_OFFSETS**2) / (2 * 5.0**2))
_GAUSSIAN /= _GAUSSIAN.sum()

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class ImageMeasures:
    """What the conventions need to know of one image."""

    height: int
    width: int
    intersection: int
    predicted: int
    true: int
    """Pixels at probability > 0.5 (strictly), as in polypseg.evaluation.metrics."""
    curve: Counts
    """(2, 256): intersection and predicted pixels at each of THRESHOLDS."""
    rescaled_curve: Counts
    """(2, 256): the same after stretching the map to 0..1 by its own minimum and maximum."""
    mae: float
    s_measure: float
    weighted_f: float
    e_adaptive: float
    tolerance: float
    surface_dice: float
    hd95: float
    """Pixels; the image's diagonal when one of the masks is empty, 0 when both are."""
    lesions: int
    found: int
    found_iou: int
    components: int
    false_components: int
    false_components_iou: int
    calibration: Floats
    """(2, CALIBRATION_BINS, 3): outside and inside the polyp, by bin: pixels, sum of confidence, correct pixels."""
    squared_error: tuple[float, float]
    """Sums of (p - y)^2 outside and inside the polyp."""

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def share(self) -> float:
        """The polyp's share of the frame, 0 to 1."""
        return self.true / self.pixels

    @property
    def diagonal(self) -> float:
        """Pixels between opposite corners of the frame."""
        return float(np.hypot(self.height, self.width))

    def row(self) -> dict[str, Any]:
        """The measures that are single numbers, JSON-able."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return numbers | {"share": self.share, "hd95_relative": self.hd95 / self.diagonal}


def measure_image(probability: NDArray[Any], mask: NDArray[Any], *, tolerance: float = TOLERANCE) -> ImageMeasures:
    """Measure a probability map (H, W) in [0, 1] against its mask (H, W), bool or 0/1; ``tolerance`` in pixels.

    Raises ValueError for other shapes, and for values that are no probabilities.
    """
    if probability.ndim != 2 or probability.shape != mask.shape or not mask.size:
        raise ValueError(f"probability {probability.shape} and mask {mask.shape} must be (H, W) and equal in shape")
    if not (probability.min() >= 0 and probability.max() <= 1):  # NaN fails too
        raise ValueError("probabilities must lie between 0 and 1")
    p32, truth = probability.astype(np.float32), mask.astype(bool)
    p, predicted = p32.astype(np.float64), p32 > np.float32(0.5)
    intersection, predicted_pixels, true_pixels = pixel_counts(predicted, truth)
    lowest, highest = p32.min(), p32.max()
    curve = threshold_counts(p32, truth)
    stretched = (p32 - lowest) / (highest - lowest) if highest > lowest else p32
    surface_dice, hd95 = surface_measures(predicted, truth, tolerance=tolerance)
    calibration, squared_error = _calibration(p, predicted, truth)
    return ImageMeasures(
        height=truth.shape[0],
        width=truth.shape[1],
        intersection=intersection,
        predicted=predicted_pixels,
        true=true_pixels,
        curve=curve,
        rescaled_curve=threshold_counts(stretched, truth),
        mae=float(np.abs(p - truth).mean()),
        s_measure=s_measure(p, truth),
        weighted_f=weighted_f(p, truth),
        e_adaptive=_adaptive_e_measure(p, truth),
        tolerance=tolerance,
        surface_dice=surface_dice,
        hd95=hd95,
        **count_lesions(predicted, truth),
        calibration=calibration,
        squared_error=squared_error,
    )


def threshold_counts(probability: NDArray[np.float32], truth: Bools) -> Counts:
    """(2, 256): pixels of the intersection and of the prediction at each of THRESHOLDS, from two histograms."""
    level = (probability * np.float32(255) + np.float32(0.5)).astype(np.int64)
    level -= THRESHOLDS[level] > probability  # the highest threshold that the pixel reaches
    histograms = np.stack([np.bincount(level[truth], minlength=256), np.bincount(level.ravel(), minlength=256)])
    return histograms[:, ::-1].cumsum(axis=1)[:, ::-1].copy()


def e_measure(intersection: Any, predicted: Any, true: int, pixels: int) -> Floats:
    """E-measure (Fan et al. 2018) of counts of any shape: a mean over pixels of the enhanced alignment.

    A map has four kinds of pixels, so counts suffice. Divided by pixels - 1 as in the original, so perfect exceeds 1.
    """
    tp, p = np.asarray(intersection, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if true == 0:
        total = pixels - p
    elif true == pixels:
        total = p
    else:
        parts = ((1, 1, tp), (1, 0, p - tp), (0, 1, true - tp), (0, 0, pixels - p - true + tp))
        total = np.zeros_like(tp)
        for in_prediction, in_truth, number in parts:
            a, b = in_prediction - p / pixels, in_truth - true / pixels
            alignment = 2 * a * b / (a**2 + b**2 + _EPS)
            total = total + number * (alignment + 1) ** 2 / 4
    return total / max(pixels - 1, 1)


def _adaptive_e_measure(p: Floats, truth: Bools) -> float:
    """E-measure at the threshold min(2 x mean probability, 1)."""
    chosen = p >= min(2 * p.mean(), 1.0)
    intersection, predicted, true = pixel_counts(chosen, truth)
    return float(e_measure(intersection, predicted, true, truth.size))


def s_measure(p: Floats, truth: Bools) -> float:
    """S-measure (Fan et al. 2017), alpha 0.5: object and region similarity, with the mean probability for one class."""
    share = truth.mean()
    if share == 0:
        return float(1 - p.mean())
    if share == 1:
        return float(p.mean())
    objects = share * _object_similarity(p[truth]) + (1 - share) * _object_similarity(1 - p[~truth])
    return max(0.0, float(0.5 * objects + 0.5 * _region_similarity(p, truth)))


def _object_similarity(values: Floats) -> float:
    mean = values.mean()
    spread = values.std(ddof=1) if values.size > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + spread + _EPS))


def _region_similarity(p: Floats, truth: Bools) -> float:
    """Structural similarity of the four blocks around the polyp's centroid, weighted by their areas."""
    rows, columns = truth.sum(axis=1), truth.sum(axis=0)
    y, x = (int(np.round(np.arange(len(n)) @ n / n.sum())) + 1 for n in (rows, columns))
    blocks = [(slice(*ys), slice(*xs)) for ys in ((0, y), (y, None)) for xs in ((0, x), (x, None))]
    return sum(_block_similarity(p[b], truth[b]) * truth[b].size / truth.size for b in blocks if truth[b].size)


def _block_similarity(p: Floats, truth: Bools) -> float:
    x, y = p.mean(), truth.mean()
    dx, dy, freedom = p - x, truth - y, p.size - 1 + _EPS
    spread = (np.vdot(dx, dx) + np.vdot(dy, dy)) / freedom
    numerator = 4 * x * y * np.vdot(dx, dy) / freedom
    denominator = (x**2 + y**2) * spread
    if numerator == 0:
        return 1.0 if denominator == 0 else 0.0
    return float(numerator / (denominator + _EPS))


def weighted_f(p: Floats, truth: Bools) -> float:
    """Weighted F-measure (Margolin et al. 2014), beta 1; 0 when there is no polyp.

    An error inside the polyp counts less beside right pixels, one outside counts more the farther it is from the polyp.
    """
    if not truth.any():
        return 0.0
    error = np.abs(p - truth)
    box = _box(truth, margin=len(_OFFSETS) // 2)  # the polyp and what its pixels are smoothed with
    nearest = ndimage.distance_transform_edt(~truth[box], return_distances=False, return_indices=True)
    carried = error[box][nearest[0], nearest[1]]  # background takes the error of the nearest polyp pixel
    smooth = cv2.sepFilter2D(carried, cv2.CV_64F, _GAUSSIAN, _GAUSSIAN, borderType=cv2.BORDER_CONSTANT)
    inside = np.minimum(error[box], smooth)[truth[box]]
    outside = (error * (2 - np.exp2(_distance_to(truth) / -5)))[~truth]
    hits = inside.size - inside.sum()
    recall, precision = 1 - inside.mean(), hits / (hits + outside.sum() + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def surface_measures(predicted: Bools, truth: Bools, *, tolerance: float) -> tuple[float, float]:
    """Normalized surface Dice at ``tolerance`` pixels, and the 95 % Hausdorff distance in pixels.

    A contour is the mask's pixels with a 4-neighbor outside it or outside the frame. Surface Dice: the share of both
    contours' pixels that lie within the tolerance of the other one. HD95: the larger of the two 95th percentiles.
    Both empty: 1 and 0. One empty: 0 and the frame's diagonal.
    """
    if not predicted.any() or not truth.any():
        both = not predicted.any() and not truth.any()
        return (1.0, 0.0) if both else (0.0, float(np.hypot(*truth.shape)))
    box = _box(predicted | truth, margin=0)  # distances between contours need no more
    ours, theirs = (mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (predicted, truth))
    to_truth, to_prediction = _distance_to(theirs)[ours], _distance_to(ours)[theirs]
    near = np.count_nonzero(to_truth <= tolerance) + np.count_nonzero(to_prediction <= tolerance)
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    return near / (to_truth.size + to_prediction.size), float(hd95)


def _box(mask: Bools, *, margin: int) -> tuple[slice, slice]:
    """The smallest box that holds the mask's pixels, and ``margin`` pixels around it as far as the frame goes."""
    ys, xs = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return np.s_[max(ys[0] - margin, 0) : ys[-1] + margin + 1, max(xs[0] - margin, 0) : xs[-1] + margin + 1]


def _distance_to(mask: Bools) -> Floats:
    """Euclidean distance of each pixel to the nearest one of a mask that has some, exact up to 4096 pixels."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(distance.astype(np.float64) ** 2))  # squares are whole; OpenCV's roots are not exact


def count_lesions(predicted: Bools, truth: Bools) -> dict[str, int]:
    """Lesions found and false alarms; both are 8-connected components of at least SMALLEST_COMPONENT pixels.

    Touch rule: a lesion is found when any of its pixels is predicted, a component is false when it touches no lesion.
    IoU rule: both need a partner with IoU > MATCH_IOU, which can only be one.
    """
    (lesion_of, lesion_areas), (component_of, component_areas) = _components(truth), _components(predicted)
    common = (lesion_of > 0) & (component_of > 0)
    pairs = lesion_of[common] * len(component_areas) + component_of[common]
    keys, shared = np.unique(pairs, return_counts=True)
    lesion, component = keys // len(component_areas), keys % len(component_areas)
    union = lesion_areas[lesion] + component_areas[component] - shared
    matches = int(np.count_nonzero(shared / union > MATCH_IOU))
    lesions, components = len(lesion_areas) - 1, len(component_areas) - 1
    return {
        "lesions": lesions,
        "found": len(np.unique(lesion)),
        "found_iou": matches,
        "components": components,
        "false_components": components - len(np.unique(component)),
        "false_components_iou": components - matches,
    }


def _components(mask: Bools) -> tuple[Counts, Counts]:
    """Labels (H, W) of the components that are large enough, 0 elsewhere, and the labels' areas."""
    number, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    large = np.bincount(labels.ravel(), minlength=number) >= SMALLEST_COMPONENT
    large[0] = False  # the background
    kept = np.where(large, large.cumsum(), 0)[labels]
    return kept, np.bincount(kept.ravel(), minlength=1)


def _calibration(p: Floats, predicted: Bools, truth: Bools) -> tuple[Floats, tuple[float, float]]:
    """The two calibration fields of ImageMeasures."""
    confidence = np.maximum(p, 1 - p).ravel()
    level = np.minimum(((confidence - 0.5) * (2 * CALIBRATION_BINS)).astype(np.int64), CALIBRATION_BINS - 1)
    place = level + CALIBRATION_BINS * truth.ravel()
    correct = (predicted == truth).ravel()
    sums = [np.bincount(place, weights=w, minlength=2 * CALIBRATION_BINS) for w in (None, confidence, correct)]
    table = np.stack(sums, axis=1).reshape(2, CALIBRATION_BINS, 3).astype(np.float64)
    squared = np.bincount(truth.ravel(), weights=((p - truth) ** 2).ravel(), minlength=2)
    return table, (float(squared[0]), float(squared[1]))
