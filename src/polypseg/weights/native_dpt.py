"""The ViT models as transformers' own DPTForSemanticSegmentation and back: the same function, other names.

The native class needs no code of this package. Its fusion stage holds a residual unit for the deepest level that it
never runs, and a final norm of the encoder that segmentation never reads: both stay neutral here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import DPTConfig, DPTForSemanticSegmentation

from polypseg.errors import UsageError
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.modeling.encoders_polypseg import sincos_position_embedding, vit_block_indices
from polypseg.weights.formats import Drop, Keep, count_and_first, map_keys

CONFIG_KEY = "polypseg"
"""Where a native config keeps the fields of ours that DPTConfig has no place for."""
KEPT_FIELDS = ("encoder", "position_embedding", "position_embedding_trainable", "image_mean", "image_std")
REASSEMBLE_FACTORS = [4, 2, 1, 0.5]
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
"""Width of a plain ViT -> its name in timm."""
SAME_TABLE = 1e-6
"""Two position tables that differ by less are the same one; sine-cosine tables of other codes differ by up to 7e-7."""


def _fusion_rows() -> Iterator[Keep]:
    """The native fusion stage counts from the deepest level, ours from the finest."""
    for native in range(4):
        theirs, ours = rf"neck\.fusion_stage\.layers\.{native}", f"decoder.fusion.{3 - native}"
        yield Keep(rf"{theirs}\.projection\.(.+)", rf"{ours}.project.\1")
        for unit, name in ((1, "skip"), (2, "refine")):
            for part, index in (("convolution1", 1), ("batch_norm1", 2), ("convolution2", 4), ("batch_norm2", 5)):
                yield Keep(rf"{theirs}\.residual_layer{unit}\.{part}\.(.+)", rf"{ours}.{name}.body.{index}.\1")


_LAYER = r"dpt\.encoder\.layer\.(\d+)"
# fmt: off
NATIVE_KEYS: tuple[Keep | Drop, ...] = (  # native key -> ours; ":" and a part: the native tensor is that part of ours
    Keep(r"dpt\.embeddings\.cls_token",                                      "encoder.cls_token"),
    Keep(r"dpt\.embeddings\.position_embeddings",                            "encoder.pos_embed"),
    Keep(r"dpt\.embeddings\.patch_embeddings\.projection\.(.+)",             r"encoder.patch_embed.proj.\1"),
    Keep(_LAYER + r"\.attention\.attention\.(query|key|value)\.(.+)",        r"encoder.blocks.\1.attn.qkv.\3:\2"),
    Keep(_LAYER + r"\.attention\.output\.dense\.(.+)",                       r"encoder.blocks.\1.attn.proj.\2"),
    Keep(_LAYER + r"\.intermediate\.dense\.(.+)",                            r"encoder.blocks.\1.mlp.fc1.\2"),
    Keep(_LAYER + r"\.output\.dense\.(.+)",                                  r"encoder.blocks.\1.mlp.fc2.\2"),
    Keep(_LAYER + r"\.layernorm_before\.(.+)",                               r"encoder.blocks.\1.norm1.\2"),
    Keep(_LAYER + r"\.layernorm_after\.(.+)",                                r"encoder.blocks.\1.norm2.\2"),
    Drop(r"dpt\.layernorm\.(weight|bias)",                                   "final norm that is never read"),
    Keep(r"neck\.reassemble_stage\.layers\.(\d)\.projection\.(.+)",         r"decoder.reassemble.\1.0.\2"),
    Keep(r"neck\.reassemble_stage\.layers\.(\d)\.resize\.(.+)",             r"decoder.reassemble.\1.1.\2"),
    Keep(r"neck\.convs\.(\d)\.weight",                                       r"decoder.reassemble.\1.2.weight"),
    Drop(r"neck\.fusion_stage\.layers\.0\.residual_layer1\..+",              "residual unit that is never run"),
    *_fusion_rows(),
    Keep(r"head\.head\.(\d)\.(.+)",                                          r"decoder.head.\1.\2"),
    Drop(r"auxiliary_head\..+",                                              "auxiliary head of training"),
)
# fmt: on
QKV = ("query", "key", "value")


def to_native_dpt(model: PolypSegForSemanticSegmentation) -> DPTForSemanticSegmentation:
    """The same function as a native DPT: (B, 3, S, S) -> logits (B, 2, S, S) = [0, z], S = ``config.image_size``.

    The position table is laid out for that size, where the two agree; at other sizes transformers interpolates the
    table otherwise than timm, and the logits differ. Weights are copies. Raises UsageError for a model with a CNN or
    with a ViT that DPTConfig cannot describe, saying what it has no place for.
    """
    config = _native_config(model)
    ours = dict(model.state_dict())
    with torch.device("meta"):
        native = DPTForSemanticSegmentation(config)
    keys = map_keys(native.state_dict(), NATIVE_KEYS)
    left_over = set(ours) - {name.partition(":")[0] for name in keys.kept.values()}
    absent = {name.partition(":")[0] for name in keys.kept.values()} - set(ours)
    if left_over or absent:
        raise UsageError(
            f"encoder {model.config.encoder!r} is not a ViT that a native DPT can hold: tensors without a place "
            f"{count_and_first(left_over)}, tensors that it lacks {count_and_first(absent)}"
        )
    state = {}
    for key, empty in native.state_dict().items():
        if key not in keys.kept:
            state[key] = _neutral(key, empty).to(model.device, model.dtype if empty.is_floating_point() else None)
            continue
        name, _, part = keys.kept[key].partition(":")
        value = ours[name].chunk(3)[QKV.index(part)] if part else ours[name]
        state[key] = value.clone()
    state["dpt.embeddings.position_embeddings"] = _table_for_size(model).clone()
    for key in ("head.head.4.weight", "head.head.4.bias"):
        state[key] = torch.cat([torch.zeros_like(state[key]), state[key]])  # [0, z]: background is the reference
    native.load_state_dict(state, strict=True, assign=True)
    return native.train(model.training)


def _native_config(model: PolypSegForSemanticSegmentation) -> DPTConfig:
    config, encoder = model.config, model.encoder
    if config.decoder != "dpt" or not model.has_vit:
        what = f"{config.encoder} {config.decoder}"
        raise UsageError(f"a {what} model has no native class in transformers: it travels with its code")
    block, patch = encoder.blocks[0], encoder.patch_embed.patch_size
    activation = block.mlp.act if isinstance(block, Block) else None
    for fits, what in (
        (type(activation) is nn.GELU and activation.approximate == "none", "blocks other than norm, attention, GELU"),
        (isinstance(block.norm1, nn.LayerNorm), "another norm than LayerNorm"),
        (encoder.num_prefix_tokens == 1 and not encoder.no_embed_class, "other prefix tokens than one with a position"),
        (patch[0] == patch[1] and not encoder.patch_embed.dynamic_img_pad, "patches that are not square"),
    ):
        if not fits:
            raise UsageError(f"encoder {config.encoder!r} is not a ViT that a native DPT can hold: it has {what}")
    return DPTConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_norm_eps=block.norm1.eps,
        image_size=config.image_size,
        patch_size=patch[0],
        readout_type="ignore",
        backbone_out_indices=vit_block_indices(encoder),
        reassemble_factors=REASSEMBLE_FACTORS,
        neck_hidden_sizes=_neck_widths(encoder.embed_dim),
        fusion_hidden_size=config.decoder_channels,
        use_batch_norm_in_fusion_residual=True,
        use_auxiliary_head=False,
        semantic_classifier_dropout=config.decoder_dropout,
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        weights_origin=config.weights_origin,
        **{CONFIG_KEY: {name: getattr(config, name) for name in KEPT_FIELDS}},
    )


def _neck_widths(width: int) -> list[int]:
    return [max(1, width // share) for share in (8, 4, 2, 1)]


def _neutral(key: str, empty: Tensor) -> Tensor:
    """Values for a tensor that is never read: norms that change nothing, convolutions that give nothing."""
    is_gain = key.endswith("running_var") or (key.endswith("weight") and empty.ndim == 1)
    return torch.ones(empty.shape, dtype=empty.dtype) if is_gain else torch.zeros(empty.shape, dtype=empty.dtype)


def _table_for_size(model: PolypSegForSemanticSegmentation) -> Tensor:
    """The position table (1, 1 + n, D) as the encoder reads it at the configuration's image size."""
    encoder, size = model.encoder, model.config.image_size
    return resample_abs_pos_embed(
        encoder.pos_embed,
        new_size=list(encoder.patch_embed.dynamic_feat_size((size, size))),
        old_size=list(encoder.patch_embed.grid_size),
        num_prefix_tokens=encoder.num_prefix_tokens,
    ).detach()


