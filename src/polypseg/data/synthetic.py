"""Procedural colonoscopy-like frames with exact polyp masks: the data that needs no download.

A frame is a pure function of (camera, seed, index, size). It is painted as a lightness plane (folds, lumen,
light) multiplied by mucosa color, with polyps on top; then the camera adds blur, noise, border and overlays.
Nothing in here imitates a patient: the overlay digits are random. Bytes are reproducible on one machine with
one set of library versions; other processors may round differently.

The mask is the drawn support of the polyps (before the camera's blur) inside the visible field. The dark
border and the position box hide tissue, so they are cut from the mask; highlights, debris and the overlay
digits lie on top of it without cutting it, as annotators outline through them.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, cast
from zlib import crc32

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from polypseg.errors import UsageError

Plane: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Triple: TypeAlias = tuple[float, float, float]

VERSION = 1
"""Of the drawing: raised with every change that changes pixels, so that no cache mistakes one for another."""
SMALLEST_SIDE = 32
"""Pixels; below this a small polyp can vanish and the overlays do not fit."""


@dataclass(frozen=True, kw_only=True)
class CameraStyle:
    """One endoscope as it shapes a frame; lengths are fractions of sqrt(height * width) unless stated."""

    name: str
    """Enters the random stream, so that two cameras never share a scene."""
    native_height: tuple[int, int]
    """Lowest and highest height in pixels, both possible."""
    native_width: tuple[int, int]
    """Lowest and highest width in pixels, both possible."""
    border: Literal["octagon", "ellipse"]
    """Outline of the visible field."""
    border_size: float
    """Corner cut of the octagon or half axes of the ellipse, as a share of the half sides, 0 to 1."""
    border_color: tuple[int, int, int]
    """RGB outside the field, 0 to 255."""
    vignette: float
    """Loss of light away from the lamp's spot, 0 (none) to about 1 (half the light lost at half a frame)."""
    polyp_area_median: float
    """Median share of the frame that a frame's polyps cover before the border cuts them, 0 to 1."""
    polyp_area_spread: float
    """Standard deviation of the logarithm of that share."""
    polyp_contrast: float
    """Strength of the polyp's own color and shading; 1 is ordinary, 0 leaves only its texture."""
    second_polyp_share: float
    """Share of frames with two polyps, 0 to 1."""
    empty_share: float = 0.0
    """Share of frames without a polyp, whose mask is all zero, 0 to 1."""
    mucosa: Triple
    """Mean RGB reflectance of the background, 0 to 1."""
    mucosa_jitter: float
    """Standard deviation of the logarithm of green and blue reflectance between frames."""
    exposure: float
    """Gain before the tone curve; 1 is dim, 3 is bright."""
    lumen_share: float
    """Share of frames that look down the lumen, 0 to 1; the others face the wall."""
    vessel_share: float
    """Share of frames with visible vessels, 0 to 1."""
    debris_share: float
    """Share of frames with stool residue, 0 to 1."""
    gloss: float
    """Amount of specular highlights, 0 (dry) to about 1 (wet)."""
    blur: tuple[float, float]
    """Lowest and highest standard deviation of the optical blur."""
    noise: float
    """Standard deviation of the sensor noise in gray levels."""
    interlace_share: float
    """Share of frames whose odd rows are displaced by motion, 0 to 1."""
    jpeg_quality: tuple[int, int] | None
    """Lowest and highest JPEG quality, 1 to 100; None stores the frame without compression."""
    text_share: float
    """Share of frames with overlay digits, 0 to 1."""
    box_share: float
    """Share of frames with a position box in the lower left corner, 0 to 1."""


