"""Synthetic files with the exact keys and shapes of published ones, and outputs that this package had no hand in.

Weights are random, BatchNorm statistics too, so that no term can hide. The key names are facts of the upstream
repositories; the oracles are segmentation_models_pytorch and timm.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from polypseg.zoo import ENCODERS, ZooEntry

GRID, MAE_DECODER_WIDTH, FUSION = 14, 512, 256
_PRETRAINING = {
    "none": "random",
    "supervised": "ImageNet_class",
    "hyperkvasir": "Hyperkvasir",
    "imagenet1k": "ImageNet_self",
}
_SS = {"moco_v3": "_mocov3", "barlow_twins": "_barlowtwins", "mae": "_mae"}
ENCODER_KINDS = (
    "moco_v3_resnet50",
    "moco_v3_vit_b",
    "barlow_twins",
    "barlow_twins_checkpoint",
    "mae",
    "mae_full",
    "augreg",
    "torchvision_resnet50",
    "hyperkvasir_resnet50",
    "hyperkvasir_moco_v3_vit_b",
    "hyperkvasir_mae",
)


@dataclass(frozen=True, kw_only=True)
class ReferenceFile:
    """A written file and what its weights give."""

    path: Path
    oracle: Callable[[Tensor], Tensor]
    """pixel_values (B, 3, 224, 224) -> polyp logits (B, 1, 224, 224)."""


@dataclass(frozen=True, kw_only=True)
class UpstreamEncoder:
    """A written encoder file and the tensors that a reader must find in it, under timm's names, without classifier."""

    path: Path
    state: dict[str, Tensor]


def randomized(model: nn.Module, *, seed: int) -> nn.Module:
    """In evaluation mode, with random BatchNorm statistics, and norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.num_batches_tracked.fill_(1000)
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5, generator=generator)
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def sincos(width: int, *, column_first: bool) -> Tensor:
    """The published tables (1, 197, width), in float64 from the formula: [sin, cos] of the row, then of the column."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    parts = [rows, columns][:: -1 if column_first else 1]
    angles = [np.outer(part, frequencies) for part in parts]
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.cat([torch.zeros(1, 1, width), torch.from_numpy(table).float()[None]], dim=1)


# -- the study's fine-tuned files -----------------------------------------------------------------------------


def file_name(entry: ZooEntry, *, dataset: str = "Kvasir") -> str:
    """The name that the authors' training script gives."""
    arch = {"resnet50": "resnet50", "vit_base": "vit_b"}[entry.encoder]
    pretraining = _PRETRAINING.get(entry.method) or _PRETRAINING[entry.corpus]
    return f"{arch}-{pretraining}{_SS.get(entry.method, '')}_init-frozen_False-dataset_{dataset}.pth"


