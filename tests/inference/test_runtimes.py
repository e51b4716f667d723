"""The runtimes: equal numbers whoever computes, nothing heavy imported, and what is said when something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import polypseg
from light_models import MEAN, SIZE, STD, network, write_light_model
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import write_json
from polypseg.inference import preparation, runtimes
from polypseg.inference import replay as replay_module
from polypseg.inference.operating_point import OperatingPoint
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.quality import UNKNOWN, read_quality
from polypseg.inference.regions import measure_regions
from polypseg.inference.replay import add_replay, replay
from polypseg.inference.runtimes import OnnxRuntime, OpenVinoRuntime, box_above, resize_bilinear, sigmoid
from polypseg.inference.segmenter import Segmenter, load, read_logits, read_part
from polypseg.provenance import local
from polypseg.provenance.checksums import write_manifest
from tiny_models import write_tiny_model


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_light_model(tmp_path_factory.mktemp("light") / "model")


# -- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 40), (200, 150), (31, 97), (640, 30), (1, 1)])
def test_preparation_is_transformers_own_bit_for_bit(folder, size):
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    theirs = DPTImageProcessorPil.from_pretrained(folder)
    ours = FrameProcessor.from_pretrained(folder)
    frames = [noise(*size), noise(*size[::-1], seed=1)]
    found = ours(images=frames)["pixel_values"]
    assert found.dtype == np.float32 and found.shape == (2, 3, *SIZE)
    np.testing.assert_array_equal(found, theirs(images=frames, return_tensors="np")["pixel_values"])
    assert torch.equal(ours(images=frames, return_tensors="pt")["pixel_values"], torch.from_numpy(found))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep_aspect_ratio": True}, "asks for keep_aspect_ratio"),
        ({"do_pad": True}, "asks for do_pad"),
        ({"ensure_multiple_of": 32}, "asks for ensure_multiple_of"),
        ({"size": {"shortest_edge": 40}}, "does not give size"),
        ({"image_mean": None}, "does not give image_mean"),
    ],
)
def test_preparations_that_need_more_are_refused(folder, change, words):
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | change
    with pytest.raises(UsageError, match=words):
        FrameProcessor.from_dict(settings, origin="preprocessor_config.json")


def test_the_largest_side_is_that_of_our_models():
    from polypseg.modeling.configuration_polypseg import LARGEST_SIDE

    assert preparation.LARGEST_SIDE == LARGEST_SIDE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"height": 0, "width": 48}}, r"size of the image processor is .*sides are 1 to 4096 pixels"),
        ({"size": {"height": 100000, "width": 100000}}, "sides are 1 to 4096 pixels"),
        ({"size": {"height": 40.5, "width": 48}}, "sides are 1 to 4096 pixels"),
        ({"size": {"height": "40", "width": 48}}, "sides are 1 to 4096 pixels"),
        ({"image_mean": [0.5, 0.5, 0.5, 0.5]}, "image_mean is .*three numbers are needed, one per color"),
        ({"image_std": 0.5}, "image_std is 0.5: three numbers are needed"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean of the image processor is .*finite numbers"),
        ({"image_mean": "gray"}, "finite numbers are needed"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "finite numbers are needed"),
        ({"image_mean": [0.5, 10**400, 0.5]}, r"image_mean of the image processor is .*\.\.\.: finite numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "no deviation of 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor of the image processor"),
        ({"rescale_factor": [0.1]}, "rescale_factor is .*a number is needed"),
        ({"rescale_factor": None}, "rescale_factor is None: a number is needed"),
        ({"resample": 99}, "resample is 99: Pillow has 0 to 5"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"do_resize": False}, "asks for do_resize false"),
        ({"do_normalize": "no"}, "do_normalize is 'no': true or false is needed"),
        ({"ensure_multiple_of": "x"}, "ensure_multiple_of is 'x'"),
        ({"ensure_multiple_of": -4}, "ensure_multiple_of is -4"),
        ({"size": {"height": 44, "width": 48}}, r"model\.onnx takes frames of 48x40 pixels but .*says 48x44"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_preparations_that_cannot_be_are_refused_in_a_line_before_any_frame(tmp_path, change, words):
    model = write_light_model(tmp_path / "m")
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=words) as caught:
        load(model)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "null", '"text"', "3"])
def test_settings_that_are_no_mapping_are_refused(tmp_path, text):
    model = write_light_model(tmp_path / "m")
    (model / "preprocessor_config.json").write_text(text)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json holds no settings but a \w+: get the model again"):
        load(model)


@pytest.mark.parametrize("open_file", [OnnxRuntime, OpenVinoRuntime])
def test_an_input_that_a_file_does_not_take_is_a_line(folder, open_file):
    if open_file is OpenVinoRuntime:
        pytest.importorskip("openvino")
    runtime = open_file(folder / "onnx" / "model.onnx")
    assert runtime.input_shape == (None, 3, *SIZE)
    with pytest.raises(PolypSegError, match=r"model\.onnx cannot compute an input of 1x3x8x8: .") as caught:
        runtime.run(np.zeros((1, 3, 8, 8), np.float32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"words": "good", "short": "good", "more": "' + "x" * 2**17 + '"}',
        '{"words": ' + "9" * 5000 + ', "short": ""}',
        '{"words": ["good"], "short": {}}',
        '["words", "short"]',
        "",
    ],
    ids=["deep", "huge", "digits", "types", "list", "empty"],
)
def test_a_quality_that_cannot_be_read_is_unknown(tmp_path, text):
    (tmp_path / "quality.json").write_text(text)
    assert read_quality(tmp_path) == UNKNOWN


@pytest.mark.parametrize(
    ("small", "large"),
    [((20, 24), (53, 622)), ((72, 64), (108, 135)), ((28, 32), (10, 9)), ((1, 1), (9, 9)), ((32, 32), (32, 32))],
)
def test_bilinear_resize_is_torchs(small, large):
    values = np.random.default_rng(0).normal(size=small).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(values)[None, None], size=large, mode="bilinear", align_corners=False
    )[0, 0]
    # 5e-7 from torch's kernels of AVX2 and AVX-512, 5.5e-6 from those without fused multiply-add, which round places.
    np.testing.assert_allclose(resize_bilinear(values, large), theirs.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "point",
    [
        OperatingPoint(),
        OperatingPoint(threshold=0.6, temperature=0.967, minimum_peak=0.95),
        OperatingPoint(threshold=0.3, minimum_share=0.01),
    ],
)
def test_a_part_of_the_frame_gives_the_mask_and_lesions_of_the_whole(point):
    rng, empty = np.random.default_rng(0), 0
    for number in range(60):
        small, size = tuple(rng.integers(4, 40, 2)), tuple(int(side) for side in rng.integers(3, 200, 2))
        logits = rng.normal(-4 if number % 5 else -12, 2, small).astype(np.float32)
        if number % 3 == 0:
            logits = np.round(logits)  # some are the limit itself
        whole = resize_bilinear(logits, size)
        box = box_above(logits, size, limit=point.limit)
        part = None
        if box is not None:
            np.testing.assert_array_equal(resize_bilinear(logits, size, box=box), whole[box])
            part = read_part(whole[box], box=box, size=size, point=point, min_area=3)
        if part is None:
            empty += 1
            assert whole.max() <= point.limit
            continue
        expected = read_logits(whole, point=point, min_area=3)
        np.testing.assert_array_equal(part.mask, expected.mask)
        np.testing.assert_array_equal(part.probability[box], expected.probability[box])
        assert part.lesions == expected.lesions and part.probability.max() == expected.probability.max()
    assert 0 < empty < 40


def test_sigmoid_is_torchs_and_does_not_overflow():
    values = np.array([-1e30, -200, -3.5, -1e-9, 0, 1e-9, 3.5, 200, 1e30], dtype=np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(values)
    np.testing.assert_allclose(found, torch.from_numpy(values).sigmoid().numpy(), rtol=3e-7)


@pytest.mark.parametrize("density", [0.05, 0.35, 0.6])
def test_regions_are_opencvs(density):
    rng = np.random.default_rng(7)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 50, 2)) < density
        values = rng.random(mask.shape).astype(np.float32)
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        wanted = sorted((*boxes[n].tolist(), values[labels == n].max()) for n in range(1, count))
        found = measure_regions(values, mask=mask)
        columns = (found.x, found.y, found.width, found.height, found.area, found.maximum)
        assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == wanted
        assert (found.mean * found.area).sum() == pytest.approx(float(values[mask].sum(dtype=np.float64)))


def test_runtimes_compute_the_same(folder):
    pixels = np.random.default_rng(1).normal(size=(5, 3, *SIZE)).astype(np.float32)
    weights = onnx.numpy_helper.to_array(network().graph.initializer[0]).copy()
    wanted = torch.nn.functional.conv2d(torch.from_numpy(pixels), torch.from_numpy(weights), stride=2, padding=1)[:, 0]
    for runtime in (OnnxRuntime, OpenVinoRuntime):
        computed = runtime(folder / "onnx" / "model.onnx")
        for batch in (1, 2, 5):
            np.testing.assert_allclose(computed.polyp_logits(pixels[:batch]), wanted[:batch], atol=1e-4)


def test_two_classes_become_one_logit(tmp_path):
    onnx.save(network(channels=2), tmp_path / "two.onnx")
    pixels = np.random.default_rng(1).normal(size=(1, 3, *SIZE)).astype(np.float32)
    runtime = OnnxRuntime(tmp_path / "two.onnx")
    raw = runtime.run(pixels)
    np.testing.assert_array_equal(runtime.polyp_logits(pixels), raw[:, 1] - raw[:, 0])
    onnx.save(network(channels=3), tmp_path / "three.onnx")
    with pytest.raises(UsageError, match=r"three\.onnx gives \(1, 3, 20, 24\)"):
        OnnxRuntime(tmp_path / "three.onnx").polyp_logits(pixels)


def test_outputs_that_are_not_finite_are_refused_by_name(tmp_path):
    model = write_light_model(tmp_path / "m")
    graph = network()
    weights = onnx.numpy_helper.to_array(graph.graph.initializer[0]).copy()
    weights[0, 0, 0, 0] = np.nan
    graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(graph, model / "onnx" / "model.onnx")
    with pytest.raises(PolypSegError, match=r"model\.onnx gives values that are no finite numbers .* for second\.png"):
        load(model).predict([noise(50, 50), noise(60, 50)][1:], names=["second.png"])


# -- choice ---------------------------------------------------------------------------------------------


def test_auto_takes_onnx_runtime_and_says_so(folder):
    segmenter = load(folder)
    assert segmenter.runtime.name == "onnxruntime" and "onnx/model.onnx" in segmenter.runtime.description
    (prediction,) = segmenter.predict([noise(97, 61)])
    pixels = (np.asarray(noise(97, 61).resize(SIZE[::-1], Image.Resampling.BICUBIC)) / 255 - MEAN) / STD
    logits = OnnxRuntime(folder / "onnx" / "model.onnx").run(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    np.testing.assert_allclose(prediction.probability, sigmoid(resize_bilinear(logits[0, 0], (61, 97))), atol=1e-4)
    with pytest.raises(UsageError, match="load it with runtime='torch'"):
        _ = segmenter.model
    with pytest.raises(UsageError, match="a device belongs to runtime 'torch'"):
        segmenter.to("cuda")
    assert segmenter.to("cpu") is segmenter


def test_a_signal_after_openvino_was_dropped_in_a_thread_does_not_end_the_process(folder):
    script = """
