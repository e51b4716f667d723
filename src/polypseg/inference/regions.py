"""Connected regions of a mask, by NumPy alone: a first mask must not wait for OpenCV's or SciPy's import."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Regions:
    """The regions of a mask (pixels that touch by side or corner), an entry for each, in the order of reading."""

    x: NDArray[np.int64]
    """Left side of the bounding box, pixels."""
    y: NDArray[np.int64]
    width: NDArray[np.int64]
    height: NDArray[np.int64]
    area: NDArray[np.int64]
    """Pixels of the region."""
    mean: NDArray[np.float64]
    """Of the values inside."""
    maximum: NDArray[np.float64]


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Start, and first place after the end, of each stretch of True in the rows, and the length of a row with a column
    of False on both sides, so that runs end with their row."""
    height, width = mask.shape
    stride = width + 2
    padded = np.zeros((height, stride), dtype=bool)
    padded[:, 1:-1] = mask
    flat = padded.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return changes[::2], changes[1::2], stride


def drop_regions(
    mask: NDArray[np.bool_], *, least: float, values: NDArray[np.float32], peak: float
) -> NDArray[np.bool_]:
    """The mask (H, W) without its regions of fewer than ``least`` pixels and those whose ``values`` nowhere exceed
    ``peak``."""
    starts, ends, stride = _runs(mask)
    if not len(starts):
        return mask
    region, lengths = _join(starts, ends, stride=stride), ends - starts
    area = np.bincount(region, weights=lengths)
    highest = np.full(len(area), -np.inf)
    np.maximum.at(highest, region, np.maximum.reduceat(values[mask], np.cumsum(lengths) - lengths))
    kept = ((area >= least) & (highest > peak))[region]
    if kept.all():
        return mask
    change = np.zeros(mask.shape[0] * stride + 1, dtype=np.int8)
    change[starts[kept]], change[ends[kept]] = 1, -1
    return np.cumsum(change[:-1], dtype=np.int8).reshape(mask.shape[0], stride)[:, 1:-1].astype(bool)


def measure_regions(values: NDArray[np.float32], *, mask: NDArray[np.bool_]) -> Regions:
    """The regions of ``mask`` (H, W) and what ``values`` (H, W) are inside them.

    Works on runs, the stretches of True in each row: few even where pixels are many.
    """
    height, width = mask.shape
    starts, ends, stride = _runs(mask)
    if not len(starts):
        nothing = np.zeros(0, dtype=np.int64)
        none = {"x": nothing, "y": nothing, "width": nothing, "height": nothing, "area": nothing}
        return Regions(**none, mean=np.zeros(0), maximum=np.zeros(0))
    region = _join(starts, ends, stride=stride)
    rows, lengths = starts // stride, ends - starts
    left, right = starts % stride - 1, ends % stride - 1
    count = int(region.max()) + 1
    area = np.bincount(region, weights=lengths, minlength=count).astype(np.int64)
    inside, first = values[mask], np.cumsum(lengths) - lengths
    sums = np.bincount(region, weights=np.add.reduceat(inside, first, dtype=np.float64), minlength=count)
    x, y = np.full(count, width), np.full(count, height)
    x_end, y_end, maximum = np.zeros(count, np.int64), np.zeros(count, np.int64), np.full(count, -np.inf)
    np.minimum.at(x, region, left)
    np.minimum.at(y, region, rows)
    np.maximum.at(x_end, region, right)
    np.maximum.at(y_end, region, rows + 1)
    np.maximum.at(maximum, region, np.maximum.reduceat(inside, first))
    return Regions(x=x, y=y, width=x_end - x, height=y_end - y, area=area, mean=sums / area, maximum=maximum)


def _join(starts: NDArray[np.int64], ends: NDArray[np.int64], *, stride: int) -> NDArray[np.int64]:
    """Number of the region of each run, counted from 0; runs touch when those of neighboring rows share a corner."""
    first = np.searchsorted(ends, starts - stride)  # runs above that end at our start's corner or later
    last = np.searchsorted(starts, ends - stride, side="right")
    touching = last - first
    below = np.repeat(np.arange(len(starts)), touching)
    above = np.arange(touching.sum()) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(first, touching)
    parent = np.arange(len(starts))
    while True:
        one, other = parent[above], parent[below]
        if (one == other).all():
            return np.unique(parent, return_inverse=True)[1]
        np.minimum.at(parent, np.maximum(one, other), np.minimum(one, other))
        while (parent != parent[parent]).any():
            parent = parent[parent]


def grow_mask(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Pixels within ``reach`` rows and columns of the mask (H, W): a square is drawn around each of its pixels."""
    grown = mask
    for axis in (0, 1):
        padded = np.pad(grown, [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]).astype(np.int32)
        sums = np.cumsum(padded, axis=axis)
        length = mask.shape[axis]
        after = np.take(sums, np.arange(2 * reach + 1, 2 * reach + 1 + length), axis=axis)
        before = np.take(sums, np.arange(length), axis=axis)
        grown = after > before
    return grown