CAMERAS: dict[str, CameraStyle] = {
    # Kvasir-SEG-like: large polyps, sharp, saturated, black octagon, position box.
    "a": CameraStyle(
        name="a",
        native_height=(500, 580),
        native_width=(540, 625),
        border="octagon",
        border_size=0.42,
        border_color=(2, 2, 2),
        vignette=0.4,
        polyp_area_median=0.130,
        polyp_area_spread=0.72,
        polyp_contrast=1.0,
        second_polyp_share=0.12,
        mucosa=(0.80, 0.33, 0.215),
        mucosa_jitter=0.14,
        exposure=2.2,
        lumen_share=0.55,
        vessel_share=0.45,
        debris_share=0.35,
        gloss=0.8,
        blur=(0.0008, 0.002),
        noise=2.5,
        interlace_share=0.0,
        jpeg_quality=None,
        text_share=0.7,
        box_share=0.35,
    ),
    # CVC-ClinicDB-like: smaller polyps, soft, paler, wide dark gray rim, video artifacts.
    "b": CameraStyle(
        name="b",
        native_height=(288, 288),
        native_width=(384, 384),
        border="ellipse",
        border_size=0.96,
        border_color=(15, 16, 19),
        vignette=0.6,
        polyp_area_median=0.076,
        polyp_area_spread=0.75,
        polyp_contrast=0.8,
        second_polyp_share=0.06,
        mucosa=(0.62, 0.36, 0.225),
        mucosa_jitter=0.13,
        exposure=2.3,
        lumen_share=0.7,
        vessel_share=0.35,
        debris_share=0.2,
        gloss=0.45,
        blur=(0.003, 0.0065),
        noise=3.0,
        interlace_share=0.35,
        jpeg_quality=(45, 80),
        text_share=0.0,
        box_share=0.0,
    ),
}


