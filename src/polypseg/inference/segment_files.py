"""Segment image files, folders and videos into masks, overlays and tables; a second call continues the first.

Reading, the model, drawing and writing run in threads of their own, in the order of the files. A frame is finished when
its row stands in ``frames.csv``: pictures and lesions are written before it, so an interruption at any moment costs
what is on its way, and no more.
"""

import csv
import io
import os
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from polypseg.data.images import decode_frame, encode_png
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import (
    LOCK,
    atomic_path,
    environment_record,
    explain_write_errors,
    from_cell,
    original_name,
    printable,
    read_json,
    sole_writer,
    to_cell,
    write_csv,
    write_json,
)
from polypseg.inference.inputs import Inputs, Source, read_inputs
from polypseg.inference.margin import Margin
from polypseg.inference.operating_point import OperatingPoint
from polypseg.inference.pipeline import in_background
from polypseg.inference.segmenter import MIN_AREA, Prediction, Segmenter, check_options, draw_overlay, find_lesions
from polypseg.inference.video import (
    ENCODED_FORMATS,
    CausalSmoother,
    FlickerIndex,
    OverlayVideo,
    Video,
    check_smoothing,
    overlay_format,
)

FRAME_FIELDS = (
    "name", "file", "frame", "time_s", "width", "height", "polyp_pixels", "polyp_share", "lesions",
    "mean_probability", "max_probability", "expected_dice", "flag", "file_bytes", "file_modified",
)  # fmt: skip
LESION_FIELDS = (
    "name", "lesion", "x", "y", "width", "height", "area", "mean_probability", "max_probability",
)  # fmt: skip
VIDEO_FIELDS = (
    "file", "frames_read", "frames_announced", "fps", "times", "overlay", "flicker", "flicker_unsmoothed", "problem",
    "file_bytes", "file_modified",
)  # fmt: skip
RECORD = "run.json"
KIND = "polypseg segmentation"
_OWN = (
    "masks", "overlays", "probabilities", "margins", "frames.csv", "lesions.csv", "videos.csv",
    "skipped.csv", RECORD,
)  # fmt: skip
OVERLAY_QUALITY = {"quality": 92, "subsampling": 0}
"""As Pillow takes it; without subsampling, so that thin lines keep their color."""
_ALARM_FRAMES = 10
"""Frames below which a video or folder is not judged as a whole."""
_AHEAD = 4
"""Frames that each stage of the pipeline may be ahead of the next."""


@dataclass(frozen=True, kw_only=True)
class SegmentReport:
    """What a call did and what the output folder holds now."""

    output: Path
    segmented: int
    """Frames that this call segmented."""
    reused: int
    """Frames that an earlier call had finished."""
    with_lesions: int
    """Frames, of both, with at least one lesion."""
    skipped: tuple[tuple[str, str], ...]
    """File, reason: what could not be read, or not to its end."""
    passed_over: tuple[tuple[str, str], ...] = ()
    """File or folder, reason: what lies in the inputs and is no image or video that can be read."""
    seconds: float = 0.0
    """Time from the first file's reading to the last one's writing."""
    flicker: tuple[tuple[str, str], ...] = ()
    """Video, its flicker index in words."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """Flag -> frames that bear it, where something was learned of the model's quality."""
    margin: tuple[str, ...] = ()
    """What the margin holds, and when that cannot be expected."""

    @property
    def frames_per_second(self) -> float:
        """Frames segmented by this call per second, reading, drawing and writing included; 0 where there were none."""
        return self.segmented / self.seconds if self.seconds > 0 else 0.0

    def lines(self) -> list[str]:
        """A summary to print."""
        kept = f", {self.reused} were finished before" if self.reused else ""
        total = self.segmented + self.reused
        lines = [
            f"{self.segmented} frame(s) segmented{kept}; {self.with_lesions} of {total} show at least one lesion",
            f"masks, overlays, frames.csv and lesions.csv are in {printable(str(self.output))}",
        ]
        if self.segmented:
            lines.append(f"{self.frames_per_second:.1f} frames per second, reading, drawing and writing included")
        lines += [f"{file}: {words}" for file, words in self.flicker[:10]]
        if self.flags:
            told = ", ".join(f"{count} {flag}" for flag, count in self.flags.items())
            lines.append(f"flagged in frames.csv: {told}")
        lines += self.margin
        listed = printable(str(self.output / "skipped.csv"))
        if self.skipped:
            lines.append(f"{len(self.skipped)} file(s) skipped, all listed in {listed}:")
            lines += [f"  {reason}" for _, reason in self.skipped[:10]]
        if self.passed_over:
            file, reason = self.passed_over[0]
            lines.append(
                f"{len(self.passed_over)} other file(s) not segmented, such as {file}: {reason}; all listed in {listed}"
            )
        return lines


