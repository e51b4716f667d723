"""An operating point from a few labeled frames: where to cut, which regions count; kept only where shown better."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.stats import t as student
from tqdm import tqdm

from polypseg.data.catalog import CLIP_COLUMN, get_spec
from polypseg.data.polyps import PolypDataset, index_records
from polypseg.data.sources import Source, open_source
from polypseg.errors import UsageError
from polypseg.expectation.intervals import group_means
from polypseg.files import environment_record
from polypseg.inference.operating_point import OperatingPoint, weights_digests
from polypseg.inference.regions import measure_regions
from polypseg.inference.segmenter import Segmenter

Floats = NDArray[np.float64]
THRESHOLDS = tuple(round(0.2 + 0.05 * step, 2) for step in range(14))
SHARES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01)
"""Minimum areas, as shares of the frame."""
PEAKS = (0.0, 0.8, 0.9, 0.95, 0.97, 0.98)
"""Probabilities that a region exceeds somewhere."""
GRID = (len(THRESHOLDS), len(SHARES), len(PEAKS))
DEFAULT = (THRESHOLDS.index(0.5), 0, 0)
LEAST_GROUPS = 5
"""Clips, or frames where clips are unknown, below which nothing is chosen."""
_SURE = 0.95
"""Of the one-sided bound of the gain."""
_PRIOR = 20
"""Frames without effect that the temperature is drawn toward 1 by."""


class JoinedSource:
    """Two folders or archives as one with the folders ``images`` and ``masks``."""

    def __init__(self, frames: Source, masks: Source):
        self._parts = {"images": frames, "masks": masks}
        self.path = frames.path

    def names(self) -> list[str]:
        """All file names, sorted as strings."""
        return sorted(f"{folder}/{name}" for folder, part in self._parts.items() for name in part.names())

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises PolypSegError when it cannot be read."""
        folder, _, rest = name.partition("/")
        return self._parts[folder].read(rest)

    def content_id(self) -> str:
        """Of both contents."""
        ids = " ".join(part.content_id() for part in self._parts.values())
        return hashlib.sha256(ids.encode()).hexdigest()[:16]


def open_pairs(frames: Path, masks: Path) -> PolypDataset:
    """A folder or archive of frames and one of masks, paired by name. Raises PolypSegError for frames without mask."""
    spec = replace(get_spec("folder"), title="the given frames")
    source = JoinedSource(open_source(frames), open_source(masks))
    return PolypDataset(spec=spec, source=source, records=index_records(spec, source))


@dataclass(frozen=True, kw_only=True)
class Labeled:
    """A frame with its mask, and what it counts with as one."""

    name: str
    group: str
    frame: Image.Image
    truth: NDArray[np.bool_]


def read_labeled(dataset: PolypDataset, *, clip: str | None = None) -> list[Labeled]:
    """The frames of a dataset; ``clip``: regular expression whose first group, in a frame's name, is its clip.

    Raises UsageError for an expression that is none, or that a name does not match.
    """
    try:
        pattern = None if clip is None else re.compile(clip)
    except re.error as error:
        raise UsageError(f"--clip {clip!r} is no regular expression: {error}") from error
    if pattern is not None and pattern.groups < 1:
        raise UsageError(f"--clip {clip!r} marks no part of the name as the clip: put it into brackets")
    found = []
    for record in dataset.records:
        match = pattern.match(record.id) if pattern else None
        if pattern is not None and match is None:
            raise UsageError(f"--clip {clip!r} does not match the name {record.id!r}")
        group = match[1] if match else record.groups.get(CLIP_COLUMN, record.id)
        frame, truth = dataset.pair(record)
        found.append(Labeled(name=record.id, group=group, frame=frame, truth=truth.astype(bool)))
    return found


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the labeled frames show."""

    point: OperatingPoint
    """The default where nothing better is shown."""
    better: bool
    chosen: tuple[float, float, float]
    """Threshold, minimum share and minimum peak that are best on all frames."""
    most_alarms: float | None = None
    """The share of polyp-free frames that the choice let raise an alarm; None where alarms counted as errors only."""
    alarms: tuple[float, float] | None = None
    """Shares of polyp-free frames with an alarm, at the default and at the choice; None without such frames."""
    gain: float
    """Mean over groups of the score on frames that the choice did not see, less the default's."""
    bound: float
    """Lower one-sided 95 % bound of the gain."""
    default_score: float
    frames: int
    groups: int
    polyp_free: int

    def lines(self) -> list[str]:
        """A summary to print."""
        threshold, share, peak = self.chosen
        told = (
            f"threshold {threshold:g}, minimum area {share:.2%} of the frame and minimum peak {peak:g} are best on "
            f"these {self.frames} frames; on clips that the choice did not see they gain {self.gain:+.4f} (at least "
            f"{self.bound:+.4f}, one-sided 95 %, {self.groups} clips) over {self.default_score:.4f} of the default"
        )
        verdict = (
            "written: this operating point is better than the default on frames like these"
            if self.better
            else "nothing better than the default can be shown: threshold 0.5 and every region are kept"
        )
        if self.alarms is not None:
            before, after = self.alarms
            told += f"; frames without polyp that raise an alarm: {before:.1%} at the default, {after:.1%} at this one"
        return [told, f"{verdict}; temperature {self.point.temperature:.3f}"]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "better": self.better,
            "chosen_threshold": self.chosen[0],
            "chosen_minimum_share": self.chosen[1],
            "chosen_minimum_peak": self.chosen[2],
            "most_alarms": self.most_alarms,
            "alarms": None if self.alarms is None else list(self.alarms),
            "gain": self.gain,
            "gain_bound": self.bound,
            "default_score": self.default_score,
            "frames": self.frames,
            "groups": self.groups,
            "polyp_free": self.polyp_free,
            "score": "mean Dice; a frame without polyp counts 1 where nothing is found and 0 otherwise",
        }


