"""Re-rendering frames of one set toward another, one factor at a time.

A factor is fitted to the looks of both sets and then takes a frame, its mask and a strength: 0 changes nothing, 1 moves
the set's measure to the other set's, as far as a re-rendering can. Only border and scale change masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from polypseg.data.corruptions import frame_length, jpeg, low_resolution, specular_glare, to_bytes
from polypseg.data.polyps import PolypDataset
from polypseg.shift.comparison import MeasuredSet
from polypseg.shift.frame_statistics import Bools, Frame, center_distance, highlights, measure_frame, visible_field

Mask: TypeAlias = NDArray[np.uint8]
Render: TypeAlias = Callable[[Frame, Mask, float, str], tuple[Frame, Mask]]
"""frame (H, W, 3), mask (H, W) in {0, 1}, strength in [0, 1], id -> both, changed."""
SAMPLE = 24
"""Frames of a set by which factors are fitted and from which borders are taken."""
NO_BORDER = 0.01
"""Share of a frame; sets whose borders are smaller have none."""
QUALITIES = (95, 90, 85, 80, 75, 70, 60, 50, 40, 30, 20, 15, 10)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a set's frames typically look like."""

    means: dict[str, float]
    """Measure -> mean over the set."""
    polyp_share: float | None
    """Geometric mean of the polyps' share of the frame."""
    frames: tuple[Frame, ...]
    """A sample."""
    fields: tuple[Bools, ...]
    """Visible field of each."""
    border_color: NDArray[np.float64]
    """(3,) median RGB outside the fields."""


