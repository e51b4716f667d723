"""What an endoscope does to a frame on a bad day: thirteen kinds at five severities, none of which moves the mask.

Every kind takes an RGB frame (H, W, 3) uint8 and returns one of the same size; lengths scale with the frame, so that a
severity means the same at every resolution. What is random comes from a generator, seeded by the frame's id. Severities
are this package's choice, meant to span "just visible" (1) to "an endoscopist would wait for a better view" (5).
"""

from collections.abc import Callable
from typing import TypeAlias
from zlib import crc32

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from polypseg.errors import UsageError, unknown_name

Frame: TypeAlias = NDArray[np.uint8]
Plane: TypeAlias = NDArray[np.float32]

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(frame: Frame, kind: str, *, severity: int, key: str = "", seed: int = 0) -> Frame:
    """``frame`` (H, W, 3) uint8 under one kind of corruption; severity 0 returns it unchanged.

    The same (kind, severity, key, seed) gives the same result; ``key`` is the frame's id. The random pattern does not
    depend on the severity, so that a curve over severities follows one and the same disturbance. Raises UsageError for
    an unknown kind or severity.
    """
    if kind not in CORRUPTIONS:
        raise unknown_name("corruption", kind, CORRUPTIONS)
    if severity not in (0, *SEVERITIES):
        raise UsageError(f"severity must be 0 to {SEVERITIES[-1]}, not {severity}")
    if severity == 0:
        return frame
    function, strengths = CORRUPTIONS[kind]
    rng = np.random.default_rng([crc32(kind.encode()), crc32(key.encode()), seed])
    return function(frame, strengths[severity - 1], rng)


def frame_length(frame: Frame) -> float:
    """The unit of length, sqrt(height * width) in pixels."""
    return float(np.sqrt(frame.shape[0] * frame.shape[1]))


def to_bytes(values: NDArray[np.floating]) -> Frame:
    """Gray levels rounded and clipped to 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _odd(size: float) -> int:
    return max(3, round(size) | 1)


def _clouds(shape: tuple[int, ...], rng: Generator, *, cells: int) -> Plane:
    """Smooth noise (H, W) in [0, 1], about ``cells`` bumps across."""
    small = rng.random((cells, cells), dtype=np.float32)
    plane = cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return np.clip((plane - plane.min()) / max(float(np.ptp(plane)), 1e-6), 0, 1)


def _visible(frame: Frame) -> Plane:
    """1 inside the endoscope's field and 0 on its black border, softly: nothing in the lumen paints the border."""
    lit = (frame.max(axis=2) > 12).astype(np.float32)
    return cv2.GaussianBlur(cv2.morphologyEx(lit, cv2.MORPH_CLOSE, np.ones((9, 9))), (0, 0), 1.5)


def _blend(frame: Frame, color: NDArray[np.floating], opacity: Plane) -> Frame:
    """``color`` (3,) or (H, W, 3) over the visible field with ``opacity`` (H, W) in [0, 1]."""
    share = (opacity * _visible(frame))[..., None]
    return to_bytes(frame * (1 - share) + color * share)


