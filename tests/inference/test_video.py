"""Videos: true times, files that are whole and files that are not, rotation, overlay videos, smoothing, flicker."""

import os
import shutil
import stat
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from polypseg.errors import PolypSegError, UsageError
from polypseg.inference import video as module
from polypseg.inference.video import (
    CausalSmoother,
    FlickerIndex,
    OverlayVideo,
    Video,
    missing_bytes,
    overlay_format,
)

MATRIX = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Degrees clockwise -> the display matrix's a, b, c, d."""


def picture(seed: int, *, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Coarse noise, (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_video(path: Path, *, frames: int = 6, codec: str = "mp4v") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 25.0, (64, 48))
    assert writer.isOpened()
    for n in range(frames):
        writer.write(np.asarray(picture(n))[:, :, ::-1].copy())
    writer.release()
    return path


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def edit_boxes(data: bytes, edits: dict[bytes, object]) -> bytes:
    """An MP4 (or the content of a box) in which ``edits`` (name -> function of the content) are made."""
    made, at = b"", 0
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        content = data[at + 8 : at + length]
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            content = edit_boxes(content, edits)
        elif name in edits:
            content = edits[name](content)  # type: ignore[operator]
        made += box(name, content)
        at += length
    return made


def with_frame_times(path: Path, runs: list[tuple[int, float]]) -> None:
    """Give an MP4's frames durations: (frames, seconds of each)."""
    data = path.read_bytes()
    ticks = struct.unpack(">I", data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20])[0]
    entries = b"".join(struct.pack(">II", count, round(seconds * ticks)) for count, seconds in runs)
    table = bytes(4) + struct.pack(">I", len(runs)) + entries
    whole = data.replace(b"edts", b"free")  # the edit list ends where the frames ended
    path.write_bytes(edit_boxes(whole, {b"stts": lambda _: table}))


def with_rotation(path: Path, degrees: int) -> None:
    matrix = b"".join(struct.pack(">i", value << 16) for value in MATRIX[degrees])
    a, b, c, d = (matrix[i : i + 4] for i in range(0, 16, 4))

    def turn(content: bytes) -> bytes:
        return content[:40] + a + b + bytes(4) + c + d + content[60:]

    path.write_bytes(edit_boxes(path.read_bytes(), {b"tkhd": turn}))


def read_times(path: Path, **options) -> tuple[list[tuple[int, float | None]], Video]:
    with Video.open(path) as video:
        return list(video.frames(**options)), video


def read_frames(path: Path) -> list[np.ndarray]:
    with Video.open(path) as video:
        return [np.asarray(video.image()) for _ in video.frames()]


# -- reading --------------------------------------------------------------------------------------------


def test_times_are_the_containers_where_the_rate_varies(tmp_path):
    path = write_video(tmp_path / "varying.mp4")
    with_frame_times(path, [(3, 0.04), (2, 1.0), (1, 0.04)])
    times, video = read_times(path)
    assert [time for _, time in times] == pytest.approx([0, 0.04, 0.08, 0.12, 1.12, 2.12], abs=1e-3)
    assert (video.times, video.problem, video.read) == ("container", "", 6)
    assert read_times(path, every=2)[0] == [times[0], times[2], times[4]]


class Capture:
    """Stands for OpenCV where the container gives no times."""

    def __init__(self, *, milliseconds: list[float], rate: float):
        self._left, self._rate, self._now = list(milliseconds), rate, 0.0

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def grab(self) -> bool:
        if not self._left:
            return False
        self._now = self._left.pop(0)
        return True

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: self._rate, cv2.CAP_PROP_POS_MSEC: self._now}.get(what, -9.2e18)


@pytest.mark.parametrize(
    ("milliseconds", "rate", "times", "source"),
    [
        ([0, 0, 0], 20, [0, 0.05, 0.1], "frame rate (2 of 3)"),
        ([0, 40, 0, 120], 25, [0, 0.04, 0.08, 0.12], "frame rate (1 of 4)"),
        ([0, float("nan"), 100], 10, [0, 0.1, 0.2], "frame rate (2 of 3)"),
        ([0, 0], 0, [0, None], ""),
        ([0, 0], 90000, [0, None], ""),  # the clock's ticks, no rate
    ],
)
def test_times_fall_back_on_the_rate_and_say_so(tmp_path, milliseconds, rate, times, source):
    video = Video(Capture(milliseconds=milliseconds, rate=rate), tmp_path / "x.ts")
    assert [time for _, time in video.frames()] == pytest.approx(times)
    assert (video.times, video.announced) == (source, 0)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_applied(tmp_path, degrees):
    upright = write_video(tmp_path / "upright.mp4", frames=1)
    turned = Path(shutil.copy(upright, tmp_path / "turned.mp4"))
    with_rotation(turned, degrees)
    (expected,), (frame,) = read_frames(upright), read_frames(turned)
    np.testing.assert_array_equal(frame, np.rot90(expected, -degrees // 90))


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "MJPG"), ("mkv", "MJPG"), ("webm", "VP80"), ("mov", "mp4v")])
def test_whole_files_lack_nothing_and_cut_ones_are_truncated(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"clip.{suffix}", frames=20, codec=codec)
    assert missing_bytes(path) == 0 and read_times(path)[1].problem == ""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    times, video = read_times(path)
    assert missing_bytes(path) == len(data) - len(data) * 2 // 3 or suffix == "mov"
    assert video.problem.startswith("truncated") and len(times) < 20