def calibrate(
    segmenter: Segmenter,
    labeled: Sequence[Labeled],
    *,
    most_alarms: float | None = None,
    show_progress: bool = True,
) -> Calibration:
    """Choose threshold, minimum area and peak by leave-one-clip-out, and a temperature by the pixels' likelihood.

    ``most_alarms``: the best Dice on frames with polyps of all points at which at most this share of the frames without
    polyp raise an alarm; by default the best mean over both, see ``Calibration.content``. Raises UsageError for fewer
    than LEAST_GROUPS clips, and for ``most_alarms`` without frames of both kinds.
    """
    groups = groups_of(labeled, needed=f"an operating point needs frames of {LEAST_GROUPS} or more")
    scores, samples = [], []
    for one in tqdm(labeled, desc="calibrating", unit="frame", leave=False, disable=None if show_progress else True):
        logits = logits_of(segmenter, one)
        scores.append(score_grid(logits, one.truth))
        samples.append(_sample(logits, one.truth))
    free = np.array([not one.truth.any() for one in labeled])
    return choose_point(np.array(scores), groups, samples=samples, free=free, most_alarms=most_alarms)


def groups_of(labeled: Sequence[Labeled], *, needed: str) -> list[str]:
    """The clip of each frame. Raises UsageError, which says what is ``needed``, for fewer than LEAST_GROUPS clips."""
    groups = [one.group for one in labeled]
    count = len(set(groups))
    if count < LEAST_GROUPS:
        raise UsageError(
            f"{count} clip(s) with {len(labeled)} frames are too few: {needed} (say which frames are of one clip with "
            "--clip)"
        )
    return groups


def logits_of(segmenter: Segmenter, one: Labeled) -> NDArray[np.float32]:
    """Polyp logits (H, W) at the size of the frame's mask."""
    found = segmenter.runtime.polyp_logits(segmenter.prepare([one.frame]), names=[one.name])[0]
    return segmenter.runtime.resize(found, one.truth.shape)