def write_reference_file(entry: ZooEntry, folder: Path, *, seed: int, dataset: str = "Kvasir") -> ReferenceFile:
    """A fine-tuned file of the row as the reference's script saves it, with an oracle of its outputs."""
    state, oracle = reference_state(entry, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(entry, dataset=dataset)
    torch.save(training_checkpoint(state), path)
    return ReferenceFile(path=path, oracle=oracle)


def training_checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
    """The entries that the reference's training script saves; the optimizer's are shortened."""
    moments = {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    return {
        "epoch": 173,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scaler_state_dict": {"scale": 65536.0, "growth_factor": 2.0},
        "loss": torch.tensor(0.1),
        "val_perf": np.float64(0.9),
        "test_perf": np.float32(0.9),
        "py_state": random.Random(0).getstate(),
        "np_state": np.random.RandomState(0).get_state(),
        "torch_state": torch.get_rng_state(),
    }


def reference_state(entry: ZooEntry, *, seed: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """The ``model_state_dict`` of the row's file, and the network that it is of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, state = _deeplabv3plus(seed) if entry.decoder == "deeplabv3plus" else _dpt(entry, seed)

    @torch.inference_mode()
    def oracle(pixel_values: Tensor) -> Tensor:
        return network(pixel_values)  # type: ignore[no-any-return]

    return state, oracle


def _deeplabv3plus(seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    network = randomized(smp.DeepLabV3Plus("resnet50", encoder_weights=None), seed=seed)
    return network, dict(network.state_dict())


def _dpt(entry: ZooEntry, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """smp's DPT without the unit that the reference never runs; its tensors under the reference's names, by order."""
    width = int(timm.create_model(ENCODERS[entry.encoder], device=torch.device("meta")).embed_dim)
    shapes = dpt_decoder_shapes(width)
    network = smp.DPT(
        f"tu-{ENCODERS[entry.encoder]}",
        encoder_weights=None,
        encoder_output_indices=[2, 5, 8, 11],
        decoder_readout="ignore",
        decoder_intermediate_channels=dpt_features(width),
        decoder_fusion_channels=FUSION,
        dynamic_img_size=True,
    )
    randomized(network, seed=seed)
    vit = network.encoder.model
    if entry.position_embedding != "learned":
        with torch.no_grad():
            vit.pos_embed.copy_(sincos(width, column_first=entry.position_embedding == "sincos_mae"))
    names = [key for key in shapes if not key.startswith("decoder.refinenet4.resConfUnit1.")]
    decoder, fusion = network.decoder, network.decoder.fusion_blocks
    fusion[0].residual_conv_block1 = nn.Identity()
    # smp reassembles a level whole (project, resize, to the fusion width); the reference lists the last step apart.
    blocks = [list(block.state_dict().values()) for block in decoder.reassemble_blocks]
    tensors = [value for block in blocks for value in block[:-1]] + [block[-1] for block in blocks]
    for block in list(fusion)[::-1]:
        values = list(block.state_dict().values())
        projection, units = _split_fusion(block, values)
        tensors += projection + units
    tensors += list(network.segmentation_head.state_dict().values())
    assert len(names) == len(tensors)
    state = {key: value for key, value in vit.state_dict().items() if not key.startswith("head.")}
    state |= dict(zip(names, tensors, strict=True))
    generator = torch.Generator().manual_seed(seed)
    for key, shape in shapes.items():
        state.setdefault(key, torch.randn(shape, generator=generator))  # the dead unit
        assert state[key].shape == shape, key
    if entry.method == "mae":
        state["decoder_pos_embed"] = torch.randn(1, GRID * GRID + 1, MAE_DECODER_WIDTH, generator=generator)
    return network, state


def _split_fusion(block: nn.Module, values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The projection (weight, bias) and the units' tensors of a fusion block, each in order of definition."""
    names = list(block.state_dict())
    projection = [v for n, v in zip(names, values, strict=True) if n.startswith("project.")]
    units = [v for n, v in zip(names, values, strict=True) if not n.startswith("project.")]
    return projection, units


def dpt_features(width: int) -> tuple[int, ...]:
    """Widths of the four levels: (96, 192, 384, 768) for ViT-B."""
    return width // 8, width // 4, width // 2, width


def dpt_decoder_shapes(width: int = 768) -> dict[str, tuple[int, ...]]:
    """The 130 keys of the reference's DPT decoder with their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    features = dpt_features(width)
    for level, channels in enumerate(features, start=1):
        at = f"decoder.act_postprocess{level}2"
        shapes |= {f"{at}.0.weight": (channels, width, 1, 1), f"{at}.0.bias": (channels,)}
        kernel = {1: 4, 2: 2, 4: 3}.get(level)
        if kernel:
            shapes |= {f"{at}.1.weight": (channels, channels, kernel, kernel), f"{at}.1.bias": (channels,)}
    shapes |= {f"decoder.layer{level}_rn.weight": (FUSION, features[level - 1], 3, 3) for level in (1, 2, 3, 4)}
    for level in (1, 2, 3, 4):
        at = f"decoder.refinenet{level}"
        shapes |= {f"{at}.out_conv.weight": (FUSION, FUSION, 1, 1), f"{at}.out_conv.bias": (FUSION,)}
        for unit in (1, 2):
            for part in (1, 2):
                shapes[f"{at}.resConfUnit{unit}.conv{part}.weight"] = (FUSION, FUSION, 3, 3)
                shapes |= batch_norm_shapes(f"{at}.resConfUnit{unit}.bn{part}", FUSION)
    shapes["decoder.output_conv.0.weight"] = (FUSION, FUSION, 3, 3)
    shapes |= batch_norm_shapes("decoder.output_conv.1", FUSION)
    return shapes | {"decoder.output_conv.4.weight": (1, FUSION, 1, 1), "decoder.output_conv.4.bias": (1,)}


def batch_norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """The five entries of a BatchNorm."""
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (width,) for part in parts} | {f"{name}.num_batches_tracked": ()}


# -- upstream encoders ----------------------------------------------------------------------------------------


def write_upstream_encoder(kind: str, folder: Path, *, seed: int, head_width: int | None = None) -> UpstreamEncoder:
    """An encoder file as one of ENCODER_KINDS is published; ``head_width`` narrows the projector, which is dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    is_resnet = "resnet" in kind or kind.startswith("barlow")
    table = "sincos_mae" if "mae" in kind else "sincos_moco_v3" if "moco" in kind and not is_resnet else "learned"
    state = dict(_upstream_state(ENCODERS["resnet50" if is_resnet else "vit_base"], seed, table))
    name, content = _upstream_content(kind, state, torch.Generator().manual_seed(seed + 1), head_width)
    path = folder / name
    np.savez(path, **content) if path.suffix == ".npz" else torch.save(content, path)
    return UpstreamEncoder(path=path, state=state)


@cache
def _upstream_state(name: str, seed: int, table: str) -> dict[str, Tensor]:
    return encoder_state(name, seed=seed, position_embedding=table)


def encoder_state(name: str, *, seed: int, position_embedding: str = "learned") -> dict[str, Tensor]:
    """Random tensors of a timm encoder without classifier, norms and statistics away from their defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = dict(randomized(timm.create_model(name, num_classes=0), seed=seed).state_dict())
    if position_embedding != "learned":
        width = state["cls_token"].shape[-1]
        state["pos_embed"] = sincos(width, column_first=position_embedding == "sincos_mae")
    return state


def _upstream_content(
    kind: str, state: dict[str, Tensor], generator: torch.Generator, head_width: int | None
) -> tuple[str, Any]:
    def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {
            key: torch.randn(shape, generator=generator) if shape else torch.tensor(1000)
            for key, shape in shapes.items()
        }

    if kind.startswith("moco_v3"):
        name = "r-50-100ep.pth.tar" if "resnet" in kind else "vit-b-300ep.pth.tar"
        return name, moco_v3_content(state, filled, is_resnet="resnet" in kind, hidden=head_width or 4096)
    if kind == "barlow_twins_checkpoint":
        return "checkpoint.pth", barlow_twins_content(state, filled, width=head_width or 8192)
    if kind == "mae":
        return "mae_pretrain_vit_base.pth", {"model": state}
    if kind == "mae_full":
        model = state | filled(mae_decoder_shapes(state["cls_token"].shape[-1]))
        options = argparse.Namespace(batch_size=64, epochs=800, mask_ratio=0.75, norm_pix_loss=True, device="cuda")
        return "checkpoint-799.pth", {"model": model, "optimizer": {}, "epoch": 799, "scaler": {}, "args": options}
    if kind == "augreg":
        return "B_16.npz", augreg_arrays(state, generator)
    if kind == "torchvision_resnet50":
        return "resnet50-0676ba61.pth", state | filled({"fc.weight": (1000, 2048), "fc.bias": (1000,)})
    if kind in ("barlow_twins", "hyperkvasir_resnet50", "hyperkvasir_moco_v3_vit_b"):
        return {"barlow_twins": "resnet50.pth"}.get(kind, f"{kind}.pth"), state
    if kind == "hyperkvasir_mae":
        return "hyperkvasir_mae.pth", {"model": state}
    raise ValueError(f"unknown kind {kind!r}; choose from {ENCODER_KINDS}")


def moco_v3_content(
    state: dict[str, Tensor], filled: Callable[..., dict[str, Tensor]], *, is_resnet: bool, hidden: int = 4096
) -> Any:
    """663 (ResNet50) or 342 (ViT-B) tensors; the momentum branch holds other values than the base encoder."""
    out = 256
    if is_resnet:
        projector = {"fc.0.weight": (hidden, 2048), **batch_norm_shapes("fc.1", hidden), "fc.3.weight": (out, hidden)}
        projector |= _without_affine("fc.4", out)
        predictor = {"0.weight": (hidden, out), **batch_norm_shapes("1", hidden), "3.weight": (out, hidden)}
    else:
        width = state["cls_token"].shape[-1]
        projector = {"head.0.weight": (hidden, width), **batch_norm_shapes("head.1", hidden)}
        projector |= {"head.3.weight": (hidden, hidden), **batch_norm_shapes("head.4", hidden)}
        projector |= {"head.6.weight": (out, hidden), **_without_affine("head.7", out)}
        predictor = {"0.weight": (hidden, out), **batch_norm_shapes("1", hidden), "3.weight": (out, hidden)}
        predictor |= _without_affine("4", out)
    momentum = {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}
    tensors = {f"module.base_encoder.{k}": v for k, v in (state | filled(projector)).items()}
    tensors |= {f"module.momentum_encoder.{k}": v for k, v in (momentum | filled(projector)).items()}
    tensors |= {f"module.predictor.{k}": v for k, v in filled(predictor).items()}
    arch = "resnet50" if is_resnet else "vit_base"
    return {"epoch": 100, "arch": arch, "state_dict": tensors, "optimizer": {}, "scaler": {"scale": 65536.0}}


def _without_affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.running_mean": (width,), f"{name}.running_var": (width,), f"{name}.num_batches_tracked": ()}


def barlow_twins_content(
    state: dict[str, Tensor], filled: Callable[..., dict[str, Tensor]], *, width: int = 8192
) -> Any:
    """334 tensors; the projector's three matrices alone are 600 MB, so tests may narrow it."""
    shapes = {"projector.0.weight": (width, 2048), **batch_norm_shapes("projector.1", width)}
    shapes |= {"projector.3.weight": (width, width), **batch_norm_shapes("projector.4", width)}
    shapes |= {"projector.6.weight": (width, width), **_without_affine("bn", width)}
    tensors = {f"module.backbone.{k}": v for k, v in state.items()}
    tensors |= {f"module.{k}": v for k, v in filled(shapes).items()}
    return {"epoch": 1000, "model": tensors, "optimizer": {}}


def mae_decoder_shapes(width: int = 768) -> dict[str, tuple[int, ...]]:
    """The 104 keys that the full MAE file has besides the encoder's 150."""
    d = MAE_DECODER_WIDTH
    shapes: dict[str, tuple[int, ...]] = {"mask_token": (1, 1, d), "decoder_pos_embed": (1, GRID * GRID + 1, d)}
    shapes |= {"decoder_embed.weight": (d, width), "decoder_embed.bias": (d,)}
    for i in range(8):
        at = f"decoder_blocks.{i}"
        for layer, outputs, inputs in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("mlp.fc1", 4 * d, d),
            ("mlp.fc2", d, 4 * d),
        ):
            shapes |= {f"{at}.{layer}.weight": (outputs, inputs), f"{at}.{layer}.bias": (outputs,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (d,), f"{at}.{norm}.bias": (d,)}
    shapes |= {"decoder_norm.weight": (d,), "decoder_norm.bias": (d,)}
    return shapes | {"decoder_pred.weight": (16 * 16 * 3, d), "decoder_pred.bias": (16 * 16 * 3,)}


def augreg_arrays(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
    """A ViT in Flax's layout: matrices transposed, heads a dimension of their own."""
    width = state["cls_token"].shape[-1]
    heads = width // 64
    t = {key: value.numpy() for key, value in state.items()}
    arrays = {
        "embedding/kernel": t["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": t["patch_embed.proj.bias"],
        "cls": t["cls_token"],
        "Transformer/posembed_input/pos_embedding": t["pos_embed"],
        "Transformer/encoder_norm/scale": t["norm.weight"],
        "Transformer/encoder_norm/bias": t["norm.bias"],
        "head/kernel": torch.randn(width, 1000, generator=generator).numpy(),
        "head/bias": torch.randn(1000, generator=generator).numpy(),
    }
    for i in range(12):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for norm, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays |= {f"{theirs}/{norm}/scale": t[f"{ours}.{name}.weight"]}
            arrays |= {f"{theirs}/{norm}/bias": t[f"{ours}.{name}.bias"]}
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = np.split(t[f"{ours}.attn.qkv.weight"], 3), np.split(t[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, 64)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, 64)
        arrays[f"{attention}/out/kernel"] = t[f"{ours}.attn.proj.weight"].T.reshape(heads, 64, width)
        arrays[f"{attention}/out/bias"] = t[f"{ours}.attn.proj.bias"]
        for number in (0, 1):
            arrays[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"] = t[f"{ours}.mlp.fc{number + 1}.weight"].T
            arrays[f"{theirs}/MlpBlock_3/Dense_{number}/bias"] = t[f"{ours}.mlp.fc{number + 1}.bias"]
    return arrays
