"""timm encoders behind one contract: pixel values (B, 3, H, W) -> list of feature maps (B, C, h, w).

CNNs run at output stride 16 (DeepLabV3+, section 4.1); ViTs give the tokens of their blocks without the final norm.
Which levels are read depends on the decoder, the encoder itself does not: a change of decoder changes nothing else.
"""

from functools import cache
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_META = {"device": torch.device("meta")}
TOKEN_STRIDE = (16, 16)
"""Patch size of the ViTs that DeepLabV3+ can read: its deep map is of stride 16."""


@cache
def _architecture(name: str) -> type[nn.Module]:
    """The class behind a timm name. Raises ValueError when timm does not know it."""
    if not timm.is_model(name):
        raise ValueError(f"timm knows no encoder {name!r}; see timm.list_models()")
    with torch.device("meta"):  # draws no random number: the seed belongs to the model
        return type(timm.create_model(name, pretrained=False))


def is_plain_vit(name: str) -> bool:
    """Whether a timm name is a plain ViT, which gives tokens; everything else is taken for a CNN.

    Raises ValueError when timm does not know ``name``.
    """
    return _architecture(name) is VisionTransformer


def build_cnn_encoder(name: str) -> nn.Module:
    """A timm CNN of stride 16 that returns its feature pyramid; ``encoder.feature_info`` describes the levels.

    Raises ValueError when timm does not know ``name`` or the architecture has no features of stride 4 and 16.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no encoder {name!r}; see timm.list_models()")
    try:
        encoder = timm.create_model(name, pretrained=False, features_only=True, output_stride=16)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"encoder {name!r} is no plain ViT and no CNN with strided features at output stride 16"
        ) from error
    strides = encoder.feature_info.reduction()
    if 4 not in strides or strides[-1] != 16:
        raise ValueError(f"encoder {name!r} has features of stride {strides}; a decoder needs 4 and, last, 16")
    if isinstance(timm.create_model(name, pretrained=False, **_META), ResNet):
        _dilate_whole_last_stage(encoder)
        _reset_residual_gains(encoder)
    return encoder


def _dilate_whole_last_stage(encoder: nn.Module) -> None:
    """Give every 3x3 convolution of ResNet's layer4 dilation 2, the first block's included.

    timm leaves that one at dilation 1 while the reference's encoder dilates the whole stage: same keys, other output.
    """
    for module in encoder.get_submodule("layer4").modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.dilation = module.padding = (2, 2)


def _reset_residual_gains(encoder: nn.Module) -> None:
    """Start every BatchNorm at gain 1, as torchvision and the reference do; timm zeroes each block's last one."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight.device.type != "meta":
            nn.init.ones_(module.weight)


def build_vit_encoder(name: str, *, position_embedding: str, position_embedding_trainable: bool) -> VisionTransformer:
    """A plain timm ViT without head and final norm (decoders read blocks before it), for any grid of patches.

    Raises ValueError when ``name`` is not a timm ``VisionTransformer`` of at least 4 blocks with position embeddings.
    """
    encoder = None
    if is_plain_vit(name):
        encoder = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    if encoder is None or encoder.pos_embed is None or len(encoder.blocks) < 4:
        raise ValueError(f"encoder {name!r} is no plain ViT of at least 4 blocks with position embeddings")
    encoder.prune_intermediate_layers(vit_block_indices(encoder), prune_norm=True, prune_head=True)
    if position_embedding != "learned":
        table = sincos_position_embedding(
            position_embedding, grid=encoder.patch_embed.grid_size, width=encoder.embed_dim
        )
        prefix = encoder.pos_embed.shape[1] - table.shape[1]
        with torch.no_grad():
            encoder.pos_embed.copy_(torch.cat([torch.zeros(1, prefix, table.shape[2]), table], dim=1))
    if not position_embedding_trainable:  # a buffer keeps the key and stays frozen through from_pretrained
        table = encoder.pos_embed.detach()
        del encoder.pos_embed
        encoder.register_buffer("pos_embed", table)
    return encoder


def vit_block_indices(encoder: VisionTransformer) -> list[int]:
    """The four equally spaced blocks that DPT reads: [2, 5, 8, 11] of 12."""
    depth = len(encoder.blocks)
    return [depth * level // 4 - 1 for level in (1, 2, 3, 4)]


def feature_levels(encoder: Any, *, decoder: str) -> list[int]:
    """Which levels of an encoder the decoder reads, finest first: blocks of a ViT or stages of a CNN's pyramid.

    DPT reads four: the blocks of ``vit_block_indices``, or the stages of strides 4, 8, 16 and, dilated, 16.
    DeepLabV3+ reads two: DPT's first and last block, or the stages of stride 4 and, last, 16. Raises ValueError for a
    pyramid without these strides and for DeepLabV3+ on patches of another size than 16.
    """
    if isinstance(encoder, VisionTransformer):
        blocks = vit_block_indices(encoder)
        if decoder == "dpt":
            return blocks
        if tuple(encoder.patch_embed.patch_size) != TOKEN_STRIDE:
            raise ValueError(f"DeepLabV3+ reads a ViT of 16x16 patches, not of {encoder.patch_embed.patch_size}")
        return [blocks[0], blocks[-1]]
    strides = encoder.feature_info.reduction()
    if decoder != "dpt":
        return [strides.index(4), len(strides) - 1]
    if strides[-4:] != [4, 8, 16, 16]:
        raise ValueError(f"DPT reads a CNN whose last features are of stride 4, 8, 16 and 16, not {strides}")
    return list(range(len(strides) - 4, len(strides)))


def level_widths(encoder: Any, levels: list[int]) -> list[int]:
    """Channels of the feature maps at ``levels``."""
    if isinstance(encoder, VisionTransformer):
        return [encoder.embed_dim] * len(levels)
    channels = encoder.feature_info.channels()
    return [channels[level] for level in levels]


def sincos_position_embedding(layout: str, *, grid: tuple[int, int], width: int) -> Tensor:
    """The fixed 2-D sine-cosine table (1, rows * columns, width) of MoCo v3 or of MAE.

    For patch (r, c) and frequencies w_j = 10000^(-4j/width): MoCo v3 stores [sin rw, cos rw, sin cw, cos cw],
    MAE the column half first. Raises ValueError for another layout or a width that is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a sine-cosine table needs a width that is a multiple of 4, not {width}")
    moco_v3 = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True).unsqueeze(0)
    if layout == "sincos_moco_v3":
        return moco_v3
    if layout == "sincos_mae":
        rows, columns = moco_v3.chunk(2, dim=-1)
        return torch.cat([columns, rows], dim=-1)
    raise ValueError(f"unknown sine-cosine layout {layout!r}; choose from ['sincos_mae', 'sincos_moco_v3']")