def from_native_dpt(native: DPTForSemanticSegmentation) -> PolypSegForSemanticSegmentation:
    """The same function as a model of this package, to train or to evaluate further; the inverse of ``to_native_dpt``.

    Also takes a native two-class DPT of somebody else, in which case z is the difference of its two logits. Raises
    UsageError, naming what differs, for a configuration that this package's DPT cannot express.
    """
    config = native.config
    _refuse_inexpressible(config)
    kept = dict(getattr(config, CONFIG_KEY, None) or {"encoder": _timm_name(config)})
    unknown = sorted(set(kept) - set(KEPT_FIELDS))
    if unknown:
        raise UsageError(f"the native config's {CONFIG_KEY!r} has unknown fields: {', '.join(unknown)}")
    ours_config = PolypSegConfig(
        decoder="dpt",
        decoder_channels=config.fusion_hidden_size,
        decoder_dropout=config.semantic_classifier_dropout,
        image_size=config.image_size,
        weights_origin=getattr(config, "weights_origin", None),
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        **kept,
    )
    with torch.device("meta"):
        ours = PolypSegForSemanticSegmentation(ours_config)
    _refuse_other_sizes(config, ours.encoder)
    ours.load_state_dict(_our_state(native, ours), strict=True, assign=True)
    return ours.train(native.training)


