"""The tables of a folder of ``segment``: what is finished of which file, what is to be read, how rows are added."""

import csv
import io
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from polypseg.data.images import decode_frame
from polypseg.errors import PolypSegError
from polypseg.files import atomic_path, explain_write_errors, from_cell, original_name, printable, to_cell
from polypseg.inference.inputs import Source
from polypseg.inference.segment_steps import Entries, Entry, Frame, Skipped, VideoEnd, VideoStart
from polypseg.inference.segmenter import Prediction
from polypseg.inference.video import Video

FRAME_FIELDS = (
    "name", "file", "frame", "time_s", "width", "height", "polyp_pixels", "polyp_share", "lesions",
    "mean_probability", "max_probability", "expected_dice", "flag", "file_bytes", "file_modified",
)  # fmt: skip  # fmt: skip
LESION_FIELDS = (
    "name", "lesion", "x", "y", "width", "height", "area", "mean_probability", "max_probability",
)  # fmt: skip  # fmt: skip
VIDEO_FIELDS = (
    "file", "frames_read", "frames_announced", "fps", "times", "overlay", "flicker", "flicker_unsmoothed", "problem",
    "file_bytes", "file_modified",
)  # fmt: skip  # fmt: skip


def picture_folders(*, probabilities: bool, margins: bool) -> dict[str, str]:
    """Folder -> suffix of the pictures of every frame."""
    more = [name for name, wanted in (("probabilities", probabilities), ("margins", margins)) if wanted]
    return {"masks": ".png", "overlays": ".jpg", **dict.fromkeys(more, ".png")}


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


class Tables:
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

    def read(self, sources: Iterable[Source], *, every: int, draws: bool) -> Entries:
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
                    yield Frame(source=source, name=name, state=state, image=image, finished=finished)
            except _UnreadableError as error:
                yield Skipped(source=source, reason=str(error))
            except OSError as error:
                reason = f"{printable(str(source.path))} cannot be read: {error.strerror}"
                yield Skipped(source=source, reason=reason)

    def _read_video(self, source: Source, state: dict[str, str], *, every: int, draws: bool) -> Iterator[Entry]:
        row = self._finished_video(source)
        if row is not None:
            for index in range(0, int(row["frames_read"]), every):
                name = _frame_name(source, index)
                yield Frame(source=source, name=name, state=state, index=index, finished=True, in_finished_video=True)
            problem = row["problem"]
        else:
            problem = yield from self._read_frames(source, state, every=every, draws=draws)
        if problem:
            raise _UnreadableError(f"{printable(str(source.path))} is {problem}")

    def _read_frames(
        self, source: Source, state: dict[str, str], *, every: int, draws: bool
    ) -> Generator[Entry, None, str]:
        """Read a video; return what is wrong with it."""
        with source.path.open("rb"):
            pass  # FFmpeg does not say why it cannot open a file
        with Video.open(source.path) as video:
            for index, at in video.frames(every=every):
                if index == 0:
                    yield VideoStart(source=source, rate=video.rate / every)
                name = _frame_name(source, index)
                finished = name in self.done
                image = video.image() if draws or not finished else None
                if image is not None or finished:
                    yield Frame(
                        source=source, name=name, state=state, image=image, index=index, time=at, finished=finished
                    )
            problem = video.problem
            if video.read:
                row = {"file": printable(source.path.as_posix()), "frames_read": str(video.read)}
                row |= {"frames_announced": str(video.announced), "fps": f"{video.rate:g}", "times": video.times}
                yield VideoEnd(source=source, row=row | {"problem": problem} | state)
        return problem

    def _finished_video(self, source: Source) -> dict[str, str] | None:
        place = os.path.abspath(source.path)
        rows = (row for row in self._videos.rows if os.path.abspath(original_name(row["file"])) == place)
        return next(rows, None)

    def add_video(self, row: dict[str, str]) -> None:
        """Record a video whose frames and overlay video are written."""
        self._append("videos.csv", [row])

    def add(self, frame: Frame, prediction: Prediction) -> None:
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