import faulthandler, gc, os, signal, sys, threading
from polypseg.inference.segmenter import load
faulthandler.enable()  # as pytest does: without a stack for signals, OpenVINO sets none
models = [load(sys.argv[1], runtime="openvino")]
def drop():
    models.clear()
    gc.collect()
thread = threading.Thread(target=drop)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    pytest.importorskip("openvino")
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_gives_the_same_masks(folder):
    frames = [noise(97, 61), noise(50, 120, seed=3)]
    one, other = (load(folder, runtime=name).predict(frames) for name in ("onnxruntime", "openvino"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.probability, b.probability, atol=1e-4)


def test_bf16_of_openvino_is_another_model_by_its_fingerprint(folder):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UsageError, match="no bf16 arithmetic"):
            load(folder, precision="bf16")
        return
    exact, rounded = load(folder, runtime="openvino"), load(folder, precision="bf16")
    assert rounded.runtime.description == f"{exact.runtime.description} in bf16"
    assert rounded.fingerprint() != exact.fingerprint()
    pixels = np.random.default_rng(0).normal(size=(2, 3, *SIZE)).astype(np.float32)
    one, other = (segmenter.runtime.polyp_logits(pixels) for segmenter in (exact, rounded))
    scale = np.abs(one).max()
    assert 1e-5 * scale < np.abs(one - other).max() < 0.05 * scale  # rounded, to eight bits


