"""Segmenting files: mixed folders, videos, names, tables with the right numbers, resuming, and what it refuses."""

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.data.images import decode_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.inference import segment_files as module
from polypseg.inference import video as video_module
from polypseg.inference.model import build_image_processor
from polypseg.inference.segment_files import find_sources, segment_files
from polypseg.inference.segmenter import Segmenter
from polypseg.inference.video import CausalSmoother, FlickerIndex

GOOD = ("patient1/frame.png", "patient2/deep/frame.png", "patient2/frame.jpg", "patient2/frame.png")
NAMES = ("patient1/frame", "patient2/deep/frame", "patient2/frame", "patient2/frame_png")
BAD = ("bad/sixteen.png", "bad/text.png", "bad/truncated.jpg")


def make_segmenter(seed: int = 0) -> Segmenter:
    """A random model whose masks cover a part of a frame of noise."""
    torch.manual_seed(seed)
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet10t", decoder_channels=16, image_size=32))
    made = Segmenter(model=model, processor=build_image_processor(model.config), name="tiny")
    probability = np.concatenate([made.predict([draw(n)])[0].probability.ravel() for n in range(3)])
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias -= float(np.median(np.log(probability / (1 - probability))))
    return made


def draw(seed: int, *, size: tuple[int, int] = (60, 48)) -> Image.Image:
    """Coarse noise, (width, height) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_video(path: Path, *, frames: int = 7, codec: str = "mp4v") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25.0, (64, 48))
    assert writer.isOpened()
    for n in range(frames):
        writer.write(np.asarray(draw(100 + n, size=(64, 48)))[:, :, ::-1].copy())
    writer.release()


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return make_segmenter()


def read_video(path: Path) -> list[np.ndarray]:
    video, frames = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG), []
    while (grabbed := video.read())[0]:
        frames.append(grabbed[1])
    return frames


@pytest.fixture(autouse=True)
def without_ffmpeg(monkeypatch) -> None:
    """Overlay videos are WebM by default, whatever this machine has."""
    monkeypatch.setattr(video_module, "_ffmpeg", lambda: None)


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Path:
    """``mixed``: good, nested and equal names, a video, three files that are bad in three ways."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mixed"
    for n, name in enumerate(GOOD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(n).save(folder / name)
    (folder / "bad").mkdir()
    draw(8).save(folder / "bad" / "whole.jpg", quality=95)
    whole = (folder / "bad" / "whole.jpg").read_bytes()
    (folder / "bad" / "whole.jpg").unlink()
    (folder / "bad" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bad" / "text.png").write_text("this is no picture")
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60)).save(folder / "bad" / "sixteen.png")
    (folder / "notes.txt").write_text("no image by its name or content")
    write_video(folder / "clip.mp4")
    return folder


# -- what is written ------------------------------------------------------------------------------------


def test_mixed_folder_gives_every_good_frame_and_lists_the_bad(segmenter, mixed, tmp_path):
    report = segment_files(segmenter, ["mixed"], Path("out"), every=3, save_probability=True)
    names = [*NAMES, "clip_frame000000", "clip_frame000003", "clip_frame000006"]
    assert (report.segmented, report.reused) == (7, 0)
    out = tmp_path / "out"
    pictures = [f"{folder}/{name}.png" for folder in ("masks", "probabilities") for name in names]
    overlays = [f"overlays/{name}.jpg" for name in NAMES] + ["overlays/clip.webm"]
    tables = ["frames.csv", "lesions.csv", "run.json", "skipped.csv", "videos.csv"]
    assert files_below(out) == sorted([*tables, *pictures, *overlays])
    assert sorted(file for file, _ in report.skipped) == [f"mixed/{name}" for name in BAD]
    assert report.passed_over == (("mixed/notes.txt", "no image or video that can be read (.txt)"),)
    rows = read_rows(out / "skipped.csv")
    assert [(row["file"], row["reason"]) for row in rows] == [*report.skipped, *report.passed_over]
    reasons = {Path(row["file"]).name: row["reason"] for row in rows}
    assert "8 bits per channel" in reasons["sixteen.png"]
    assert "truncated or not an image" in reasons["truncated.jpg"]
    assert "truncated or not an image" in reasons["text.png"]
    assert any("mixed/bad/text.png" in line for line in report.lines())


