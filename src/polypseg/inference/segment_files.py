"""Segment image files, folders and videos into masks, overlays and tables; a second call continues the first.

Reading, the model, drawing and writing run in threads of their own, in the order of the files. A frame is finished when
its row stands in ``frames.csv``: pictures and lesions are written before it, so an interruption at any moment costs
what is on its way, and no more.
"""

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import (
    LOCK,
    atomic_path,
    environment_record,
    explain_write_errors,
    printable,
    read_json,
    sole_writer,
    write_csv,
    write_json,
)
from polypseg.inference.inputs import Inputs, Source, read_inputs
from polypseg.inference.memory import keep_freed_memory
from polypseg.inference.operating_point import OperatingPoint
from polypseg.inference.pipeline import in_background
from polypseg.inference.segment_steps import (
    Drawing,
    Frame,
    Skipped,
    VideoEnd,
    VideoStart,
    predict_frames,
    prepare_frames,
)
from polypseg.inference.segment_tables import Tables, picture_folders
from polypseg.inference.segmenter import MIN_AREA, Segmenter, check_options
from polypseg.inference.video import (
    ENCODED_FORMATS,
    OverlayVideo,
    Video,
    check_smoothing,
    overlay_format,
)

RECORD = "run.json"
KIND = "polypseg segmentation"
_OWN = (
    "masks", "overlays", "probabilities", "margins", "frames.csv", "lesions.csv", "videos.csv",
    "skipped.csv", RECORD,
)  # fmt: skip
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
    tables = Tables(
        output,
        pictures=picture_folders(probabilities=save_probability, margins=margin is not None),
        every=every,
        whole_videos=smooth is not None,
    )
    sources = tables.name_sources(found.sources)
    keep_freed_memory()  # each frame asks for as much as the one before gave back
    skipped: list[tuple[str, str]] = []
    segmented, seen, flicker = 0, [], []
    kind = overlay_format(overlay_video) if any(source.is_video for source in sources) else "none"
    videos = _VideoWriter(output, tables, kind)
    start = time.perf_counter()
    try:
        with tables.open(), tqdm(total=_count_frames(sources, every), unit="frame", disable=None) as progress:
            entries = prepare_frames(tables.read(sources, every=every, draws=videos.draws), segmenter)
            read = in_background(entries, depth=max(_AHEAD, batch_size))
            predicted = in_background(predict_frames(read, segmenter, batch_size=batch_size), depth=_AHEAD)
            drawing = Drawing(
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
                    if isinstance(entry, Skipped):
                        skipped.append((printable(str(entry.source.path)), entry.reason))
                    elif isinstance(entry, Frame):
                        if not entry.finished and entry.prediction is not None:
                            _write_pictures(output, entry.name, entry.pictures)
                            tables.add(entry, entry.prediction)
                            segmented += 1
                        videos.add(entry)
                        seen.append(entry.name)
                        progress.update()
                    elif isinstance(entry, VideoStart):
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


class _VideoWriter:
    """Writes the overlay video of the video at hand, and the row when it is finished."""

    def __init__(self, output: Path, tables: Tables, kind: str):
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

    def start(self, video: VideoStart) -> None:
        if self.draws:
            self._current = OverlayVideo(self._output / self._place(video.source), rate=video.rate)

    def add(self, frame: Frame) -> None:
        if self._current is not None and frame.overlay is not None:
            self._current.write(frame.overlay, time=frame.time)

    def finish(self, video: VideoEnd) -> None:
        overlay, self._current = self._current, None
        written = overlay is not None and overlay.finish()
        self._tables.add_video({**video.row, "overlay": self._place(video.source) if written else ""})

    def _place(self, source: Source) -> str:
        return f"overlays/{source.name}.{self._kind}"