def test_bf16_of_torch_is_another_model_by_its_fingerprint_and_is_named_in_results(tmp_path):
    from polypseg.inference.model import cpu_has_bf16
    from polypseg.inference.open_model import open_model

    folder = write_tiny_model(tmp_path / "m")
    exact, rounded = (load(folder, runtime="torch", precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.runtime.description == exact.runtime.description.replace("float32", "bf16")
    assert rounded.fingerprint() != exact.fingerprint()
    side = exact.processor.size["height"]
    pixels = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    if not cpu_has_bf16():
        with pytest.raises(UsageError, match="no bf16 arithmetic"):
            rounded.runtime.polyp_logits(pixels)
        return
    one, other = (segmenter.runtime.polyp_logits(pixels) for segmenter in (exact, rounded))
    scale = np.abs(one).max()
    assert 1e-5 * scale < np.abs(one - other).max() < 0.1 * scale
    source = open_model(str(folder), runtime="torch", precision="bf16")
    assert source.name.endswith(".torch.bf16") and source.origin["precision"] == "bf16"


@pytest.mark.parametrize(
    ("encoder", "files", "installed", "chosen"),
    [
        ("resnet50", ("onnx/model.onnx", "model.safetensors"), ("torch", "openvino"), "openvino"),
        ("vit_base_patch16_224", ("onnx/model.onnx", "model.safetensors"), ("torch", "openvino"), "torch"),
        ("vit_base_patch16_224", ("onnx/model.onnx", "model.safetensors"), ("openvino",), "openvino"),
        ("resnet50", ("model.safetensors",), ("torch", "openvino"), "torch"),
        ("resnet50", ("onnx/model.onnx", "model.safetensors"), ("torch",), "torch"),
    ],
)
def test_auto_takes_for_bf16_what_is_at_hand_and_faster(tmp_path, monkeypatch, encoder, files, installed, chosen):
    monkeypatch.setattr(runtimes, "is_installed", lambda name: name in installed)
    write_json(tmp_path / "config.json", {"encoder": encoder})
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert runtimes.choose_runtime(tmp_path, precision="bf16")[0] == chosen


def test_auto_falls_back_to_what_is_installed(folder, monkeypatch):
    monkeypatch.setattr(runtimes, "is_installed", lambda name: name == "openvino")
    assert runtimes.choose_runtime(folder) == ("openvino", folder / "onnx" / "model.onnx")
    monkeypatch.setattr(runtimes, "is_installed", lambda name: False)
    with pytest.raises(UsageError, match=r"needs a runtime that is not installed: run `python -m pip install onnx"):
        runtimes.choose_runtime(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "onnx"}, "unknown runtime 'onnx'.*onnxruntime"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"precision": "int8"}, "--format onnx --precision int8"),
        ({"runtime": "torch", "precision": "fp16"}, "torch computes in fp32 or bf16"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "onnxruntime does not compute in bf16: ask openvino"),
        ({"revision": "main"}, "a revision belongs to a Hub id"),
    ],
)
def test_requests_that_cannot_be_met(folder, options, words):
    with pytest.raises(UsageError, match=words):
        load(folder, **options)


