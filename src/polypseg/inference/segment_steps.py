"""What ``segment`` does with each frame on its way from file to folder: preparation, the model, drawing."""

import io
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.images import encode_png
from polypseg.files import printable
from polypseg.inference.inputs import Source
from polypseg.inference.margin import Margin
from polypseg.inference.operating_point import OperatingPoint
from polypseg.inference.segmenter import Prediction, Segmenter, draw_onto, draw_overlay, find_lesions
from polypseg.inference.video import CausalSmoother, FlickerIndex

OVERLAY_QUALITY = {"quality": 92, "subsampling": 0}
"""As Pillow takes it; without subsampling, so that thin lines keep their color."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame on its way through the pipeline."""

    source: Source
    name: str
    state: dict[str, str]
    """What its file was when it was read."""
    image: Image.Image | None = None
    """RGB; None where it is not needed."""
    index: int | None = None
    """Number in its video, from 0; None for an image file."""
    time: float | None = None
    """Seconds from the video's start."""
    finished: bool = False
    """Whether an earlier call has finished it."""
    in_finished_video: bool = False
    pixels: NDArray[np.float32] | None = None
    """Prepared for the model (3, h, w); None where it is not asked."""
    logits: NDArray[np.float32] | None = None
    """The model's answer (h', w')."""
    prediction: Prediction | None = None
    overlay: Image.Image | None = None
    """Of a video's frame."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """Path below the output folder -> content, to be written."""


@dataclass(frozen=True, kw_only=True)
class VideoStart:
    """A video begins of which not everything is finished."""

    source: Source
    rate: float
    """Of the frames that are taken, per second."""


@dataclass(frozen=True, kw_only=True)
class VideoEnd:
    """A video was read to its end."""

    source: Source
    row: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that cannot be read, or not to its end."""

    source: Source
    reason: str


Entry = Frame | VideoStart | VideoEnd | Skipped
Entries = Generator[Entry, None, None]


def prepare_frames(entries: Entries, segmenter: Segmenter) -> Entries:
    """Add the model's input to the frames that need a prediction."""
    with closing(entries):
        for entry in entries:
            if isinstance(entry, Frame) and not entry.finished and entry.image is not None:
                entry = replace(entry, pixels=segmenter.prepare([entry.image])[0])
            yield entry


def predict_frames(entries: Entries, segmenter: Segmenter, *, batch_size: int) -> Entries:
    """Add the model's answers to the frames that it is asked about."""
    waiting: list[Entry] = []

    def predict() -> Iterator[Entry]:
        asked = [entry for entry in waiting if isinstance(entry, Frame) and entry.pixels is not None]
        pixels = [frame.pixels for frame in asked if frame.pixels is not None]
        names = [_called(frame) for frame in asked]
        answers = iter(segmenter.runtime.polyp_logits(np.stack(pixels), names=names) if pixels else ())
        for entry in waiting:
            if isinstance(entry, Frame) and entry.pixels is not None:
                entry = replace(entry, logits=next(answers))
            yield entry
        waiting.clear()

    with closing(entries):
        open_frames = 0
        for entry in entries:
            waiting.append(entry)
            open_frames += isinstance(entry, Frame) and entry.pixels is not None
            if open_frames in (0, batch_size):
                yield from predict()
                open_frames = 0
        yield from predict()


