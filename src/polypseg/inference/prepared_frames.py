"""Frames of a dataset, prepared for a model in a thread of their own while it computes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.data.polyps import PolypDataset
from polypseg.inference.pipeline import in_background


@dataclass(frozen=True, kw_only=True)
class PreparedFrames:
    """Some frames as a model takes them."""

    ids: Sequence[str]
    pixels: NDArray[np.float32]
    """(B, 3, h, w)."""
    sizes: Sequence[tuple[int, int]]
    """Height and width of each frame."""


def usual_batch_size(device: str) -> int:
    """Frames per forward pass: on a CPU more than two gain no time and cost memory."""
    return 2 if device == "cpu" else 8


def prepared_frames(
    dataset: PolypDataset, processor: Any, ids: Sequence[str], *, batch_size: int
) -> Iterator[PreparedFrames]:
    """The frames of these ids in batches, each prepared while the one before is computed; no mask is read."""

    def prepare(chunk: Sequence[str]) -> PreparedFrames:
        frames = [dataset.frame(dataset.by_id[record_id]) for record_id in chunk]
        pixels = processor(images=frames, return_tensors="np")["pixel_values"]
        sizes = [(frame.height, frame.width) for frame in frames]
        return PreparedFrames(ids=chunk, pixels=np.ascontiguousarray(pixels, dtype=np.float32), sizes=sizes)

    chunks = (ids[i : i + batch_size] for i in range(0, len(ids), batch_size))
    return in_background(map(prepare, chunks), depth=1)
