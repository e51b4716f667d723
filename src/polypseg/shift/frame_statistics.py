"""Interpretable measures of one frame: color, illumination, sharpness, border, polyp and compression.

Pixels are measured inside the visible field at a common scale, sqrt(height * width) = 256, so that sets of different
resolution compare; blockiness and size are measured on the frame as it is.
"""

from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Frame: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]
Plane: TypeAlias = NDArray[np.float32]

COMMON_SIDE = 256
"""sqrt(height * width) in pixels at which frames are compared."""
SPECULAR_LIGHTNESS, SPECULAR_CHROMA = 90.0, 15.0


def at_common_scale(frame: Frame) -> Frame:
    """(H, W, 3) -> the same frame with sqrt(h * w) = 256: area average when reduced, bilinear when enlarged."""
    height, width = frame.shape[:2]
    scale = COMMON_SIDE / np.sqrt(height * width)
    size = (max(8, round(width * scale)), max(8, round(height * scale)))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR).astype(np.uint8)


def visible_field(frame: Frame) -> Bools:
    """(H, W, 3) -> (H, W), True inside the endoscope's field: the convex hull of the largest lit region.

    Lit: the brightest channel, median-filtered, exceeds 0.3 of its median, kept within 14 to 32 gray levels. A box
    in a corner is partly inside the hull. A frame without any lit pixel is all field.
    """
    level = frame.max(axis=2)
    limit = float(np.clip(0.3 * np.median(level), 14, 32))
    lit = (cv2.medianBlur(level, 3) > limit).astype(np.uint8)
    count, labels, regions, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
    if count < 2:
        return np.ones(level.shape, dtype=bool)
    largest = 1 + int(regions[1:, cv2.CC_STAT_AREA].argmax())
    hull = cv2.convexHull(cv2.findNonZero((labels == largest).astype(np.uint8)))
    return cv2.fillConvexPoly(np.zeros(level.shape, np.uint8), hull, 1).astype(bool)


def measure_frame(frame: Frame, mask: NDArray[np.uint8] | None = None) -> dict[str, float]:
    """Measures of a frame (H, W, 3) uint8 RGB and its mask (H, W) in {0, 1}, by name.

    lab_{l,a,b}_{mean,std}: CIELAB (L* 0 to 100). falloff: slope of L* over the distance from the frame's center, per
    half diagonal. sharpness: log10 of the mean squared Laplacian of L* over its variance. border_share: share of the
    frame outside the field. blockiness: log of the mean step across 8-pixel boundaries over that elsewhere.
    specular_share: share of the field that is nearly white (L* above 90, chroma below 15). native_side: sqrt(H * W) in
    pixels. native_aspect: W / H. With a mask that is not empty polyp_share, its share of the frame, and polyp_offset,
    the distance of its center from the frame's, per half diagonal.
    """
    common = at_common_scale(frame)
    field = visible_field(common)
    lab = cv2.cvtColor(common.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    found: dict[str, float] = {}
    for name, plane in zip("lab", np.moveaxis(lab, 2, 0), strict=True):
        found[f"lab_{name}_mean"] = float(plane[field].mean())
        found[f"lab_{name}_std"] = float(plane[field].std())
    lightness: Plane = np.ascontiguousarray(lab[..., 0])
    found["specular_share"] = float(_white(lab)[field].mean())
    found["falloff"] = _falloff(lightness, field)
    found["sharpness"] = _sharpness(lightness, field)
    found["border_share"] = float(1 - field.mean())
    found["blockiness"] = _blockiness(frame)
    found["native_side"] = float(np.sqrt(frame.shape[0] * frame.shape[1]))
    found["native_aspect"] = frame.shape[1] / frame.shape[0]
    if mask is not None and mask.any():
        found["polyp_share"] = float(mask.mean())
        found["polyp_offset"] = _offset(mask)
    return found


def highlights(frame: Frame) -> Bools:
    """(H, W, 3) -> (H, W), True where a frame is nearly white: L* above 90, chroma below 15."""
    return _white(cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def _white(lab: NDArray[np.float32]) -> Bools:
    return (lab[..., 0] > SPECULAR_LIGHTNESS) & (np.hypot(lab[..., 1], lab[..., 2]) < SPECULAR_CHROMA)


def _offset(mask: NDArray[np.uint8]) -> float:
    y, x = (float(places.mean()) for places in np.nonzero(mask))
    return float(center_distance(y, x, shape=mask.shape))


def center_distance(y: Any, x: Any, *, shape: tuple[int, ...]) -> Any:
    """Distance of rows y and columns x from the center of a frame of ``shape`` (H, W), in half diagonals."""
    height, width = shape
    return np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) / (np.hypot(height, width) / 2)


def _falloff(lightness: Plane, field: Bools) -> float:
    height, width = lightness.shape
    radius = center_distance(*np.mgrid[:height, :width], shape=(height, width))[field]
    spread = float(radius.var())
    return 0.0 if spread == 0 else float(np.mean((radius - radius.mean()) * lightness[field]) / spread)


def _sharpness(lightness: Plane, field: Bools) -> float:
    inner = cv2.erode(field.astype(np.uint8), np.ones((11, 11), np.uint8), borderValue=0).astype(bool)
    inside = inner if inner.any() else field
    energy = float(np.mean(cv2.Laplacian(lightness, cv2.CV_32F)[inside] ** 2))
    return float(np.log10((energy + 1e-6) / (float(lightness[inside].var()) + 1e-6)))


def _blockiness(frame: Frame) -> float:
    gray = frame.mean(axis=2)
    edge, other = [], []
    for steps in (np.abs(np.diff(gray, axis=0)).mean(axis=1), np.abs(np.diff(gray, axis=1)).mean(axis=0)):
        at_edge = np.arange(len(steps)) % 8 == 7
        edge.append(steps[at_edge].mean() if at_edge.any() else steps.mean())
        other.append(steps[~at_edge].mean())
    return float(np.log((np.mean(edge) + 1e-3) / (np.mean(other) + 1e-3)))