def test_missing_packages_are_named_with_the_line_to_type(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match="needs openvino: run `python -m pip install openvino`"):
        load(folder, runtime="openvino")


def test_damaged_network_is_refused(tmp_path):
    model = write_light_model(tmp_path / "m")
    write_manifest(model)
    load(model)
    path = model / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PolypSegError, match=r"onnx/model\.onnx \(damaged\)"):
        load(model)


def test_fingerprint_follows_file_and_preparation(folder, tmp_path):
    assert load(folder).fingerprint() == load(folder).fingerprint()
    other = write_light_model(tmp_path / "m")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.1, 0.1]}))
    assert load(other).fingerprint() != load(folder).fingerprint()


def test_a_segmenter_has_one_of_model_and_runtime(folder):
    with pytest.raises(UsageError, match="either a model or a runtime"):
        Segmenter(processor=FrameProcessor.from_pretrained(folder), name="x")


# -- the shipped model ----------------------------------------------------------------------------------


def test_the_shipped_model_is_the_default(folder, monkeypatch):
    monkeypatch.setattr(local, "STARTER_FOLDER", folder)
    segmenter = polypseg.load()
    assert segmenter.name == "starter" and segmenter.runtime.name == "onnxruntime"
    assert load("starter").fingerprint() == segmenter.fingerprint()


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "STARTER_FOLDER", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starter").mkdir()  # a folder of that name is not meant
    with pytest.raises(UsageError, match=r"holds no model called 'starter'.*config\.json is missing"):
        polypseg.load()