def synthesize_frame(
    camera: CameraStyle, *, seed: int, index: int, size: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """-> image (H, W, 3) uint8 RGB, mask (H, W) uint8 in {0, 1}.

    The same (camera, seed, index, size) gives the same bytes, whatever was drawn before. ``size`` is
    (height, width) in pixels, at least 32 each; None draws from the camera's native resolutions.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"seed and index of a synthetic frame count from 0; got seed {seed}, index {index}")
    rng = np.random.default_rng([seed, index, crc32(camera.name.encode())])
    native = _between(rng, camera.native_height), _between(rng, camera.native_width)
    height, width = native if size is None else size
    if min(height, width) < SMALLEST_SIDE:
        raise UsageError(
            f"a synthetic frame of {height}x{width} pixels is too small; use at least {SMALLEST_SIDE} a side"
        )
    shape = (height, width)

    box = _box_corner(shape) if rng.random() < camera.box_share else None
    field = _visible_field(camera, shape, rng)
    light, relief = _lightness(camera, shape, rng)
    channels = _mucosa(camera, light * relief, rng)
    support = np.zeros(shape, np.uint8)
    for center, area in _polyp_places(camera, shape, box, rng):
        _paint_polyp(channels, support, light, center=center, area=area, contrast=camera.polyp_contrast, rng=rng)
    if rng.random() < camera.debris_share:
        _paint_debris(channels, light, rng)
    image = _expose(camera, channels, _gloss(camera, light * relief, rng), rng)
    image = _frame_overlays(camera, image, field, box, rng)
    visible = field > 0.5
    if box is not None:
        visible[box[0] :, : box[1]] = False
    return _record(camera, image, rng), support * visible


# Random quantities and grids ----------------------------------------------------------------------


def _between(rng: Generator, limits: tuple[int, int]) -> int:
    """An integer from ``limits``, both ends included."""
    return int(rng.integers(limits[0], limits[1] + 1))


@lru_cache(maxsize=32)
def _grid(shape: tuple[int, int]) -> tuple[Plane, Plane]:
    """Pixel centers x, y, each (H, W), in units of sqrt(H * W) / 2: a square spans -1 to 1. Read only."""
    height, width = shape
    unit = 2.0 / np.sqrt(height * width)
    y, x = np.meshgrid(
        (np.arange(height, dtype=np.float32) - (height - 1) / 2) * np.float32(unit),
        (np.arange(width, dtype=np.float32) - (width - 1) / 2) * np.float32(unit),
        indexing="ij",
    )
    x.flags.writeable = y.flags.writeable = False
    return x, y


@lru_cache(maxsize=8)
def _grain(shape: tuple[int, int]) -> Plane:
    """White noise of unit variance with 64 pixels to spare each way, cut at random offsets. Read only."""
    noise = np.random.default_rng(0).standard_normal((shape[0] + 64, shape[1] + 64), dtype=np.float32)
    noise.flags.writeable = False
    return noise


def _cut_grain(shape: tuple[int, int], rng: Generator) -> Plane:
    """White noise (H, W) of unit variance, randomly flipped: far cheaper than drawing it."""
    top, left, flip_y, flip_x = (int(n) for n in rng.integers(0, [64, 64, 2, 2]))
    cut = _grain(shape)[top : top + shape[0], left : left + shape[1]]
    return np.ascontiguousarray(cut[:: 1 - 2 * flip_y, :: 1 - 2 * flip_x])


def _clouds(rng: Generator, shape: tuple[int, int], *, cells: int) -> Plane:
    """Smooth noise (H, W), standard deviation roughly 0.7, with about ``cells`` bumps along a side."""
    lattice = rng.standard_normal((cells, cells), dtype=np.float32)
    if 16 * cells < min(shape):
        # Two steps look the same on wide bumps and cost half: cubic to a quarter of the size, then linear.
        lattice = cv2.resize(lattice, (shape[1] // 4, shape[0] // 4), interpolation=cv2.INTER_CUBIC)
        return cast(Plane, cv2.resize(lattice, shape[::-1], interpolation=cv2.INTER_LINEAR))
    return cast(Plane, cv2.resize(lattice, shape[::-1], interpolation=cv2.INTER_CUBIC))


# The scene ----------------------------------------------------------------------------------------


def _lightness(camera: CameraStyle, shape: tuple[int, int], rng: Generator) -> tuple[Plane, Plane]:
    """Light that reaches the wall, and the wall's relief as a factor on it; both (H, W), about 0 to 1.3."""
    x, y = _grid(shape)
    looks_down = rng.random() < camera.lumen_share
    distance = rng.uniform(0.0, 0.65) if looks_down else rng.uniform(1.3, 2.4)
    angle = rng.uniform(0, 2 * np.pi)
    lumen_x, lumen_y = distance * np.cos(angle), distance * np.sin(angle)
    bend = 0.16 * _clouds(rng, shape, cells=4)
    radius, theta = cv2.cartToPolar(x - np.float32(lumen_x) + bend, y - np.float32(lumen_y) - 0.7 * bend)

    depth = rng.uniform(0.05, 0.35) if looks_down else 0.05
    squared = radius * radius
    light = squared / (squared + np.float32(depth))
    lamp_x, lamp_y = -0.4 * lumen_x + rng.normal(0, 0.2), -0.4 * lumen_y + rng.normal(0, 0.2)
    away = (x - np.float32(lamp_x)) ** 2 + (y - np.float32(lamp_y)) ** 2
    light *= np.float32(rng.uniform(0.9, 1.3)) / (1 + np.float32(camera.vignette * rng.uniform(0.8, 3.0)) * away)
    light += np.float32(0.03)

    # Folds: seen from the lumen outwards, a crest jumps out of the dark and fades toward the next one.
    twist = np.float32(rng.uniform(0.1, 0.3)) * np.cos(theta * int(rng.integers(1, 4)) + np.float32(rng.uniform(0, 6)))
    phase = np.float32(rng.uniform(0.7, 1.7)) * np.log(squared + np.float32(0.06)) + twist
    phase += 0.25 * _clouds(rng, shape, cells=5) + np.float32(rng.random())
    saw = phase - np.floor(phase)
    saw = np.minimum(saw, 9 * (1 - saw))
    height = np.clip(0.45 + 0.8 * _clouds(rng, shape, cells=4), 0, 1)
    relief = 1.15 - np.float32(rng.uniform(0.45, 0.9)) * height * saw
    relief *= (
        1 + 0.08 * _clouds(rng, shape, cells=9) + np.float32(rng.uniform(0.02, 0.045)) * _clouds(rng, shape, cells=56)
    )
    return light, relief


def _mucosa(camera: CameraStyle, lightness: Plane, rng: Generator) -> list[Plane]:
    """Radiance of the background as R, G, B planes (H, W), about 0 to 1."""
    shape = lightness.shape
    # Green and blue vary together (blood against fat), so that the hue stays between red and tan.
    warm, cool = rng.normal(0, camera.mucosa_jitter, 2)
    color = np.asarray(camera.mucosa) * (1.0, np.exp(warm), np.exp(1.1 * warm + 0.7 * cool))
    # Patches of redder or paler tissue: color alone must not give the polyp away.
    flush = _clouds(rng, shape, cells=6)
    flush_strength = rng.uniform(0.03, 0.13)
    vessels = _vessels(shape, rng) if rng.random() < camera.vessel_share else None
    channels = []
    for level, flushes, absorbs in zip(color, (0.05, 1.0, 0.8), (0.12, 0.45, 0.40), strict=True):
        plane = lightness * (np.float32(level) - np.float32(level * flushes * flush_strength) * flush)
        if vessels is not None:
            plane *= 1 - np.float32(absorbs) * vessels
        channels.append(plane)
    return channels


def _vessels(shape: tuple[int, int], rng: Generator) -> Plane:
    """Branching vessels as absorption (H, W), 0 to 1."""
    canvas = np.zeros(shape, np.uint8)
    scale = np.sqrt(shape[0] * shape[1])
    steps, count = 24, int(rng.integers(4, 9))
    start = rng.uniform(0, 1, (count, 2)) * shape[::-1]
    heading = rng.uniform(0, 2 * np.pi, count)
    for generation, thickness in enumerate((0.007, 0.004, 0.0025)):
        turns = np.cumsum(rng.normal(0, 0.28, (len(start), steps)), axis=1) + heading[:, None]
        stride = scale * 0.022 * 0.75**generation
        path = start[:, None] + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=-1) * stride, axis=1)
        lines = list(np.round(path * 8).astype(np.int32))
        strength = 255 - 60 * generation
        cv2.polylines(canvas, lines, False, strength, max(1, round(thickness * scale)), cv2.LINE_AA, 3)
        joints = rng.integers(2, steps - 2, (len(start), 3))
        start = np.take_along_axis(path, joints[..., None], axis=1).reshape(-1, 2)
        side = np.where(rng.random(joints.shape) < 0.5, -0.8, 0.8)
        heading = (np.take_along_axis(turns, joints, axis=1) + side).reshape(-1)
    soft = cv2.GaussianBlur(canvas, (0, 0), max(0.6, 0.0028 * scale)).astype(np.float32)
    visible = np.clip(0.4 + 0.5 * _clouds(rng, shape, cells=4), 0, 1)
    return cast(Plane, soft * visible * np.float32(rng.uniform(0.5, 1.0) / 255))


