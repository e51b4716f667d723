"""Videos: frames with their true times, whether a file is whole, overlay videos, smoothing and flicker.

OpenCV is imported where a video is opened, so that images can be segmented without it.
"""

import math
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.images import check_pixels
from polypseg.errors import PolypSegError, UsageError, first_line, unknown_name
from polypseg.files import atomic_path, printable

if TYPE_CHECKING:
    import cv2

RATE = 25.0
"""Frames per second where a video states none."""
_RATES = (0.5, 240.0)
"""Frames per second that are believed; some containers state their clock's ticks instead."""
_LONGEST_STILL = 10.0
"""Seconds for which an overlay video holds a frame at most, however long the gap to the next is."""
_RETRIES = 8
"""Reads after a failed one: FFmpeg goes on behind a damaged place, and fails for good at the end."""
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_UNSTATED_RIFF = (0, 0xFFFFFFFF)


# Reading -----------------------------------------------------------------------------------------------


class Video:
    """A video that is read once from start to end, for seeking is not exact in every format.

    What describes the reading (``read``, ``times``, ``problem``) is complete when ``frames`` is at its end.
    """

    def __init__(self, capture: "cv2.VideoCapture", path: Path):
        import cv2

        self._capture, self._path = capture, path
        rate = float(capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if _RATES[0] <= rate <= _RATES[1] else 0.0
        """Frames per second as the container states them; 0 where it states none. An average at best."""
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = max(0, int(count)) if math.isfinite(count) else 0
        """Frames by the header: exact in few containers, often an estimate from the duration."""
        self.read = 0
        """Frames read so far."""
        self._estimated_times = 0
        self._damaged_places = 0
        self._refused = ""
        width, height = (capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        try:
            if width > 0 and height > 0:
                check_pixels(int(width), int(height), name="it")
        except UsageError:  # of the limit itself
            raise
        except PolypSegError as error:
            self._refused = str(error).removeprefix("it is ")

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["Video"]:
        """Open a file; one that FFmpeg does not read, or whose frames have too many pixels, gives no frame."""
        import cv2

        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's own messages: we report what cannot be read
        with _plain_path(path) as name:
            level = cv2.utils.logging.getLogLevel()
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
            capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
            cv2.utils.logging.setLogLevel(level)
            capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
            try:
                yield cls(capture, path)
            finally:
                capture.release()

    def frames(self, *, every: int = 1) -> Iterator[tuple[int, float | None]]:
        """Index and time of every ``every``-th frame; ``image`` decodes the one last given."""
        before: float | None = None
        failures = 0
        while not self._refused and failures <= _RETRIES and self._capture.isOpened():
            if not self._capture.grab():
                failures += 1
                continue
            if failures:
                self._damaged_places += 1
            failures = 0
            before = self._time(before)
            index, self.read = self.read, self.read + 1
            if index % every == 0:
                yield index, before

    def image(self) -> Image.Image | None:
        """The frame last given as an RGB image; None for one that cannot be decoded."""
        import cv2

        whole, pixels = self._capture.retrieve()
        if not whole:
            self._damaged_places += 1
            return None
        return Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))

    def _time(self, before: float | None) -> float | None:
        """Of the frame just read: the container's, or one frame later than the last where it gives none."""
        import cv2

        time = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
        if not self.read:
            return time if math.isfinite(time) else 0.0
        if before is not None and math.isfinite(time) and time > before:
            return time
        self._estimated_times += 1
        return before + 1 / self.rate if before is not None and self.rate else None

    @property
    def times(self) -> str:
        """Where the times come from: ``container``, or how many of them follow from the frame rate."""
        if not self._estimated_times:
            return "container"
        return f"frame rate ({self._estimated_times} of {self.read})" if self.rate else ""

    @property
    def problem(self) -> str:
        """What is wrong with the file as far as can be known, else an empty text."""
        if self._refused:
            return self._refused
        if not self.read:
            return "truncated or not a video that FFmpeg reads: convert it to MP4"
        missing = missing_bytes(self._path)
        of = f" of {self.announced}" if self.announced > self.read else ""
        if missing:
            return f"truncated: {self.read}{of} frames could be read (at least {missing} bytes are missing)"
        if self._damaged_places:
            return f"damaged in {self._damaged_places} place(s): {self.read}{of} frames could be read"
        return ""


