"""What converting published files promises: the file's own outputs, or one sentence and nothing written or executed."""

import argparse
import io
import json
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from marks import first_fast
from polypseg import zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.inference.model import load_model
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.origin import read_origin
from polypseg.weights import convert as conversion
from polypseg.weights.convert import convert_file, inspect_file
from polypseg.weights.formats import Content, recognize
from polypseg.weights.loading import describe_source, identify_encoder, load_encoder_weights, pretraining_origin
from reference_files import (
    ENCODER_KINDS,
    ReferenceFile,
    augreg_arrays,
    dpt_decoder_shapes,
    encoder_state,
    file_name,
    mae_decoder_shapes,
    moco_v3_content,
    reference_state,
    sincos,
    training_checkpoint,
    write_reference_file,
    write_upstream_encoder,
)

TINY = "vit_tiny_patch16_224"
LOGITS = 1e-5
"""Relative to the largest logit; observed over the twelve: 0 for ViT, at most 2.8e-6 for ResNet50."""


@pytest.fixture
def small_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of ViT-B stand for ViT-tiny: everything is a sixteenth of the size, under the same names."""
    monkeypatch.setitem(zoo.ENCODERS, "vit_base", TINY)


def hollow(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors of full size that take no space, on disk neither."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def hollow_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return hollow({key: tuple(value.shape) for key, value in state.items()})


def hollow_vit(*, table: str = "learned", mae: bool = False) -> dict[str, Tensor]:
    """The 280 or 281 keys of a fine-tuned ViT file of full size; only the position table has values."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    state = hollow_copy(dict(vit.state_dict())) | hollow(dpt_decoder_shapes())
    state["pos_embed"] = torch.randn(1, 197, 768) if table == "learned" else sincos(768, column_first="mae" in table)
    return state | (hollow({"decoder_pos_embed": (1, 197, 512)}) if mae else {})


@cache
def resnet_shapes() -> dict[str, tuple[int, ...]]:
    state, _ = reference_state(zoo.get("RN-NA-NA"), seed=0)
    return {key: tuple(value.shape) for key, value in state.items()}


def hollow_resnet() -> dict[str, Tensor]:
    """The 379 keys of a fine-tuned ResNet50 file of full size."""
    return hollow(resnet_shapes())


def save_finetuned(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(training_checkpoint(state), path)
    return path


def refusal(path: Path, tmp_path: Path, *, kind: type[PolypSegError] = UsageError, model: str | None = None) -> str:
    """The one line with which a conversion is refused; nothing may be written."""
    output = tmp_path / "converted"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PolypSegError) as caught:
        convert_file(path, output, model=model)
    assert type(caught.value) is kind, caught.value
    assert sorted(tmp_path.rglob("*")) == before
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


# -- the study's fine-tuned files -----------------------------------------------------------------------------