def _polyp_places(
    camera: CameraStyle, shape: tuple[int, int], box: tuple[int, int] | None, rng: Generator
) -> list[tuple[tuple[float, float], float]]:
    """Center (x, y) in grid units and area as a share of the frame, for each polyp of a frame."""
    share = camera.polyp_area_median * np.exp(camera.polyp_area_spread * rng.standard_normal())
    share = float(np.clip(share, 0.012, 0.55))
    kind = rng.random()
    if kind < camera.empty_share:
        return []
    parts = (0.65, 0.35) if kind > 1 - camera.second_polyp_share else (1.0,)
    x, y = _grid(shape)
    half_width, half_height = float(x[0, -1]), float(y[-1, 0])
    places = []
    for part in parts:
        # Eight tries in the inner field; the frame's center, which nothing covers, is the last resort.
        reach = 0.72 * np.sqrt(rng.random(8))
        turn = rng.uniform(0, 2 * np.pi, 8)
        tries = [
            *zip(half_width * reach * np.cos(turn), half_height * reach * np.sin(turn), strict=True),
            (0.0, 0.0),
        ]
        blocked = (-np.inf, np.inf) if box is None else (float(x[0, box[1] - 1]), float(y[box[0], 0]))
        center = next(c for c in tries if c[0] > blocked[0] + 0.05 or c[1] < blocked[1] - 0.05)
        places.append(((float(center[0]), float(center[1])), share * part))
    return places