def _our_state(native: DPTForSemanticSegmentation, ours: PolypSegForSemanticSegmentation) -> dict[str, Tensor]:
    theirs = dict(native.state_dict())
    keys = map_keys(theirs, NATIVE_KEYS)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, target in keys.kept.items():
        name, _, part = target.partition(":")
        parts.setdefault(name, {})[part] = theirs[key].detach()
    expected = ours.state_dict()
    if keys.unknown or set(parts) != set(expected):
        raise UsageError(
            "the native DPT holds other tensors than this package's: unknown "
            f"{count_and_first(keys.unknown + sorted(set(parts) - set(expected)))}, missing "
            f"{count_and_first(set(expected) - set(parts))}"
        )
    state = {
        name: torch.cat([tensors[part] for part in QKV]) if "query" in tensors else tensors[""].clone()
        for name, tensors in parts.items()
    }
    for name in ("decoder.head.4.weight", "decoder.head.4.bias"):
        state[name] = state[name][1:] - state[name][:1]
    state["encoder.pos_embed"] = _table_for_encoder(state["encoder.pos_embed"], ours)
    shapes = [name for name in expected if expected[name].shape != state[name].shape]
    if shapes:
        raise UsageError(f"tensors of the native DPT have another shape here: {count_and_first(shapes)}")
    return state


