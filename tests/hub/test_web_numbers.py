"""The page's arithmetic, called in Node.js, against Pillow, torch and the package."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg.data.images import decode_gray_mask
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.inference.model import build_image_processor, polyp_logits, resize_map
from polypseg.inference.segmenter import find_lesions, read_logits
from polypseg.modeling import PolypSegConfig

WEB = Path(__file__).resolve().parents[2] / "web"


@pytest.fixture
def node(tmp_path):
    """A function that runs calls of web/test/run.mjs and returns their answers; files are in ``tmp_path``."""
    if shutil.which("node") is None:
        pytest.skip("no Node.js")
    if not (WEB / "node_modules" / "esbuild").is_dir():
        pytest.skip("web/node_modules is missing: run `make web`")

    def run(*jobs: dict[str, Any]) -> list[Any]:
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        subprocess.run(["node", WEB / "test" / "run.mjs", tmp_path], check=True, timeout=120)
        return json.loads((tmp_path / "answers.json").read_text())

    return run


def size_of(width: int, height: int) -> dict[str, int]:
    return {"width": width, "height": height}


def hard_picture(width: int, height: int, *, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise beside black and white edges, where a filter that rounds elsewhere shows it."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 255 * random.integers(0, 2, (height // 2, width // 2, 1), dtype=np.uint8)
    return pixels


@pytest.mark.parametrize("channels", [3, 4])
def test_resize_gives_pillows_bytes(node, tmp_path, channels):
    pairs = [
        ((123, 97), (64, 64)),
        ((530, 331), (320, 320)),
        ((41, 57), (96, 96)),
        ((96, 50), (96, 96)),
        ((3, 2), (32, 32)),
    ]
    jobs, expected = [], []
    for index, (before, after) in enumerate(pairs):
        pixels = hard_picture(*before, channels=channels, seed=index)
        (tmp_path / f"{index}.in").write_bytes(pixels.tobytes())
        jobs.append(
            {"call": "resize", "input": f"{index}.in", "output": f"{index}.out", "channels": channels}
            | {"from": size_of(*before), "to": size_of(*after)}
        )
        rgb = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
        expected.append(np.asarray(rgb.resize(after, Image.Resampling.BICUBIC)))
    node(*jobs)
    for index, image in enumerate(expected):
        got = np.frombuffer((tmp_path / f"{index}.out").read_bytes(), np.uint8).reshape(image.shape)
        np.testing.assert_array_equal(got, image, err_msg=str(pairs[index]))


@pytest.mark.parametrize("camera", ["a", "b"])
def test_input_of_the_network_is_the_image_processors(node, tmp_path, camera):
    frame, _ = synthesize_frame(CAMERAS[camera], seed=0, index=3)
    settings = PolypSegConfig(encoder="resnet18", image_size=96)
    expected = build_image_processor(settings)(images=[Image.fromarray(frame)], return_tensors="np")["pixel_values"][0]
    (tmp_path / "frame").write_bytes(frame.tobytes())
    job = {"call": "prepare", "input": "frame", "output": "values", "side": 96}
    node(
        job | {"from": size_of(frame.shape[1], frame.shape[0]), "mean": settings.image_mean, "std": settings.image_std}
    )
    got = np.fromfile(tmp_path / "values", np.float32).reshape(expected.shape)
    assert np.abs(got - expected).max() < 1e-5  # a step of one gray value is 0.017


def test_logits_and_their_upsampling_are_torchs(node, tmp_path):
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 24, 24) * 4
    logits.numpy().tofile(tmp_path / "two")
    node({"call": "logits", "input": "two", "output": "one", "dims": [1, 2, 24, 24]})
    one = polyp_logits(logits, None)[0]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "one", np.float32), one.numpy().ravel())
    sizes = [(61, 37), (24, 24), (200, 150), (10, 13)]
    node(
        *(
            {"call": "map", "input": "one", "output": f"{w}", "from": size_of(24, 24), "to": size_of(w, h)}
            for w, h in sizes
        )
    )
    for width, height in sizes:
        expected = resize_map(one, (height, width)).numpy()
        got = np.fromfile(tmp_path / str(width), np.float32).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, atol=5e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
def test_mask_and_lesions_are_the_packages(node, tmp_path, threshold):
    torch.manual_seed(1)
    logits = resize_map(torch.randn(9, 12) * 3, (72, 120))
    logits.numpy().tofile(tmp_path / "logits")
    (answer,) = node(
        {"call": "summary", "input": "logits", "size": size_of(120, 72), "threshold": threshold, "minArea": 20}
    )
    expected = read_logits(logits, threshold=threshold, min_area=20)
    got = answer["value"]
    assert got["area"] == expected.area > 0 and got["fraction"] == pytest.approx(expected.share)
    assert got["maxProbability"] == pytest.approx(float(expected.probability.max()), abs=1e-6)
    assert len(got["regions"]) == len(expected.lesions) > 0
    for region, lesion in zip(got["regions"], expected.lesions, strict=True):
        assert (region["x"], region["y"], region["width"], region["height"], region["area"]) == (
            lesion.x, lesion.y, lesion.width, lesion.height, lesion.area,
        )  # fmt: skip
        assert region["meanProbability"] == pytest.approx(lesion.mean_probability, abs=1e-5)
        assert region["maxProbability"] == pytest.approx(lesion.max_probability, abs=1e-5)


def test_outline_encloses_the_mask_with_its_holes(node, tmp_path):
    """Cut corners take half a pixel from every outer line and give half a pixel to every hole."""
    random = np.random.default_rng(2)
    masks = {"ring": np.zeros((9, 11), np.uint8), "noise": random.integers(0, 2, (20, 31), dtype=np.uint8)}
    masks["ring"][1:8, 2:10] = 1
    masks["ring"][3:5, 4:7] = 0
    masks["full"] = np.ones((4, 5), np.uint8)
    masks["empty"] = np.zeros((4, 5), np.uint8)
    jobs = []
    for name, mask in masks.items():
        (tmp_path / name).write_bytes(mask.tobytes())
        jobs.append({"call": "outline", "input": name, "size": size_of(mask.shape[1], mask.shape[0])})
    for (name, mask), answer in zip(masks.items(), node(*jobs), strict=True):
        areas = []
        for line in answer["value"]:
            x, y = np.reshape(line, (-1, 2)).T
            areas.append(float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2))
        corrected = sum(area + 0.5 * np.sign(area) for area in areas)
        whole = np.ones_like(mask, dtype=np.float32)
        outer = len(find_lesions(whole, mask=mask.astype(bool), min_area=1))
        assert corrected == pytest.approx(mask.sum()), name
        assert sum(area > 0 for area in areas) == outer, name
    assert len(node(jobs[0])[0]["value"]) == 2


def test_mask_file_is_one_the_package_reads(node, tmp_path):
    mask = np.random.default_rng(0).integers(0, 2, (37, 53), dtype=np.uint8)
    (tmp_path / "mask").write_bytes(mask.tobytes())
    node({"call": "png", "input": "mask", "output": "mask.png", "size": size_of(53, 37)})
    data = (tmp_path / "mask.png").read_bytes()
    assert Image.open(io.BytesIO(data)).mode == "L"
    np.testing.assert_array_equal(decode_gray_mask(data, name="mask.png"), 255 * mask)


# -- files before they are decoded ------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


PICTURE = Image.fromarray(hard_picture(40, 24))
JPEG, PNG = saved(PICTURE, "JPEG"), saved(PICTURE, "PNG")
REFUSED = {
    "16-bit.png": (saved(Image.new("I;16", (8, 8)), "PNG"), "16 bits per channel"),
    "cmyk.jpg": (saved(PICTURE.convert("CMYK"), "JPEG"), "CMYK"),
    "frame.tif": (saved(PICTURE, "TIFF"), "TIFF"),
    "frame.gif": (saved(PICTURE, "GIF"), "GIF"),
    "frame.avif": (saved(PICTURE, "AVIF"), "HEIC or AVIF"),
    "clip.mp4": (b"\0\0\0\x18ftypisom" + bytes(40), "video"),
    "notes.txt": (b"Not a picture at all.", "no picture"),
    "short.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "head.jpg": (JPEG[:30], "truncated"),
    "short.png": (PNG[:-40], "truncated"),
    "empty.jpg": (b"", "no picture"),
    "moving.webp": (saved(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]), "animated"),
}


def test_files_that_pixels_cannot_be_trusted_of_are_refused_with_the_reason(node, tmp_path):
    jobs = []
    for name, (data, _) in REFUSED.items():
        (tmp_path / name).write_bytes(data)
        jobs.append({"call": "picture", "input": name, "output": "unused"})
    for (name, (_, words)), answer in zip(REFUSED.items(), node(*jobs), strict=True):
        assert answer.get("refused") and words in answer["error"], (name, answer)


def test_marks_that_browsers_obey_are_taken_out_and_pixels_stay(node, tmp_path):
    files = {
        "plain.jpg": (JPEG, []),
        "turned.jpg": (saved(PICTURE, "JPEG", exif=turned()), ["rotation"]),
        "profile.jpg": (saved(PICTURE, "JPEG", icc_profile=profile(), progressive=True), ["profile"]),
        "both.png": (saved(PICTURE, "PNG", exif=turned(), icc_profile=profile()), ["rotation", "profile"]),
        "both.webp": (
            saved(PICTURE, "WEBP", exif=turned(), icc_profile=profile(), lossless=True),
            ["rotation", "profile"],
        ),
        "plain.webp": (saved(PICTURE, "WEBP"), []),
        "gray.png": (saved(PICTURE.convert("L"), "PNG"), []),
        "palette.png": (saved(PICTURE.convert("P"), "PNG"), []),
        "gray.jpg": (saved(PICTURE.convert("L"), "JPEG"), []),
        "frame.bmp": (saved(PICTURE, "BMP"), []),
    }
    jobs = []
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
        jobs.append({"call": "picture", "input": name, "output": f"{name}.out"})
    for (name, (data, words)), answer in zip(files.items(), node(*jobs), strict=True):
        notes = answer["value"]["notes"]
        assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True)), name
        before, after = Image.open(io.BytesIO(data)), Image.open(tmp_path / f"{name}.out")
        np.testing.assert_array_equal(np.asarray(after.convert("RGB")), np.asarray(before.convert("RGB")), err_msg=name)
        assert "icc_profile" not in after.info and 0x0112 not in after.getexif(), name


def test_words_state_the_interval_and_tables_keep_odd_names(node):
    score = {"dataset": "CVC-ClinicDB", "images": 612, "dice": 0.8451, "low": 0.801, "high": 0.8799}
    stated, unknown, table = node(
        {"call": "quality", "scores": [score]},
        {"call": "quality", "scores": []},
        {"call": "csv", "rows": [["name", "area"], ['a "b", c.png', 3]]},
    )
    assert "mean Dice 0.845 (95 % interval 0.801 to 0.880) on CVC-ClinicDB, 612 images" in stated["value"]
    assert "has not been measured" in unknown["value"]
    assert table["value"] == 'name,area\n"a ""b"", c.png",3\n'
