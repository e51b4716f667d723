"""The folder that is published: complete, loadable without this package, and equal to its source."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import processes
from marks import first_fast
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import read_content, save_receipt
from polypseg.files import file_sha256, read_json
from polypseg.hub import export as export_module
from polypseg.hub.export import FP16_WEIGHTS, export_model, half, write_weights
from polypseg.inference.model import build_image_processor, load_model
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import MANIFEST, find_mismatches, list_files, read_manifest
from receipt_factory import DrawnDataset, DrawnPredictions

FIELDS = {
    "cnn": {"encoder": "resnet10t"},
    "vit": {"encoder": "vit_tiny_patch16_224", "decoder": "dpt", "position_embedding": "sincos_mae"},
}
SIDE = 224
ORIGIN = {
    "model_id": "small.random",
    "encoder_initialisation": "random",
    "scale": "small",
    "recipe": "smoke",
    "finetuned_on": "synthetic_a reference/train",
    "n": 8,
    "finished": True,
}


def randomize(model: nn.Module) -> None:
    """Random BatchNorm statistics, so that no buffer can hide."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.fixture(scope="module", params=first_fast(FIELDS))
def source(request, tmp_path_factory) -> Path:
    """A model folder as fine-tuning leaves it."""
    folder = tmp_path_factory.mktemp(request.param) / "best"
    torch.manual_seed(0)
    options = {"decoder_channels": 32, "image_size": SIDE, "weights_origin": ORIGIN}
    model = PolypSegForSemanticSegmentation(PolypSegConfig(**FIELDS[request.param], **options))
    randomize(model)
    head = [module for module in model.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
    with torch.inference_mode():
        head.bias -= model.eval()(torch.randn(1, 3, SIDE, SIDE)).logits[:, 1].median()  # marks about half of a frame
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def without_card(monkeypatch):
    """For tests that are not about the card: its pictures cost forward passes."""
    monkeypatch.setattr(export_module, "_write_card", lambda *_, **__: None)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory) -> Path:
    return export_model(source, tmp_path_factory.mktemp("exported") / "model", organization="someone").folder


PLAIN = """
import sys
sys.modules["polypseg"] = None
import json
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline
folder, frame = sys.argv[1], Image.open(sys.argv[2])
torch.manual_seed(0)
images = torch.randn(2, 3, 224, 224)
out = {}
for name, options in {"fp32": {}, "fp16": {"variant": "fp16", "dtype": torch.float16}}.items():
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True, **options).float().eval()
    with torch.inference_mode():
        out[name] = model(images).logits.numpy()
segment = pipeline("image-segmentation", model=folder, trust_remote_code=True)
masks = {answer["label"]: np.asarray(answer["mask"]) > 0 for answer in segment(frame)}
out["polyp"] = masks.get("polyp", np.zeros(0))
out["background"] = masks.get("background", np.zeros(0))
sys.path.insert(0, folder)
sys.dont_write_bytecode = True  # the folder stays as it was exported
from handler import EndpointHandler
answers = EndpointHandler(folder)({"inputs": open(sys.argv[2], "rb").read()})
out["handler"] = json.dumps(answers)
np.savez(sys.argv[3], **out)
"""


@pytest.mark.slow
def test_exported_folder_works_where_polypseg_cannot_be_imported(source, exported, tmp_path):
    frame = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8))
    frame.save(tmp_path / "frame.png")
    command = [sys.executable, "-c", PLAIN, str(exported), str(tmp_path / "frame.png"), str(tmp_path / "out.npz")]
    done = processes.run(command, capture_output=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    model, processor = load_model(str(source))
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = model(torch.randn(2, 3, 224, 224)).logits.numpy()
        logits = model(**processor(images=[frame], return_tensors="pt")).logits
    resized = torch.nn.functional.interpolate(logits, size=(90, 130), mode="bilinear", align_corners=False)[0]
    right = (resized[1] > resized[0]).numpy()
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["fp32"], expected, atol=1e-5)  # observed: 0 to 2e-6
        np.testing.assert_allclose(found["fp16"], expected, atol=2e-2 * max(1, np.abs(expected).max()))
        masks = {"polyp": found["polyp"], "background": found["background"]}
        answers = {answer["label"]: answer for answer in json.loads(str(found["handler"]))}
    assert 0.01 < right.mean() < 0.99
    for label, mask in {"polyp": right, "background": ~right}.items():
        assert (masks[label] != mask).mean() < 1e-3
        picture = Image.open(io.BytesIO(base64.b64decode(answers[label]["mask"])))
        assert (np.asarray(picture).astype(bool) != mask).mean() < 1e-3
        assert 0.5 <= answers[label]["score"] <= 1