def check_model(source: ReferenceFile, entry: zoo.ZooEntry, folder: Path) -> PolypSegForSemanticSegmentation:
    """Convert, load as evaluation does, and compare logits with the oracle's."""
    convert_file(source.path, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    model, processor = load_model(str(folder))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        logits = model(images).logits
    expected = source.oracle(images)
    assert expected.std() > 0.1
    assert (logits[:, 1:] - expected).abs().max() <= LOGITS * expected.abs().max()
    assert (processor.size["height"], processor.size["width"]) == (224, 224)
    assert tuple(processor.image_mean) == zoo.IMAGENET_MEAN and tuple(processor.image_std) == zoo.IMAGENET_STD
    origin = read_origin(model.config.weights_origin)
    assert (origin.kind, origin.model_id, origin.entry) == ("converted", entry.model_id, entry)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("short_name", first_fast(["VT-HK-MC", "VT-IN-MA", "VT-NA-NA"]))
def test_convert_file_gives_the_outputs_of_another_implementation(short_name, tmp_path, small_vit):
    entry = zoo.get(short_name)
    model = check_model(write_reference_file(entry, tmp_path, seed=1), entry, tmp_path / "model")
    assert model.config.position_embedding == entry.position_embedding
    assert ("encoder.pos_embed" in dict(model.named_parameters())) == entry.position_embedding_trainable


@pytest.mark.slow
@pytest.mark.parametrize("short_name", ["RN-IN-BT", "VT-IN-MC"])
def test_convert_file_converts_the_full_size_files(short_name, tmp_path):
    entry = zoo.get(short_name)
    model = check_model(write_reference_file(entry, tmp_path, seed=1), entry, tmp_path / "model")
    origin = read_origin(model.config.weights_origin)
    assert origin.official and origin.converted_from.upstream == "SSL4GIE"


@pytest.mark.slow
def test_convert_file_takes_tensors_saved_from_within_distributed_training(tmp_path, small_vit):
    entry = zoo.get("VT-IN-SL")
    state, oracle = reference_state(entry, seed=2)
    path = save_finetuned({f"module.{key}": value for key, value in state.items()}, tmp_path / file_name(entry))
    check_model(ReferenceFile(path=path, oracle=oracle), entry, tmp_path / "model")


@pytest.mark.parametrize("entry", zoo.ZOO, ids=lambda entry: entry.short_name)
def test_every_file_name_of_the_study_means_its_row(entry):
    for dataset in ("Kvasir", "CVC"):
        named = conversion._FILE_NAME.fullmatch(file_name(entry, dataset=dataset))
        assert named and conversion._row_of_name(named) == entry and named["dataset"] == dataset


def test_file_names_are_those_that_the_authors_script_writes():
    assert file_name(zoo.get("RN-HK-BT")) == "resnet50-Hyperkvasir_barlowtwins_init-frozen_False-dataset_Kvasir.pth"
    assert file_name(zoo.get("VT-IN-SL")) == "vit_b-ImageNet_class_init-frozen_False-dataset_Kvasir.pth"
    assert file_name(zoo.get("VT-NA-NA"), dataset="CVC") == "vit_b-random_init-frozen_False-dataset_CVC.pth"


@pytest.mark.slow
def test_a_file_tuned_on_cvc_keeps_its_row_but_not_its_name(tmp_path, small_vit):
    entry = zoo.get("VT-IN-MC")
    source = write_reference_file(entry, tmp_path, seed=3, dataset="CVC")
    origin = read_origin(check_model(source, entry, tmp_path / "model").config.weights_origin)
    assert origin.finetuned_on.startswith("CVC-ClinicDB") and not origin.official
    assert origin.converted_from.file == source.path.name
    assert len(origin.converted_from.sha256) == 64


def test_a_renamed_file_needs_its_row_and_lists_those_that_fit(tmp_path):
    path = save_finetuned(hollow_vit(table="sincos_mae", mae=True), tmp_path / "best.pth")
    assert "its content fits VT-HK-MA, VT-IN-MA: say which with --model" in refusal(path, tmp_path)
    path = save_finetuned(hollow_vit(table="sincos_moco_v3"), tmp_path / "moco.pth")
    assert "its content fits VT-HK-MC, VT-IN-MC: say" in refusal(path, tmp_path)
    path = save_finetuned(hollow_vit(), tmp_path / "learned.pth")
    assert "its content fits VT-IN-SL, VT-NA-NA: say" in refusal(path, tmp_path)


def test_a_renamed_file_is_not_said_to_be_tuned_on_what_its_name_does_not_say(tmp_path, small_vit):
    entry = zoo.get("VT-NA-NA")
    path = write_reference_file(entry, tmp_path, seed=4).path.rename(tmp_path / "model.pth")
    convert_file(path, tmp_path / "out", model="VT-NA-NA")
    record = json.loads((tmp_path / "out" / "config.json").read_text())["weights_origin"]
    assert record["finetuned_on"].startswith("unknown data") and not read_origin(record).official


@pytest.mark.parametrize(
    ("table", "mae", "claimed", "said"),
    [
        ("learned", False, "VT-IN-MC", "position table is learned, not sincos_moco_v3"),
        ("sincos_mae", False, "VT-IN-MC", "position table is sincos_mae, not sincos_moco_v3"),
        ("sincos_moco_v3", True, "VT-IN-MC", "it has the position table of MAE's decoder"),
        ("sincos_mae", False, "VT-HK-MA", "it has no position table of MAE's decoder"),
        ("sincos_moco_v3", True, "VT-HK-MA", "position table is sincos_moco_v3, not sincos_mae"),
        ("sincos_moco_v3", False, "VT-NA-NA", "position table is sincos_moco_v3, not learned"),
        ("sincos_mae", True, "VT-IN-SL", "it has the position table of MAE's decoder"),
        ("learned", False, "RN-IN-BT", "it is a SSL4GIE fine-tuned ViT-B"),
    ],
)
def test_content_that_contradicts_the_claimed_row_is_refused(tmp_path, table, mae, claimed, said):
    state = hollow_vit(table=table, mae=mae)
    path = save_finetuned(state, tmp_path / file_name(zoo.get(claimed)))
    assert said in refusal(path, tmp_path)
    renamed = path.rename(tmp_path / "renamed.pth")
    assert said in refusal(renamed, tmp_path, model=claimed)


def test_a_position_table_that_moved_during_training_is_not_the_frozen_one(tmp_path):
    state = hollow_vit(table="sincos_moco_v3")
    state["pos_embed"][0, 5, 7] += 2e-5
    path = save_finetuned(state, tmp_path / file_name(zoo.get("VT-IN-MC")))
    assert "position table is learned" in refusal(path, tmp_path)


def test_name_and_row_must_agree(tmp_path):
    path = save_finetuned(hollow_resnet(), tmp_path / file_name(zoo.get("RN-HK-MC")))
    assert "is RN-HK-MC by its name, not RN-IN-MC" in refusal(path, tmp_path, model="RN-IN-MC")
    frozen = path.rename(tmp_path / path.name.replace("frozen_False", "frozen_True"))
    assert "frozen encoder" in refusal(frozen, tmp_path, model="RN-IN-MC")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("decoder.block1.0.weight"), "1 missing (first decoder.skip.0.weight)"),
        (lambda s: s.pop("encoder.layer4.2.conv3.weight"), "1 missing (first encoder.layer4.2.conv3.weight)"),
        (
            lambda s: s.update({"decoder.block3.0.weight": torch.zeros(1)}),
            "1 unexpected (first decoder.block3.0.weight)",
        ),
        (lambda s: s.update({"encoder.fc.weight": torch.zeros(1)}), "1 unexpected (first encoder.fc.weight)"),
        (lambda s: s.update({"segmentation_head.0.weight": torch.zeros(21, 256, 1, 1)}), "1 of another shape"),
    ],
)
def test_a_finetuned_file_is_taken_exactly_or_not_at_all(tmp_path, change, said):
    state = hollow_resnet()
    change(state)
    path = save_finetuned(state, tmp_path / file_name(zoo.get("RN-IN-MC")))
    assert said in refusal(path, tmp_path, kind=PolypSegError)


