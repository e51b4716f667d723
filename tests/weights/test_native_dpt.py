"""What the native DPT promises: the same numbers as our own class, both ways, or one sentence on what differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, DPTConfig, DPTForSemanticSegmentation

from polypseg.errors import UsageError
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.weights.native_dpt import from_native_dpt, to_native_dpt
from reference_files import randomized

# Kernels differ between instruction sets and with where tensors lie in memory, so two graphs of equal tensors agree to
# rounding only. Observed largest differences of logits up to 0.58, torch 2.14 with ATEN_CPU_CAPABILITY,
# ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS set alike, on an Intel CPU with AVX-512:
#             default   AVX2      AVX-512   unset
#   float32   0         1.2e-7    1.2e-7    1.2e-7   (on another CPU, with AMX: 2.1e-6)
#   float64   0         2.2e-16   0         0        (1.9 units in the last place of the largest logit)
NOISE = {torch.float32: 1e-5, torch.float64: 8 * torch.finfo(torch.float64).eps}
"""The most by which logits may differ: as it is in float32, in float64 of the largest logit."""
TINY = "vit_tiny_patch16_224"


def build(encoder: str = TINY, **fields: Any) -> PolypSegForSemanticSegmentation:
    """A DPT model with a narrow decoder, random statistics and no bias or gain at its default."""
    torch.manual_seed(0)
    config = PolypSegConfig(encoder=encoder, decoder="dpt", **({"decoder_channels": 16} | fields))
    model = randomized(PolypSegForSemanticSegmentation(config), seed=1)
    assert isinstance(model, PolypSegForSemanticSegmentation)
    nn.init.normal_(model.decoder.head[4].weight)  # logits of a size at which differences would show
    return model


@torch.inference_mode()
def logits(model: nn.Module, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits (2, 2, side, side) of two random images."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return model(images).logits  # type: ignore[no-any-return]


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def noise(of: Tensor) -> float:
    """By how much logits like these may differ."""
    return NOISE[of.dtype] * (float(of.abs().max()) if of.dtype == torch.float64 else 1.0)


# -- there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [224, 352, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.slow
def test_to_native_dpt_gives_the_same_logits_at_the_models_image_size(image_size, dtype):
    model = build(image_size=image_size).to(dtype)
    native = to_native_dpt(model)
    ours, theirs = logits(model, image_size, dtype), logits(native, image_size, dtype)
    assert type(native) is DPTForSemanticSegmentation and ours[:, 1].std() > 0.01
    assert torch.equal(theirs[:, 0], torch.zeros_like(theirs[:, 0]))
    assert largest(ours, theirs) <= noise(ours)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["vit_small_patch16_224", "vit_base_patch16_224"])
def test_to_native_dpt_takes_the_larger_plain_vits(encoder):
    model = build(encoder, decoder_channels=256 if "base" in encoder else 16)
    native = to_native_dpt(model)
    for made in (native, from_native_dpt(native)):
        assert largest(logits(model, 224), logits(made, 224)) <= NOISE[torch.float32]


def test_to_native_dpt_differs_at_other_sizes_because_the_tables_are_interpolated_otherwise():
    """timm: bicubic with antialiasing; transformers: bilinear without. Stating it keeps anyone from relying on it."""
    model = build()
    difference = largest(logits(model, 352), logits(to_native_dpt(model), 352))
    assert difference > 1e-5
    with torch.no_grad():  # where the table is constant, any interpolation gives it, and the outputs agree again
        model.encoder.pos_embed[:, 1:] = model.encoder.pos_embed[:, 1:2]
    assert largest(logits(model, 352), logits(to_native_dpt(model), 352)) < 0.01 * difference


def test_the_native_residual_unit_of_the_deepest_level_and_the_final_norm_are_never_run():
    native = to_native_dpt(build()).double()
    before = logits(native, 224, torch.float64)
    with torch.no_grad():
        unread = [*native.neck.fusion_stage.layers[0].residual_layer1.parameters(), *native.dpt.layernorm.parameters()]
        assert len(unread) == 8
        for parameter in unread:
            parameter.fill_(float("nan"))
    assert torch.equal(logits(native, 224, torch.float64), before)


def test_to_native_dpt_copies_and_draws_no_random_numbers():
    model = build()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    native = to_native_dpt(model)
    assert torch.equal(torch.rand(1), expected)
    before = model.encoder.cls_token.clone()
    with torch.no_grad():
        native.dpt.embeddings.cls_token.zero_()
        native.head.head[4].weight.zero_()
    assert torch.equal(model.encoder.cls_token, before) and model.decoder.head[4].weight.any()
    assert not native.training and to_native_dpt(model.train()).training
    assert all(
        torch.equal(a, b) for a, b in zip(*(to_native_dpt(model).state_dict().values() for _ in "ab"), strict=True)
    )


def test_to_native_dpt_refuses_a_cnn():
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet10t", decoder_channels=8))
    with pytest.raises(UsageError, match="deeplabv3plus model has no native class"):
        to_native_dpt(model)
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet10t", decoder="dpt", decoder_channels=8))
    with pytest.raises(UsageError, match="a resnet10t dpt model has no native class"):
        to_native_dpt(model)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("deit3_small_patch16_224", "other prefix tokens"),
        ("deit_tiny_distilled_patch16_224", None),
        ("vit_tiny_patch16_224", "blocks other than norm, attention, GELU"),
        ("vit_wee_patch16_reg1_gap_256", "other prefix tokens"),
    ],
)
def test_to_native_dpt_refuses_a_vit_that_dptconfig_cannot_describe(encoder, reason):
    if reason is None:
        with pytest.raises(ValueError, match="no plain ViT"):  # our own class refuses it already
            build(encoder)
        return
    model = build(encoder, image_size=256 if "256" in encoder else 224)
    if encoder == TINY:
        for block in model.encoder.blocks:
            block.mlp.act = nn.GELU(approximate="tanh")
    with pytest.raises(UsageError, match=reason):
        to_native_dpt(model)


def test_to_native_dpt_names_a_tensor_that_has_no_place():
    model = build()
    model.encoder.blocks[0].ls1 = nn.Linear(192, 192)
    with pytest.raises(UsageError, match=r"without a place 2 \(first encoder\.blocks\.0\.ls1\.bias\)"):
        to_native_dpt(model)


# -- and back ---------------------------------------------------------------------------------------------


def test_from_native_dpt_brings_back_every_tensor_and_field_through_a_saved_folder(tmp_path: Path):
    origin = {"model_id": "vit_tiny_patch16_224_dpt.random", "scale": "small"}
    model = build(
        position_embedding="sincos_mae",
        position_embedding_trainable=False,
        decoder_dropout=0.25,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.2, 0.1],
        weights_origin=origin,
    )
    to_native_dpt(model).save_pretrained(tmp_path)
    native = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(native) is DPTForSemanticSegmentation
    assert native.config.weights_origin == origin and native.config.id2label == {0: "background", 1: "polyp"}
    back = from_native_dpt(native)
    assert back.config.to_dict() | {"_name_or_path": "", "dtype": None} == model.config.to_dict() | {"dtype": None}
    ours, theirs = model.state_dict(), back.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "encoder.pos_embed" not in dict(back.named_parameters())  # still frozen
    back.save_pretrained(tmp_path / "ours")
    again = PolypSegForSemanticSegmentation.from_pretrained(tmp_path / "ours")
    assert largest(logits(again, 224), logits(model, 224)) <= NOISE[torch.float32]  # the tensors are equal, see above


def test_from_native_dpt_gives_a_model_that_trains():
    back = from_native_dpt(to_native_dpt(build())).train()
    loss = back(torch.randn(2, 3, 64, 64), labels=torch.rand(2, 64, 64).round()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in back.parameters())


def test_from_native_dpt_recovers_a_learned_table_from_a_finer_grid():
    model = build(image_size=352)
    back = from_native_dpt(to_native_dpt(model))
    assert back.encoder.pos_embed.shape == model.encoder.pos_embed.shape
    assert largest(back.encoder.pos_embed, model.encoder.pos_embed) < 1e-7  # observed: 7e-9
    assert largest(logits(back, 352), logits(model, 352)) < 1e-5


def test_from_native_dpt_keeps_the_outputs_of_a_coarser_grid_at_the_models_size():
    model = build(image_size=96)
    back = from_native_dpt(to_native_dpt(model))
    assert largest(logits(back, 96), logits(model, 96)) < 1e-5


@pytest.mark.parametrize("layout", ["sincos_mae", "sincos_moco_v3"])
def test_from_native_dpt_knows_a_sine_cosine_table_at_any_grid(layout):
    model = build(position_embedding=layout, position_embedding_trainable=False, image_size=96)
    back = from_native_dpt(to_native_dpt(model))
    assert torch.equal(back.encoder.pos_embed, model.encoder.pos_embed)
    assert largest(logits(back, 224), logits(model, 224)) <= NOISE[torch.float32]
    found, expected = (logits(one.double(), 224, torch.float64) for one in (back, model))
    assert largest(found, expected) <= noise(expected)


def foreign_config(**changes: Any) -> DPTConfig:
    """A native configuration that this package did not write."""
    fields: dict[str, Any] = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "readout_type": "ignore",
        "neck_hidden_sizes": [24, 48, 96, 192],
        "fusion_hidden_size": 16,
        "use_batch_norm_in_fusion_residual": True,
        "use_auxiliary_head": False,
        "num_labels": 2,
    }
    return DPTConfig(**(fields | changes))


@pytest.mark.parametrize("changes", [{}, {"use_auxiliary_head": True}, {"image_size": 320}])
def test_from_native_dpt_takes_the_difference_of_two_free_logits(changes):
    torch.manual_seed(3)
    native = randomized(DPTForSemanticSegmentation(foreign_config(**changes)), seed=4)
    for parameter in native.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    nn.init.normal_(native.dpt.embeddings.position_embeddings, std=0.02)
    if changes.get("image_size"):
        with pytest.raises(UsageError, match="20x20 patches is no interpolation of the 14x14"):
            from_native_dpt(native)
        return
    back = from_native_dpt(native)
    theirs, ours = logits(native, 224), logits(back, 224)
    assert back.config.encoder == TINY and theirs[:, 0].std() > 0.01
    assert largest(ours[:, 1], theirs[:, 1] - theirs[:, 0]) < 1e-6 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"readout_type": "project"}, "readout_type is 'project', not 'ignore'"),
        ({"num_labels": 3}, "num_labels is 3, not 2"),
        ({"use_batch_norm_in_fusion_residual": False}, "use_batch_norm_in_fusion_residual is False, not True"),
        ({"use_bias_in_fusion_residual": True}, "use_bias_in_fusion_residual is True, not False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', not 'gelu'"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12, not 1e-06"),
        ({"backbone_out_indices": [0, 1, 2, 3]}, "backbone_out_indices is [0, 1, 2, 3], not [2, 5, 8, 11]"),
        ({"neck_hidden_sizes": [8, 8, 8, 8]}, "neck_hidden_sizes is [8, 8, 8, 8], not [24, 48, 96, 192]"),
        ({"num_attention_heads": 6}, "num_attention_heads is 6, not 3"),
        ({"hidden_size": 96}, "no plain ViT of timm has hidden_size 96"),
        ({"id2label": {0: "polyp", 1: "background"}}, "class 0 is the polyp"),
        ({"qkv_bias": False}, "missing 12 (first encoder.blocks.0.attn.qkv.bias)"),
        ({"polypseg": {"encoder": TINY, "speed": 1}}, "unknown fields: speed"),
    ],
)
def test_from_native_dpt_says_what_it_cannot_express(changes, said):
    with torch.device("meta"):
        native = DPTForSemanticSegmentation(foreign_config(**changes))
    with pytest.raises(UsageError) as caught:
        from_native_dpt(native)
    assert said in str(caught.value) and "\n" not in str(caught.value)