@dataclass(frozen=True, kw_only=True)
class _Frame:
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
class _VideoStart:
    """A video begins of which not everything is finished."""

    source: Source
    rate: float
    """Of the frames that are taken, per second."""


@dataclass(frozen=True, kw_only=True)
class _VideoEnd:
    """A video was read to its end."""

    source: Source
    row: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Skipped:
    """A file that cannot be read, or not to its end."""

    source: Source
    reason: str


_Entry = _Frame | _VideoStart | _VideoEnd | _Skipped
_Entries = Generator[_Entry, None, None]


def segment_files(
    segmenter: Segmenter,
    inputs: Sequence[str],
    output: Path,
    *,
    threshold: float | None = None,
    min_area: int = MIN_AREA,
    every: int = 1,
    save_probability: bool = False,
    smooth: float | None = None,
    overlay_video: str | None = None,
    margin: float | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
) -> SegmentReport:
    """Segment everything that ``inputs`` name (files, folders with what is below them, globs, videos) into ``output``.

    Writes ``masks/NAME.png`` (0 background, 255 polyp), ``overlays/NAME.jpg``, with ``save_probability``
    ``probabilities/NAME.png`` (8 bits: 255 times the probability, rounded), ``frames.csv`` (one row per frame),
    ``lesions.csv`` (one row per lesion of at least ``min_area`` pixels), ``videos.csv``, ``skipped.csv`` (every file of
    the inputs that was not segmented, with the reason) and ``run.json``. NAME keeps the path below the input folder.
    Pixels of images are taken as stored: an EXIF rotation is not applied, so that a mask fits the pixels of its file.

    Of videos, turned as they say, every ``every``-th frame is taken, as ``NAME_frame000123``, with its presentation
    time; its overlays become one video ``overlays/NAME.FORMAT`` (``overlay_video``: see ``overlay_format``).
    ``smooth``: average the probabilities over this time in seconds, looking back only (see ``CausalSmoother``).

    Names in tables: bytes that are no UTF-8 and control characters are written as ``\\xNN``; a ``'`` stands before
    texts that a spreadsheet would run as a formula.

    The same call continues an interrupted one and skips finished files that have not changed; ``overwrite`` starts
    again. ``margin``: also write ``margins/NAME.png``, the masks grown so that in this share of frames with a polyp, if
    they are like the frames calibrated on, 90 % of its pixels lie inside.

    With a ``batch_size`` above 1 probabilities can differ in the last bits. Raises UsageError for inputs that
    are not there, a folder that holds something else, or a finished part made by other weights or options;
    PolypSegError when no file at all could be read.
    """
    point = segmenter.point(threshold)
    check_options(threshold=point.threshold, min_area=min_area)
    if every < 1:
        raise UsageError(f"a video's frames are taken in steps of at least 1; got {every}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    found = read_inputs(inputs, output=output)
    if not any(source.is_video for source in found.sources):
        for option, value in (("smoothing", smooth), ("an overlay video", overlay_video)):
            if value is not None:
                raise UsageError(f"{option} is for videos, and the input holds none: leave it out")
    elif overlay_format(overlay_video) and smooth is not None:
        check_smoothing(smooth)
    if margin is not None:
        _check_margin(segmenter, margin, point)
    settings = {
        "model": segmenter.name,
        "weights": segmenter.fingerprint(),
        "threshold": point.threshold,
        "temperature": point.temperature,
        "minimum_share": point.minimum_share,
        "minimum_peak": point.minimum_peak,
        "min_area": min_area,
        "every": every,
        "save_probability": save_probability,
        "smooth": smooth,
        "margin": margin,
        "expectation": None if segmenter.expectation is None else segmenter.expectation.digest,
    }
    with sole_writer(output):
        return _segment(
            segmenter, found, output, settings, overlay_video=overlay_video, batch_size=batch_size, overwrite=overwrite
        )


def _segment(
    segmenter: Segmenter,
    found: Inputs,
    output: Path,
    settings: Mapping[str, Any],
    *,
    overlay_video: str | None,
    batch_size: int,
    overwrite: bool,
) -> SegmentReport:
    """What segment_files does while nobody else writes to ``output``."""
    min_area, every = settings["min_area"], settings["every"]
    point = OperatingPoint(**{name: settings[name] for name in OperatingPoint.__dataclass_fields__})
    save_probability, smooth, margin = (settings[name] for name in ("save_probability", "smooth", "margin"))
    _claim_output(output, dict(settings), overwrite=overwrite)
    known = None if margin is None or segmenter.expectation is None else (segmenter.expectation.margin, margin)
    tables = _Tables(
        output,
        pictures=_picture_folders(save_probability, margins=margin is not None),
        every=every,
        whole_videos=smooth is not None,
    )
    sources = tables.name_sources(found.sources)
    skipped: list[tuple[str, str]] = []
    segmented, seen, flicker = 0, [], []
    kind = overlay_format(overlay_video) if any(source.is_video for source in sources) else "none"
    videos = _VideoWriter(output, tables, kind)
    start = time.perf_counter()
    try:
        with tables.open(), tqdm(total=_count_frames(sources, every), unit="frame", disable=None) as progress:
            entries = _prepare(tables.read(sources, every=every, draws=videos.draws), segmenter)
            read = in_background(entries, depth=max(_AHEAD, batch_size))
            predicted = in_background(_predict(read, segmenter, batch_size=batch_size), depth=_AHEAD)
            drawing = _Drawing(
                output,
                segmenter,
                point=point,
                min_area=min_area,
                smooth=smooth,
                save_probability=save_probability,
                margin=known,
                stills=kind == "jpg",
            )
            with videos, closing(in_background(drawing.draw(predicted), depth=_AHEAD)) as drawn:
                for entry in drawn:
                    if isinstance(entry, _Skipped):
                        skipped.append((printable(str(entry.source.path)), entry.reason))
                    elif isinstance(entry, _Frame):
                        if not entry.finished and entry.prediction is not None:
                            _write_pictures(output, entry.name, entry.pictures)
                            tables.add(entry, entry.prediction)
                            segmented += 1
                        videos.add(entry)
                        seen.append(entry.name)
                        progress.update()
                    elif isinstance(entry, _VideoStart):
                        videos.start(entry)
                    else:
                        videos.finish(entry)
                        if entry.row["flicker"]:
                            flicker.append((printable(str(entry.source.path)), _flicker_words(entry.row)))
    finally:
        _write_skipped(output, [*skipped, *found.passed_over])
    if not seen:
        raise PolypSegError(
            f"none of the {len(sources)} file(s) could be read: {skipped[0][1]}. "
            f"All are listed in {output / 'skipped.csv'}"
        )
    return SegmentReport(
        output=output,
        segmented=segmented,
        reused=len(seen) - segmented,
        with_lesions=sum(tables.done[name]["lesions"] != "0" for name in seen),
        skipped=tuple(skipped),
        passed_over=found.passed_over,
        seconds=time.perf_counter() - start,
        flicker=tuple(flicker),
        flags=Counter(tables.done[name]["flag"] for name in seen if tables.done[name]["flag"]),
        margin=() if margin is None else _margin_lines(segmenter, [tables.done[name] for name in seen], margin),
    )


def _check_margin(segmenter: Segmenter, margin: float, point: OperatingPoint) -> None:
    """Raise UsageError where no margin of this level can be given."""
    if segmenter.expectation is None:
        raise UsageError(
            f"no margin is known of {segmenter.name}: it is learned with training_scripts/fit_expectation.py"
        )
    if not point.is_default:
        raise UsageError("margins are of masks at threshold 0.5: leave out the threshold or the operating point")
    segmenter.expectation.margin.factor(margin)


def _margin_lines(segmenter: Segmenter, rows: Sequence[Mapping[str, str]], margin: float) -> tuple[str, ...]:
    """What is guaranteed, and an alarm for every video, and for all images together, on which it cannot hold."""
    assert segmenter.expectation is not None
    learned = segmenter.expectation.margin
    empty = sum(row["polyp_pixels"] == "0" for row in rows)
    lines = [
        f"margins/: 90 % of the polyp lies inside in {margin:.0%} of frames with a polyp that are like the "
        f"{len(learned.needs)} calibrated on; nothing is said of the {empty} frame(s) with an empty mask"
    ]
    batches: dict[str, list[float | None]] = {}
    for row in rows:
        name = row["file"] if row["frame"] else "the images"
        batches.setdefault(name, []).append(float(row["expected_dice"]) if row["expected_dice"] else None)
    for name, expected in batches.items():
        alarm = learned.alarm(expected) if len(expected) >= _ALARM_FRAMES else ""
        if alarm:
            lines.append(f"ALARM, {name}: {alarm}")
    return tuple(lines)


def _called(frame: _Frame) -> str:
    """What errors call a frame."""
    name = printable(str(frame.source.path))
    return name if frame.index is None else f"frame {frame.index} of {name}"


def _flicker_words(row: dict[str, str]) -> str:
    before = f" ({row['flicker_unsmoothed']} without smoothing)" if row["flicker_unsmoothed"] else ""
    return f"flicker index {row['flicker']}{before}"


def find_sources(inputs: Sequence[str], *, output: Path) -> list[tuple[Path, PurePosixPath]]:
    """Files to segment and their names in the output without suffix; see ``read_inputs``."""
    return [(source.path, source.name) for source in read_inputs(inputs, output=output).sources]


def _count_frames(sources: Sequence[Source], every: int) -> int:
    """Frames to expect; a video's number is what its header announces."""
    total = 0
    for source in sources:
        if not source.is_video:
            total += 1
            continue
        with Video.open(source.path) as video:
            total += -(-video.announced // every)
    return total


# The stages --------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A file that cannot be read; it is skipped."""


def _read_image(path: Path) -> Image.Image:
    name = printable(str(path))
    try:
        return decode_frame(path.read_bytes(), name=name)
    except OSError as error:
        raise _UnreadableError(f"{name} cannot be read: {error.strerror}") from error
    except PolypSegError as error:
        raise _UnreadableError(str(error)) from error


def _prepare(entries: _Entries, segmenter: Segmenter) -> _Entries:
    """Add the model's input to the frames that need a prediction."""
    with closing(entries):
        for entry in entries:
            if isinstance(entry, _Frame) and not entry.finished and entry.image is not None:
                entry = replace(entry, pixels=segmenter.prepare([entry.image])[0])
            yield entry


def _predict(entries: _Entries, segmenter: Segmenter, *, batch_size: int) -> _Entries:
    """Add the model's answers to the frames that it is asked about."""
    waiting: list[_Entry] = []

    def predict() -> Iterator[_Entry]:
        asked = [entry for entry in waiting if isinstance(entry, _Frame) and entry.pixels is not None]
        pixels = [frame.pixels for frame in asked if frame.pixels is not None]
        names = [_called(frame) for frame in asked]
        answers = iter(segmenter.runtime.polyp_logits(np.stack(pixels), names=names) if pixels else ())
        for entry in waiting:
            if isinstance(entry, _Frame) and entry.pixels is not None:
                entry = replace(entry, logits=next(answers))
            yield entry
        waiting.clear()

    with closing(entries):
        open_frames = 0
        for entry in entries:
            waiting.append(entry)
            open_frames += isinstance(entry, _Frame) and entry.pixels is not None
            if open_frames in (0, batch_size):
                yield from predict()
                open_frames = 0
        yield from predict()


class _Drawing:
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

    def draw(self, entries: _Entries) -> _Entries:
        """Add the pictures to frames, and the flicker index to the rows of videos."""
        with closing(entries):
            for entry in entries:
                if isinstance(entry, _VideoStart):
                    self._smoother = CausalSmoother(self._smooth) if self._smooth is not None else None
                    self._flicker, self._flicker_before = FlickerIndex(), FlickerIndex()
                elif isinstance(entry, _VideoEnd):
                    entry = replace(entry, row=entry.row | self._flicker_row())
                elif isinstance(entry, _Frame):
                    entry = self._frame(entry)
                yield entry

    def _read(self, frame: _Frame) -> Prediction | None:
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

    def _frame(self, frame: _Frame) -> _Frame:
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

    def _pictures(self, frame: _Frame, prediction: Prediction) -> dict[str, bytes]:
        pictures = {f"masks/{frame.name}.png": encode_png(prediction.mask.astype(np.uint8) * 255)}
        if self._save_probability:
            probability = (prediction.probability * 255).round().astype(np.uint8)
            pictures[f"probabilities/{frame.name}.png"] = encode_png(probability)
        if self._margin is not None:
            known, level = self._margin
            grown = known.grow(prediction.mask, level=level)
            pictures[f"margins/{frame.name}.png"] = encode_png(grown.astype(np.uint8) * 255)
        if (frame.index is None or self._stills) and frame.image is not None:
            buffer = io.BytesIO()
            draw_overlay(frame.image, prediction, caption=self._caption).save(buffer, format="JPEG", **OVERLAY_QUALITY)
            pictures[f"overlays/{frame.name}.jpg"] = buffer.getvalue()
        return pictures

    def _flicker_row(self) -> dict[str, str]:
        pairs = (("flicker", self._flicker), ("flicker_unsmoothed", self._flicker_before))
        return {name: "" if index.value is None else f"{index.value:.5f}" for name, index in pairs}


def _read_mask(output: Path, name: str) -> NDArray[np.bool_]:
    with Image.open(output / "masks" / f"{name}.png") as mask:
        return np.asarray(mask) > 0


def _with_mask(mask: NDArray[np.bool_]) -> Prediction:
    """A prediction of which only the mask is known."""
    return Prediction(probability=np.zeros((0, 0), np.float32), mask=mask, lesions=())


# The output folder -------------------------------------------------------------------------------------


def _picture_folders(save_probability: bool, *, margins: bool) -> dict[str, str]:
    """Folder -> suffix of the pictures of every frame."""
    more = [name for name, wanted in (("probabilities", save_probability), ("margins", margins)) if wanted]
    return {"masks": ".png", "overlays": ".jpg", **dict.fromkeys(more, ".png")}


def _claim_output(output: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Write ``run.json``, or check that what is there was made with these settings; see ``segment_files``."""
    path, environment = output / RECORD, environment_record()
    record = read_json(path) if path.is_file() else {}
    if record.get("kind") != KIND:
        if output.is_dir() and any(path.name != LOCK for path in output.iterdir()):
            raise UsageError(f"{output} holds something else than results of segmentation: choose another folder")
        record = {}
    elif overwrite:
        with explain_write_errors(output):
            _remove_results(output)
        record = {}
    if record:
        changed = [f"{key} ({record['settings'].get(key)})" for key in settings if _differs(key, settings, record)]
        if changed:
            raise UsageError(
                f"{output} holds results with another {', '.join(changed)}: choose another folder or overwrite them"
            )
        if record["environments"][-1]["versions"] == environment["versions"]:
            return
    environments = [*record.get("environments", []), environment]
    write_json(path, {"kind": KIND, "settings": settings, "environments": environments})


def _differs(key: str, settings: dict[str, Any], record: dict[str, Any]) -> bool:
    """The same weights may be called by another name."""
    return key != "model" and record["settings"].get(key) != settings[key]


def _remove_results(output: Path) -> None:
    """Delete what this module writes, and nothing else; the record last, so that it can be tried again."""
    for name in _OWN:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write_pictures(output: Path, name: str, pictures: dict[str, bytes]) -> None:
    """Write the pictures of the frame ``name``, given as paths below ``output``."""
    for place, data in pictures.items():
        with atomic_path(output / place, sync_name=False) as temporary:  # a frame without picture is done again
            temporary.write_bytes(data)


def _write_skipped(output: Path, skipped: Sequence[tuple[str, str]]) -> None:
    path = output / "skipped.csv"
    if skipped:
        write_csv(path, [{"file": file, "reason": reason} for file, reason in skipped])
    else:
        path.unlink(missing_ok=True)


@dataclass(kw_only=True)
class _Table:
    """A CSV file that grows by whole rows."""

    path: Path
    fields: Sequence[str]
    rows: list[dict[str, str]] = field(default_factory=list)

    def load(self) -> None:
        """Read the rows that were written whole."""
        if not self.path.is_file():
            return
        with explain_write_errors(self.path):
            text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        if whole and tuple(rows.fieldnames or ()) != tuple(self.fields):
            raise PolypSegError(
                f"{self.path} is damaged or of another version: choose another folder, or overwrite the results"
            )
        whole_rows = (row for row in rows if None not in row.values() and None not in row)
        self.rows = [{key: from_cell(text) for key, text in row.items()} for row in whole_rows]

    def store(self) -> None:
        """Replace the file by the rows held here."""
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(_cells(row) for row in self.rows)


class _Tables:
    """The tables of an output folder: what is finished, and how more is added."""

    def __init__(self, output: Path, *, pictures: dict[str, str], every: int, whole_videos: bool):
        """``whole_videos``: frames of a video count only if the video was finished."""
        self._output, self._every = output, every
        self._frames = _Table(path=output / "frames.csv", fields=FRAME_FIELDS)
        self._lesions = _Table(path=output / "lesions.csv", fields=LESION_FIELDS)
        self._videos = _Table(path=output / "videos.csv", fields=VIDEO_FIELDS)
        for table in (self._frames, self._lesions, self._videos):
            table.load()
        frames = [row for row in self._frames.rows if _is_current(row) and _has(output, row, pictures)]
        counts = Counter(row["file"] for row in frames)
        self._videos.rows = [row for row in self._videos.rows if _is_current(row) and self._is_whole(row, counts)]
        if whole_videos:
            finished = {row["file"] for row in self._videos.rows}
            frames = [row for row in frames if not row["frame"] or row["file"] in finished]
        self._frames.rows = frames
        self.done = {row["name"]: row for row in frames}
        self._lesions.rows = [row for row in self._lesions.rows if row["name"] in self.done]
        self._writers: dict[str, Any] = {}

    def _is_whole(self, row: dict[str, str], counts: Counter[str]) -> bool:
        """Whether a video's frames and its overlay video are there."""
        there = not row["overlay"] or (self._output / row["overlay"]).is_file()
        return there and counts[row["file"]] == len(range(0, int(row["frames_read"]), self._every))

    def name_sources(self, found: Sequence[Source]) -> list[Source]:
        """Give every file a name of its own; finished ones keep theirs.

        The first of several files of the same name and folder gets ``NAME``, the next ``NAME_jpg``, ``NAME_jpg_2``.
        """
        before = {os.path.abspath(original_name(row["file"])): _stem(row) for row in self._frames.rows}
        # Case does not distinguish files everywhere.
        taken, sources = {stem.lower() for stem in before.values()}, []
        videos = {str(source.name).lower() for source in found if source.is_video}
        for source in found:
            stem = source.name
            name = before.get(os.path.abspath(source.path))
            if name is None:
                video, frame, number = str(stem).lower().rpartition("_frame")
                if frame and number.isdigit() and video in videos:
                    taken.add(str(stem).lower())  # the name of a frame of that video
                tagged = f"{stem}_{source.path.suffix[1:].lower()}"
                numbered = (f"{tagged}_{n}" for n in range(2, len(found) + 2))
                name = next(n for n in (str(stem), tagged, *numbered) if n.lower() not in taken)
                taken.add(name.lower())
            sources.append(source._replace(name=PurePosixPath(name)))
        return sources

    @contextmanager
    def open(self) -> Iterator[None]:
        """Store what is valid of the tables, then keep them open for appending."""
        with ExitStack() as stack:
            for table in (self._frames, self._lesions, self._videos):
                table.store()
                with explain_write_errors(table.path):
                    file = stack.enter_context(table.path.open("a", encoding="utf-8", newline=""))
                self._writers[table.path.name] = (csv.DictWriter(file, table.fields, lineterminator="\n"), file)
            yield

    def read(self, sources: Iterable[Source], *, every: int, draws: bool) -> _Entries:
        """Everything in the files, in order, without pixels where they are finished.

        ``draws``: the frames of an unfinished video all have pixels, for its overlay video.
        """
        for source in sources:
            try:
                state = _file_state(source.path)
                if source.is_video:
                    yield from self._read_video(source, state, every=every, draws=draws)
                else:
                    name = str(source.name)
                    finished = name in self.done
                    image = None if finished else _read_image(source.path)
                    yield _Frame(source=source, name=name, state=state, image=image, finished=finished)
            except _UnreadableError as error:
                yield _Skipped(source=source, reason=str(error))
            except OSError as error:
                reason = f"{printable(str(source.path))} cannot be read: {error.strerror}"
                yield _Skipped(source=source, reason=reason)

    def _read_video(self, source: Source, state: dict[str, str], *, every: int, draws: bool) -> Iterator[_Entry]:
        row = self._finished_video(source)
        if row is not None:
            for index in range(0, int(row["frames_read"]), every):
                name = _frame_name(source, index)
                yield _Frame(source=source, name=name, state=state, index=index, finished=True, in_finished_video=True)
            problem = row["problem"]
        else:
            problem = yield from self._read_frames(source, state, every=every, draws=draws)
        if problem:
            raise _UnreadableError(f"{printable(str(source.path))} is {problem}")

    def _read_frames(
        self, source: Source, state: dict[str, str], *, every: int, draws: bool
    ) -> Generator[_Entry, None, str]:
        """Read a video; return what is wrong with it."""
        with source.path.open("rb"):
            pass  # FFmpeg does not say why it cannot open a file
        with Video.open(source.path) as video:
            for index, at in video.frames(every=every):
                if index == 0:
                    yield _VideoStart(source=source, rate=video.rate / every)
                name = _frame_name(source, index)
                finished = name in self.done
                image = video.image() if draws or not finished else None
                if image is not None or finished:
                    yield _Frame(
                        source=source, name=name, state=state, image=image, index=index, time=at, finished=finished
                    )
            problem = video.problem
            if video.read:
                row = {"file": printable(source.path.as_posix()), "frames_read": str(video.read)}
                row |= {"frames_announced": str(video.announced), "fps": f"{video.rate:g}", "times": video.times}
                yield _VideoEnd(source=source, row=row | {"problem": problem} | state)
        return problem

    def _finished_video(self, source: Source) -> dict[str, str] | None:
        place = os.path.abspath(source.path)
        rows = (row for row in self._videos.rows if os.path.abspath(original_name(row["file"])) == place)
        return next(rows, None)

    def add_video(self, row: dict[str, str]) -> None:
        """Record a video whose frames and overlay video are written."""
        self._append("videos.csv", [row])

    def add(self, frame: _Frame, prediction: Prediction) -> None:
        """Record a frame whose pictures are written."""
        height, width = prediction.mask.shape
        lesions = [
            {
                "name": frame.name, "lesion": number, "x": lesion.x, "y": lesion.y, "width": lesion.width,
                "height": lesion.height, "area": lesion.area, "mean_probability": f"{lesion.mean_probability:.4f}",
                "max_probability": f"{lesion.max_probability:.4f}",
            }
            for number, lesion in enumerate(prediction.lesions, start=1)
        ]  # fmt: skip
        inside = prediction.probability[prediction.mask]
        row = {
            "name": frame.name,
            "file": printable(frame.source.path.as_posix()),
            "frame": "" if frame.index is None else str(frame.index),
            "time_s": "" if frame.time is None else f"{frame.time:.3f}",
            "width": str(width),
            "height": str(height),
            "polyp_pixels": str(prediction.area),
            "polyp_share": f"{prediction.share:.6f}",
            "lesions": str(len(lesions)),
            "mean_probability": f"{inside.mean(dtype=np.float64):.4f}" if inside.size else "",
            "max_probability": f"{prediction.probability.max():.4f}",
            "expected_dice": "" if prediction.expected_dice is None else f"{prediction.expected_dice:.3f}",
            "flag": prediction.flag,
            **frame.state,
        }
        self._append("lesions.csv", lesions)
        self._append("frames.csv", [row])
        self.done[frame.name] = row

    def _append(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        writer, file = self._writers[table]
        with explain_write_errors(Path(file.name)):
            writer.writerows(_cells(row) for row in rows)
            file.flush()


class _VideoWriter:
    """Writes the overlay video of the video at hand, and the row when it is finished."""

    def __init__(self, output: Path, tables: _Tables, kind: str):
        self._output, self._tables, self._kind = output, tables, kind
        self._current: OverlayVideo | None = None

    @property
    def draws(self) -> bool:
        """Whether there are overlay videos."""
        return self._kind in ENCODED_FORMATS

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        if self._current is not None:
            self._current.abandon()

    def start(self, video: _VideoStart) -> None:
        if self.draws:
            self._current = OverlayVideo(self._output / self._place(video.source), rate=video.rate)

    def add(self, frame: _Frame) -> None:
        if self._current is not None and frame.overlay is not None:
            self._current.write(frame.overlay, time=frame.time)

    def finish(self, video: _VideoEnd) -> None:
        overlay, self._current = self._current, None
        written = overlay is not None and overlay.finish()
        self._tables.add_video({**video.row, "overlay": self._place(video.source) if written else ""})

    def _place(self, source: Source) -> str:
        return f"overlays/{source.name}.{self._kind}"


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {key: to_cell(value) for key, value in row.items()}


def _frame_name(source: Source, index: int) -> str:
    return f"{source.name}_frame{index:06d}"


def _stem(row: dict[str, str]) -> str:
    """The name of a row's file: that of a video is its frames' without their number."""
    return row["name"].removesuffix(f"_frame{int(row['frame']):06d}") if row["frame"] else row["name"]


def _file_state(path: Path) -> dict[str, str]:
    """By what a changed file is recognized: its size, and its time of change (UTC)."""
    state = path.stat()
    changed = datetime.fromtimestamp(state.st_mtime, UTC).isoformat(timespec="microseconds")
    return {"file_bytes": str(state.st_size), "file_modified": changed}


def _is_current(row: dict[str, str]) -> bool:
    """Whether a row's file is what it was; one that is gone keeps its row."""
    path = Path(original_name(row["file"]))
    return not path.exists() or _file_state(path).items() <= row.items()


def _has(output: Path, row: dict[str, str], pictures: dict[str, str]) -> bool:
    """Whether a row's pictures are there; frames of videos need no overlay of their own."""
    needed = {folder: suffix for folder, suffix in pictures.items() if folder != "overlays" or not row["frame"]}
    return all((output / folder / f"{row['name']}{suffix}").is_file() for folder, suffix in needed.items())
