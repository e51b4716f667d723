"""Numbers of a frame and a model's answer to it, from which the expected Dice is read; NumPy alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.inference.regions import grow_mask, measure_regions
from polypseg.inference.runtimes import resize_bilinear, sigmoid

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]

MASK_FEATURES = (
    "soft_dice", "inside", "steepness", "entropy", "doubt", "threshold_dice", "peak", "elsewhere",
    "size", "regions", "largest", "roundness", "at_border", "contrast",
)  # fmt: skip
"""Of one forward pass, at the model's own size."""
FRAME_FEATURES = (
    "brightness", "brightness_spread", "redness", "redness_spread", "saturation", "dark", "highlights", "sharpness",
    "grain",
)  # fmt: skip
"""Of the frame alone."""
VIEW_FEATURES = ("agree_flip", "agree_view", "agree_least", "soft_agreement", "size_spread")
"""Of two more passes: the frame mirrored, and reduced with its colors changed."""
SINGLE = (*MASK_FEATURES, *FRAME_FEATURES)
ALL = (*SINGLE, *VIEW_FEATURES)
MEANINGS: Mapping[str, str] = {
    "soft_dice": "soft Dice of probabilities and mask: 2 sum(p m) / (sum p + sum m); 0 for an empty mask",
    "inside": "mean probability inside the mask",
    "steepness": "mean absolute logit within 3 pixels of the outline",
    "entropy": "mean entropy (bits) within 3 pixels of the outline",
    "doubt": "sum of p (1 - p) per pixel of outline, log10",
    "threshold_dice": "Dice of the masks at thresholds .3 and .7",
    "peak": "mean probability of the half percent of pixels that are most like a polyp",
    "elsewhere": "highest probability farther than 8 pixels from the mask",
    "size": "square root of the mask's share of the frame",
    "regions": "log2 of 1 + the regions above a thousandth of the frame",
    "largest": "share of the largest region in the mask",
    "roundness": "outline^2 / (4 pi area) of the mask, log10",
    "at_border": "share of the frame's outermost pixels in the mask",
    "contrast": "distance of the mean colors inside and within 8 pixels outside the mask",
    "brightness": "mean luma, 0 to 1",
    "brightness_spread": "standard deviation of luma",
    "redness": "mean share of red in the sum of the channels",
    "redness_spread": "its standard deviation",
    "saturation": "mean of (largest - smallest channel)",
    "dark": "share of pixels whose brightest channel is below .06",
    "highlights": "share of pixels whose darkest channel is above .85",
    "sharpness": "log10 of the mean squared Laplacian of luma over its variance",
    "grain": "log10 of the median absolute Laplacian",
    "agree_flip": "Dice of the masks of the frame and of the mirrored frame",
    "agree_view": "the same with the frame at four fifths of its size and changed colors",
    "agree_least": "the lesser of the two",
    "soft_agreement": "1 - mean |p - p'| over pixels where either mask is, mean of both",
    "size_spread": "standard deviation of the three masks' areas over their mean",
}
_BAND, _NEAR = 3, 8
_VIEW_SCALE, _VIEW_GAMMA, _VIEW_SATURATION = 0.8, 1.25, 0.8
_LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)[:, None, None]


@dataclass(frozen=True, kw_only=True)
class Look:
    """A model's answer to a frame, at the model's size, and the numbers read from both."""

    logits: Plane
    """(h, w)."""
    features: Mapping[str, float]


def look_at(
    segmenter: Any, pixels: Plane, *, views: bool, name: str = "the frame", features: Collection[str] = SINGLE
) -> Look:
    """A prepared frame (3, h, w) -> what the segmenter says of it; ``views``: two more passes, for ``VIEW_FEATURES``.

    ``features``: those of the frame's own pass that are wanted; others may be there or not. ``name``: what errors call
    the frame. Raises PolypSegError for outputs that are not finite.
    """
    colors = to_colors(pixels, segmenter.processor)
    logits = segmenter.runtime.polyp_logits(pixels[None], names=[name])[0]
    found = describe(logits, colors, features=features)
    if views:
        found |= agreement(segmenter, pixels, colors, logits, name=name)
    return Look(logits=logits, features=found)


