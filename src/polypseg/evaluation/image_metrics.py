"""What is measured on one image: a probability map against its mask, in one call, as much of it as is asked for.

The conventions (conventions.py) start from these measures and say which they need; nothing there looks at pixels again.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
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
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=np.uint8)
_OFFSETS = np.arange(-3, 4)
_GAUSSIAN = np.exp(-(_OFFSETS**2) / (2 * 5.0**2))
_GAUSSIAN /= _GAUSSIAN.sum()

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Bools = NDArray[np.bool_]


_NOT_ASKED: Any = None


@dataclass(frozen=True, kw_only=True)
class ImageMeasures:
    """What the conventions need to know of one image; what was not asked for is None."""

    height: int
    width: int
    intersection: int
    predicted: int
    true: int
    """Pixels at probability > 0.5 (strictly), as in polypseg.evaluation.metrics."""
    tolerance: float
    """Of the surface Dice, in pixels."""
    curve: Counts = _NOT_ASKED
    """(2, 256): intersection and predicted pixels at each of THRESHOLDS."""
    rescaled_curve: Counts = _NOT_ASKED
    """(2, 256): the same after stretching the map to 0..1 by its own minimum and maximum."""
    mae: float = _NOT_ASKED
    s_measure: float = _NOT_ASKED
    weighted_f: float = _NOT_ASKED
    e_adaptive: float = _NOT_ASKED
    surface_dice: float = _NOT_ASKED
    hd95: float = _NOT_ASKED
    """Pixels; the image's diagonal when one of the masks is empty, 0 when both are."""
    lesions: int = _NOT_ASKED
    found: int = _NOT_ASKED
    found_iou: int = _NOT_ASKED
    components: int = _NOT_ASKED
    false_components: int = _NOT_ASKED
    false_components_iou: int = _NOT_ASKED
    calibration: Floats = _NOT_ASKED
    """(2, CALIBRATION_BINS, 3): outside and inside the polyp, by bin: pixels, sum of confidence, correct pixels."""
    squared_error: tuple[float, float] = _NOT_ASKED
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
        surface = {} if self.hd95 is None else {"hd95_relative": self.hd95 / self.diagonal}
        return numbers | {"share": self.share} | surface


MEASURES = tuple(known.name for known in fields(ImageMeasures) if known.default is None)
"""The measures that are made only where they are asked for."""
_OF_SURFACE = ("surface_dice", "hd95")
_OF_LESIONS = ("lesions", "found", "found_iou", "components", "false_components", "false_components_iou")
_OF_CALIBRATION = ("calibration", "squared_error")


def measure_image(
    probability: NDArray[Any],
    mask: NDArray[Any],
    *,
    tolerance: float = TOLERANCE,
    measures: Collection[str] = MEASURES,
) -> ImageMeasures:
    """Measure a probability map (H, W) in [0, 1] against its mask (H, W), bool or 0/1; ``tolerance`` in pixels.

    ``measures``: those of MEASURES to make; sizes and pixel counts there always are. Raises ValueError for other shapes
    or names, and for values that are no probabilities.
    """
    if probability.ndim != 2 or probability.shape != mask.shape or not mask.size:
        raise ValueError(f"probability {probability.shape} and mask {mask.shape} must be (H, W) and equal in shape")
    unknown = set(measures) - set(MEASURES)
    if unknown:
        raise ValueError(f"unknown measures: {', '.join(sorted(unknown))}")
    lowest, highest = probability.min(), probability.max()
    if not (lowest >= 0 and highest <= 1):  # NaN fails too
        raise ValueError("probabilities must lie between 0 and 1")
    p32, truth = probability.astype(np.float32, copy=False), mask.astype(bool, copy=False)
    predicted = p32 > np.float32(0.5)
    intersection, predicted_pixels, true_pixels = pixel_counts(predicted, truth)
    made = _Image(p32, truth, predicted).measures(frozenset(measures), tolerance=tolerance)
    return ImageMeasures(
        height=truth.shape[0],
        width=truth.shape[1],
        intersection=intersection,
        predicted=predicted_pixels,
        true=true_pixels,
        tolerance=tolerance,
        **{name: value for name, value in made.items() if name in measures},
    )