def motion_blur(frame: Frame, strength: float, rng: Generator) -> Frame:
    """A straight smear in a random direction, ``strength`` of the frame's length long."""
    size = _odd(strength * frame_length(frame))
    kernel = np.zeros((size, size), np.float32)
    kernel[size // 2] = 1
    turn = cv2.getRotationMatrix2D((size // 2, size // 2), float(rng.uniform(0, 180)), 1)
    kernel = cv2.warpAffine(kernel, turn, (size, size), flags=cv2.INTER_LINEAR)
    return cv2.filter2D(frame, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE).astype(np.uint8)


def defocus(frame: Frame, strength: float, rng: Generator) -> Frame:
    """An even disc of confusion, its diameter ``strength`` of the frame's length."""
    size = _odd(strength * frame_length(frame))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)).astype(np.float32)
    return cv2.filter2D(frame, -1, disc / disc.sum(), borderType=cv2.BORDER_REPLICATE).astype(np.uint8)


def over_exposure(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Linear light times 2 ** ``strength``, clipped."""
    return _expose(frame, 2.0**strength)


def under_exposure(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Linear light divided by 2 ** ``strength``."""
    return _expose(frame, 2.0**-strength)


def _expose(frame: Frame, gain: float) -> Frame:
    """Gain in linear light; sRGB's curve is taken as a power of 2.2."""
    table = to_bytes(255 * np.minimum(1, gain * (np.arange(256) / 255) ** 2.2) ** (1 / 2.2))
    return cv2.LUT(frame, table).astype(np.uint8)


def specular_glare(frame: Frame, strength: float, rng: Generator) -> Frame:
    """White highlights on wet mucosa; ``strength`` is the share of the frame that they cover."""
    noise = _clouds(frame.shape, rng, cells=24) + 0.35 * _clouds(frame.shape, rng, cells=80)
    noise = noise * (0.5 + frame.mean(axis=2) / 255)  # bright tissue faces the lamp
    limit = np.quantile(noise, 1 - strength)
    glare = np.clip((noise - limit) / max(float(noise.max() - limit), 1e-6) * 6, 0, 1).astype(np.float32)
    return _blend(frame, np.array([252.0, 252.0, 250.0]), cv2.GaussianBlur(glare, (0, 0), 0.003 * frame_length(frame)))


def smoke(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Gray haze from electrocautery, ``strength`` opaque on average where it is thick."""
    haze = 0.55 + 0.45 * _clouds(frame.shape, rng, cells=5)
    return _blend(frame, np.array([188.0, 186.0, 184.0]), (strength * haze).astype(np.float32))


def bubbles(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Foam: rings with a highlight each; ``strength`` is their number."""
    out = frame.astype(np.float32)
    height, width = frame.shape[:2]
    for _ in range(int(strength)):
        center = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        radius = max(2, int(frame_length(frame) * rng.uniform(0.008, 0.04)))
        body, rim, spot = (np.zeros((height, width), np.float32) for _ in range(3))
        cv2.circle(body, center, radius, 1, -1, cv2.LINE_AA)
        cv2.circle(rim, center, radius, 1, max(1, radius // 6), cv2.LINE_AA)
        shift = int(radius * 0.4)
        cv2.circle(spot, (center[0] - shift, center[1] - shift), max(1, radius // 5), 1, -1, cv2.LINE_AA)
        opacity = (0.18 * body + 0.5 * rim + 0.8 * spot).clip(0, 0.9)[..., None]
        out = out * (1 - opacity) + np.array([236.0, 232.0, 222.0]) * opacity
    return to_bytes(frame + (out - frame) * _visible(frame)[..., None])


def stain(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Blood over part of the field, ``strength`` opaque where it is thick; tissue shows through by its shading."""
    pool = np.clip((_clouds(frame.shape, rng, cells=4) - 0.35) / 0.4, 0, 1)
    shading = frame.mean(axis=2, keepdims=True) / 255
    blood = np.array([150.0, 18.0, 14.0]) * (0.35 + shading)
    return _blend(frame, blood, (strength * pool).astype(np.float32))


def overlay_box(frame: Frame, strength: float, rng: Generator) -> Frame:
    """A position-guide box in a corner, ``strength`` of the frame's sides long, with a drawing in it.

    It hides tissue. The mask stays: an annotator who saw the frame without it would have drawn it.
    """
    height, width = frame.shape[:2]
    box_h, box_w = int(strength * height), int(strength * width)
    top = 0 if rng.random() < 0.5 else height - box_h
    left = 0 if rng.random() < 0.5 else width - box_w
    box = np.full((box_h, box_w, 3), (18, 60, 34), np.uint8)
    points = np.cumsum(rng.normal(0, 0.12, (12, 2)), axis=0)
    points = (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-6)
    line = (points * [0.8 * box_w, 0.8 * box_h] + [0.1 * box_w, 0.1 * box_h]).astype(np.int32)
    cv2.polylines(box, [line], False, (120, 220, 140), max(1, box_h // 20), cv2.LINE_AA)
    out = frame.copy()
    out[top : top + box_h, left : left + box_w] = box
    return out


def interlacing(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Two fields of a moving camera in one frame: odd lines are shifted by ``strength`` of the width."""
    shift = max(1, round(strength * frame.shape[1])) * (1 if rng.random() < 0.5 else -1)
    out = frame.copy()
    out[1::2] = np.roll(frame[1::2], shift, axis=1)
    edge = out[1::2, :shift] if shift > 0 else out[1::2, shift:]
    edge[:] = frame[1::2, :1] if shift > 0 else frame[1::2, -1:]
    return out


def jpeg(frame: Frame, strength: float, rng: Generator) -> Frame:
    """JPEG at quality ``strength``."""
    _, data = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(strength)])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def noise(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Sensor noise: Gaussian of standard deviation ``strength`` gray levels, stronger in the dark."""
    sigma = strength * (1.3 - 0.6 * frame.mean(axis=2, keepdims=True) / 255)
    return to_bytes(frame + sigma * rng.standard_normal(frame.shape))


def low_resolution(frame: Frame, strength: float, rng: Generator) -> Frame:
    """Reduced by the factor ``strength`` (area average) and enlarged again (bilinear)."""
    height, width = frame.shape[:2]
    small = (max(8, round(width / strength)), max(8, round(height / strength)))
    reduced = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(reduced, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)


Corruption: TypeAlias = tuple[Callable[[Frame, float, Generator], Frame], tuple[float, ...]]
CORRUPTIONS: dict[str, Corruption] = {
    "motion_blur": (motion_blur, (0.012, 0.024, 0.04, 0.065, 0.1)),
    "defocus": (defocus, (0.008, 0.014, 0.022, 0.034, 0.05)),
    "over_exposure": (over_exposure, (0.5, 1.0, 1.5, 2.1, 2.8)),
    "under_exposure": (under_exposure, (0.8, 1.5, 2.2, 3.0, 4.0)),
    "specular_glare": (specular_glare, (0.01, 0.025, 0.05, 0.09, 0.15)),
    "smoke": (smoke, (0.2, 0.35, 0.5, 0.65, 0.8)),
    "bubbles": (bubbles, (6, 14, 28, 50, 90)),
    "stain": (stain, (0.25, 0.4, 0.55, 0.7, 0.88)),
    "overlay_box": (overlay_box, (0.14, 0.2, 0.27, 0.34, 0.42)),
    "interlacing": (interlacing, (0.006, 0.012, 0.02, 0.032, 0.05)),
    "jpeg": (jpeg, (40, 22, 13, 8, 5)),
    "noise": (noise, (6, 12, 20, 32, 48)),
    "low_resolution": (low_resolution, (2, 3, 4.5, 7, 11)),
}
"""Kind -> function and its strength at severities 1 to 5, in the unit that the function's docstring states."""
