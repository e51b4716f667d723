"""Segment image files, folders and videos into masks, overlays and tables; a second call continues the first.

A frame is finished when its row stands in ``frames.csv``: pictures and lesions are written before it, so an
interruption at any moment costs one frame.
"""

import csv
import io
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from polypseg.artifacts import (
    LOCK,
    atomic_path,
    environment_record,
    explain_write_errors,
    read_json,
    sole_writer,
    write_csv,
    write_json,
)
from polypseg.data.images import decode_frame, encode_png
from polypseg.errors import PolypSegError, UsageError
from polypseg.segmentation import MIN_AREA, Prediction, Segmenter, check_options, draw_overlay

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".mpg", ".mpeg", ".m4v", ".webm", ".wmv")
FRAME_FIELDS = (
    "name", "file", "frame", "time_s", "width", "height", "polyp_pixels", "polyp_share", "lesions",
    "mean_probability", "max_probability", "file_bytes", "file_modified",
)  # fmt: skip
LESION_FIELDS = (
    "name", "lesion", "x", "y", "width", "height", "area", "mean_probability", "max_probability",
)  # fmt: skip
VIDEO_FIELDS = ("file", "frames_read", "frames_announced", "fps", "file_bytes", "file_modified")
RECORD = "run.json"
KIND = "polypseg segmentation"
_OWN = ("masks", "overlays", "probabilities", "frames.csv", "lesions.csv", "videos.csv", "skipped.csv", RECORD)
_SHORT_VIDEO = 0.98
"""A video of which less than this share of its announced frames can be read is called truncated."""


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

    def lines(self) -> list[str]:
        """A summary to print."""
        kept = f", {self.reused} were finished before" if self.reused else ""
        total = self.segmented + self.reused
        lines = [
            f"{self.segmented} frame(s) segmented{kept}; {self.with_lesions} of {total} show at least one lesion",
            f"masks, overlays, frames.csv and lesions.csv are in {self.output}",
        ]
        if self.skipped:
            lines.append(f"{len(self.skipped)} file(s) skipped, all listed in {self.output / 'skipped.csv'}:")
            lines += [f"  {reason}" for _, reason in self.skipped[:10]]
        return lines


class _Source(NamedTuple):
    """A file to segment."""

    path: Path
    stem: PurePosixPath
    """Its name in the output, without suffix; for a video that of its frames without their number."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class _Frame:
    """A frame and its place."""

    name: str
    image: Image.Image | None
    """RGB; None where the frame is finished already."""
    index: int | None = None
    """Number in its video, from 0; None for an image file."""
    time: float | None = None
    """Seconds from the video's start."""


def segment_files(
    segmenter: Segmenter,
    inputs: Sequence[str],
    output: Path,
    *,
    threshold: float = 0.5,
    min_area: int = MIN_AREA,
    every: int = 1,
    save_probability: bool = False,
    overwrite: bool = False,
) -> SegmentReport:
    """Segment everything that ``inputs`` name (files, folders with what is below them, globs, videos) into ``output``.

    Writes ``masks/NAME.png`` (0 background, 255 polyp), ``overlays/NAME.jpg``, with ``save_probability``
    ``probabilities/NAME.png`` (8 bits: 255 times the probability, rounded), ``frames.csv`` (a row a frame),
    ``lesions.csv`` (a row a lesion of at least ``min_area`` pixels), ``videos.csv``, ``skipped.csv`` and ``run.json``.
    NAME keeps the path below the input folder. Pixels are taken as stored: an EXIF rotation is not applied, so that a
    mask fits the pixels of its file. Of videos every ``every``-th frame is taken, as ``NAME_frame000123``.

    The same call continues an interrupted one and skips finished files that have not changed; ``overwrite`` starts
    again. Raises UsageError for inputs that are not there, a folder that holds something else, or a finished part made
    by other weights or options; PolypSegError when no file at all could be read.
    """
    check_options(threshold=threshold, min_area=min_area)
    if every < 1:
        raise UsageError(f"a video's frames are taken in steps of at least 1; got {every}")
    found = find_sources(inputs, output=output)
    settings = {
        "model": segmenter.name,
        "weights": segmenter.fingerprint(),
        "threshold": threshold,
        "min_area": min_area,
        "every": every,
        "save_probability": save_probability,
    }
    with sole_writer(output):
        return _segment(segmenter, found, output, settings, overwrite=overwrite)