@pytest.mark.parametrize("wrong", ["swapped", "nan"])
@pytest.mark.slow
def test_weights_in_the_wrong_place_are_found_by_their_outputs(tmp_path, small_vit, monkeypatch, wrong):
    """Same keys, same shapes: only a second network can tell."""
    source = write_reference_file(zoo.get("VT-NA-NA"), tmp_path, seed=5)

    def misplaced(content: Content, *, path: Path) -> Any:
        found = recognize(content, path=path)
        a, b = "decoder.fusion.2.skip.body.1.weight", "decoder.fusion.2.skip.body.4.weight"
        if wrong == "swapped":
            found.state[a], found.state[b] = found.state[b], found.state[a]
        else:
            found.state[a] = found.state[a] * float("nan")
        return found

    monkeypatch.setattr(conversion, "recognize", misplaced)
    assert "converted outputs differ" in refusal(source.path, tmp_path, kind=PolypSegError)


def test_convert_file_replaces_nothing(tmp_path):
    path = save_finetuned(hollow_resnet(), tmp_path / file_name(zoo.get("RN-IN-MC")))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("three years")
    with pytest.raises(UsageError, match="exists already"):
        convert_file(path, tmp_path / "kept")
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "three years"


# -- encoders ---------------------------------------------------------------------------------------------