def to_colors(pixels: Plane, processor: Any) -> Plane:
    """A prepared frame (3, h, w) -> its colors, 0 to 1."""
    if not getattr(processor, "do_normalize", True):
        return np.clip(pixels, 0, 1)
    mean, deviation = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    return np.clip(pixels * deviation + mean, 0, 1)


def describe(logits: Plane, colors: Plane, *, features: Collection[str] = SINGLE) -> dict[str, float]:
    """Logits (h, w) and colors (3, H, W) in 0 to 1, of any size -> the features of ``SINGLE`` that are wanted, by name.

    They are made in groups; others of a wanted one's group come with it.
    """
    probability, mask = sigmoid(logits), logits > 0
    found = _describe_areas(probability, mask=mask)
    if not found.keys() >= set(features):
        if colors.shape[1:] != logits.shape:
            colors = np.stack([resize_bilinear(plane, logits.shape) for plane in colors])
        found |= _describe_outline(logits, colors, probability=probability, mask=mask) | _describe_frame(colors)
    return found


def _describe_areas(probability: Plane, *, mask: Mask) -> dict[str, float]:
    """What sums over the frame tell."""
    area = int(mask.sum())
    if not area:
        return {"soft_dice": 0.0, "inside": 0.0, "size": 0.0, "at_border": 0.0}
    inside = float(probability[mask].sum(dtype=np.float64))
    return {
        "soft_dice": 2 * inside / (float(probability.sum(dtype=np.float64)) + area),
        "inside": inside / area,
        "size": float(np.sqrt(area / mask.size)),
        "at_border": float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()),
    }


def _describe_outline(logits: Plane, colors: Plane, *, probability: Plane, mask: Mask) -> dict[str, float]:
    """What the outline, its surroundings, the regions and the peak tell."""
    area, pixels = int(mask.sum()), mask.size
    top = np.partition(probability.ravel(), -max(1, pixels // 200))[-max(1, pixels // 200) :]
    found = dict.fromkeys(
        ("steepness", "entropy", "doubt", "elsewhere", "regions", "largest", "roundness", "contrast"), 0.0
    )
    found["peak"] = float(top.mean(dtype=np.float64))
    found["threshold_dice"] = dice(probability > 0.3, probability > 0.7)
    if not area:
        found["elsewhere"] = float(probability.max())
        return found
    edge = _edge(mask)
    band, near = grow_mask(edge, _BAND), grow_mask(mask, _NEAR)
    p = np.clip(probability[band].astype(np.float64), 1e-6, 1 - 1e-6)
    areas = measure_regions(probability, mask=mask).area
    length = int(edge.sum())
    ring = near & ~mask
    found |= {
        "steepness": float(np.abs(logits[band]).mean(dtype=np.float64)),
        "entropy": float(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)).mean()),
        "doubt": float(np.log10((probability * (1 - probability)).sum(dtype=np.float64) / length + 1e-3)),
        "elsewhere": float(probability[~near].max()) if not near.all() else 0.0,
        "regions": float(np.log2(1 + (areas > pixels / 1000).sum())),
        "largest": float(areas.max() / area),
        "roundness": float(np.log10(length**2 / (4 * np.pi * area))),
        "contrast": float(np.linalg.norm(colors[:, mask].mean(axis=1) - colors[:, ring].mean(axis=1)))
        if ring.any()
        else 0.0,
    }
    return found