def score_grid(logits: NDArray[np.float32], truth: NDArray[np.bool_]) -> Floats:
    """Logits and true mask (H, W) -> scores, of the shape GRID."""
    found = np.zeros(GRID)
    values, true = truth.astype(np.float32), int(truth.sum())
    least = (np.array(SHARES) * truth.size)[:, None]
    peaks = np.array([_logit(peak) if peak else -np.inf for peak in PEAKS])
    for row, threshold in enumerate(THRESHOLDS):
        mask = logits > _logit(threshold)
        regions, highest = measure_regions(values, mask=mask), measure_regions(logits, mask=mask).maximum
        kept = (regions.area[:, None, None] >= least) & (highest[:, None, None] > peaks)
        area = (regions.area[:, None, None] * kept).sum(axis=0)
        common = ((regions.area * regions.mean)[:, None, None] * kept).sum(axis=0)
        found[row] = np.where(area + true == 0, 1.0, 2 * common / np.maximum(area + true, 1))
    return found


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def choose_point(
    scores: Floats,
    groups: Sequence[str],
    *,
    samples: Sequence[tuple[Floats, Floats]] = (),
    free: NDArray[np.bool_] | None = None,
    most_alarms: float | None = None,
) -> Calibration:
    """The point from scores (N, *GRID) of frames in groups.

    ``samples``: logits and truth of pixels; ``free``: which frames have no polyp. Raises UsageError for ``most_alarms``
    without frames of both kinds.
    """
    cells = scores.reshape(len(scores), -1)
    free = np.zeros(len(cells), dtype=bool) if free is None else free
    if most_alarms is not None and (free.all() or not free.any()):
        raise UsageError("a share of false alarms needs frames with polyps and frames without: give both")
    by_group = np.stack([group_means(cell, groups) for cell in cells.T], axis=1)  # (G, cells)
    default = int(np.ravel_multi_index(DEFAULT, GRID))
    number = np.unique(np.asarray(groups), return_inverse=True)[1]

    def best_without(left_out: int | None) -> int:
        """The best cell of all groups but one."""
        others = np.arange(len(by_group)) != left_out
        if most_alarms is None:
            return _best(by_group[others].sum(axis=0))
        frames = others[number]
        alarms = 1 - cells[frames & free].mean(axis=0)
        allowed = alarms <= max(most_alarms, alarms.min())
        return _best(np.where(allowed, cells[frames & ~free].mean(axis=0), -1.0))

    best = best_without(None)
    unseen = np.array([by_group[g, best_without(g)] for g in range(len(by_group))])
    gain, bound = sure_gain(unseen - by_group[:, default])
    better = bound > 0 and best != default
    row, column, layer = np.unravel_index(best, GRID)
    chosen = THRESHOLDS[row], SHARES[column], PEAKS[layer]
    temperature = _temperature(samples)
    point = OperatingPoint(temperature=temperature)
    if better:
        threshold, share, peak = chosen
        point = OperatingPoint(
            threshold=_tempered(threshold, temperature),
            minimum_share=share,
            minimum_peak=_tempered(peak, temperature) if peak else 0.0,
            temperature=temperature,
        )
    return Calibration(
        point=point,
        better=better,
        chosen=chosen,
        most_alarms=most_alarms,
        alarms=(1 - float(cells[free, default].mean()), 1 - float(cells[free, best].mean())) if free.any() else None,
        gain=gain,
        bound=bound,
        default_score=float(by_group[:, default].mean()),
        frames=len(scores),
        groups=len(by_group),
        polyp_free=int(free.sum()),
    )


def _tempered(probability: float, temperature: float) -> float:
    """A cut of untempered probabilities -> the same cut of tempered ones."""
    return probability if temperature == 1 else float(1 / (1 + np.exp(-_logit(probability) / temperature)))


def sure_gain(gains: Floats) -> tuple[float, float]:
    """Gains of independent groups (G,) -> their mean and its lower one-sided 95 % bound, by Student's t."""
    error = float(gains.std(ddof=1) / np.sqrt(len(gains)))
    return float(gains.mean()), float(gains.mean() - student.ppf(_SURE, len(gains) - 1) * error)


def _best(total: Floats) -> int:
    """The highest sum; of equal ones the closest to the default."""
    rows, columns, layers = np.unravel_index(np.arange(len(total)), GRID)
    order = np.lexsort((layers, columns, np.abs(rows - DEFAULT[0]), -np.round(total, 9)))
    return int(order[0])


def _sample(logits: NDArray[np.float32], truth: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Every so many pixels of a frame: some hundred logits and whether each is polyp."""
    step = max(1, int(np.sqrt(logits.size / 900)))
    return logits[::step, ::step].ravel().astype(np.float64), truth[::step, ::step].ravel().astype(np.float64)


def _temperature(samples: Sequence[tuple[Floats, Floats]]) -> float:
    """The temperature of greatest likelihood, drawn toward 1; frames count equally."""
    if not samples:
        return 1.0

    def loss(logarithm: float) -> float:
        scaled = [(z / np.exp(logarithm), y) for z, y in samples]
        each = [float(np.mean(np.logaddexp(0, z) - y * z)) for z, y in scaled]
        return float(np.sum(each)) + _PRIOR * logarithm**2 / 10

    found = minimize_scalar(loss, bounds=(-2.0, 2.0), method="bounded")
    return round(float(np.exp(found.x)), 4)


def calibrate_files(
    segmenter: Segmenter,
    frames: Path,
    masks: Path,
    output: Path,
    *,
    folder: Path | None = None,
    clip: str | None = None,
    most_alarms: float | None = None,
) -> Calibration:
    """Calibrate on a folder of frames and one of masks, and write the operating point to ``output``.

    ``folder``: the model's, to whose weights the point is bound; ``most_alarms``: see ``calibrate``.
    """
    dataset = open_pairs(frames, masks)
    found = calibrate(segmenter, read_labeled(dataset, clip=clip), most_alarms=most_alarms)
    save_calibration(found, output, model=segmenter.name, weights={} if folder is None else weights_digests(folder))
    return found


def save_calibration(found: Calibration, output: Path, *, model: str, weights: Mapping[str, str]) -> Path:
    """Write the operating point with how it was found and the weights' SHA-256 by file; return the path."""
    return found.point.save(
        output, model=model, weights=dict(weights), evidence=found.content(), environment=environment_record()
    )