KINDS = {  # kind -> method that the file tells, what is left out, rows that may be
    "moco_v3_resnet50": ("moco_v3", {"momentum encoder": 328, "predictor": 7, "projector": 10}, "RN-HK-MC, RN-IN-MC"),
    "moco_v3_vit_b": ("moco_v3", {"momentum encoder": 166, "predictor": 10, "projector": 16}, "VT-HK-MC, VT-IN-MC"),
    "barlow_twins": (None, {}, "RN-HK-MC, RN-HK-BT, RN-IN-MC, RN-IN-BT, RN-IN-SL"),
    "barlow_twins_checkpoint": (
        "barlow_twins",
        {"projector": 13, "normalization of the loss": 3},
        "RN-HK-BT, RN-IN-BT",
    ),
    "mae": ("mae", {}, "VT-HK-MA, VT-IN-MA"),
    "mae_full": ("mae", {"mask token": 1, "MAE decoder": 103}, "VT-HK-MA, VT-IN-MA"),
    "augreg": ("supervised", {"classifier": 2}, "VT-IN-SL"),
    "torchvision_resnet50": ("supervised", {"classifier": 2}, "RN-IN-SL"),
    "hyperkvasir_resnet50": (None, {}, "RN-HK-MC, RN-HK-BT, RN-IN-MC, RN-IN-BT, RN-IN-SL"),
    "hyperkvasir_moco_v3_vit_b": ("moco_v3", {}, "VT-HK-MC, VT-IN-MC"),
    "hyperkvasir_mae": ("mae", {}, "VT-HK-MA, VT-IN-MA"),
}
TENSORS = {
    "moco_v3_resnet50": 663,
    "moco_v3_vit_b": 342,
    "barlow_twins_checkpoint": 334,
    "mae_full": 254,
    "augreg": 152,
    "torchvision_resnet50": 320,
}


@pytest.mark.parametrize("kind", first_fast(ENCODER_KINDS))
def test_every_published_encoder_is_recognized_converted_and_loaded(kind, tmp_path, small_vit):
    source = write_upstream_encoder(kind, tmp_path, seed=6, head_width=8)
    method, left_out, rows = KINDS[kind]
    report = inspect_file(source.path)
    assert (report.method, report.dropped, ", ".join(report.models)) == (method, left_out, rows)
    assert report.holds == "encoder" and report.kept == len(source.state) and not report.unknown
    assert report.tensors == TENSORS.get(kind, len(source.state))
    name = "resnet50" if "vit" not in kind and "mae" not in kind and kind != "augreg" else TINY
    assert report.architecture == name
    assert all(len(line) < 400 for line in report.lines())

    folder = convert_file(source.path, tmp_path / "encoder")
    written = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert set(written.state_dict()) == set(source.state)
    assert all(torch.equal(value, source.state[key]) for key, value in written.state_dict().items())

    config = PolypSegConfig(encoder=name, decoder="dpt" if name == TINY else "deeplabv3plus", decoder_channels=8)
    for path in (source.path, folder / "model.safetensors"):
        model = PolypSegForSemanticSegmentation(config)
        description = load_encoder_weights(model, str(path))
        assert description == describe_source(str(path)) and path.name in description
        assert all(torch.equal(value, source.state[key]) for key, value in model.encoder.state_dict().items())
        assert identify_encoder(path).method == method