def test_cut_files_of_other_containers_are_told_by_their_packets(tmp_path):
    tag = b"\x09" + (100).to_bytes(3, "big") + bytes(7 + 100 + 4)
    page = b"OggS" + bytes(22) + bytes([2, 255, 45]) + bytes(300)
    asf = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(14) + module._ASF_PROPERTIES + bytes(24)
    asf += struct.pack("<Q", 500) + bytes(40) + struct.pack("<I", 0)
    samples = {
        "flv": b"FLV\x01\x01" + (9).to_bytes(4, "big") + bytes(4) + 3 * tag,
        "ogv": 3 * page,
        "wmv": asf + bytes(500 - len(asf)),
        "gif": b"GIF89a" + bytes(200) + b";",
        "mp4": box(b"ftyp", bytes(8)) + box(b"mdat", bytes(90)) + box(b"moov", bytes(20)),
    }
    for name, data in samples.items():
        path = tmp_path / f"whole.{name}"
        path.write_bytes(data)
        assert missing_bytes(path) == 0, name
        for cut in (1, 15, len(data) // 2 + 3):
            path.write_bytes(data[:-cut])
            assert missing_bytes(path), (name, cut)
    stream = tmp_path / "stream.ts"
    stream.write_bytes((b"\x47" + bytes(187)) * 5 + b"\x47")
    assert missing_bytes(stream) is None


def test_announced_count_is_an_estimate(tmp_path):
    path = write_video(tmp_path / "clip.mkv", codec="MJPG", frames=10)
    video = read_times(path)[1]
    video.announced = 1000
    assert video.problem == ""


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def animation(width: int, height: int, *, frames: int = 2) -> bytes:
    """A GIF of a large canvas on which single pixels are drawn."""
    frame = b"\x21\xf9\4\0\x0a\0\0\0," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return start + frame * frames + b";"


def test_too_many_pixels_are_refused_before_a_frame_is_decoded(tmp_path, monkeypatch):
    """66 bytes took 3.5 GB and 45 s."""
    path = tmp_path / "a.gif"
    path.write_bytes(animation(13_000, 13_000))
    assert path.stat().st_size == 66
    monkeypatch.setattr(Video, "image", lambda self: pytest.fail("a frame was decoded"))
    with Video.open(path) as video:
        assert list(video.frames()) == [] and video.read == 0
        assert video.problem.startswith("too large to be a frame: 13000x13000 pixels, and the limit is 64,000,000. ")


def test_the_limit_of_pixels_can_be_set_for_videos(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    path.write_bytes(animation(300, 200))
    monkeypatch.setenv("POLYPSEG_MAX_PIXELS", "59999")
    with Video.open(path) as video:
        assert list(video.frames()) == [] and "300x200" in video.problem
    monkeypatch.setenv("POLYPSEG_MAX_PIXELS", "60000")
    with Video.open(path) as video:
        assert len(list(video.frames())) == 2 and video.problem == ""


def test_name_that_is_no_utf8_is_opened(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    shutil.move(write_video(tmp_path / "x.mp4"), path)
    assert len(read_times(path)[0]) == 6


# -- overlay videos -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webm", "avi"])
def test_overlay_video_of_odd_size_has_every_frame_at_its_time(tmp_path, kind, capfd):
    path = tmp_path / f"overlay.{kind}"
    video = OverlayVideo(path, rate=25.0)
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for color, time in zip(colors, (0.0, 0.04, 0.2), strict=True):
        video.write(Image.new("RGB", (61, 47), color), time=time)
    assert video.finish() and os.listdir(tmp_path) == [path.name]
    frames = read_frames(path)
    assert {frame.shape for frame in frames} == {(48, 62, 3)}
    shown = [int(frame.reshape(-1, 3).mean(axis=0).argmax()) for frame in frames]
    assert shown == [0, 1, 1, 1, 1, 2]  # the second is held until the third is due
    assert capfd.readouterr().err == ""


def test_frames_that_come_faster_than_the_rate_are_all_kept(tmp_path):
    video = OverlayVideo(tmp_path / "overlay.avi", rate=10.0)
    for n in range(5):
        video.write(picture(n), time=n / 50)
    video.finish()
    assert len(read_frames(tmp_path / "overlay.avi")) == 5


def test_frame_of_another_size_is_fitted(tmp_path):
    video = OverlayVideo(tmp_path / "overlay.avi", rate=25.0)
    video.write(Image.new("RGB", (64, 48), "white"), time=None)
    video.write(Image.new("RGB", (48, 96), "white"), time=None)
    video.finish()
    first, second = read_frames(tmp_path / "overlay.avi")
    assert second.shape == first.shape
    assert second[:, :20].mean() > 200 and second[:, 32:].mean() < 50


def test_abandoned_overlay_video_leaves_nothing(tmp_path):
    video = OverlayVideo(tmp_path / "overlay.avi", rate=25.0)
    video.write(picture(0), time=0.0)
    video.abandon()
    assert os.listdir(tmp_path) == []
    empty = OverlayVideo(tmp_path / "empty.avi", rate=25.0)
    assert empty.finish() is False and os.listdir(tmp_path) == []


def test_overlay_video_cut_by_a_full_disk_is_an_error(tmp_path, monkeypatch):
    video = OverlayVideo(tmp_path / "overlay.avi", rate=25.0)
    for n in range(5):
        video.write(picture(n), time=None)
    monkeypatch.setattr(module, "missing_bytes", lambda path: 7)
    with pytest.raises(PolypSegError, match=r"cannot write overlay\.avi to its end"):
        video.finish()
    assert os.listdir(tmp_path) == []


def put_ffmpeg(folder: Path, monkeypatch, *, script: str) -> None:
    """An ffmpeg of ours on PATH."""
    program = folder / "ffmpeg"
    program.write_text(f"#!/bin/sh\nif [ \"$2\" = -encoders ]; then echo ' V....D libx264 '; exit 0; fi\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    module._ffmpeg.cache_clear()


@pytest.fixture
def forget_ffmpeg():
    yield
    module._ffmpeg.cache_clear()


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for ffmpeg")
@pytest.mark.usefixtures("forget_ffmpeg")
def test_ffmpeg_on_the_path_gets_every_frame(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    put_ffmpeg(tmp_path / "bin", monkeypatch, script='for last; do :; done; cat > "$last"')
    assert overlay_format(None) == "mp4" and overlay_format("webm") == "webm"
    video = OverlayVideo(tmp_path / "overlay.mp4", rate=25.0)
    for n in range(3):
        video.write(picture(n, size=(5, 3)), time=None)
    video.finish()
    assert (tmp_path / "overlay.mp4").stat().st_size == 3 * 6 * 4 * 3
    put_ffmpeg(tmp_path / "bin", monkeypatch, script="echo no such codec >&2; exit 1")
    failing = OverlayVideo(tmp_path / "failing.mp4", rate=25.0)
    with pytest.raises(PolypSegError, match=r"failing\.mp4: no such codec; choose another format"):
        for n in range(50):
            failing.write(picture(n, size=(640, 480)), time=None)
        failing.finish()
    failing.abandon()
    assert sorted(os.listdir(tmp_path)) == ["bin", "overlay.mp4"]


@pytest.mark.usefixtures("forget_ffmpeg")
def test_overlay_format_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    module._ffmpeg.cache_clear()
    assert overlay_format(None) == "webm"
    with pytest.raises(UsageError, match="need an ffmpeg"):
        overlay_format("mp4")
    with pytest.raises(UsageError, match="Did you mean 'webm'"):
        overlay_format("wemb")


# -- smoothing and flicker ------------------------------------------------------------------------------


def test_smoothing_is_an_exponential_average_over_time():
    smoother = CausalSmoother(0.1)
    one, zero = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(smoother(one, time=0.0), one)
    np.testing.assert_allclose(smoother(zero, time=0.1), np.exp(-1), rtol=1e-6)
    np.testing.assert_allclose(smoother(zero, time=0.4), np.exp(-4), rtol=1e-6)
    np.testing.assert_allclose(smoother(one, time=30.0), 1, rtol=1e-6)  # a long gap forgets
    assert smoother(np.zeros((4, 4), np.float32), time=30.1).max() == 0  # another size begins anew


def test_smoothing_looks_back_only():
    rng = np.random.default_rng(0)
    maps = rng.random((6, 4, 4), dtype=np.float32)
    whole, part = CausalSmoother(0.2), CausalSmoother(0.2)
    all_of_it = [whole(frame, time=n / 25) for n, frame in enumerate(maps)]
    for n, frame in enumerate(maps[:3]):
        np.testing.assert_array_equal(part(frame, time=n / 25), all_of_it[n])


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), 61])
def test_smoothing_time_is_checked(seconds):
    with pytest.raises(UsageError, match="seconds"):
        CausalSmoother(seconds)


def test_flicker_counts_what_changes_and_changes_back():
    def index(*masks: list[int]) -> float | None:
        made = FlickerIndex()
        for mask in masks:
            made.add(np.array([mask], dtype=bool))
        return made.value

    assert index([1, 1], [1, 1]) is None and index([0, 0], [0, 0], [0, 0]) is None
    assert index([1, 1], [1, 1], [1, 1]) == 0
    assert index([0, 1], [0, 1], [1, 1]) == 0  # it grows
    assert index([0, 0], [1, 1], [0, 0]) == 1
    assert index([1, 1], [0, 1], [1, 1], [1, 1]) == 0.25
    one = FlickerIndex()
    for shape in ((1, 2), (1, 2), (2, 2), (2, 2)):
        one.add(np.ones(shape, dtype=bool))
    assert one.value is None