def test_exported_folder_is_complete_and_agrees_with_its_manifest(exported):
    files = set(list_files(exported))
    assert {
        "README.md",
        "config.json",
        "handler.py",
        "model.fp16.safetensors",
        "model.safetensors",
        "preprocessor_config.json",
        "replay/expected.json",
        "replay/frame.png",
        "requirements.txt",
    } <= files
    manifest = read_manifest(exported / MANIFEST)
    assert set(manifest) == files and find_mismatches(exported, manifest) == {}
    config = json.loads((exported / "config.json").read_text())
    native = config["model_type"] == "dpt"
    assert native == ("modeling_polypseg.py" not in files) == ("auto_map" not in config)
    assert config["id2label"] == {"0": "background", "1": "polyp"}
    assert config["weights_origin"]["model_id"] == "small.random"


def test_half_precision_file_holds_the_same_tensors_in_half_the_bytes(exported):
    full = safetensors.torch.load_file(exported / "model.safetensors")
    small = safetensors.torch.load_file(exported / FP16_WEIGHTS)
    assert full.keys() == small.keys()
    for key, value in full.items():
        assert small[key].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(small[key].float(), value.float(), rtol=1e-3, atol=1e-4)


def test_half_refuses_values_that_it_cannot_hold():
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 1e6)
    with pytest.raises(PolypSegError, match="float16"):
        half(layer)