def _radial_outline(theta: Plane, rng: Generator) -> Plane:
    """Radius of a smooth irregular closed curve at ``theta``, relative to a circle of the same area."""
    stretch, tilt = rng.uniform(1.0, 1.55), rng.uniform(0, np.pi)
    turned = np.linspace(0, 2 * np.pi, 721)
    radius = 1 / np.sqrt(np.cos(turned - tilt) ** 2 / stretch + np.sin(turned - tilt) ** 2 * stretch)
    for order in range(2, 7):
        radius *= 1 + rng.normal(0, 0.3 / order**1.5) * np.cos(order * turned + rng.uniform(0, 2 * np.pi))
    radius /= np.sqrt(np.mean(radius[:-1] ** 2))
    table = radius.astype(np.float32)
    return table[(theta * np.float32(720 / (2 * np.pi))).astype(np.int32)]


def _paint_polyp(
    channels: list[Plane],
    support: Bytes,
    light: Plane,
    *,
    center: tuple[float, float],
    area: float,
    contrast: float,
    rng: Generator,
) -> None:
    """Paint one polyp and its shadow into ``channels`` and mark it in ``support``; both change in place."""
    grid_x, grid_y = _grid(light.shape)
    radius = np.sqrt(4 * area / np.pi)
    # The window holds the outline and its shadow; its work is what small polyps save.
    columns = np.abs(grid_x[0] - center[0]) < 2.1 * radius
    rows = np.abs(grid_y[:, 0] - center[1]) < 2.1 * radius
    window = (
        slice(int(rows.argmax()), int(rows.argmax() + rows.sum())),
        slice(int(columns.argmax()), int(columns.argmax() + columns.sum())),
    )
    x, y = grid_x[window] - np.float32(center[0]), grid_y[window] - np.float32(center[1])
    distance, theta = cv2.cartToPolar(x, y)
    rho = distance / (_radial_outline(theta, rng) * np.float32(radius))
    inside = rho < 1
    pixel = 2 / np.sqrt(light.size)
    alpha = np.clip((1 - rho) * np.float32(radius / (1.6 * pixel)), 0, 1)

    # The lamp sits at the lens: the dome is brighter toward the frame's center, its shadow falls outwards.
    to_lamp = np.arctan2(-center[1], -center[0]) + rng.normal(0, 0.6)
    facing = (x * np.float32(np.cos(to_lamp)) + y * np.float32(np.sin(to_lamp))) / np.float32(radius)
    dome = np.sqrt(np.clip(1 - rho * rho, 0, 1))
    bulge = contrast * rng.uniform(0.7, 1.25)
    shade = 1 + np.float32(bulge) * (0.75 * dome - 0.5 + 0.28 * facing)
    texture_cells = int(np.clip(rng.uniform(40, 90) * radius, 6, 60))
    shade *= 1 + np.float32(rng.uniform(0.08, 0.16)) * _clouds(rng, x.shape, cells=texture_cells)
    # The polyp stands in front of the lumen, so its darkness must not show through.
    mean_light = np.float32(light[window][inside].mean())
    surface = np.maximum(shade, 0.15) * (0.4 * mean_light + 0.6 * np.maximum(light[window], 0.9 * mean_light))
    shadow = np.exp(np.minimum(1 - rho, 0) * 7) * np.clip(0.5 - facing, 0, 1) * np.float32(0.6 * bulge)
    keep = (1 - np.minimum(shadow, 0.7)) * (1 - alpha)

    tint = _polyp_tint(channels, light, contrast=contrast, rng=rng)
    for channel, level in zip(channels, tint, strict=True):
        channel[window] = channel[window] * keep + surface * alpha * np.float32(level)
    support[window] |= inside.astype(np.uint8)


