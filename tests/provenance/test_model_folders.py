"""Model folders that are damaged, incomplete or hostile: one line that says what is wrong, and no result."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation

import polypseg
from polypseg.data.polyps import PolypDataset, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.robustness import measure_robustness
from polypseg.inference.model import fold_names, load_model, polyp_logits, predict_masks, resize_map
from polypseg.inference.model_folder import results_name
from polypseg.inference.onnx_predictions import OnnxPredictions
from polypseg.inference.open_model import open_model
from polypseg.inference.predictors import ModelPredictions, SmpPredictions
from polypseg.inference.segment_files import segment_files
from polypseg.inference.segmenter import Segmenter
from tiny_models import write_tiny_model

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("written"))


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    return shutil.copytree(written, tmp_path / "tiny")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    save_file(change(state), folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


class TestIncomplete:
    @pytest.mark.parametrize("door", [load_model, polypseg.load, open_model, Segmenter.from_pretrained])
    def test_every_door_lists_what_is_missing(self, folder, door):
        lost = "decoder.fuse.0.weight"
        edit_weights(folder, lambda s: {k: v for k, v in s.items() if k.startswith("decoder.") and k != lost})
        with pytest.raises(
            UsageError, match=rf"not those of its config.json: \d+ tensor.*: {lost}, encoder\.\* \(\d+\)$"
        ):
            door(str(folder))

    def test_names_are_folded_without_loss(self):
        known = ["a.b.w", "a.b.v", "a.c.w", "d.w", "e"]
        assert fold_names(["a.b.w", "a.b.v"], known=known) == ["a.b.* (2)"]
        assert fold_names(["a.c.w", "a.b.v", "a.b.w"], known=known) == ["a.* (3)"]
        assert fold_names(["a.b.w", "d.w", "e"], known=known) == ["a.b.w", "d.w", "e"]
        assert fold_names(known, known=known) == ["* (5)"]


class TestNotFinite:
    """A NaN is above no threshold: every path would say that there is no polyp."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("key", ["decoder.head.weight", "encoder.bn1.running_var"])
    def test_weights_are_refused_by_name(self, folder, key, value):
        edit_weights(folder, lambda s: s | {key: torch.full_like(s[key], value)})
        assert key in refusal(folder) and "tiny" in refusal(folder)

    @pytest.mark.parametrize("name", ["image_mean", "image_std"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("file", [CONFIG, PROCESSOR])
    def test_statistics_are_refused_by_name(self, folder, file, name, value):
        edit(folder / file, **{name: [0.5, value, 0.5]})
        assert name in refusal(folder) and "tiny" in refusal(folder)

    def test_a_deviation_of_zero_is_refused(self, folder):
        edit(folder / PROCESSOR, image_std=[0.2, 0.0, 0.2])
        assert "image_std" in refusal(folder)

    @pytest.fixture
    def broken(self, folder: Path) -> Segmenter:
        """Finite weights that overflow."""
        segmenter = polypseg.load(folder)
        with torch.no_grad():
            segmenter.model.decoder.head.weight.fill_(3e38)
            segmenter.model.decoder.fuse[2].weight.fill_(3e38)
        return segmenter

    @pytest.fixture
    def data(self, tmp_path: Path) -> PolypDataset:
        for part in ("images", "masks"):
            (tmp_path / "data" / part).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (48, 40), 255 * (number % 2)).save(tmp_path / "data" / part / f"{number}.png")
        return open_dataset("folder", source=tmp_path / "data")

    def test_predict_and_segment_name_file_and_model(self, broken, tmp_path):
        frame = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
        with pytest.raises(PolypSegError, match=r"tiny gives values that are no finite numbers .* for frame 1"):
            broken.predict([frame])
        with pytest.raises(PolypSegError, match="no finite numbers"):
            predict_masks(broken.model, broken.processor, [frame])
        frame.save(tmp_path / "one.png")
        with pytest.raises(PolypSegError, match=r"tiny gives .* for .*one\.png"):
            segment_files(broken, [str(tmp_path / "one.png")], tmp_path / "out")
        assert not list((tmp_path / "out").glob("masks/*"))

    def test_evaluation_and_robustness_name_image_and_model(self, broken, data):
        ids = [record.id for record in data.records]
        source = ModelPredictions(name="mine", model=broken.model, processor=broken.processor)
        with pytest.raises(PolypSegError, match=f"mine gives .* for {ids[0]}:"):
            list(source.predict(data, ids))
        with pytest.raises(PolypSegError, match=f"mine gives .* for {ids[0]}:"):
            measure_robustness(source, data, kinds=["noise"])

    @pytest.mark.parametrize("output", ["logits", "probability"])
    def test_foreign_models_too(self, data, output, monkeypatch):
        ids = [record.id for record in data.records]

        class Half(torch.nn.Module):
            def forward(self, pixels):
                maps = torch.full((len(pixels), 1, 64, 64), 0.25 if output == "probability" else -3.0)
                maps[1:] = torch.nan
                return maps

        class Session:
            input_shape = (None, 3, 64, 64)

            def __init__(self, path):
                pass

            def run(self, pixels):
                return Half()(torch.from_numpy(pixels)).numpy()

        monkeypatch.setattr("polypseg.inference.runtimes.OnnxRuntime", Session)
        for source in (
            SmpPredictions(name="smp", model=Half(), image_size=64, output=output),
            OnnxPredictions(name="onnx", path=Path("some.onnx"), output=output),
        ):
            with pytest.raises(PolypSegError, match=f"(smp|some.onnx) gives .* for {ids[1]}:"):
                list(source.predict(data, ids))

    def test_the_shared_places_refuse_whoever_calls_them(self):
        for bad in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(PolypSegError, match="no finite numbers"):
                resize_map(torch.tensor([[0.0, bad]]), (4, 4))
            with pytest.raises(PolypSegError, match="no finite numbers"):
                polyp_logits(torch.full((1, 2, 2, 2), bad), None)


NESTED = "[" * 5000 + "]" * 5000


class TestHostile:
    """Each was a traceback, or reached a loader that fetches code."""

    @pytest.mark.parametrize(
        "changes",
        [
            {"encoder": ["resnet10t"]},
            {"encoder": {"a": 1}},
            {"encoder": None},
            {"decoder": ["dpt"]},
            {"position_embedding": 3},
            {"position_embedding_trainable": "no"},
            {"decoder_channels": -1},
            {"decoder_channels": 10**9},
            {"decoder_channels": 1e400},
            {"decoder_channels": "many"},
            {"decoder_channels": True},
            {"image_size": -64},
            {"image_size": 10**8},
            {"image_size": [64, 64]},
            {"decoder_dropout": "half"},
            {"decoder_dropout": 7},
            {"image_mean": 0.5},
            {"image_mean": ["a", "b", "c"]},
            {"image_std": [0.5]},
            {"weights_origin": "the internet"},
            {"weights_origin": ["a"]},
            {"id2label": {"0": "a", "1": "b", "2": "c"}},
            {"id2label": {"0": "polyp", "1": "background"}},
            {"id2label": "polyp"},
            {"num_labels": 3},
            {"model_type": "nothing"},
            {"model_type": ["polypseg"]},
            {"architectures": 7, "model_type": "bert"},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            {"quantization_config": {"quant_method": "nonsense"}},
            {"quantization_config": "yes"},
            {"attn_implementation": "flash_attention_2"},
        ],
        ids=lambda changes: "-".join(f"{key}={value}"[:40] for key, value in changes.items()),
    )
    def test_a_configuration(self, folder, changes):
        edit(folder / CONFIG, **changes)
        assert "tiny" in refusal(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{", '"text"', "null", NESTED, '{"a": ' + "9" * 5000 + "}", "\udcff"])
    @pytest.mark.parametrize("file", [CONFIG, PROCESSOR, "model.safetensors.index.json"])
    def test_a_file_that_is_no_configuration(self, folder, file, text):
        if file.startswith("model"):
            (folder / WEIGHTS).unlink()
        (folder / file).write_bytes(text.encode(errors="surrogateescape"))
        assert "tiny" in refusal(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"size": {"height": 10**8, "width": 10**8}},
            {"size": {"height": -3, "width": 64}},
            {"size": {"height": 64.5, "width": 64}},
            {"size": "large"},
            {"resample": 99},
            {"rescale_factor": "1/255"},
            {"image_mean": "gray"},
            {"image_mean": [0.1]},
            {"image_processor_type": "os.system"},
        ],
        ids=str,
    )
    def test_an_image_processor(self, folder, changes):
        edit(folder / PROCESSOR, **changes)
        assert "tiny" in refusal(folder)

    @pytest.mark.parametrize(
        "index",
        [
            {"weight_map": {"a": "../../etc/passwd"}},
            {"weight_map": {"a": "none.safetensors"}},
            {"weight_map": ["a"]},
            {"metadata": {}},
            {"weight_map": {"a": 3}},
        ],
        ids=str,
    )
    def test_an_index_of_shards(self, folder, index):
        (folder / WEIGHTS).unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "tiny" in refusal(folder)

    def test_pickled_weights_are_not_opened(self, folder, monkeypatch):
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
        assert "safetensors" in refusal(folder)

    def test_an_adapter_is_not_followed(self, folder):
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')
        assert "merge the adapter" in refusal(folder)

    def test_a_huge_text_file_is_not_read(self, folder):
        with (folder / "tokenizer.json").open("wb") as file:
            file.truncate(2**30)
        assert "tokenizer.json has 1073741824 bytes" in refusal(folder)

    @pytest.mark.parametrize("dtype", ["float99", 5, "int8"])
    def test_a_type_of_numbers_changes_nothing(self, folder, dtype):
        """The weights say of what type they are, and are computed with in float32."""
        edit(folder / CONFIG, dtype=dtype)
        assert load_model(str(folder))[0].dtype == torch.float32

    def test_half_precision_is_computed_in_float32(self, folder):
        edit_weights(folder, lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()})
        edit(folder / CONFIG, dtype="float16")
        (prediction,) = polypseg.load(folder).predict([Image.new("RGB", (64, 64))])
        assert prediction.probability.dtype == np.float32

    @pytest.mark.parametrize("name", ["../../elsewhere", "/etc/x", ".hidden", "a/b", "a\nb", 5, "x" * 300])
    def test_an_id_that_would_leave_the_folder_of_results(self, name):
        config = type("Config", (), {"weights_origin": {"model_id": name}})
        with pytest.raises(UsageError, match="cannot name results"):
            results_name(config, "folder")


KERNELS = [
    {"attn_implementation": "somebody/kernel"},
    {"_attn_implementation": "kernels-community/flash-attn2@main:attention"},
    {"_attn_implementation_internal": "somebody/kernel"},
    {"attn_implementation": {"": "somebody/kernel"}},
    {"attn_implementation": ["somebody/kernel"]},
    {"backbone_config": {"model_type": "resnet", "attn_implementation": "somebody/kernel"}},
    {"attn_implementation": "flash_attention_3"},
]


@pytest.mark.parametrize("model_type", ["polypseg", "segformer", "dpt"])
@pytest.mark.parametrize("changes", KERNELS, ids=str)
def test_an_attention_kernel_is_refused_before_any_loader(folder, changes, model_type, monkeypatch):
    """The kernels library fetches code from the Hub and runs it, without asking for trust in remote code."""
    edit(folder / CONFIG, model_type=model_type, **changes)
    monkeypatch.setattr(
        AutoModelForSemanticSegmentation, "from_pretrained", lambda *a, **k: pytest.fail("a loader was reached")
    )
    before = set(sys.modules)
    assert "asks for the attention kernel" in refusal(folder)
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] == "kernels"}