@pytest.mark.slow
def test_an_exported_folder_can_be_exported_again(source, exported, tmp_path, without_card):
    again = export_model(exported, tmp_path / "again", organization="someone")
    first = safetensors.torch.load_file(exported / "model.safetensors")
    second = safetensors.torch.load_file(again.folder / "model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert again.origin.sha256 == file_sha256(source / "model.safetensors")


@pytest.mark.slow
def test_a_card_bears_the_name_that_the_weights_earn(exported, tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(export_module, "_write_card", lambda *_, name, **__: named.append(name))
    done = export_model(exported, tmp_path / "again")
    assert named == [done.origin.repo_name] == ["small.random-small-smoke-synthetic_a"]


def write_result(folder: Path, *, sha256: str | None, name: str = "small.random", count: int = 3) -> Path:
    """A receipt of made-up predictions by weights of that digest."""
    origin = ORIGIN | ({"sha256": sha256} if sha256 else {})
    dataset = DrawnDataset("kvasir_seg", count)
    source = DrawnPredictions(name=name, weights_origin=origin, skill=1.0, seed=0)
    manifest = dataset.manifest("reference", f"test{count}")
    return score_predictions(source, dataset, manifest=manifest, conventions=("paper",)).write(folder)


def test_only_sound_receipts_of_these_very_weights_go_along(source, tmp_path, without_card):
    ours, results = file_sha256(source / "model.safetensors"), tmp_path / "results"
    mine, elsewhere = write_result(results, sha256=ours), write_result(results, sha256=ours, name="another", count=4)
    write_result(results, sha256="ab" * 32, count=5)
    write_result(results, sha256=None, count=6)
    write_result(results, sha256="ab" * 32, name="another", count=7)  # nobody's business
    forged = write_result(results, sha256=ours, count=8)
    content = read_json(forged)
    content["scores_by_cluster"]["paper"]["dice"]["mean"] += 0.1
    save_receipt(forged, content)  # with a digest that fits
    (results / "small.random" / "kvasir_seg.reference.test.json").write_text('{"metrics": {}}')  # of another format
    done = export_model(source, tmp_path / "out", results=results, organization="someone")
    assert done.results == (elsewhere.name, mine.name)
    assert [reason.split(": ")[0] for reason in done.left_out] == [
        f"kvasir_seg.reference.test{count}.receipt.json" for count in (5, 6, 8)
    ]
    assert "other weights (abababababab)" in done.left_out[0] and "does not say" in done.left_out[1]
    assert "scores_by_cluster.paper.dice.mean" in done.left_out[2]
    assert sorted(path.name for path in (tmp_path / "out" / "results").iterdir()) == [mine.name, elsewhere.name]
    assert read_content(tmp_path / "out" / "results" / mine.name) == read_content(mine)


def test_results_without_a_receipt_are_a_usage_error(source, tmp_path, without_card):
    (tmp_path / "results" / "small.random").mkdir(parents=True)
    (tmp_path / "results" / "small.random" / "kvasir_seg.reference.test.json").write_text('{"metrics": {}}')
    with pytest.raises(UsageError, match=r"no receipts .*another format are not read: run"):
        export_model(source, tmp_path / "out", results=tmp_path / "results", organization="someone")
    assert not (tmp_path / "out").exists()


def test_a_copy_with_other_outputs_is_not_kept(source, tmp_path, monkeypatch, without_card):
    write_weights = export_module.write_weights

    def damaged(model, folder):
        write_weights(model, folder)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        key = next(k for k in state if state[k].ndim == 4)
        state[key] = state[key] * 1.5
        safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "write_weights", damaged)
    with pytest.raises(PolypSegError, match="nothing is kept"):
        export_model(source, tmp_path / "out", organization="someone")
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(source, tmp_path, without_card):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no exported model"):
        export_model(source, tmp_path / "work", organization="someone")
    with pytest.raises(UsageError, match=r"another folder|no exported model"):
        export_model(source, source.parent, organization="someone")
    assert (tmp_path / "work" / "notes.txt").read_text() == "mine" and (source / "model.safetensors").is_file()


@pytest.mark.slow
def test_changed_weights_lose_the_name_and_the_results_of_the_old_ones(source, tmp_path, without_card):
    model, processor = load_model(str(source))
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    model.save_pretrained(tmp_path / "further")
    processor.save_pretrained(tmp_path / "further")
    write_result(tmp_path / "results", sha256=file_sha256(source / "model.safetensors"))
    done = export_model(tmp_path / "further", tmp_path / "out", results=tmp_path / "results", organization="someone")
    assert done.results == () and "other weights" in done.left_out[0]
    assert "changed" in done.origin.suffix and any("changed" in why for why in done.origin.shortcomings)


def test_a_damaged_export_is_not_exported_again(exported, tmp_path, without_card):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    with pytest.raises(PolypSegError, match=r"config\.json \(damaged\)"):
        export_model(copy, tmp_path / "out", organization="someone")


def test_a_folder_that_is_no_model_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no model folder"):
        export_model(tmp_path, tmp_path / "out")


def test_saving_a_run_after_an_export_brings_no_code_along(exported, tmp_path):
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet10t", decoder_channels=8))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize(("encoder", "decoder"), [("resnet10t", "dpt"), ("vit_tiny_patch16_224", "deeplabv3plus")])
def test_pairs_that_the_study_does_not_have_travel_with_their_code(encoder, decoder, tmp_path):
    torch.manual_seed(0)
    config = PolypSegConfig(encoder=encoder, decoder=decoder, decoder_channels=8, image_size=64)
    model = PolypSegForSemanticSegmentation(config).eval()
    write_weights(model, tmp_path)
    assert (tmp_path / "decoder_dpt.py").is_file()
    reference = json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForSemanticSegmentation"]
    copied = get_class_from_dynamic_module(reference, str(tmp_path))  # not the package's class
    assert copied.__module__.startswith("transformers_modules")
    loaded = copied.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(image).logits, model(image).logits, rtol=0, atol=1e-5)
