"""A model as a function of batches, for engines that spread an archive's frames over processes and machines.

``datasets.Dataset.map(..., batched=True, num_proc=N)`` calls it, and so does ``map_batches`` of Ray Data; each of their
workers loads the model once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from polypseg.data.images import as_frame, decode_frame, encode_png
from polypseg.errors import PolypSegError, UsageError
from polypseg.inference.runtimes import AUTO, Precision
from polypseg.inference.segmenter import MIN_AREA, Prediction, Segmenter, load
from polypseg.provenance.local import STARTER


@dataclass(kw_only=True)
class BatchSegmenter:
    """Frames of a column -> columns of the same length: masks and what is known of them.

    ``mask``: bytes of a PNG, 0 background and 255 polyp, of the frame's size; ``polyp_share`` of the frame's area, 0 to
    1; ``lesions``: regions of at least ``min_area`` pixels; ``expected_dice``, not a number where nothing is expected;
    ``flag`` as `segment` gives it. A frame that cannot be read or segmented has an empty mask, no numbers, and in
    ``problem`` why; elsewhere that is empty.

    Frames are the bytes of image files, paths, PIL images, (H, W, 3) uint8 arrays, or what an undecoded
    ``datasets.Image`` column holds (``{"bytes", "path"}``). ``model``, ``runtime``, ``precision`` and ``threshold`` as
    in ``load`` and ``predict``. Raises UsageError at once for a model that cannot be loaded, and for a batch without
    the column.
    """

    model: str = STARTER
    column: str = "image"
    keep: tuple[str, ...] = ()
    """Columns to hand through, for engines that keep none by themselves (Ray Data; ``datasets`` keeps all)."""
    runtime: str = AUTO
    precision: Precision = "fp32"
    threshold: float | None = None
    min_area: int = MIN_AREA
    fingerprint: str = field(init=False)
    """Of weights and preparation: changed ones in the same folder are another function to engines that keep results."""

    def __post_init__(self) -> None:
        self.fingerprint = self._segmenter.fingerprint()

    @cached_property
    def _segmenter(self) -> Segmenter:
        found = load(self.model, runtime=self.runtime, precision=self.precision)
        if getattr(self, "fingerprint", None) not in (None, found.fingerprint()):
            raise PolypSegError(f"{self.model} is another model here than where this was started: get the same one")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model, which no process can hand to another."""
        return {name: value for name, value in self.__dict__.items() if name != "_segmenter"}

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """One row for each frame of ``batch[column]``, in order."""
        for name in (self.column, *self.keep):
            if name not in batch:
                raise UsageError(f"the batch has no column {name!r} but {', '.join(batch)}: name one of these")
        segmenter = self._segmenter
        rows = [self._row(segmenter, value, number=number) for number, value in enumerate(batch[self.column])]
        kept = {name: list(batch[name]) for name in self.keep}
        return kept | {name: [row[name] for row in rows] for name in _EMPTY}

    def _row(self, segmenter: Segmenter, value: Any, *, number: int) -> dict[str, Any]:
        try:
            frame = _frame_of(value, name=f"frame {number} of a batch")
            found = segmenter.predict(frame, threshold=self.threshold, min_area=self.min_area)
        except UsageError:
            raise
        except PolypSegError as error:
            return _EMPTY | {"problem": str(error)}
        return _row_of(found)


_EMPTY: dict[str, Any] = {
    "mask": b"",
    "polyp_share": float("nan"),
    "lesions": -1,
    "expected_dice": float("nan"),
    "flag": "",
    "problem": "",
}
"""The columns, of a frame that was not segmented."""


def _row_of(found: Prediction) -> dict[str, Any]:
    expected = float("nan") if found.expected_dice is None else found.expected_dice
    return _EMPTY | {
        "mask": encode_png(found.mask * np.uint8(255)),
        "polyp_share": float(found.share),
        "lesions": len(found.lesions),
        "expected_dice": expected,
        "flag": found.flag,
    }


def _frame_of(value: Any, *, name: str) -> Image.Image:
    """A frame in any of the forms that engines hand over."""
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, str | Path):
        try:
            return as_frame(value)
        except UsageError as error:  # one file of an archive that is not there: no fault of the others
            raise PolypSegError(str(error)) from error
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_frame(bytes(value), name=name)
    return as_frame(value, name=name)
