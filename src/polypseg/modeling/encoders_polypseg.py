"""timm encoders behind one contract: pixel values (B, 3, H, W) -> list of feature maps (B, C, h, w).

CNNs run at output stride 16 (DeepLabV3+, section 4.1); ViTs give the tokens of four blocks without the final norm.
"""

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def build_cnn_encoder(name: str) -> nn.Module:
    """A timm CNN of stride 16 that returns its feature pyramid; ``encoder.feature_info`` describes the levels.

    Raises ValueError when timm does not know ``name`` or the architecture has no features of stride 4 and 16.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no encoder {name!r}; see timm.list_models()")
    try:
        encoder = timm.create_model(name, pretrained=False, features_only=True, output_stride=16)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"encoder {name!r} has no strided features for DeepLabV3+: {error}") from error
    strides = encoder.feature_info.reduction()
    if 4 not in strides or strides[-1] != 16:
        raise ValueError(f"encoder {name!r} has features of stride {strides}; DeepLabV3+ needs 4 and, last, 16")
    if isinstance(timm.create_model(name, pretrained=False, **_META), ResNet):
        _dilate_whole_last_stage(encoder)
        _reset_residual_gains(encoder)
    return encoder


_META = {"device": torch.device("meta")}


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
    """A plain timm ViT without head and final norm (DPT reads blocks before it), for any grid of patches.

    Raises ValueError when ``name`` is not a timm ``VisionTransformer`` of at least 4 blocks with position embeddings.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm knows no encoder {name!r}; see timm.list_models()")
    try:
        encoder = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # the architecture does not know dynamic_img_size
        encoder = None
    if type(encoder) is not VisionTransformer or encoder.pos_embed is None or len(encoder.blocks) < 4:
        raise ValueError(f"encoder {name!r} is no plain ViT with position embeddings; DPT needs one")
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