def _describe_frame(colors: Plane) -> dict[str, float]:
    luma = (colors * _LUMA).sum(axis=0)
    red = colors[0] / (colors.sum(axis=0) + 1e-3)
    lightest, darkest = colors.max(axis=0), colors.min(axis=0)
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return {
        "brightness": float(luma.mean(dtype=np.float64)),
        "brightness_spread": float(luma.std(dtype=np.float64)),
        "redness": float(red.mean(dtype=np.float64)),
        "redness_spread": float(red.std(dtype=np.float64)),
        "saturation": float((lightest - darkest).mean(dtype=np.float64)),
        "dark": float((lightest < 0.06).mean()),
        "highlights": float((darkest > 0.85).mean()),
        "sharpness": float(
            np.log10((np.mean(laplacian**2, dtype=np.float64) + 1e-8) / (np.var(inner, dtype=np.float64) + 1e-6))
        ),
        "grain": float(np.log10(np.median(np.abs(laplacian)) + 1e-4)),
    }


def agreement(segmenter: Any, pixels: Plane, colors: Plane, logits: Plane, *, name: str) -> dict[str, float]:
    """``VIEW_FEATURES`` of a prepared frame (3, h, w) whose own logits are known, by two more passes."""
    height, width = pixels.shape[1:]
    run = segmenter.runtime.polyp_logits
    flipped = run(np.ascontiguousarray(pixels[None, :, :, ::-1]), names=[name])[0][:, ::-1]
    small = (round(height * _VIEW_SCALE), round(width * _VIEW_SCALE))
    top, left = (height - small[0]) // 2, (width - small[1]) // 2
    reduced = np.stack([resize_bilinear(plane, small) for plane in _changed_colors(colors)])
    margins = ((0, 0), (top, height - small[0] - top), (left, width - small[1] - left))
    view = to_pixels(np.pad(reduced, margins, mode="edge"), segmenter.processor)
    answer = run(view[None], names=[name])[0]
    rows, columns = (side / full for side, full in zip(answer.shape, (height, width), strict=True))
    part = answer[
        round(top * rows) : round((top + small[0]) * rows), round(left * columns) : round((left + small[1]) * columns)
    ]
    return compare_views(logits, [flipped, resize_bilinear(part, logits.shape)])


def compare_views(logits: Plane, others: Sequence[Plane]) -> dict[str, float]:
    """``VIEW_FEATURES`` of the logits (h, w) of a frame and of its two views, turned back."""
    mask, probability = logits > 0, sigmoid(logits)
    masks = [other > 0 for other in others]
    agreements = [dice(mask, other) for other in masks]
    areas = np.array([one.sum() for one in (mask, *masks)], dtype=np.float64)
    soft = []
    for other, values in zip(masks, others, strict=True):
        either = mask | other
        difference = np.abs(probability - sigmoid(values))[either]
        soft.append(1 - float(difference.mean(dtype=np.float64)) if either.any() else 1.0)
    return {
        "agree_flip": agreements[0],
        "agree_view": agreements[1],
        "agree_least": min(agreements),
        "soft_agreement": float(np.mean(soft)),
        "size_spread": float(areas.std() / areas.mean()) if areas.any() else 0.0,
    }


def to_pixels(colors: Plane, processor: Any) -> Plane:
    """Colors (3, h, w), 0 to 1 -> a prepared frame, as the processor would give it."""
    if not getattr(processor, "do_normalize", True):
        return np.ascontiguousarray(colors, dtype=np.float32)
    mean, deviation = (
        np.array(values, dtype=np.float32)[:, None, None] for values in (processor.image_mean, processor.image_std)
    )
    return np.ascontiguousarray((colors - mean) / deviation, dtype=np.float32)


def _changed_colors(colors: Plane) -> Plane:
    """Darker and paler: gamma, then toward gray."""
    darker = colors ** np.float32(_VIEW_GAMMA)
    gray = (darker * _LUMA).sum(axis=0)
    return np.asarray(gray + np.float32(_VIEW_SATURATION) * (darker - gray), dtype=np.float32)


def dice(one: Mask, other: Mask) -> float:
    """Dice of two masks; 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 1.0 if total == 0 else 2 * int((one & other).sum()) / total


def _edge(mask: Mask) -> Mask:
    """Pixels of the mask with a neighbor by side that is not of it; the frame's border is none."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Mask = mask & ~inner
    return edge if edge.any() else mask  # a mask of the whole frame has no outline