class Drawing:
    """Predictions, smoothing, flicker, overlays and pictures' bytes: everything between the model and the disk."""

    def __init__(
        self,
        output: Path,
        segmenter: Segmenter,
        *,
        point: OperatingPoint,
        min_area: int,
        smooth: float | None,
        save_probability: bool,
        margin: tuple[Margin, float] | None,
        stills: bool,
    ):
        """``stills``: frames of videos get overlays as images do. ``margin``: what is known, and the level."""
        self._segmenter, self._caption = segmenter, segmenter.caption
        self._margin = margin
        self._stills = stills
        self._output, self._point, self._min_area = output, point, min_area
        self._smooth, self._save_probability = smooth, save_probability
        self._smoother: CausalSmoother | None = None
        self._flicker, self._flicker_before = FlickerIndex(), FlickerIndex()

    def draw(self, entries: Entries) -> Entries:
        """Add the pictures to frames, and the flicker index to the rows of videos."""
        with closing(entries):
            for entry in entries:
                if isinstance(entry, VideoStart):
                    self._smoother = CausalSmoother(self._smooth) if self._smooth is not None else None
                    self._flicker, self._flicker_before = FlickerIndex(), FlickerIndex()
                elif isinstance(entry, VideoEnd):
                    entry = replace(entry, row=entry.row | self._flicker_row())
                elif isinstance(entry, Frame):
                    entry = self._frame(entry)
                yield entry

    def _read(self, frame: Frame) -> Prediction | None:
        if frame.image is None or frame.pixels is None or frame.logits is None:
            return None
        return self._segmenter.read(
            frame.image,
            frame.pixels,
            frame.logits,
            point=self._point,
            min_area=self._min_area,
            everywhere=self._save_probability or self._smooth is not None,
        )

    def _frame(self, frame: Frame) -> Frame:
        prediction = self._read(frame)
        if frame.index is None:
            pictures = self._pictures(frame, prediction) if prediction else {}
            return replace(frame, prediction=prediction, pictures=pictures, pixels=None, logits=None)
        if frame.in_finished_video:
            return frame
        if prediction is None:
            mask = _read_mask(self._output, frame.name)
        else:
            if self._smoother is not None:
                self._flicker_before.add(prediction.mask)
                prediction = self._smoothed(prediction, time=frame.time)
            mask = prediction.mask
        self._flicker.add(mask)
        overlay = (
            None
            if frame.image is None or self._stills
            else draw_overlay(frame.image, _with_mask(mask), caption=self._caption)
        )
        pictures = self._pictures(frame, prediction) if prediction else {}
        return replace(frame, prediction=prediction, overlay=overlay, pictures=pictures, pixels=None, logits=None)

    def _smoothed(self, prediction: Prediction, *, time: float | None) -> Prediction:
        assert self._smoother is not None
        probability = self._smoother(prediction.probability, time=time)
        mask = self._point.mask_of(probability)
        lesions = find_lesions(probability, mask=mask, min_area=self._min_area)
        # What is expected is of the frame's own mask; its average with the frames before is alike.
        return replace(prediction, probability=probability, mask=mask, lesions=lesions)

    def _pictures(self, frame: Frame, prediction: Prediction) -> dict[str, bytes]:
        pictures = {f"masks/{frame.name}.png": encode_png(prediction.mask * np.uint8(255))}
        if self._save_probability:
            probability = (prediction.probability * 255).round().astype(np.uint8)
            pictures[f"probabilities/{frame.name}.png"] = encode_png(probability)
        if self._margin is not None:
            known, level = self._margin
            grown = known.grow(prediction.mask, level=level)
            pictures[f"margins/{frame.name}.png"] = encode_png(grown * np.uint8(255))
        if (frame.index is None or self._stills) and frame.image is not None:
            buffer = io.BytesIO()
            drawn = draw_onto(frame.image, prediction, caption=self._caption)  # it goes no further than this
            drawn.save(buffer, format="JPEG", **OVERLAY_QUALITY)
            pictures[f"overlays/{frame.name}.jpg"] = buffer.getvalue()
        return pictures

    def _flicker_row(self) -> dict[str, str]:
        pairs = (("flicker", self._flicker), ("flicker_unsmoothed", self._flicker_before))
        return {name: "" if index.value is None else f"{index.value:.5f}" for name, index in pairs}


def _called(frame: Frame) -> str:
    """What errors call a frame."""
    name = printable(str(frame.source.path))
    return name if frame.index is None else f"frame {frame.index} of {name}"


def _read_mask(output: Path, name: str) -> NDArray[np.bool_]:
    with Image.open(output / "masks" / f"{name}.png") as mask:
        return np.asarray(mask) > 0


def _with_mask(mask: NDArray[np.bool_]) -> Prediction:
    """A prediction of which only the mask is known."""
    return Prediction(probability=np.zeros((0, 0), np.float32), mask=mask, lesions=())