def test_a_converted_encoder_is_not_taken_for_one_that_was_pretrained_here(tmp_path, small_vit):
    source = write_upstream_encoder("mae", tmp_path, seed=6)
    folder = convert_file(source.path, tmp_path / "encoder", model="VT-IN-MA")
    assert pretraining_origin(str(folder / "model.safetensors")) is None  # its license stays the upstream's
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["polypseg_conversion"])
    assert header["method"] == "mae" and header["converted_from"]["file"] == source.path.name
    assert header == json.loads((folder / "config.json").read_text())["polypseg_conversion"]


def test_files_of_this_package_need_no_conversion(tmp_path):
    """Converting an encoder of pretrain.py would lose the record of its training."""
    key = {"polypseg_pretraining": json.dumps({"method": "mae", "encoder": TINY})}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(encoder_state(TINY, seed=0), path, metadata=key)
    assert "already in this package's format" in refusal(path, tmp_path)
    report = inspect_file(path)
    assert report.format == "encoder of pretrain.py" and report.method == "mae"
    assert identify_encoder(path).method == "mae"


def test_the_row_names_the_method_of_an_encoder_that_does_not_tell_it(tmp_path):
    source = write_upstream_encoder("barlow_twins", tmp_path, seed=6)
    folder = convert_file(source.path, tmp_path / "encoder", model="RN-IN-BT")
    assert identify_encoder(folder / "model.safetensors").method == "barlow_twins"


@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ("mae", "VT-IN-MC", "pretrained with MAE, but VT-IN-MC stands for MoCo v3"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("hyperkvasir_moco_v3_vit_b", "VT-HK-MA", "pretrained with MoCo v3, but VT-HK-MA stands for MAE"),
                ("augreg", "VT-IN-MA", "pretrained with supervised, but"),
            ]
        ),
        ("mae", "RN-IN-BT", f"holds {TINY}, but RN-IN-BT has resnet50"),
        ("augreg", "VT-NA-NA", "stands for random initialization"),
    ],
)
def test_an_encoder_of_another_row_is_refused(kind, model, said, tmp_path, small_vit):
    path = write_upstream_encoder(kind, tmp_path, seed=6).path
    assert said in refusal(path, tmp_path, model=model)


def test_load_encoder_weights_takes_moco_files_of_any_architecture(tmp_path):
    """Ablations with a ResNet18 pretrained by the MoCo v3 script."""
    state = encoder_state("resnet18", seed=1)
    filled: Callable[..., dict[str, Tensor]] = hollow
    torch.save(moco_v3_content(state, filled, is_resnet=True, hidden=8), tmp_path / "checkpoint_0099.pth.tar")
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18", decoder_channels=8))
    said = load_encoder_weights(model, str(tmp_path / "checkpoint_0099.pth.tar"))
    assert said.startswith("file checkpoint_0099.pth.tar (MoCo v3 pretraining checkpoint, sha256 ")
    assert all(torch.equal(value, state[key]) for key, value in model.encoder.state_dict().items())


def test_old_files_without_batchnorm_counters_are_complete(tmp_path):
    state = {k: v for k, v in encoder_state("resnet50", seed=1).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet50-19c8e357.pth", _use_new_zipfile_serialization=False)
    folder = convert_file(tmp_path / "resnet50-19c8e357.pth", tmp_path / "encoder")
    written = safetensors.torch.load_file(folder / "model.safetensors")
    assert len(written) == 318 and written["bn1.num_batches_tracked"] == 0
    assert torch.equal(written["bn1.running_var"], state["bn1.running_var"])


def test_half_precision_weights_are_written_in_single(tmp_path):
    state = encoder_state("resnet50", seed=1)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(half, tmp_path / "half.pth")
    written = safetensors.torch.load_file(convert_file(tmp_path / "half.pth", tmp_path / "out") / "model.safetensors")
    assert all(torch.equal(written[key], value.to(written[key].dtype)) for key, value in half.items())
    assert written["conv1.weight"].dtype == torch.float32


def test_names_without_values_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7, device="meta")}, tmp_path / "meta.pth")
    assert "without values" in refusal(tmp_path / "meta.pth", tmp_path, kind=PolypSegError)