@contextmanager
def _plain_path(path: Path) -> Iterator[str]:
    """An absolute path for OpenCV, which takes no names that are not UTF-8: those get a link of a plain name."""
    place = os.path.abspath(path)
    if printable(place) == place:
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="polypseg-") as folder:
        suffix = path.suffix if path.suffix.isascii() and path.suffix.isprintable() else ""
        link = Path(folder) / f"video{suffix}"
        link.symlink_to(place)
        yield str(link)


# Whole or not ------------------------------------------------------------------------------------------


def missing_bytes(path: Path) -> int | None:
    """How many bytes at least a video file lacks of what its container states; None where it states nothing.

    MP4, MOV, AVI, Matroska, WebM and ASF state the size of the whole, FLV and Ogg of each packet, and a GIF has an end
    mark; of MPEG streams nobody can say whether they go on.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            end = _riff_end(file, size)
        elif start[:4] == b"\x1a\x45\xdf\xa3":
            end = _matroska_end(file)
        elif start[:8] == b"\x30\x26\xb2\x75\x8e\x66\xcf\x11":
            end = _asf_end(file)
        elif start[:4] in (b"FLV\x01", b"OggS"):
            end = _packets_end(file, size, ogg=start[:1] == b"O")
        elif start[:4] == b"GIF8":
            file.seek(max(0, size - 64))
            end = size if file.read().rstrip(b"\0").endswith(b";") else size + 1
        elif start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            end = _boxes_end(file, size)
        else:
            end = None
    return None if end is None else max(0, end - size)


def _boxes_end(file: IO[bytes], size: int) -> int | None:
    """End of the last box of an MP4 or QuickTime file."""
    at = 0
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length = struct.unpack(">I", head[:4])[0]
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length == 0:  # to the end of the file
            return size
        if length < 8 or not head[4:8].isascii():  # no box: something was appended
            return size
        at += length
    return at


def _riff_end(file: IO[bytes], size: int) -> int | None:
    """End of the last RIFF chunk of an AVI file; large ones have several."""
    at, end = 0, None
    while at + 12 <= size:
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        if name != b"RIFF" or length in _UNSTATED_RIFF:
            break
        at += 8 + length + length % 2
        end = at if at <= size else at - length % 2
    return end


def _matroska_end(file: IO[bytes]) -> int | None:
    """End of the segment; live recordings state none."""
    file.seek(4)
    header = _matroska_size(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    length = _matroska_size(file)
    return None if length is None else file.tell() + length


def _matroska_size(file: IO[bytes]) -> int | None:
    """A number of variable length; None for the unknown size (all bits set) or the file's end."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    rest = file.read(more)
    value = int.from_bytes(bytes([first[0] & (0xFF >> (more + 1))]) + rest, "big")
    return None if len(rest) < more or value == (1 << 7 * (more + 1)) - 1 else value


def _packets_end(file: IO[bytes], size: int, *, ogg: bool) -> int:
    """End of the last packet (FLV: tag, Ogg: page); where no packet follows another, something was appended."""
    at = 0 if ogg else 13
    while at < size:
        file.seek(at)
        head = file.read(27 if ogg else 11)
        if ogg:
            if not b"OggS".startswith(head[:4]):
                return size
            lengths = file.read(head[26]) if len(head) == 27 else b""
            at += 27 + (head[26] if len(head) == 27 else 0) + sum(lengths)
        else:
            if head[0] & 0x1F not in (8, 9, 18):
                return size
            at += 11 + int.from_bytes(head[1:4], "big") + 4 if len(head) == 11 else 11
    return at