def typical_look(dataset: PolypDataset, ids: Sequence[str], measured: MeasuredSet) -> Look:
    """The look of measured frames of a dataset. Raises PolypSegError for a broken file."""
    places = np.unique(np.linspace(0, len(ids) - 1, SAMPLE).astype(int))
    frames = tuple(np.asarray(dataset.frame(dataset.by_id[ids[place]])) for place in places)
    fields = tuple(visible_field(frame) for frame in frames)
    outside = [frame[~field] for frame, field in zip(frames, fields, strict=True) if not field.all()]
    shares = measured.values.get("polyp_share")
    return Look(
        means={name: float(values.mean()) for name, values in measured.values.items()},
        polyp_share=None if shares is None else float(np.exp(np.log(shares).mean())),
        frames=frames,
        fields=fields,
        border_color=np.median(np.concatenate(outside), axis=0) if outside else np.zeros(3),
    )


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One way in which sets differ."""

    name: str
    measures: tuple[str, ...]
    """What it is meant to move; other measures may follow (see the cross-talk)."""
    fit: Callable[[Look, Look], Render]
    """Looks of the set and of the other one -> the re-rendering."""

    def render(self, source: Look, target: Look) -> Render:
        """The fitted re-rendering; strength 0 gives back the same arrays. Raises ValueError for other strengths."""
        fitted = self.fit(source, target)

        def apply(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
            if not 0 <= strength <= 1:
                raise ValueError(f"a strength lies in [0, 1], not {strength}")
            return (frame, mask) if strength == 0 else fitted(frame, mask, strength, key)

        return apply


def _unchanged(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
    return frame, mask


def _in_lab(frame: Frame, change: Callable[[NDArray[np.float32], Bools], NDArray[np.float32]]) -> Frame:
    """Change CIELAB values inside the visible field only."""
    field = visible_field(frame)
    lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    changed = to_bytes(255 * cv2.cvtColor(change(lab, field).astype(np.float32), cv2.COLOR_LAB2RGB))
    return np.where(field[..., None], changed, frame).astype(np.uint8)


def fit_color(source: Look, target: Look) -> Render:
    """Shift and stretch each CIELAB channel by the sets' difference and ratio (after Reinhard et al. 2001).

    A frame keeps its own deviation from its set: L' = m + (L - m) k^t + t (m_b - m_a), k the ratio of mean spreads.
    """
    channels = [f"lab_{name}" for name in "lab"]
    shift = np.array([target.means[f"{c}_mean"] - source.means[f"{c}_mean"] for c in channels])
    stretch = np.array([target.means[f"{c}_std"] / max(source.means[f"{c}_std"], 1e-6) for c in channels])

    def render(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
        def change(lab: NDArray[np.float32], field: Bools) -> NDArray[np.float32]:
            middle = lab[field].mean(axis=0)
            return middle + (lab - middle) * stretch**strength + strength * shift

        return _in_lab(frame, change), mask

    return render


def fit_illumination(source: Look, target: Look) -> Render:
    """Add the difference of the fall-offs: L' = L + t (f_b - f_a) (r - mean r), r in half diagonals."""
    slope = target.means["falloff"] - source.means["falloff"]

    def render(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
        height, width = frame.shape[:2]
        radius = center_distance(*np.mgrid[:height, :width], shape=(height, width))

        def change(lab: NDArray[np.float32], field: Bools) -> NDArray[np.float32]:
            lab = lab.copy()
            lab[..., 0] += strength * slope * (radius - radius[field].mean())
            return lab

        return _in_lab(frame, change), mask

    return render


def _blurred(frame: Frame, amount: float) -> Frame:
    """amount > 0: Gaussian blur of that share of the frame's length; below 0: unsharp masking by so much of 1 %."""
    if amount > 0:
        return cv2.GaussianBlur(frame, (0, 0), amount * frame_length(frame)).astype(np.uint8)
    soft = cv2.GaussianBlur(frame, (0, 0), 0.006 * frame_length(frame)).astype(np.float32)
    return to_bytes(frame + (-100 * amount) * (frame - soft))


def fit_sharpness(source: Look, target: Look) -> Render:
    """Blur, or sharpen by unsharp masking, until the sample's mean sharpness is the other set's."""

    def missing(amount: float) -> float:
        changed = source.frames if amount == 0 else [_blurred(frame, amount) for frame in source.frames]
        return float(np.mean([measure_frame(frame)["sharpness"] for frame in changed])) - goal

    # The sample stands for its set: what it differs from the set by is no shift.
    goal = target.means["sharpness"]
    goal += float(np.mean([measure_frame(f)["sharpness"] for f in source.frames])) - source.means["sharpness"]
    blur = missing(0.0) > 0
    ends = (0.0005, 0.04) if blur else (-0.03, -1e-4)
    values = [missing(end) for end in ends]
    if values[0] * values[1] > 0:  # beyond what this can reach, or too close to change
        nearest = ends[int(np.argmin(np.abs(values)))]
        amount = nearest if abs(missing(nearest)) < abs(missing(0.0)) else 0.0
    else:
        amount = float(brentq(missing, *ends, xtol=2e-4))
    if amount == 0:
        return _unchanged
    return lambda frame, mask, strength, key: (_blurred(frame, strength * amount), mask)


def fit_resolution(source: Look, target: Look) -> Render:
    """Reduce to the other set's mean size and enlarge again; nothing where the other set has more pixels."""
    ratio = source.means["native_side"] / target.means["native_side"]
    if ratio <= 1:
        return _unchanged

    rng = np.random.default_rng(0)  # it draws nothing
    return lambda frame, mask, strength, key: (low_resolution(frame, ratio**strength, rng), mask)


def fit_border(source: Look, target: Look) -> Render:
    """Fill the frame's own border with the nearest tissue, then paint the border of a frame of the other set.

    What the new border hides is cut from the mask from strength 0.5 on.
    """
    if max(source.means["border_share"], target.means["border_share"]) < NO_BORDER:
        return _unchanged

    def render(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
        height, width = frame.shape[:2]
        filled = _nearest_tissue(frame, visible_field(frame))
        chosen = target.fields[crc32(key.encode()) % len(target.fields)].astype(np.float32)
        field = cv2.resize(chosen, (width, height), interpolation=cv2.INTER_LINEAR)
        painted = filled * field[..., None] + target.border_color * (1 - field[..., None])
        kept = (1 - strength * (1 - field)) > 0.5
        return to_bytes(frame * (1 - strength) + painted * strength), (mask * kept).astype(np.uint8)

    return render


def _nearest_tissue(frame: Frame, field: Bools) -> Frame:
    if field.all():
        return frame
    inner = cv2.erode(field.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1)
    _, labels = cv2.distanceTransformWithLabels(1 - inner, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    colors = np.zeros((int(labels.max()) + 1, 3), dtype=np.uint8)
    colors[labels[inner == 1]] = frame[inner == 1]
    return np.where(field[..., None], frame, colors[labels]).astype(np.uint8)


def fit_compression(source: Look, target: Look) -> Render:
    """JPEG at the quality that brings the sample's mean blockiness closest to the other set's, if that is more."""
    now = float(np.mean([measure_frame(frame)["blockiness"] for frame in source.frames]))
    goal = now + target.means["blockiness"] - source.means["blockiness"]
    rng = np.random.default_rng(0)
    distance = {100: abs(now - goal)}
    for quality in QUALITIES:
        coded = [measure_frame(jpeg(frame, quality, rng))["blockiness"] for frame in source.frames]
        distance[quality] = abs(float(np.mean(coded)) - goal)
    best = min(distance, key=lambda quality: distance[quality])
    if best == 100:
        return _unchanged
    return lambda frame, mask, strength, key: (jpeg(frame, 100 - strength * (100 - best), rng), mask)


def fit_scale(source: Look, target: Look) -> Render:
    """Zoom about the polyp to the other set's typical polyp size: enlarging crops, reducing repeats the edge."""
    if source.polyp_share is None or target.polyp_share is None:
        return _unchanged
    ratio = float(np.sqrt(target.polyp_share / source.polyp_share))

    def render(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
        if not mask.any():
            return frame, mask
        zoom = ratio**strength
        y, x = (float(places.mean()) for places in np.nonzero(mask))
        matrix = np.array([[zoom, 0, (1 - zoom) * x], [0, zoom, (1 - zoom) * y]])
        size = (frame.shape[1], frame.shape[0])
        zoomed = cv2.warpAffine(frame, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        cut = cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT)
        return zoomed.astype(np.uint8), cut.astype(np.uint8)

    return render


def fit_specular(source: Look, target: Look) -> Render:
    """Add highlights, or paint over them from around, by the difference of their shares."""
    missing = target.means["specular_share"] - source.means["specular_share"]
    if missing > 0:

        def add(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
            return specular_glare(frame, strength * missing, np.random.default_rng(crc32(key.encode()))), mask

        return add
    share = -missing / max(source.means["specular_share"], 1e-9)

    def remove(frame: Frame, mask: Mask, strength: float, key: str) -> tuple[Frame, Mask]:
        spots = highlights(frame)
        if not spots.any():
            return frame, mask
        wide = cv2.dilate(spots.astype(np.uint8), np.ones((3, 3), np.uint8))
        painted = cv2.inpaint(frame, wide, 3, cv2.INPAINT_TELEA)
        return to_bytes(frame * (1 - strength * share) + painted * (strength * share)), mask

    return remove


FACTORS: tuple[Factor, ...] = (
    Factor(name="scale", measures=("polyp_share",), fit=fit_scale),
    Factor(name="border", measures=("border_share",), fit=fit_border),
    Factor(name="colour", measures=tuple(f"lab_{c}_{m}" for c in "lab" for m in ("mean", "std")), fit=fit_color),
    Factor(name="illumination", measures=("falloff",), fit=fit_illumination),
    Factor(name="specular", measures=("specular_share",), fit=fit_specular),
    Factor(name="sharpness", measures=("sharpness",), fit=fit_sharpness),
    Factor(name="resolution", measures=("native_side",), fit=fit_resolution),
    Factor(name="compression", measures=("blockiness",), fit=fit_compression),
)
"""In the order in which a frame comes to be, and in which all of them together are applied."""