def _segment(
    segmenter: Segmenter,
    found: Sequence[tuple[Path, PurePosixPath]],
    output: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
) -> SegmentReport:
    """What segment_files does while nobody else writes to ``output``."""
    threshold, min_area, every = (settings[name] for name in ("threshold", "min_area", "every"))
    save_probability = settings["save_probability"]
    _claim_output(output, dict(settings), overwrite=overwrite)
    tables = _Tables(output, pictures=_picture_folders(save_probability))
    sources = tables.name_sources(found)
    skipped: list[tuple[str, str]] = []
    segmented, seen = 0, []
    try:
        with tables.open(), tqdm(total=_count_frames(sources, every), unit="frame", disable=None) as progress:
            for source in sources:
                try:
                    for frame in tables.frames(source, every=every):
                        if frame.image is not None:
                            (prediction,) = segmenter.predict(
                                [frame.image], threshold=threshold, min_area=min_area, names=[_called(source, frame)]
                            )
                            _write_pictures(
                                output, frame.name, frame.image, prediction, save_probability=save_probability
                            )
                            tables.add(source, frame, prediction)
                            segmented += 1
                        seen.append(frame.name)
                        progress.update()
                except _UnreadableError as error:
                    skipped.append((str(source.path), str(error)))
    finally:
        _write_skipped(output, skipped)
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
    )


def _called(source: _Source, frame: _Frame) -> str:
    """What errors call a frame."""
    return str(source.path) if frame.index is None else f"frame {frame.index} of {source.path}"


# What is asked for -------------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str], *, output: Path) -> list[tuple[Path, PurePosixPath]]:
    """Files that ``inputs`` name, once each and in order, with their names in the output (without suffix).

    Names are relative to the input folder; of several inputs, to the folder that holds them all. Files inside
    ``output`` are left out. Raises UsageError for an input that does not exist or holds neither images nor videos.
    """
    if not inputs:
        raise UsageError("nothing to segment: give files, folders, globs or videos")
    roots, files = zip(*(_expand(text) for text in inputs), strict=True)
    root = os.path.commonpath(roots)
    sources: dict[str, tuple[Path, PurePosixPath]] = {}
    for path in (path for group in files for path in group):
        place = os.path.abspath(path)
        if not Path(place).is_relative_to(os.path.abspath(output)):
            name = PurePosixPath(Path(place).relative_to(root).as_posix())
            sources.setdefault(place, (path, name.with_suffix("")))
    if not sources:
        raise UsageError(f"nothing to segment: all of {', '.join(inputs)} lies in the output folder {output}")
    return list(sources.values())


def _expand(text: str) -> tuple[str, list[Path]]:
    """The absolute folder to which the names of an input's files are relative, and the files."""
    path = Path(text)
    if path.is_file():
        return os.path.abspath(path.parent), [path]
    if path.is_dir():
        root, files = path, _files_below(path)
    elif has_magic(text):
        root, matches = _fixed_part(path), [Path(match) for match in glob(text, recursive=True)]
        files = sorted({file for match in matches for file in [match, *_files_below(match)] if _is_readable(file)})
    else:
        raise UsageError(f"{text} does not exist: give files, folders, globs or videos")
    if not files:
        raise UsageError(f"{text} holds no image or video: known are {', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}")
    return os.path.abspath(root), files


def _files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_readable(file)) if folder.is_dir() else []