# -- from the shell -------------------------------------------------------------------------------------

SEGMENT = """
import sys
from pathlib import Path
from polypseg.provenance import local
local.STARTER_FOLDER = Path({folder!r})
sys.argv = ["polypseg", "segment", {frame!r}]
import polypseg_command
polypseg_command.main()
heavy = ("torch", "transformers", "datasets", "cv2", "scipy", "pydantic", "typer", "huggingface_hub", "pandas")
print("imported", *[name for name in heavy if name in sys.modules])
"""


def test_first_mask_from_the_shell_imports_nothing_heavy(folder, tmp_path):
    noise(130, 90).save(tmp_path / "frame.png")
    script = SEGMENT.replace("{folder!r}", repr(str(folder))).replace("{frame!r}", repr("frame.png"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, says, quality, imported = done.stdout.splitlines()
    assert imported == "imported" and "onnxruntime" in says and says.startswith("model starter")
    assert "not been measured" in quality and "not a medical device" in quality
    with Image.open(tmp_path / "segmented" / "masks" / "frame.png") as mask:
        assert mask.size == (130, 90)
    assert (tmp_path / "segmented" / "overlays" / "frame.jpg").is_file()


# -- test frame -----------------------------------------------------------------------------------------


def test_replay_tells_running_from_reproducing(tmp_path, monkeypatch):
    model = write_light_model(tmp_path / "m")
    with pytest.raises(UsageError, match="has no test frame"):
        replay(model)
    add_replay(model, "onnx/model.onnx")
    (good,) = replay(model)
    assert good.runs and good.reproduces and good.difference < 1e-4 and "runs here" in good.line()
    content = json.loads((model / "replay" / "expected.json").read_text())
    content["outputs"]["onnx/model.onnx"]["logits"][0][0] += 1
    (model / "replay" / "expected.json").write_text(json.dumps(content))
    (other,) = replay(model)
    assert other.runs and not other.reproduces and "DOES NOT REPRODUCE" in other.line()
    monkeypatch.setattr(replay_module, "OnnxRuntime", lambda path: (_ for _ in ()).throw(UsageError("not here")))
    (absent,) = replay(model)
    assert not absent.runs and not absent.reproduces and "does not run here (not here)" in absent.line()
