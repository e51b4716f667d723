"""Files for ONNX Runtime and OpenVINO: what is written computes the model, in every precision, and says so later."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.hub import onnx as module
from polypseg.hub.onnx import export_runtime
from polypseg.inference.replay import replay
from polypseg.inference.runtimes import OnnxRuntime
from polypseg.inference.segmenter import load
from polypseg.provenance.checksums import find_mismatches, list_files, read_manifest, write_manifest
from tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    return [Image.fromarray(synthesize_frame(CAMERAS["a"], seed=1, index=n, size=(80, 96))[0]) for n in range(10)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, frames) -> Path:
    """A tiny model in half precision, exported in every form; its network is traced once."""
    folder = write_tiny_model(tmp_path_factory.mktemp("export") / "model")
    half = folder.parent / "half"
    from polypseg.inference.model import load_model

    load_model(str(folder))[0].half().save_pretrained(half)
    shutil.copyfile(folder / "preprocessor_config.json", half / "preprocessor_config.json")
    training = folder.parent / "training"
    training.mkdir()
    for n, frame in enumerate(frames):
        frame.save(training / f"{n}.png")
    write_manifest(half)
    traced: list[onnx.ModelProto] = []
    genuine = module.trace

    def once(model, processor):
        traced[:] = traced or [genuine(model, processor)]
        return traced[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", once)
        for format in ("onnx", "openvino"):
            for precision in ("fp32", "fp16", "int8"):
                calibration = str(training) if precision == "int8" else None
                done = export_runtime(half, format=format, precision=precision, calibration=calibration)
                assert done.size > 1000 and (precision == "int8") == bool(done.kept_in_float)
                assert done.difference < {"fp32": 1e-4, "fp16": 0.05, "int8": 0.5}[precision]
    return half


@pytest.mark.slow
def test_every_form_is_there_and_in_the_checksums(exported):
    names = list_files(exported)
    assert [name for name in names if name.startswith("onnx/")] == [
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "onnx/model_quantized.onnx",
    ]
    assert sum(name.startswith("openvino/") for name in names) == 6
    assert find_mismatches(exported, read_manifest(exported / "SHA256SUMS")) == {}
    graph = onnx.load(exported / "onnx" / "model.onnx")
    shape = [side.dim_param or side.dim_value for side in graph.graph.input[0].type.tensor_type.shape.dim]
    assert (graph.graph.input[0].name, graph.graph.output[0].name) == ("pixel_values", "logits")
    assert isinstance(shape[0], str) and shape[1:] == [3, 64, 64]
    assert max(entry.version for entry in graph.opset_import) <= 20
    weights = exported / "model.safetensors"
    assert (exported / "onnx" / "model.onnx").stat().st_size < 1.2 * weights.stat().st_size  # fp16 stays fp16


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_exported_models_segment_as_torch_does(exported, frames, runtime):
    wanted = load(exported, runtime="torch").predict(frames, batch_size=4)
    for precision, most in (("fp32", 1e-4), ("fp16", 0.02), ("int8", 0.15)):
        segmenter = load(exported, runtime=runtime, precision=precision)
        for batch_size in (1, 4):
            found = segmenter.predict(frames, batch_size=batch_size)
            off = [np.abs(a.probability - b.probability).max() for a, b in zip(found, wanted, strict=True)]
            assert max(off) < most, (precision, off)


@pytest.mark.slow
def test_every_form_reproduces_its_own_output(exported):
    outcomes = replay(exported)
    assert len(outcomes) == 6 and all(outcome.reproduces for outcome in outcomes), [o.line() for o in outcomes]


@pytest.mark.slow
def test_a_light_folder_runs_without_weights_for_torch(exported, frames, tmp_path, monkeypatch):
    graph = onnx.load(exported / "onnx" / "model.onnx")
    monkeypatch.setattr(module, "trace", lambda model, processor: graph)
    export_runtime(exported, output=tmp_path / "light")
    assert set(list_files(tmp_path / "light")) == {
        *("config.json", "preprocessor_config.json", "onnx/model.onnx", "replay/expected.json", "replay/frame.png"),
    }
    light = load(tmp_path / "light")
    assert light.runtime.name == "onnxruntime"
    (found,), (wanted,) = light.predict(frames[:1]), load(exported, runtime="torch").predict(frames[:1])
    np.testing.assert_allclose(found.probability, wanted.probability, atol=1e-4)
    with pytest.raises(UsageError, match="holds something else"):
        export_runtime(exported, output=exported.parent / "training")


def test_compact_files_compute_the_same_in_fewer_bytes(tmp_path):
    weights = np.random.default_rng(0).normal(size=(32, 32, 3, 3)).astype(np.float16).astype(np.float32)
    other = weights + np.float32(1e-5)  # what half precision does not hold exactly stays in fp32
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Conv", ["y", "v"], ["z"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32, 9, 9])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 32, 5, 5])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(other, "v")],
    )
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    module._save(plain, tmp_path / "plain.onnx")
    module._save(module._compact(plain), tmp_path / "compact.onnx")
    x = np.random.default_rng(1).normal(size=(2, 32, 9, 9)).astype(np.float32)
    one, two = (OnnxRuntime(tmp_path / f"{name}.onnx").run(x) for name in ("plain", "compact"))
    np.testing.assert_array_equal(one, two)
    saved = (tmp_path / "plain.onnx").stat().st_size - (tmp_path / "compact.onnx").stat().st_size
    assert 0.9 * weights.size * 2 < saved < 1.1 * weights.size * 2


def test_the_same_network_gives_the_same_bytes_in_whatever_order_its_attributes_come(tmp_path):
    for name, attributes in (("one", ("pads", "strides")), ("two", ("strides", "pads"))):
        node = helper.make_node("Conv", ["x", "w"], ["y"])
        node.attribute.extend(helper.make_attribute(key, [1, 1] * (1 + (key == "pads"))) for key in attributes)
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", 4, 9, 9]) for end in "xy"]
        weights = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
        graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weights])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        module._save(made, tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    class Wrong:
        def polyp_logits(self, pixels):
            return np.ones((len(pixels), 64, 64), dtype=np.float32)

    from polypseg.inference.model import load_model
    from polypseg.inference.preparation import FrameProcessor

    folder = write_tiny_model(tmp_path / "m")
    model, _ = load_model(str(folder))
    with pytest.raises(PolypSegError, match="the fp32 file's outputs are not the model's"):
        module._check(Wrong(), model, FrameProcessor.from_pretrained(folder), precision="fp32")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "tflite"}, "unknown format 'tflite'"),
        ({"precision": "int4"}, "unknown precision"),
        ({"precision": "int8"}, "name them with --calibration"),
        ({"calibration": "synthetic_a"}, "calibration belongs to int8"),
        ({}, "is no model folder: it has no config.json"),
    ],
)
def test_requests_that_cannot_be_met(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        export_runtime(tmp_path, **options)


def test_calibration_takes_the_training_part_only():
    from polypseg.data import open_dataset

    readers = module.calibration_frames("synthetic_a")
    data = open_dataset("synthetic_a")
    ids, _ = data.part("reference", "train")
    assert len(readers) == len(ids) < len(data.ids)
    assert readers[0]() == data.frame(data.by_id[ids[0]])


def test_the_published_folder_and_the_runtimes_file_have_options_of_their_own(tmp_path):
    from polypseg.cli.hub import export

    for options, words in (
        ({"precision": "fp16"}, "belong to --format"),
        ({}, "say with --output"),
        ({"format_": "onnx", "organization": "me"}, "belong to the published folder"),
    ):
        with pytest.raises(UsageError, match=words):
            export(str(tmp_path), **options)


def test_the_expected_file_is_small_and_readable(tmp_path):
    from light_models import write_light_model
    from polypseg.inference.replay import add_replay

    model = write_light_model(tmp_path / "m")
    add_replay(model, "onnx/model.onnx")
    kept = json.loads((model / "replay" / "expected.json").read_text())["outputs"]["onnx/model.onnx"]
    assert kept["size"] == [20, 24] and len(kept["logits"]) == 20 and len(kept["logits"][0]) == 24
    assert (model / "replay" / "frame.png").stat().st_size < 150_000
    assert torch.isfinite(torch.tensor(kept["logits"])).all()