def _is_readable(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and file.is_file() and not file.name.startswith(".")


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first wildcard."""
    parts = list(pattern.parts)
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first]) if first else Path()


def _count_frames(sources: Sequence[_Source], every: int) -> int:
    """Frames to expect; a video's number is what its header announces."""
    total = 0
    for source in sources:
        if not source.is_video:
            total += 1
            continue
        with _open_video(source.path) as video:
            total += max(0, -(-int(video.get(cv2.CAP_PROP_FRAME_COUNT)) // every))
    return total


# Decoding ----------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A file that cannot be read, or not to its end; it is skipped."""


def _read_image(path: Path) -> Image.Image:
    try:
        return decode_frame(path.read_bytes(), name=str(path))
    except OSError as error:
        raise _UnreadableError(f"{path} cannot be read: {error.strerror}") from error
    except PolypSegError as error:
        raise _UnreadableError(str(error)) from error


@contextmanager
def _open_video(path: Path) -> Iterator[cv2.VideoCapture]:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's own messages: we report what cannot be read
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        yield video
    finally:
        video.release()


# The output folder -------------------------------------------------------------------------------------


def _picture_folders(save_probability: bool) -> dict[str, str]:
    """Folder -> suffix of the pictures of every frame."""
    probability = {"probabilities": ".png"} if save_probability else {}
    return {"masks": ".png", "overlays": ".jpg", **probability}


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


def _write_pictures(
    output: Path, name: str, image: Image.Image, prediction: Prediction, *, save_probability: bool
) -> None:
    pictures = {"masks": encode_png(prediction.mask.astype(np.uint8) * 255)}
    if save_probability:
        pictures["probabilities"] = encode_png((prediction.probability * 255).round().astype(np.uint8))
    for folder, data in pictures.items():
        with atomic_path(output / folder / f"{name}.png") as temporary:
            temporary.write_bytes(data)
    with atomic_path(output / "overlays" / f"{name}.jpg") as temporary:
        draw_overlay(image, prediction).save(temporary, format="JPEG", quality=92, subsampling=0)


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
            raise PolypSegError(f"{self.path} is damaged: choose another folder, or overwrite the results")
        self.rows = [row for row in rows if None not in row.values()]

    def store(self) -> None:
        """Replace the file by the rows held here."""
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


class _Tables:
    """The tables of an output folder: what is finished, and how more is added."""

    def __init__(self, output: Path, *, pictures: dict[str, str]):
        self._frames = _Table(path=output / "frames.csv", fields=FRAME_FIELDS)
        self._lesions = _Table(path=output / "lesions.csv", fields=LESION_FIELDS)
        self._videos = _Table(path=output / "videos.csv", fields=VIDEO_FIELDS)
        for table in (self._frames, self._lesions, self._videos):
            table.load()
        self._frames.rows = [row for row in self._frames.rows if _is_current(row) and _has(output, row, pictures)]
        self.done = {row["name"]: row for row in self._frames.rows}
        self._lesions.rows = [row for row in self._lesions.rows if row["name"] in self.done]
        self._videos.rows = [row for row in self._videos.rows if _is_current(row)]
        self._writers: dict[str, Any] = {}

    def name_sources(self, found: Sequence[tuple[Path, PurePosixPath]]) -> list[_Source]:
        """Give every file a name of its own; finished ones keep theirs.

        The first of several files of the same name and folder gets ``NAME``, the next ``NAME_jpg``, ``NAME_jpg_2``.
        """
        before = {os.path.abspath(row["file"]): _stem(row) for row in self._frames.rows}
        # Case does not distinguish files everywhere.
        taken, sources = {stem.lower() for stem in before.values()}, []
        videos = {str(stem).lower() for path, stem in found if path.suffix.lower() in VIDEO_SUFFIXES}
        for path, stem in found:
            name = before.get(os.path.abspath(path))
            if name is None:
                video, frame, number = str(stem).lower().rpartition("_frame")
                if frame and number.isdigit() and video in videos:
                    taken.add(str(stem).lower())  # the name of a frame of that video
                tagged = f"{stem}_{path.suffix[1:].lower()}"
                numbered = (f"{tagged}_{n}" for n in range(2, len(found) + 2))
                name = next(n for n in (str(stem), tagged, *numbered) if n.lower() not in taken)
                taken.add(name.lower())
            sources.append(_Source(path, PurePosixPath(name)))
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

    def frames(self, source: _Source, *, every: int) -> Iterator[_Frame]:
        """Frames of a file, without their pixels where they are finished. Raises _UnreadableError."""
        name = str(source.stem)
        if source.is_video:
            yield from self._video_frames(source, every=every)
        else:
            yield _Frame(name, None if name in self.done else _read_image(source.path))

    def _video_frames(self, source: _Source, *, every: int) -> Iterator[_Frame]:
        row = self._finished_video(source, every=every)
        if row is not None:
            yield from (_Frame(name, None) for name in _frame_names(source, int(row["frames_read"]), every=every))
        else:
            row = yield from self._read_video(source, every=every)
        read, announced = int(row["frames_read"]), int(row["frames_announced"])
        if read < _SHORT_VIDEO * announced:
            raise _UnreadableError(f"{source.path} is truncated: {read} of {announced} frames could be read")

    def _read_video(self, source: _Source, *, every: int) -> Generator[_Frame, None, dict[str, str]]:
        """Read a video from start to end, for seeking is not exact in every format; return its row."""
        with _open_video(source.path) as video:
            fps, index = video.get(cv2.CAP_PROP_FPS), 0
            announced = max(0, int(video.get(cv2.CAP_PROP_FRAME_COUNT)))
            while video.grab():
                if index % every == 0:
                    name = _frame_name(source, index)
                    whole, pixels = (True, None) if name in self.done else video.retrieve()
                    if not whole:
                        break
                    image = None if pixels is None else Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
                    yield _Frame(name, image, index, index / fps if fps > 0 else None)
                index += 1
        if not index:
            raise _UnreadableError(f"{source.path} is truncated or not a video that FFmpeg reads: convert it to MP4")
        row = {"file": source.path.as_posix(), "frames_read": str(index), "frames_announced": str(announced)}
        row |= {"fps": f"{fps:g}", **_file_state(source.path)}
        self._append("videos.csv", [row])
        return row

    def _finished_video(self, source: _Source, *, every: int) -> dict[str, str] | None:
        """The video's row, if it was read to its end and all its frames are there."""
        for row in self._videos.rows:
            if os.path.abspath(row["file"]) == os.path.abspath(source.path):
                names = _frame_names(source, int(row["frames_read"]), every=every)
                return row if all(name in self.done for name in names) else None
        return None

    def add(self, source: _Source, frame: _Frame, prediction: Prediction) -> None:
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
            "file": source.path.as_posix(),
            "frame": "" if frame.index is None else str(frame.index),
            "time_s": "" if frame.time is None else f"{frame.time:.3f}",
            "width": str(width),
            "height": str(height),
            "polyp_pixels": str(prediction.area),
            "polyp_share": f"{prediction.share:.6f}",
            "lesions": str(len(lesions)),
            "mean_probability": f"{inside.mean(dtype=np.float64):.4f}" if inside.size else "",
            "max_probability": f"{prediction.probability.max():.4f}",
            **_file_state(source.path),
        }
        self._append("lesions.csv", lesions)
        self._append("frames.csv", [row])
        self.done[frame.name] = row

    def _append(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        writer, file = self._writers[table]
        with explain_write_errors(Path(file.name)):
            writer.writerows(rows)
            file.flush()


def _frame_name(source: _Source, index: int) -> str:
    return f"{source.stem}_frame{index:06d}"


def _frame_names(source: _Source, count: int, *, every: int) -> list[str]:
    return [_frame_name(source, index) for index in range(0, count, every)]


def _stem(row: dict[str, str]) -> str:
    """The name of a row's file: that of a video is its frames' without their number."""
    return row["name"].removesuffix(f"_frame{int(row['frame']):06d}") if row["frame"] else row["name"]


def _file_state(path: Path) -> dict[str, str]:
    """By what a changed file is recognised: its size, and its time of change (UTC)."""
    state = path.stat()
    changed = datetime.fromtimestamp(state.st_mtime, UTC).isoformat(timespec="microseconds")
    return {"file_bytes": str(state.st_size), "file_modified": changed}


def _is_current(row: dict[str, str]) -> bool:
    """Whether a row's file is what it was; one that is gone keeps its row."""
    path = Path(row["file"])
    return not path.exists() or _file_state(path).items() <= row.items()


def _has(output: Path, row: dict[str, str], pictures: dict[str, str]) -> bool:
    return all((output / folder / f"{row['name']}{suffix}").is_file() for folder, suffix in pictures.items())