def _table_for_encoder(table: Tensor, ours: PolypSegForSemanticSegmentation) -> Tensor:
    """A position table of the architecture's own grid that, resampled by timm to ``table``'s grid, gives ``table``.

    A fixed sine-cosine table is known. Of a learned one the pseudo-inverse of the resampling gives the smallest that
    does it: the original where the native grid is the finer one.
    """
    grid = ours.encoder.patch_embed.grid_size
    side = round((table.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return table
    patches = grid[0] * grid[1]
    identity = torch.eye(patches).unsqueeze(0)
    resampling = resample_abs_pos_embed(identity, new_size=[side, side], old_size=list(grid), num_prefix_tokens=0)[0]
    layout = ours.config.position_embedding
    if layout != "learned":
        known = sincos_position_embedding(layout, grid=grid, width=table.shape[2])
        if (resampling.double() @ known[0].double() - table[0, 1:].double().cpu()).abs().max() < SAME_TABLE:
            return torch.cat([table[:, :1], known.to(table)], dim=1)
    wanted = table[:, 1:].double().cpu()
    found = torch.linalg.pinv(resampling.double()) @ wanted
    if (resampling.double() @ found - wanted).abs().max() > SAME_TABLE * max(1.0, float(wanted.abs().max())):
        raise UsageError(
            f"the native DPT's position table of {side}x{side} patches is no interpolation of the {grid[0]}x{grid[1]} "
            f"that {ours.config.encoder} has: name an encoder of its image size in the native config's {CONFIG_KEY!r}"
        )
    return torch.cat([table[:, :1], found.to(table)], dim=1)


@dataclass(frozen=True)
class _Demand:
    """A field of DPTConfig that our decoder fixes."""

    field: str
    value: Any


_DEMANDS = (
    _Demand("is_hybrid", False),
    _Demand("backbone_config", None),
    _Demand("num_channels", 3),
    _Demand("num_labels", 2),
    _Demand("hidden_act", "gelu"),
    _Demand("readout_type", "ignore"),
    _Demand("reassemble_factors", REASSEMBLE_FACTORS),
    _Demand("neck_ignore_stages", []),
    _Demand("head_in_index", -1),
    _Demand("use_batch_norm_in_fusion_residual", True),
)


def _refuse_inexpressible(config: DPTConfig) -> None:
    differences = []
    for demand in _DEMANDS:
        value = getattr(config, demand.field)
        value = list(value) if isinstance(value, tuple) else value
        if value != demand.value:
            differences.append(f"{demand.field} is {value!r}, not {demand.value!r}")
    if config.use_bias_in_fusion_residual:
        differences.append("use_bias_in_fusion_residual is True, not False")
    if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        differences.append("image_size and patch_size are not single numbers")
    if "polyp" in str(config.id2label.get(0, "")).lower():
        differences.append("class 0 is the polyp, not class 1")
    if differences:
        raise UsageError(f"this native DPT cannot be a model of this package: {'; '.join(differences)}")


def _timm_name(config: DPTConfig) -> str:
    """The plain timm ViT of a native config that does not name one, of the native grid where timm has it."""
    size = SIZES.get(config.hidden_size, str(config.hidden_size))
    names = [f"vit_{size}_patch{config.patch_size}_{side}" for side in (config.image_size, 224)]
    found = next((name for name in names if timm.is_model(name)), None)
    if found is None:
        raise UsageError(
            f"no plain ViT of timm has hidden_size {config.hidden_size} and patches of {config.patch_size} pixels: "
            f"name one in the native config's {CONFIG_KEY!r} as 'encoder'"
        )
    return found


def _refuse_other_sizes(config: DPTConfig, encoder: VisionTransformer) -> None:
    """Raise UsageError where the timm architecture computes something else than the native config says."""
    block: Any = encoder.blocks[0]
    wanted = {
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "patch_size": encoder.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
        "backbone_out_indices": vit_block_indices(encoder),
        "neck_hidden_sizes": _neck_widths(encoder.embed_dim),
    }
    found = {name: getattr(config, name) for name in wanted}
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
    differences = [f"{name} is {found[name]!r}, not {wanted[name]!r}" for name in wanted if found[name] != wanted[name]]
    if differences:
        raise UsageError(f"this native DPT cannot be a model of this package: {'; '.join(differences)}")
