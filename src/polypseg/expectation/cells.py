"""The cells that the expected Dice is learned from: models x sets x corruptions, measured once and kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from polypseg.data.catalog import CLIP_COLUMN
from polypseg.data.corruptions import corrupt
from polypseg.data.polyps import PolypDataset, Record
from polypseg.files import read_json, write_json
from polypseg.inference.features import ALL, look_at
from polypseg.inference.margin import COVERED
from polypseg.inference.runtimes import WHOLE, Box, Logits, Runtime
from polypseg.inference.segmenter import Segmenter

VERSION = 1
"""Of what a kept row holds; others are measured again."""
CLEAN = "none"
NEVER = -1.0
"""Margin of a frame whose mask is empty: no dilation covers anything."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A frame, a model's answer and its measured quality."""

    id: str
    group: str
    """Clip, or the frame itself: what is drawn as one in intervals, and held out as one."""
    features: tuple[float, ...]
    """In the order of ``features.ALL``."""
    dice: float
    recall: float
    need: float
    """Least margin, in units of sqrt(H W), by which the mask must grow to hold COVERED of the true pixels; or NEVER."""
    size: float
    """sqrt of the mask's share of the frame, at the frame's own size."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model on frames of one set under one corruption."""

    model: str
    set: str
    kind: str
    """A corruption's name, or CLEAN."""
    severity: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class FrameSet:
    """Frames with masks under one name."""

    name: str
    dataset: PolypDataset
    ids: tuple[str, ...]

    def group(self, record: Record) -> str:
        """The clip of a frame, or its id."""
        return f"{self.name}/{record.groups.get(CLIP_COLUMN, record.id)}"


def choose_frames(name: str, dataset: PolypDataset, ids: Sequence[str], *, most: int) -> FrameSet:
    """At most ``most`` frames with a polyp, spread evenly over the list, so that every clip gives some."""
    order = [
        ids[place] for place in dict.fromkeys(np.linspace(0, len(ids) - 1, min(most, len(ids))).round().astype(int))
    ]
    with_polyp = tuple(i for i in order if dataset.mask(dataset.by_id[i]).any())
    return FrameSet(name=name, dataset=dataset, ids=with_polyp)


def measure_cells(
    segmenter: Segmenter, frames: FrameSet, corruptions: Sequence[tuple[str, int]], *, model: str, cache: Path
) -> Iterator[Cell]:
    """A cell for each (kind, severity), taken from ``cache`` where it is there, else measured and kept.

    Raises PolypSegError for a broken file or outputs that are not finite.
    """
    folder = cache / segmenter.fingerprint()[:16]
    for kind, severity in corruptions:
        path = folder / f"{frames.name}.{kind}.{severity}.json"
        kept = read_json(path) if path.is_file() else {}
        if kept.get("version") == VERSION and kept.get("ids") == list(frames.ids):
            rows = tuple(Row(**row | {"features": tuple(row["features"])}) for row in kept["rows"])
        else:
            rows = tuple(_measure(segmenter, frames, i, kind, severity) for i in frames.ids)
            content = {"version": VERSION, "ids": list(frames.ids), "rows": [asdict(row) for row in rows]}
            write_json(path, content)
        yield Cell(model=model, set=frames.name, kind=kind, severity=severity, rows=rows)


def _measure(segmenter: Segmenter, frames: FrameSet, record_id: str, kind: str, severity: int) -> Row:
    record = frames.dataset.by_id[record_id]
    frame, truth = frames.dataset.pair(record)
    if kind != CLEAN:
        frame = Image.fromarray(corrupt(np.asarray(frame), kind, severity=severity, key=record_id))
    look = look_at(segmenter, segmenter.prepare([frame])[0], views=True, name=record_id)
    mask = segmenter.runtime.resize(look.logits, truth.shape) > 0
    return Row(
        id=record_id,
        group=frames.group(record),
        features=tuple(round(look.features[name], 6) for name in ALL),
        size=round(float(np.sqrt(mask.mean())), 6),
        **measure_mask(mask, truth.astype(bool)),
    )


def measure_mask(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Dice, recall and needed margin of a mask (H, W) against a true one that is not empty."""
    common, true = int((mask & truth).sum()), int(truth.sum())
    return {
        "dice": 2 * common / (int(mask.sum()) + true),
        "recall": common / true,
        "need": needed_margin(mask, truth) / float(np.sqrt(mask.size)) if mask.any() else NEVER,
    }


def needed_margin(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> int:
    """Least number of pixels by which ``mask`` (H, W, not empty) must grow, by row and column, to hold COVERED of
    the true pixels."""
    if (mask & truth).sum() >= COVERED * truth.sum():
        return 0
    distances = np.sort(distance_transform_cdt(~mask, metric="chessboard")[truth])
    return int(distances[int(np.ceil(COVERED * len(distances))) - 1])


@dataclass(frozen=True, kw_only=True)
class SwappedColors:
    """A runtime that is fed blue for red: how a correct model is most often broken."""

    runtime: Runtime
    name: str = "swapped"

    @property
    def description(self) -> str:
        return f"{self.runtime.description}, red and blue swapped"

    def polyp_logits(self, pixels: NDArray[np.float32], *, names: Sequence[str] = ()) -> Logits:
        """As the runtime's, of the swapped pixels."""
        return self.runtime.polyp_logits(np.ascontiguousarray(pixels[:, ::-1]), names=names)

    def resize(self, logits: Logits, size: tuple[int, int], *, box: Box = WHOLE) -> Logits:
        """As the runtime's."""
        return self.runtime.resize(logits, size, box=box)

    def update_digest(self, update: Any) -> None:
        """The runtime's, marked."""
        self.runtime.update_digest(update)
        update(b"red and blue swapped\n")


def add_noise(source: Path, target: Path, *, amount: float, seed: int = 0) -> Path:
    """An ONNX file whose convolutions carry Gaussian noise of ``amount`` times their weights' standard deviation."""
    import onnx
    from onnx import numpy_helper

    network, rng = onnx.load(source), np.random.default_rng(seed)
    for tensor in network.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim == 4:
            noisy = weights + amount * weights.std() * rng.standard_normal(weights.shape)
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(weights.dtype), tensor.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(network, target)
    return target


def table(cells: Sequence[Cell]) -> Mapping[str, NDArray[Any]]:
    """The rows of all cells as columns: features (N, K), dice, recall, need, size, and model, set, kind, ... (N,)."""
    rows = [(cell, row) for cell in cells for row in cell.rows]
    columns: dict[str, NDArray[Any]] = {
        name: np.array([getattr(row, name) for _, row in rows]) for name in ("dice", "recall", "need", "size")
    }
    columns |= {name: np.array([getattr(cell, name) for cell, _ in rows]) for name in ("model", "set", "kind")}
    columns |= {"severity": np.array([cell.severity for cell, _ in rows])}
    columns |= {"id": np.array([row.id for _, row in rows]), "group": np.array([row.group for _, row in rows])}
    columns["features"] = np.array([row.features for _, row in rows], dtype=np.float64).reshape(len(rows), len(ALL))
    return columns