def test_a_momentum_encoder_alone_is_no_encoder(tmp_path):
    content = {"state_dict": hollow({"module.momentum_encoder.conv1.weight": (64, 3, 7, 7)})}
    torch.save(content, tmp_path / "moco.pth.tar")
    assert "only momentum encoder (1 tensors)" in refusal(tmp_path / "moco.pth.tar", tmp_path, kind=PolypSegError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "from resnet50 it differs by"),
        ("resnet101", "unexpected"),
        ("vit_large_patch16_224", "from vit_base_patch16_224 it differs by"),
        ("vit_small_patch16_224", "of another shape"),
        ("efficientnet_b0", "missing"),
    ],
)
def test_weights_of_another_architecture_are_refused_with_what_differs(name, said, tmp_path):
    with torch.device("meta"):
        shapes = dict(timm.create_model(name, num_classes=0).state_dict())
    torch.save(hollow_copy(shapes), tmp_path / "weights.pth")
    assert said in refusal(tmp_path / "weights.pth", tmp_path, kind=PolypSegError)


def test_an_unknown_tensor_of_a_known_layout_is_refused(tmp_path):
    shapes = {"module.backbone.conv1.weight": (64, 3, 7, 7), "module.queue": (8, 8)}
    torch.save({"model": hollow(shapes)}, tmp_path / "checkpoint.pth")
    assert "1 unknown (first queue)" in refusal(tmp_path / "checkpoint.pth", tmp_path, kind=PolypSegError)
    assert inspect_file(tmp_path / "checkpoint.pth").unknown == ("queue",)


def test_a_finetuned_model_is_no_encoder_to_start_from(tmp_path):
    path = save_finetuned(hollow_resnet(), tmp_path / "best.pth")
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18", decoder_channels=8))
    with pytest.raises(UsageError, match=r"not an encoder: make a model of it with `polypseg convert best\.pth`"):
        load_encoder_weights(model, str(path))


def test_misread_encoders_are_found_by_their_outputs(tmp_path, small_vit, monkeypatch):
    """Query and value of one block exchanged: every key and shape is right."""
    path = write_upstream_encoder("augreg", tmp_path, seed=6).path

    def misread(file: Path) -> Any:
        arrays = conversion_read(file)
        at = "Transformer/encoderblock_3/MultiHeadDotProductAttention_1"
        arrays[f"{at}/query/kernel"], arrays[f"{at}/value/kernel"] = (
            arrays[f"{at}/value/kernel"],
            arrays[f"{at}/query/kernel"],
        )
        return arrays

    conversion_read = conversion.read_arrays
    monkeypatch.setattr(conversion, "read_arrays", misread)
    assert "converted outputs differ" in refusal(path, tmp_path, kind=PolypSegError)


# -- files that are nothing of the kind ---------------------------------------------------------------------