class _Image:
    """A map, its mask, and what several measures share."""

    def __init__(self, p32: NDArray[np.float32], truth: Bools, predicted: Bools):
        self.p32, self.truth, self.predicted = p32, truth, predicted

    @cached_property
    def p(self) -> Floats:
        return self.p32.astype(np.float64)

    @cached_property
    def error(self) -> Floats:
        """(H, W): distance of the probability from the mask."""
        return np.abs(self.p - self.truth)

    @cached_property
    def error_outside(self) -> Floats:
        """(H, W): the error outside the mask, 0 inside it."""
        return self.error * ~self.truth

    @cached_property
    def contour(self) -> Bools:
        return _contour(self.truth)

    @cached_property
    def squared_distance(self) -> NDArray[np.int64]:
        """(H, W): squared distance in pixels to the mask's contour; outside the mask this is the distance to it."""
        return _squared_distance_to(self.contour)

    def measures(self, asked: frozenset[str], *, tolerance: float) -> dict[str, Any]:
        """The asked measures, and those that come with them."""
        p32, truth, made = self.p32, self.truth, dict[str, Any]()
        if "curve" in asked:
            made["curve"] = threshold_counts(p32, truth)
        if "rescaled_curve" in asked:
            lowest, highest = p32.min(), p32.max()
            stretched = (p32 - lowest) / (highest - lowest) if highest > lowest else p32
            made["rescaled_curve"] = threshold_counts(stretched, truth)
        if "mae" in asked:
            made["mae"] = float(self.error.mean())
        if "s_measure" in asked:
            made["s_measure"] = s_measure(self.p, truth)
        if "weighted_f" in asked:
            made["weighted_f"] = self._weighted_f()
        if "e_adaptive" in asked:
            made["e_adaptive"] = _adaptive_e_measure(self.p, truth)
        if asked.intersection(_OF_SURFACE):
            made |= zip(_OF_SURFACE, self._surface_measures(tolerance), strict=True)
        if asked.intersection(_OF_LESIONS):
            made |= count_lesions(self.predicted, truth)
        if asked.intersection(_OF_CALIBRATION):
            made |= zip(_OF_CALIBRATION, self._calibration(), strict=True)
        return made

    def _weighted_f(self) -> float:
        """Weighted F-measure (Margolin et al. 2014), beta 1; 0 when there is no polyp.

        An error inside the polyp counts less beside right pixels, one outside counts more the farther it is from the
        polyp.
        """
        truth, error = self.truth, self.error
        if not truth.any():
            return 0.0
        box = _box(truth, margin=len(_OFFSETS) // 2)  # the polyp and what its pixels are smoothed with
        nearest = ndimage.distance_transform_edt(~truth[box], return_distances=False, return_indices=True)
        carried = error[box][nearest[0], nearest[1]]  # background takes the error of the nearest polyp pixel
        smooth = cv2.sepFilter2D(carried, cv2.CV_64F, _GAUSSIAN, _GAUSSIAN, borderType=cv2.BORDER_CONSTANT)
        inside = np.minimum(error[box], smooth)[truth[box]]
        weight = _distance_weights(truth.shape[0] ** 2 + truth.shape[1] ** 2).take(self.squared_distance)
        outside = float(np.vdot(self.error_outside, weight))
        hits = inside.size - inside.sum()
        recall, precision = 1 - inside.mean(), hits / (hits + outside + _EPS)
        return float(2 * recall * precision / (recall + precision + _EPS))

    def _surface_measures(self, tolerance: float) -> tuple[float, float]:
        """Normalized surface Dice at ``tolerance`` pixels, and the 95 % Hausdorff distance in pixels.

        A contour is the mask's pixels with a 4-neighbor outside it or outside the frame. Surface Dice: the share of
        both contours' pixels that lie within the tolerance of the other one. HD95: the larger of the two 95th
        percentiles. Both empty: 1 and 0. One empty: 0 and the frame's diagonal.
        """
        predicted, truth = self.predicted, self.truth
        if not predicted.any() or not truth.any():
            both = not predicted.any() and not truth.any()
            return (1.0, 0.0) if both else (0.0, float(np.hypot(*truth.shape)))
        ours, theirs = _contour(predicted), self.contour
        box = _box(ours | theirs, margin=0)  # distances from the mask's contour to the prediction's need no more
        to_truth = np.sqrt(self.squared_distance[ours])
        to_prediction = np.sqrt(_squared_distance_to(ours[box])[theirs[box]])
        near = np.count_nonzero(to_truth <= tolerance) + np.count_nonzero(to_prediction <= tolerance)
        hd95 = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
        return near / (to_truth.size + to_prediction.size), float(hd95)

    def _calibration(self) -> tuple[Floats, tuple[float, float]]:
        """The two calibration fields of ImageMeasures."""
        confidence = np.maximum(self.p, 1 - self.p)
        level = np.minimum(((confidence - 0.5) * (2 * CALIBRATION_BINS)).astype(np.uint8), CALIBRATION_BINS - 1)
        right = self.predicted == self.truth
        place = (level + np.uint8(CALIBRATION_BINS) * (self.truth + np.uint8(2) * right)).ravel().astype(np.intp)
        shape = (2, 2, CALIBRATION_BINS)  # wrong or right, outside or inside, bin
        pixels = np.bincount(place, minlength=4 * CALIBRATION_BINS).reshape(shape)
        sums = np.bincount(place, weights=confidence.ravel(), minlength=4 * CALIBRATION_BINS).reshape(shape)
        table = np.stack([pixels.sum(axis=0), sums.sum(axis=0), pixels[1]], axis=-1).astype(np.float64)
        outside, inside = self.error_outside, self.error * self.truth
        return table, (float(np.vdot(outside, outside)), float(np.vdot(inside, inside)))


def threshold_counts(probability: NDArray[np.float32], truth: Bools) -> Counts:
    """(2, 256): pixels of the intersection and of the prediction at each of THRESHOLDS, from one histogram."""
    level = (probability * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    level -= cv2.LUT(level, THRESHOLDS) > probability  # the highest threshold that the pixel reaches
    outside, inside = np.bincount((level + np.uint16(256) * truth).ravel(), minlength=512).reshape(2, 256)
    return np.stack([inside, outside + inside])[:, ::-1].cumsum(axis=1)[:, ::-1].copy()


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
    inside = truth.astype(np.float64)
    objects = share * _object_similarity(p, inside) + (1 - share) * _object_similarity(1 - p, 1 - inside)
    return max(0.0, float(0.5 * objects + 0.5 * _region_similarity(p, inside)))


def _object_similarity(values: Floats, chosen: Floats) -> float:
    """Of the values (H, W) where ``chosen`` is 1; it is 0 elsewhere."""
    number = chosen.sum()
    mean = np.vdot(values, chosen) / number
    deviation = (values - mean) * chosen
    spread = np.sqrt(np.vdot(deviation, deviation) / (number - 1)) if number > 1 else 0.0
    return float(2 * mean / (mean**2 + 1 + spread + _EPS))


def _region_similarity(p: Floats, truth: Floats) -> float:
    """Structural similarity of the four blocks around the polyp's centroid, weighted by their areas."""
    rows, columns = truth.sum(axis=1), truth.sum(axis=0)
    y, x = (int(np.round(np.arange(len(n)) @ n / n.sum())) + 1 for n in (rows, columns))
    blocks = [(slice(*ys), slice(*xs)) for ys in ((0, y), (y, None)) for xs in ((0, x), (x, None))]
    return sum(_block_similarity(p[b], truth[b]) * truth[b].size / truth.size for b in blocks if truth[b].size)


def _block_similarity(p: Floats, truth: Floats) -> float:
    """From sums where the mask has both values, so that their rounding is far below the variance."""
    x, y, freedom = p.mean(), truth.mean(), p.size - 1 + _EPS
    if 0 < y < 1:
        spread = (_dot(p, p) - p.size * x * x + p.size * y * (1 - y)) / freedom
        covariance = (_dot(p, truth) - p.size * x * y) / freedom
    else:
        deviation = p - x
        spread, covariance = _dot(deviation, deviation) / freedom, 0.0
    numerator = 4 * x * y * covariance
    denominator = (x**2 + y**2) * spread
    if numerator == 0:
        return 1.0 if denominator == 0 else 0.0
    return float(numerator / (denominator + _EPS))


def _dot(a: Floats, b: Floats) -> float:
    """Sum of the products of two blocks (H, W), which need not lie together in memory."""
    return float(np.einsum("ij,ij->", a, b))


def _box(mask: Bools, *, margin: int) -> tuple[slice, slice]:
    """The smallest box that holds the mask's pixels, and ``margin`` pixels around it as far as the frame goes."""
    ys, xs = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return np.s_[max(ys[0] - margin, 0) : ys[-1] + margin + 1, max(xs[0] - margin, 0) : xs[-1] + margin + 1]


def _contour(mask: Bools) -> Bools:
    """The mask's pixels with a 4-neighbor outside it or outside the frame."""
    inner = cv2.erode(mask.astype(np.uint8), _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.asarray(mask & (inner == 0))


def _squared_distance_to(mask: Bools) -> NDArray[np.int64]:
    """Squared distance of each pixel to the nearest one of a mask that has some, exact up to 4096 pixels."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    squared = np.square(distance, dtype=np.float64)
    return np.rint(squared, out=squared).astype(np.int64)  # they are whole; OpenCV's roots are not exact


@lru_cache(maxsize=4)
def _distance_weights(greatest: int) -> Floats:
    """(greatest + 1,): the weighted F-measure's weights by squared distance from the polyp. Read only."""
    weights = 2 - np.exp2(np.sqrt(np.arange(greatest + 1)) / -5)
    weights.flags.writeable = False
    return np.asarray(weights)


def largest_component(mask: Bools) -> int:
    """Pixels of the largest 8-connected component of a mask (H, W); 0 where it is empty."""
    if not mask.any():
        return 0
    return int(_labeled(mask[_box(mask, margin=0)])[1][1:].max())


def count_lesions(predicted: Bools, truth: Bools) -> dict[str, int]:
    """Lesions found and false alarms; both are 8-connected components of at least SMALLEST_COMPONENT pixels.

    Touch rule: a lesion is found when any of its pixels is predicted, a component is false when it touches no lesion.
    IoU rule: both need a partner with IoU > MATCH_IOU, which can only be one.
    """
    if not predicted.any() and not truth.any():
        return dict.fromkeys(_OF_LESIONS, 0)
    box = _box(predicted | truth, margin=0)
    predicted, truth = predicted[box], truth[box]
    (lesion_of, lesion_areas), (component_of, component_areas) = _labeled(truth), _labeled(predicted)
    common = predicted & truth
    keys, shared = np.unique(
        lesion_of[common].astype(np.int64) * len(component_areas) + component_of[common], return_counts=True
    )
    lesion, component = keys // len(component_areas), keys % len(component_areas)
    large = (lesion_areas[lesion] >= SMALLEST_COMPONENT) & (component_areas[component] >= SMALLEST_COMPONENT)
    lesion, component, shared = lesion[large], component[large], shared[large]
    union = lesion_areas[lesion] + component_areas[component] - shared
    matches = int(np.count_nonzero(shared / union > MATCH_IOU))
    lesions, components = (
        int(np.count_nonzero(areas[1:] >= SMALLEST_COMPONENT)) for areas in (lesion_areas, component_areas)
    )
    return {
        "lesions": lesions,
        "found": len(np.unique(lesion)),
        "found_iou": matches,
        "components": components,
        "false_components": components - len(np.unique(component)),
        "false_components_iou": components - matches,
    }


def _labeled(mask: Bools) -> tuple[NDArray[np.int32], Counts]:
    """Labels (H, W) of the 8-connected components, 0 outside the mask, and the areas of the labels."""
    _, labels, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels, facts[:, cv2.CC_STAT_AREA].astype(np.int64)