def _asf_end(file: IO[bytes]) -> int | None:
    file.seek(0)
    head = file.read(65536)
    at = head.find(_ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    size, flags = struct.unpack_from("<Q", head, at + 40)[0], struct.unpack_from("<I", head, at + 88)[0]
    return None if flags & 1 or not size else int(size)  # a broadcast states none


# Overlay videos ----------------------------------------------------------------------------------------


class _Sink(Protocol):
    def write(self, pixels: NDArray[np.uint8]) -> None:
        """Take a frame, (H, W, 3) BGR."""

    def close(self) -> None:
        """Finish the file. Raises PolypSegError when it cannot be whole."""

    def abandon(self) -> None:
        """Stop; the file may stay as it is."""


class _OpenCVSink:
    """WebM or AVI by OpenCV's own encoders."""

    def __init__(self, path: Path, *, codec: str, rate: float, size: tuple[int, int]):
        import cv2

        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        self._path = path
        self._plain = ExitStack()
        folder = self._plain.enter_context(_plain_path(path.parent))
        fourcc = cv2.VideoWriter.fourcc(*codec)
        with _quiet_stderr():  # OpenCV says of every WebM file that it does not know its tag, and writes it well
            self._writer = cv2.VideoWriter(os.path.join(folder, path.name), cv2.CAP_FFMPEG, fourcc, rate, size)
        if not self._writer.isOpened():
            self.abandon()
            raise PolypSegError(
                f"cannot write the overlay video {path.name}: this OpenCV has no encoder for {path.suffix}: choose "
                "another format (--overlay-video)"
            )

    def write(self, pixels: NDArray[np.uint8]) -> None:
        self._writer.write(pixels)

    def close(self) -> None:
        self.abandon()
        if not self._path.is_file() or missing_bytes(self._path) != 0:  # OpenCV tells nothing of a full disk
            raise PolypSegError(
                f"cannot write {printable(self._path.name)} to its end: free some space or choose another folder"
            )

    def abandon(self) -> None:
        self._writer.release()
        self._plain.close()


class _FFmpegSink:
    """H.264 in MP4 by the ffmpeg that the user has."""

    def __init__(self, path: Path, *, rate: float, size: tuple[int, int]):
        self._path = path
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        command = [
            *(_ffmpeg() or "ffmpeg", "-hide_banner", "-loglevel", "error", "-nostdin", "-y"),
            *("-f", "rawvideo", "-pix_fmt", "bgr24", "-s", f"{size[0]}x{size[1]}", "-r", f"{rate:.6f}", "-i", "pipe:0"),
            *("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-pix_fmt", "yuv420p"),
            *("-movflags", "+faststart", "-fflags", "+bitexact", os.path.abspath(path)),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._errors, start_new_session=True)

    def write(self, pixels: NDArray[np.uint8]) -> None:
        try:
            self._process.stdin.write(np.ascontiguousarray(pixels).data)  # type: ignore[union-attr]
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        with suppress(OSError):  # it has ended already: its own words say why
            self._process.stdin.close()  # type: ignore[union-attr]
        code = self._process.wait()
        self._errors.seek(0)
        words = first_line(Exception(self._errors.read(4000).decode("utf-8", "replace")))
        self._errors.close()
        if code or not self._path.is_file():
            raise PolypSegError(
                f"ffmpeg cannot write {printable(self._path.name)}: {words}; choose another format "
                "(--overlay-video webm) or folder"
            )

    def abandon(self) -> None:
        self._process.kill()
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()
        self._errors.close()


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard what C code writes to the standard error."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@cache
def _ffmpeg() -> str | None:
    """The ffmpeg on PATH, if it encodes H.264."""
    program = shutil.which("ffmpeg")
    if program is None:
        return None
    try:
        listed = subprocess.run([program, "-hide_banner", "-encoders"], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return program if b" libx264 " in listed.stdout else None


ENCODED_FORMATS = ("mp4", "webm", "avi")
"""H.264 by the ffmpeg on PATH, plays everywhere; VP8 by OpenCV, plays in browsers; MJPG, the fastest and largest."""
OVERLAY_FORMATS = (*ENCODED_FORMATS, "jpg", "none")
"""Those, a picture per frame, or nothing."""
_CODECS = {
    "webm": "VP80",
    "avi": "MJPG",
}  # VP9 by OpenCV takes 2.6 to 3.5 times as long as VP8, with no way to ask less


def overlay_format(name: str | None) -> str:
    """The format of overlay videos: ``name``, or by default ``mp4`` where ffmpeg is there to write it, else ``webm``.

    Raises UsageError for a name that is none of OVERLAY_FORMATS, or for ``mp4`` without an ffmpeg that writes it.
    """
    if name is None:
        return "mp4" if _ffmpeg() else "webm"
    if name not in OVERLAY_FORMATS:
        raise unknown_name("overlay video format", name, OVERLAY_FORMATS)
    if name == "mp4" and not _ffmpeg():
        raise UsageError("overlay videos in MP4 need an ffmpeg with libx264 on PATH: install one, or choose webm")
    return name


class OverlayVideo:
    """A video of overlays, written whole or not at all, without sound and at a constant rate.

    Frames of varying distance are held or moved on to the grid of the rate; none is left out. All get the first one's
    size, with borders where theirs has another shape; odd sizes grow by a pixel, which the encoders need.
    """

    def __init__(self, path: Path, *, rate: float):
        self._stack = ExitStack()
        self._temporary = self._stack.enter_context(atomic_path(path))
        self._rate = rate if _RATES[0] <= rate <= _RATES[1] else RATE
        self._sink: _Sink | None = None
        self._size = (0, 0)
        self._last: NDArray[np.uint8] | None = None
        self._next = 0

    def write(self, image: Image.Image, *, time: float | None) -> None:
        """Add a frame (RGB) that is shown from ``time`` on, in seconds."""
        if self._sink is None:
            self._size = (image.width + image.width % 2, image.height + image.height % 2)
            self._sink = self._open_sink()
        pixels = _fit(np.asarray(image)[:, :, ::-1], self._size)
        if self._last is not None and time is not None:
            held = min(round(time * self._rate) - self._next, round(_LONGEST_STILL * self._rate))
            for _ in range(held):
                self._sink.write(self._last)
            self._next = max(self._next, round(time * self._rate))
        self._sink.write(pixels)
        self._last = pixels
        self._next += 1

    def _open_sink(self) -> _Sink:
        kind = self._temporary.suffix[1:]
        if kind == "mp4":
            return _FFmpegSink(self._temporary, rate=self._rate, size=self._size)
        return _OpenCVSink(self._temporary, codec=_CODECS[kind], rate=self._rate, size=self._size)

    def finish(self) -> bool:
        """Put the video in its place; False where it has no frame, and no file. Raises PolypSegError."""
        if self._sink is None:
            self.abandon()
            return False
        sink, self._sink = self._sink, None
        try:
            sink.close()
        except BaseException:
            self.abandon()
            raise
        self._stack.close()
        return True

    def abandon(self) -> None:
        """Leave nothing behind; may follow ``finish``."""
        if self._sink is not None:
            self._sink.abandon()
            self._sink = None
        self._stack.pop_all().__exit__(_AbandonedError, _AbandonedError(), None)


class _AbandonedError(Exception):
    """Ends the writing of a file that is not wanted any more."""


def _fit(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) pixels in (width, height): reduced or enlarged where they have another shape, the rest of the edge."""
    import cv2

    height, width = pixels.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    if not (size[0] - 1 <= width <= size[0] and size[1] - 1 <= height <= size[1]):
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_AREA)
    right, below = size[0] - width, size[1] - height
    border = cv2.BORDER_REPLICATE if max(right, below) <= 1 else cv2.BORDER_CONSTANT
    return np.asarray(cv2.copyMakeBorder(np.ascontiguousarray(pixels), 0, below, 0, right, border), dtype=np.uint8)


# Smoothing and flicker ---------------------------------------------------------------------------------


class CausalSmoother:
    """Exponential average of probability maps over time; it looks back only, so it works on live frames.

    After a gap of ``seconds`` the past counts 1/e; where frames change their size it starts again.
    """

    def __init__(self, seconds: float):
        self._seconds = check_smoothing(seconds)
        self._state: NDArray[np.float32] | None = None
        self._time: float | None = None

    def __call__(self, probability: NDArray[np.float32], *, time: float | None) -> NDArray[np.float32]:
        """The smoothed map (H, W), 0 to 1, of a frame at ``time`` in seconds; without time frames are 1/25 s apart."""
        passed = 1 / RATE if time is None or self._time is None else time - self._time
        self._time = time
        if self._state is None or self._state.shape != probability.shape or passed < 0:
            self._state = probability
        else:
            new = np.float32(1 - math.exp(-passed / self._seconds))
            self._state = self._state + new * (probability - self._state)
        return self._state


def check_smoothing(seconds: float) -> float:
    """``seconds`` if it is a time constant by which one can smooth. Raises UsageError."""
    if not 0 < seconds <= 60:
        raise UsageError(f"smoothing takes a time in seconds, above 0 and at most 60; got {seconds}")
    return seconds


class FlickerIndex:
    """How much the masks of a clip flicker, 0 to 1.

    Of the pixels that are polyp in any of three consecutive masks, the fraction that changes from the first to the
    second and changes back in the third; summed over the clip. What moves or appears once does not flicker.
    """

    def __init__(self) -> None:
        self._last: list[NDArray[np.bool_]] = []
        self._flips = 0
        self._pixels = 0

    def add(self, mask: NDArray[np.bool_]) -> None:
        """The next mask (H, W); one of another size begins anew."""
        if self._last and self._last[-1].shape != mask.shape:
            self._last = []
        if len(self._last) == 2:
            first, second = self._last
            self._flips += int(np.count_nonzero((first != second) & (second != mask)))
            self._pixels += int(np.count_nonzero(first | second | mask))
        self._last = [*self._last[-1:], mask]

    @property
    def value(self) -> float | None:
        """The index; None where no three masks with any polyp follow one another."""
        return self._flips / self._pixels if self._pixels else None