def test_pictures_and_rows_agree_with_the_segmenter(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"), threshold=0.4, min_area=20, save_probability=True)
    rows = {row["name"]: row for row in read_rows(tmp_path / "out" / "frames.csv")}
    lesions = read_rows(tmp_path / "out" / "lesions.csv")
    for file, name in zip(GOOD, NAMES, strict=True):
        frame = decode_frame((mixed / file).read_bytes(), name=file)
        (expected,) = segmenter.predict([frame], threshold=0.4, min_area=20)
        with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as mask:
            assert mask.mode == "L" and set(mask.get_flattened_data()) <= {0, 255}
            np.testing.assert_array_equal(np.asarray(mask) == 255, expected.mask)
        with Image.open(tmp_path / "out" / "probabilities" / f"{name}.png") as probability:
            np.testing.assert_allclose(np.asarray(probability) / 255, expected.probability, atol=0.5 / 255 + 1e-6)
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.size == frame.size
        row = rows[name]
        assert (row["file"], row["frame"], row["time_s"]) == (f"mixed/{file}", "", "")
        assert (int(row["width"]), int(row["height"]), int(row["polyp_pixels"])) == (*frame.size, expected.area)
        assert float(row["polyp_share"]) == pytest.approx(expected.share, abs=1e-6)
        assert float(row["max_probability"]) == pytest.approx(expected.probability.max(), abs=1e-4)
        inside = expected.probability[expected.mask]
        assert float(row["mean_probability"]) == pytest.approx(inside.mean(), abs=1e-4)
        assert int(row["lesions"]) == len(expected.lesions) > 0
        listed = [row for row in lesions if row["name"] == name]
        assert [int(row["lesion"]) for row in listed] == list(range(1, len(expected.lesions) + 1))
        for row, lesion in zip(listed, expected.lesions, strict=True):
            box = [int(row[key]) for key in ("x", "y", "width", "height", "area")]
            assert box == [lesion.x, lesion.y, lesion.width, lesion.height, lesion.area]
            assert float(row["mean_probability"]) == pytest.approx(lesion.mean_probability, abs=1e-4)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mp4v"), ("avi", "MJPG")])
def test_video_frames_are_those_that_opencv_reads(segmenter, tmp_path, monkeypatch, suffix, codec):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / f"clip.{suffix}", codec=codec)
    segment_files(segmenter, [f"clip.{suffix}"], Path("out"), every=2)
    rows = read_rows(tmp_path / "out" / "frames.csv")
    assert [row["name"] for row in rows] == [f"clip_frame{n:06d}" for n in (0, 2, 4, 6)]
    assert [(row["frame"], row["time_s"]) for row in rows] == [
        ("0", "0.000"),
        ("2", "0.080"),
        ("4", "0.160"),
        ("6", "0.240"),
    ]
    video, pixels = cv2.VideoCapture(str(tmp_path / f"clip.{suffix}")), []
    while (grabbed := video.read())[0]:
        pixels.append(grabbed[1][:, :, ::-1])
    (expected,) = segmenter.predict([Image.fromarray(np.ascontiguousarray(pixels[4]))])
    with Image.open(tmp_path / "out" / "masks" / "clip_frame000004.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask) == 255, expected.mask)
    (video_row,) = read_rows(tmp_path / "out" / "videos.csv")
    assert (video_row["frames_read"], video_row["fps"]) == ("7", "25")


def test_unusual_images_are_segmented_as_the_package_decodes_them(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    draw(1).convert("L").save(folder / "gray.png")
    draw(2).convert("RGBA").save(folder / "alpha.png")
    draw(3).save(folder / "scan.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    draw(4).save(folder / "turned.jpg", exif=exif)
    report = segment_files(segmenter, ["in"], Path("out"))
    assert report.segmented == 4 and not report.skipped
    for file in folder.iterdir():
        frame = decode_frame(file.read_bytes(), name=file.name)
        with Image.open(tmp_path / "out" / "masks" / f"{file.stem}.png") as mask:
            assert mask.size == frame.size == (60, 48)  # the pixels as stored
            np.testing.assert_array_equal(np.asarray(mask) == 255, segmenter.predict([frame])[0].mask)


def test_run_record_says_which_model_and_options(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"), threshold=0.6, every=7)
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    expected = {"model": "tiny", "weights": segmenter.fingerprint(), "threshold": 0.6, "every": 7}
    assert expected.items() <= record["settings"].items()
    assert {"polypseg", "torch", "transformers"} <= set(record["environments"][0]["versions"])


def test_overlay_video_shows_every_frame_and_the_row_names_it(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4")
    report = segment_files(segmenter, ["clip.mp4"], Path("out"), overlay_video="avi")
    overlays = read_video(tmp_path / "out" / "overlays" / "clip.avi")
    assert len(overlays) == 7 and overlays[0].shape == (48, 64, 3)
    (row,) = read_rows(tmp_path / "out" / "videos.csv")
    assert (row["overlay"], row["times"], row["problem"]) == ("overlays/clip.avi", "container", "")
    assert 0 <= float(row["flicker"]) <= 1 and row["flicker_unsmoothed"] == ""
    masks = [np.asarray(Image.open(tmp_path / "out" / "masks" / f"clip_frame{n:06d}.png")) > 0 for n in range(7)]
    index = FlickerIndex()
    for mask in masks:
        index.add(mask)
    assert float(row["flicker"]) == pytest.approx(index.value, abs=1e-5)
    assert report.frames_per_second > 0 and any("frames per second" in line for line in report.lines())
    (tmp_path / "out" / "overlays" / "clip.avi").unlink()  # it is drawn again from the masks
    again = segment_files(segmenter, ["clip.mp4"], Path("out"), overlay_video="avi")
    assert (again.segmented, again.reused) == (0, 7)
    np.testing.assert_array_equal(read_video(tmp_path / "out" / "overlays" / "clip.avi"), overlays)
    assert len(read_rows(tmp_path / "out" / "videos.csv")) == 1


@pytest.mark.parametrize(("kind", "pictures"), [("jpg", 7), ("none", 0)])
def test_overlays_of_videos_can_be_pictures_or_nothing(segmenter, tmp_path, monkeypatch, kind, pictures):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4")
    segment_files(segmenter, ["clip.mp4"], Path("out"), overlay_video=kind)
    assert len(list((tmp_path / "out").glob("overlays/*"))) == pictures
    assert read_rows(tmp_path / "out" / "videos.csv")[0]["flicker"] != ""


def test_smoothing_averages_the_probabilities_over_true_times(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4")
    segment_files(segmenter, ["clip.mp4"], Path("out"), smooth=0.08, save_probability=True, overlay_video="none")
    smoother = CausalSmoother(0.08)
    for n, pixels in enumerate(read_video(tmp_path / "clip.mp4")):
        frame = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
        expected = smoother(segmenter.predict([frame])[0].probability, time=n / 25)
        with Image.open(tmp_path / "out" / "probabilities" / f"clip_frame{n:06d}.png") as probability:
            np.testing.assert_allclose(np.asarray(probability) / 255, expected, atol=0.5 / 255 + 1e-6)
        with Image.open(tmp_path / "out" / "masks" / f"clip_frame{n:06d}.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask) > 0, expected > 0.5)
    (row,) = read_rows(tmp_path / "out" / "videos.csv")
    assert 0 <= float(row["flicker"]) < float(row["flicker_unsmoothed"])


def test_interrupted_smoothing_begins_the_video_again(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4")
    options = {"smooth": 0.1, "overlay_video": "avi"}
    segment_files(segmenter, ["clip.mp4"], Path("whole"), **options)
    with pytest.raises(KeyboardInterrupt):
        segment_files(Interruption(segmenter, at=5), ["clip.mp4"], Path("parts"), **options)
    report = segment_files(segmenter, ["clip.mp4"], Path("parts"), **options)
    assert (report.segmented, report.reused) == (7, 0)
    for name in files_below(tmp_path / "whole"):
        if name != "run.json":
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert segment_files(Interruption(segmenter, at=1), ["clip.mp4"], Path("parts"), **options).reused == 7


@pytest.mark.parametrize("size", [2, 3, 50])
def test_batches_give_the_same_files_in_the_same_order(segmenter, mixed, tmp_path, size):
    options = {"overlay_video": "avi"}
    segment_files(segmenter, ["mixed"], Path("single"), **options)
    counting = Interruption(segmenter)
    segment_files(counting, ["mixed"], Path("batches"), batch_size=size, **options)
    assert counting.calls == -(-11 // size)
    assert files_below(tmp_path / "single") == files_below(tmp_path / "batches")
    for name in files_below(tmp_path / "single"):
        if name.endswith(".png"):
            read = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("single", "batches")]
            assert (read[0] != read[1]).mean() < 0.01, name
    orders = [[row["name"] for row in read_rows(tmp_path / f / "frames.csv")] for f in ("single", "batches")]
    assert orders[0] == orders[1]


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_files_of_any_name_are_segmented_and_found_again(segmenter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    files = [os.fsdecode(b"caf\xe9.png"), "x" * 251 + ".png", "=1+2.png", "two\nlines.png"]
    for n, name in enumerate(files):
        draw(n).save(tmp_path / "in" / name)
    write_video(tmp_path / "clip.avi", codec="MJPG")
    shutil.move(tmp_path / "clip.avi", tmp_path / "in" / os.fsdecode(b"\xff.avi"))
    (tmp_path / "in" / os.fsdecode(b"\xfe.png")).write_bytes(b"broken")
    report = segment_files(segmenter, ["in"], Path("out"), overlay_video="avi")
    assert (report.segmented, len(report.skipped)) == (11, 1)
    rows = read_rows(tmp_path / "out" / "frames.csv")
    assert {"in/caf\\xe9.png", "in/two\\x0alines.png"} <= {row["file"] for row in rows}
    assert {"caf%E9", "'=1+2", "two%0Alines", "%FF_frame000006"} <= {row["name"] for row in rows}
    assert (tmp_path / "out" / "masks" / "=1+2.png").is_file()
    "\n".join(report.lines()).encode()
    again = Interruption(segmenter, at=1)
    assert segment_files(again, ["in"], Path("out"), overlay_video="avi").reused == 11


def test_video_that_is_damaged_inside_is_read_on_and_named(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.avi", frames=12, codec="MJPG")
    grab = cv2.VideoCapture

    class Damaged:
        def __init__(self, *arguments):
            self._capture, self._calls = grab(*arguments), 0

        def __getattr__(self, name):
            return getattr(self._capture, name)

        def grab(self):
            self._calls += 1
            return self._calls != 5 and self._capture.grab()

    monkeypatch.setattr(cv2, "VideoCapture", Damaged)
    report = segment_files(segmenter, ["clip.avi"], Path("out"), overlay_video="none")
    assert report.segmented == 12
    assert report.skipped == (("clip.avi", "clip.avi is damaged in 1 place(s): 12 frames could be read"),)


# -- resuming -------------------------------------------------------------------------------------------


class Interruption:
    """Stands for Ctrl-C during the n-th frame; counts what the model is asked."""

    def __init__(self, segmenter: Segmenter, *, at: int | None = None):
        self.calls, self.runtime, self._segmenter, self._at = 0, self, segmenter, at

    def __getattr__(self, name):
        return getattr(self._segmenter, name)

    def polyp_logits(self, pixels, **options):
        self.calls += 1
        if self.calls == self._at:
            raise KeyboardInterrupt
        return self._segmenter.runtime.polyp_logits(pixels, **options)


@pytest.mark.parametrize("at", [1, 3, 9])  # before the first frame, inside the video, among the images
def test_interrupted_and_resumed_equals_uninterrupted(segmenter, mixed, tmp_path, at):
    segment_files(segmenter, ["mixed"], Path("whole"))
    with pytest.raises(KeyboardInterrupt):
        segment_files(Interruption(segmenter, at=at), ["mixed"], Path("parts"))
    rest = Interruption(segmenter)
    report = segment_files(rest, ["mixed"], Path("parts"))
    assert (report.segmented, report.reused) == (12 - at, at - 1) and rest.calls == 12 - at
    assert files_below(tmp_path / "parts") == files_below(tmp_path / "whole")
    for name in files_below(tmp_path / "whole"):
        if name.endswith(".webm"):  # holds a random number
            parts, whole = (read_video(tmp_path / folder / name) for folder in ("parts", "whole"))
            np.testing.assert_array_equal(parts, whole)
        elif name not in ("run.json", "skipped.csv"):  # the one has a time, the other Pillow's words
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_second_call_computes_nothing(segmenter, mixed, tmp_path):
    first = segment_files(segmenter, ["mixed"], Path("out"))
    before = (tmp_path / "out" / "frames.csv").read_bytes()
    again = Interruption(segmenter, at=1)
    report = segment_files(again, [str(mixed)], Path("out"))  # the same files, named by an absolute path
    assert again.calls == 0 and (report.segmented, report.reused) == (0, 11)
    assert report.with_lesions == first.with_lesions and report.skipped[0][1].endswith(first.skipped[0][1][-40:])
    assert (tmp_path / "out" / "frames.csv").read_bytes() == before


def test_rows_cut_by_a_crash_are_completed(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"), min_area=5)
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in ("frames.csv", "lesions.csv", "videos.csv")}
    for name, keep in (("frames.csv", -25), ("lesions.csv", -3)):
        (tmp_path / "out" / name).write_bytes(whole[name][:keep])
    counting = Interruption(segmenter)
    segment_files(counting, ["mixed"], Path("out"), min_area=5)
    assert counting.calls == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in ("frames.csv", "lesions.csv")} == {
        name: whole[name] for name in ("frames.csv", "lesions.csv")
    }


def test_changed_file_and_missing_picture_are_done_again(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"))
    draw(77).save(mixed / GOOD[0])
    (tmp_path / "out" / "masks" / f"{NAMES[1]}.png").unlink()
    counting = Interruption(segmenter)
    report = segment_files(counting, ["mixed"], Path("out"))
    assert counting.calls == report.segmented == 2
    rows = read_rows(tmp_path / "out" / "frames.csv")
    assert sorted(row["name"] for row in rows if "clip" not in row["name"]) == sorted(NAMES)
    (expected,) = segmenter.predict([draw(77)])
    with Image.open(tmp_path / "out" / "masks" / f"{NAMES[0]}.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask) == 255, expected.mask)


def test_repaired_file_leaves_the_list_of_skipped(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"))
    for name in BAD:
        draw(5).save(mixed / name)
    report = segment_files(segmenter, ["mixed"], Path("out"))
    assert (report.segmented, report.skipped) == (3, ())
    assert [row["file"] for row in read_rows(tmp_path / "out" / "skipped.csv")] == ["mixed/notes.txt"]
    (mixed / "notes.txt").unlink()
    segment_files(segmenter, ["mixed"], Path("out"))
    assert not (tmp_path / "out" / "skipped.csv").exists()


def test_new_file_does_not_take_a_finished_ones_name(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    draw(1).save(tmp_path / "in" / "x.png")
    segment_files(segmenter, ["in"], Path("out"))
    draw(2).save(tmp_path / "in" / "x.jpg")  # sorts first
    segment_files(segmenter, ["in"], Path("out"))
    rows = {row["name"]: row["file"] for row in read_rows(tmp_path / "out" / "frames.csv")}
    assert rows == {"x": "in/x.png", "x_jpg": "in/x.jpg"}


# -- what it refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.3}, r"another threshold \(0\.5\)"),
        ({"every": 2}, "another every"),
        ({"min_area": 1}, "min_area"),
    ],
)
def test_other_options_are_refused_and_overwrite_starts_again(segmenter, mixed, tmp_path, options, words):
    segment_files(segmenter, ["mixed"], Path("out"))
    before = (tmp_path / "out" / "frames.csv").read_bytes()
    with pytest.raises(UsageError, match=words):
        segment_files(segmenter, ["mixed"], Path("out"), **options)
    assert (tmp_path / "out" / "frames.csv").read_bytes() == before
    report = segment_files(segmenter, ["mixed/patient1"], Path("out"), overwrite=True, **options)
    assert (report.segmented, report.reused) == (1, 0)
    assert [name for name in files_below(tmp_path / "out") if name.startswith("masks")] == ["masks/frame.png"]


def test_other_weights_are_refused_even_under_the_same_name(segmenter, mixed):
    segment_files(segmenter, ["mixed"], Path("out"))
    with pytest.raises(UsageError, match="another weights"):
        segment_files(make_segmenter(seed=1), ["mixed"], Path("out"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_of_somebody_else_is_left_alone(segmenter, mixed, tmp_path, overwrite):
    dataset = tmp_path / "dataset"
    (dataset / "masks").mkdir(parents=True)
    draw(0).save(dataset / "masks" / "truth.png")
    (dataset / "run.json").write_text('{"recipe": "finetune"}')
    with pytest.raises(UsageError, match="something else"):
        segment_files(segmenter, ["mixed"], dataset, overwrite=overwrite)
    assert files_below(dataset) == ["masks/truth.png", "run.json"]


def test_overwrite_keeps_files_that_it_did_not_write(segmenter, mixed, tmp_path):
    segment_files(segmenter, ["mixed"], Path("out"))
    (tmp_path / "out" / "remarks.txt").write_text("mine")
    segment_files(segmenter, ["mixed"], Path("out"), overwrite=True)
    assert (tmp_path / "out" / "remarks.txt").read_text() == "mine"


def test_every_file_bad_is_an_error_with_exit_code_1(segmenter, mixed, tmp_path):
    with pytest.raises(PolypSegError, match=r"none of the 3 file\(s\) could be read: .*bad/sixteen.png") as caught:
        segment_files(segmenter, ["mixed/bad"], Path("out"))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert len(read_rows(tmp_path / "out" / "skipped.csv")) == 3


def test_video_that_is_no_video_is_skipped(segmenter, mixed, tmp_path):
    (mixed / "broken.mp4").write_bytes(b"no video at all")
    report = segment_files(segmenter, ["mixed/broken.mp4", "mixed/patient1"], Path("out"))
    assert report.segmented == 1
    assert [file for file, _ in report.skipped] == ["mixed/broken.mp4"] and "FFmpeg" in report.skipped[0][1]


def test_truncated_video_keeps_its_frames_and_is_named(segmenter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "long.avi", frames=40, codec="MJPG")
    data = (tmp_path / "long.avi").read_bytes()
    (tmp_path / "long.avi").write_bytes(data[: len(data) // 2])
    for _ in range(2):  # the second call has not to read it again, and says it again
        report = segment_files(segmenter, ["long.avi"], Path("out"), every=4)
        assert 0 < report.segmented + report.reused < 10
        assert "of 40 frames could be read" in report.skipped[0][1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smooth": 0.1}, "smoothing is for videos"),
        ({"overlay_video": "avi"}, "for videos"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_apply_are_refused(segmenter, mixed, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        segment_files(segmenter, ["mixed/patient1"], Path("out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "nothing to segment"),
        (["nowhere"], "nowhere does not exist"),
        (["mixed/*.gif"], "holds no image or video"),
        (["empty"], "empty holds no image or video"),
        (["out"], "out holds no image|lies in the output folder"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_written(segmenter, mixed, tmp_path, inputs, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=words):
        (tmp_path / "out").mkdir()
        segment_files(segmenter, inputs, Path("out"))
    assert files_below(tmp_path / "out") == []


def test_full_disk_is_one_line_and_leaves_whole_rows(segmenter, mixed, tmp_path, monkeypatch):
    written = module._write_pictures

    def full(output, name, *arguments, **options):
        if name == NAMES[2]:
            raise PolypSegError(f"cannot write {output / name}: the disk is full")
        written(output, name, *arguments, **options)

    monkeypatch.setattr(module, "_write_pictures", full)
    with pytest.raises(PolypSegError, match="disk is full"):
        segment_files(segmenter, ["mixed/patient?"], Path("out"))
    assert [row["name"] for row in read_rows(tmp_path / "out" / "frames.csv")] == list(NAMES[:2])


# -- names ----------------------------------------------------------------------------------------------


def test_own_output_inside_the_input_is_not_segmented(segmenter, mixed):
    first = segment_files(segmenter, ["mixed"], mixed / "results")
    second = segment_files(segmenter, ["mixed"], mixed / "results")
    assert (first.segmented, second.segmented, second.reused) == (11, 0, 11)


def test_names_are_relative_to_what_was_given(mixed):
    def names(*inputs: str) -> list[str]:
        return [name.as_posix() for _, name in find_sources(inputs, output=Path("out"))]

    assert names("mixed/patient1/frame.png") == ["frame"]
    assert names("mixed/patient1", "mixed/patient2/frame.png") == ["patient1/frame", "patient2/frame"]
    assert names("mixed/*/frame.png") == ["patient1/frame", "patient2/frame"]
    assert names("mixed/**/frame.png") == ["patient1/frame", "patient2/deep/frame", "patient2/frame"]
    assert names("mixed/patient[12]") == ["patient1/frame", "patient2/deep/frame", "patient2/frame", "patient2/frame"]
    assert names("mixed/patient2/frame.png", "mixed/patient2/frame.jpg") == ["frame", "frame"]
    assert names("mixed/patient1", "mixed/patient1/frame.png") == ["frame"]
    assert names("mixed/patient2/../patient1") == ["frame"]


def test_nothing_is_written_outside_the_output(segmenter, mixed, tmp_path):
    before = files_below(tmp_path)
    segment_files(segmenter, ["mixed/patient1/../patient2", os.path.abspath("mixed/patient1")], Path("out"))
    shutil.rmtree(tmp_path / "out")
    assert files_below(tmp_path) == before