def _polyp_tint(channels: list[Plane], light: Plane, *, contrast: float, rng: Generator) -> list[float]:
    """Reflectance of a polyp: the frame's own mucosa, a little redder or paler by chance."""
    lit = float(light[::8, ::8].mean())
    redder = rng.normal(0.13, 0.12) * contrast
    scale = (1.0 + 0.3 * redder, 1.0 - redder, 1.0 - 0.8 * redder)
    return [float(c[::8, ::8].mean()) / lit * 1.08 * s for c, s in zip(channels, scale, strict=True)]


def _paint_debris(channels: list[Plane], light: Plane, rng: Generator) -> None:
    """Scatter clumps of yellowish to greenish residue over ``channels``, in place."""
    shape = light.shape
    scale = np.sqrt(light.size)
    canvas = np.zeros(shape, np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        clump = rng.uniform(0.08, 0.92, 2) * shape[::-1]
        count = int(rng.integers(3, 9))
        spots = clump + rng.normal(0, 0.035 * scale, (count, 2))
        for (x, y), reach in zip(spots, scale * rng.uniform(0.004, 0.02, count), strict=True):
            cv2.circle(canvas, (round(x * 8), round(y * 8)), round(reach * 8), 255, -1, cv2.LINE_AA, 3)
    cover = cv2.GaussianBlur(canvas, (0, 0), max(0.6, 0.004 * scale)).astype(np.float32) * np.float32(0.8 / 255)
    color = np.array([0.62, 0.50, 0.12]) * rng.uniform([0.75, 0.9, 0.7], [1.1, 1.1, 1.6])
    shade = light * (1 + 0.12 * _clouds(rng, shape, cells=40)) * cover
    for channel, level in zip(channels, color, strict=True):
        channel *= 1 - cover
        channel += shade * np.float32(level)


def _gloss(camera: CameraStyle, lightness: Plane, rng: Generator) -> Plane:
    """Specular highlights (H, W), 0 to 1: small irregular spots in clusters, mostly in strong light."""
    shape = lightness.shape
    cells = int(rng.integers(36, 64))
    peaks = cv2.resize(
        rng.standard_normal((cells, int(cells * rng.uniform(0.6, 1.4))), dtype=np.float32),
        shape[::-1],
        interpolation=cv2.INTER_CUBIC,
    )
    level = np.float32(3.5 - 0.7 * camera.gloss + rng.normal(0, 0.15))
    drive = peaks + 1.1 * _clouds(rng, shape, cells=7) + 0.9 * (lightness - 0.7) - level
    return cast(Plane, np.clip(5 * drive, 0, 1))


# The camera ---------------------------------------------------------------------------------------


def _visible_field(camera: CameraStyle, shape: tuple[int, int], rng: Generator) -> Plane:
    """Opacity of the visible field (H, W): 1 inside, 0 in the border, with an edge of about a pixel."""
    x, y = _grid(shape)
    across, down = x / (x[0, -1] + np.float32(1e-6)), y / (y[-1, 0] + np.float32(1e-6))
    size = np.float32(camera.border_size * rng.uniform(0.94, 1.03))
    if camera.border == "octagon":
        outside = np.maximum(np.abs(across) + np.abs(down) - (2 - size), np.abs(across) - np.float32(0.99))
    else:
        outside = np.sqrt(across * across + down * down) - size
    return cast(Plane, np.clip(0.5 - outside * np.float32(min(shape) / 2.5), 0, 1))


def _expose(camera: CameraStyle, channels: list[Plane], gloss: Plane, rng: Generator) -> Bytes:
    """Radiance planes -> image (H, W, 3) uint8 through highlights, tone curve, blur and sensor noise."""
    gain = np.float32(-camera.exposure * rng.uniform(0.85, 1.2))
    grain = np.float32(camera.noise) * _cut_grain(gloss.shape, rng)
    sigma = float(rng.uniform(*camera.blur) * np.sqrt(gloss.size))
    glare = 2 * gloss
    planes = []
    for channel in channels:
        # 1 - exp(-x) saturates red first, so bright tissue turns pale as on a real sensor.
        plane = 255 - 255 * cv2.exp(gain * (channel + glare))
        planes.append(cv2.GaussianBlur(plane, (0, 0), sigma) if sigma > 0.3 else plane)
    return cast(Bytes, cv2.merge([np.clip(plane + grain, 0, 255).astype(np.uint8) for plane in planes]))


def _box_corner(shape: tuple[int, int]) -> tuple[int, int]:
    """First row and end column of the position box, which reaches from there to the lower left corner."""
    return round(0.68 * shape[0]), round(0.32 * shape[1])


def _frame_overlays(
    camera: CameraStyle, image: Bytes, field: Plane, box: tuple[int, int] | None, rng: Generator
) -> Bytes:
    """The image inside its border, with overlay digits and the position box where the camera has them."""
    border = np.full_like(image, camera.border_color)
    framed = cast(Bytes, cv2.blendLinear(image, border, field, 1 - field))
    if rng.random() < camera.text_share:
        _paint_digits(framed, rng)
    if box is not None:
        _paint_box(framed[box[0] :, : box[1]], rng)
    return framed


# Each digit and the colon, five rows of three pixels, as bits.
GLYPHS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1), "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 2, 2, 2),
    "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7), ":": (0, 2, 0, 2, 0), "/": (1, 1, 2, 4, 4),
}  # fmt: skip