class Bomb:
    """An object whose unpickling creates a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_training_checkpoints_with_argument_lists_and_random_states_are_read(tmp_path):
    content = {"model": encoder_state("vit_tiny_patch16_224", seed=0), "args": argparse.Namespace(lr=1e-3, tags=["a"])}
    torch.save(content | {"np_state": np.random.RandomState(0).get_state(), "f": np.float64(1)}, tmp_path / "ok.pth")
    report = inspect_file(tmp_path / "ok.pth")
    assert report.extras == {"args": "Namespace", "np_state": "tuple", "f": "float64"}


@pytest.mark.parametrize("place", ["args", "top", "array"])
def test_nothing_else_is_unpickled_and_nothing_is_executed(tmp_path, place):
    mark = tmp_path / "executed"
    extra: Any = {
        "args": argparse.Namespace(lr=1e-3, hook=Bomb(mark)),
        "top": Bomb(mark),
        "array": np.array([Bomb(mark)], dtype=object),
    }[place]
    path = tmp_path / "mae.pth"
    torch.save({"model": {"cls_token": torch.zeros(1, 1, 768)}, "args": extra}, path)
    message = refusal(path, tmp_path, kind=PolypSegError)
    assert "not loaded" in message and "weights_only" not in message
    with pytest.raises(PolypSegError):
        inspect_file(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.is_dir()  # the bomb was live


def test_an_archive_of_objects_is_not_unpickled(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "B_16.npz"
    np.savez(path, **{"embedding/kernel": np.array([Bomb(mark)], dtype=object)})
    assert "not an archive of plain arrays" in refusal(path, tmp_path, kind=PolypSegError)
    assert not mark.exists()
    with np.load(path, allow_pickle=True) as archive:
        assert archive["embedding/kernel"].size and mark.is_dir()


def _zip_cut(share: float) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"module.base_encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}}, buffer)
    return buffer.getvalue()[: int(share * buffer.tell())]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"hello world\n"),
        ("page.pth", b"<!DOCTYPE html><html>Google Drive: sign in</html>"),
        ("page.npz", b"<!DOCTYPE html><html>Google Drive: sign in</html>"),
        ("empty.pth", b""),
        ("pickle.pth", pickle.dumps({"a": [1, 2]}, protocol=2)),
        ("cut.safetensors", safetensors.torch.save({"a": torch.zeros(100)})[:-9]),
        ("cut.pth.tar", _zip_cut(0.9)),
        ("cut.npz", _zip_cut(0.5)),
    ],
)
def test_a_file_that_is_no_weights_file_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name, tmp_path, kind=PolypSegError)
    assert "damaged or not" in message or "not a plain state dict" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no encoder, only nothing"),
        ([torch.zeros(1)], "not a plain state dict"),
        ({"state_dict": 3}, "not a"),
    ],
)
def test_a_torch_file_without_tensors_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "odd.pth")
    assert said in refusal(tmp_path / "odd.pth", tmp_path, kind=PolypSegError)


def test_an_archive_of_another_network_is_refused(tmp_path, small_vit):
    arrays = augreg_arrays(encoder_state(TINY, seed=0), torch.Generator().manual_seed(0))
    del arrays["Transformer/encoderblock_7/LayerNorm_0/scale"]
    np.savez(tmp_path / "holey.npz", **arrays)
    assert "does not fit timm's" in refusal(tmp_path / "holey.npz", tmp_path, kind=PolypSegError)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert "no AugReg ViT" in refusal(tmp_path / "other.npz", tmp_path, kind=PolypSegError)


def test_a_folder_and_a_missing_file_are_said_to_be_so(tmp_path):
    (tmp_path / "weights").mkdir()
    assert "are a folder" in refusal(tmp_path / "weights", tmp_path)
    assert "do not exist" in refusal(tmp_path / "absent.pth", tmp_path)
    with pytest.raises(UsageError, match="do not exist"):
        inspect_file(tmp_path / "absent.pth")


# -- inspection -------------------------------------------------------------------------------------------


def test_inspect_file_says_what_a_finetuned_file_holds(tmp_path):
    path = save_finetuned(hollow_vit(table="sincos_mae", mae=True), tmp_path / "best.pth")
    report = inspect_file(path)
    assert (report.tensors, report.kept, report.method) == (281, 266, "mae")
    assert report.models == ("VT-HK-MA", "VT-IN-MA") and report.architecture == "vit_base_patch16_224"
    assert report.dropped["residual unit that is never run"] == 12
    assert report.extras["optimizer_state_dict"] == "dict" and report.extras["np_state"] == "tuple"
    text = "\n".join(report.lines())
    assert "SSL4GIE fine-tuned ViT-B + DPT" in text and "106,236,882 values" in text and report.sha256 in text


def test_the_full_mae_file_has_the_keys_that_are_documented():
    shapes = mae_decoder_shapes()
    assert len(shapes) + 150 == 254 and len(dpt_decoder_shapes()) == 130
    assert sum(int(np.prod(shape)) for key, shape in dpt_decoder_shapes().items() if _is_parameter(key)) == 20_328_641


def _is_parameter(key: str) -> bool:
    return key.endswith(("weight", "bias"))