@lru_cache(maxsize=256)
def _glyph(character: str, scale: int) -> NDArray[np.bool_]:
    """One character as (6 * scale, 4 * scale) booleans, its spacing included. Read only."""
    bits = np.zeros((6, 4), bool)
    bits[:5, :3] = [[row >> shift & 1 for shift in (2, 1, 0)] for row in GLYPHS[character]]
    return bits.repeat(scale, axis=0).repeat(scale, axis=1)


def _paint_digits(image: Bytes, rng: Generator) -> None:
    """Write lines of random digits, like a date and counters, at the left rim of ``image``, in place."""
    height = image.shape[0]
    scale = max(1, round(height / 280))
    digits = rng.integers(0, 10, 24)
    lines = ["{}{}/{}{}/{}{}{}{}", "{}{}:{}{}:{}{}", "{}{}", "{}:{}{}"]
    top = round(height * rng.uniform(0.24, 0.3))
    for number, line in enumerate(lines[: int(rng.integers(2, 5))]):
        text = line.format(*digits[4 * number :])
        block = np.concatenate([_glyph(character, scale) for character in text], axis=1)
        target = image[top : top + block.shape[0], scale * 2 : scale * 2 + block.shape[1]]
        target[block[: target.shape[0], : target.shape[1]]] = 225
        top += block.shape[0] + 2 * scale


def _paint_box(corner: Bytes, rng: Generator) -> None:
    """Fill ``corner`` with a position box: black or green with the instrument's looped line, in place."""
    height, width = corner.shape[:2]
    green = rng.random() < 0.6
    corner[:] = (18, 84, 44) if green else (3, 3, 3)
    if not green:
        return
    turn = np.linspace(0, rng.uniform(4.5, 7.0), 40) + rng.uniform(0, 2 * np.pi)
    reach = np.linspace(0.14, 0.38, 40) * rng.uniform(0.8, 1.05)
    path = np.stack([0.5 + reach * np.cos(turn), 0.5 + reach * np.sin(turn)], axis=-1) * (width, height)
    thickness = max(1, round(height / 26))
    loop = np.zeros((height, width), np.uint8)
    cv2.polylines(loop, [np.round(path * 8).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, 3)
    corner += (loop[..., None] * np.array([0.5, 0.55, 0.5])).astype(np.uint8)


def _record(camera: CameraStyle, image: Bytes, rng: Generator) -> Bytes:
    """The image (H, W, 3) as the video chain stores it: displaced rows, then JPEG."""
    if rng.random() < camera.interlace_share:
        shift = round(float(rng.uniform(0.004, 0.009)) * image.shape[1]) or 1
        image[1::2, shift:] = image[1::2, :-shift].copy()
    if camera.jpeg_quality is None:
        return image
    quality = _between(rng, camera.jpeg_quality)
    _, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.ascontiguousarray(np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)[..., ::-1])
