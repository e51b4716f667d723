"""The networks evaluated straight from the tensors of a published file, under the file's own key names.

The second opinion of a conversion: shares neither the renaming tables nor the modules with the model that is checked.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
VIT_BLOCKS = (2, 5, 8, 11)
VIT_HEAD_WIDTH = 64
BLOCKS = (3, 4, 6, 3)


def _norm(t: Tensors, name: str, x: Tensor) -> Tensor:
    statistics = t[f"{name}.running_mean"], t[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-5)


def _conv(t: Tensors, name: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, t[f"{name}.weight"], t.get(f"{name}.bias"), **options)


def _grow(x: Tensor, scale: int) -> Tensor:
    return F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=True)


def resnet50_features(t: Tensors, pixels: Tensor, *, prefix: str) -> list[Tensor]:
    """(B, 3, H, W) -> maps of stride 4 and, with the last stage dilated, of stride 16."""
    x = _norm(t, f"{prefix}bn1", _conv(t, f"{prefix}conv1", pixels, stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage, blocks in enumerate(BLOCKS, start=1):
        spread = 2 if stage == 4 else 1
        for block in range(blocks):
            at = f"{prefix}layer{stage}.{block}"
            stride = 2 if block == 0 and stage in (2, 3) else 1
            y = _norm(t, f"{at}.bn1", _conv(t, f"{at}.conv1", x)).relu()
            y = _norm(t, f"{at}.bn2", _conv(t, f"{at}.conv2", y, stride=stride, padding=spread, dilation=spread)).relu()
            y = _norm(t, f"{at}.bn3", _conv(t, f"{at}.conv3", y))
            if block == 0:
                x = _norm(t, f"{at}.downsample.1", _conv(t, f"{at}.downsample.0", x, stride=stride))
            x = (x + y).relu()
        maps.append(x)
    return [maps[0], maps[3]]


def _separable(t: Tensors, depthwise: str, pointwise: str, x: Tensor, *, spread: int = 1) -> Tensor:
    x = _conv(t, depthwise, x, padding=spread, dilation=spread, groups=x.shape[1])
    return _conv(t, pointwise, x)


def deeplabv3plus_logits(t: Tensors, pixels: Tensor) -> Tensor:
    """SSL4GIE's ResNet50 with DeepLabV3+: (B, 3, H, W) -> (B, 1, H, W), sides multiples of 16."""
    skip, deep = resnet50_features(t, pixels, prefix="encoder.")
    pyramid = "decoder.aspp.0"
    branches = [_norm(t, f"{pyramid}.convs.0.1", _conv(t, f"{pyramid}.convs.0.0", deep)).relu()]
    for branch, rate in ((1, 12), (2, 24), (3, 36)):
        at = f"{pyramid}.convs.{branch}"
        branches.append(_norm(t, f"{at}.1", _separable(t, f"{at}.0.0", f"{at}.0.1", deep, spread=rate)).relu())
    whole = _norm(t, f"{pyramid}.convs.4.2", _conv(t, f"{pyramid}.convs.4.1", deep.mean((2, 3), keepdim=True))).relu()
    branches.append(whole.expand_as(branches[0]))
    x = _norm(t, f"{pyramid}.project.1", _conv(t, f"{pyramid}.project.0", torch.cat(branches, 1))).relu()
    x = _norm(t, "decoder.aspp.2", _separable(t, "decoder.aspp.1.0", "decoder.aspp.1.1", x)).relu()
    skip = _norm(t, "decoder.block1.1", _conv(t, "decoder.block1.0", skip)).relu()
    x = torch.cat([_grow(x, 4), skip], 1)
    x = _norm(t, "decoder.block2.1", _separable(t, "decoder.block2.0.0", "decoder.block2.0.1", x)).relu()
    return _grow(_conv(t, "segmentation_head.0", x), 4)


def vit_features(t: Tensors, pixels: Tensor, *, prefix: str) -> list[Tensor]:
    """ViT-B/16: (B, 3, 224, 224) -> tokens (B, 768, 14, 14) after four blocks, before any final norm."""
    x = _conv(t, f"{prefix}patch_embed.proj", pixels, stride=16)
    grid, width = x.shape[2:], x.shape[1]
    x = torch.cat([t[f"{prefix}cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + t[f"{prefix}pos_embed"]
    maps = []
    for block in range(VIT_BLOCKS[-1] + 1):
        at = f"{prefix}blocks.{block}"

        def layer(name: str, y: Tensor, at: str = at) -> Tensor:
            return F.linear(y, t[f"{at}.{name}.weight"], t[f"{at}.{name}.bias"])

        def norm(name: str, y: Tensor, at: str = at) -> Tensor:
            return F.layer_norm(y, (width,), t[f"{at}.{name}.weight"], t[f"{at}.{name}.bias"], eps=1e-6)

        q, k, v = layer("attn.qkv", norm("norm1", x)).unflatten(2, (3, -1, VIT_HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        x = x + layer("attn.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer("mlp.fc2", F.gelu(layer("mlp.fc1", norm("norm2", x))))
        if block in VIT_BLOCKS:
            maps.append(x[:, 1:].mT.unflatten(2, grid))
    return maps


def dpt_logits(t: Tensors, pixels: Tensor) -> Tensor:
    """SSL4GIE's ViT-B with DPT: (B, 3, 224, 224) -> (B, 1, 224, 224)."""
    levels = []
    for level, x in enumerate(vit_features(t, pixels, prefix=""), start=1):
        at = f"decoder.act_postprocess{level}2"
        x = _conv(t, f"{at}.0", x)
        if level in (1, 2):
            x = F.conv_transpose2d(x, t[f"{at}.1.weight"], t[f"{at}.1.bias"], stride={1: 4, 2: 2}[level])
        elif level == 4:
            x = _conv(t, f"{at}.1", x, stride=2, padding=1)
        levels.append(_conv(t, f"decoder.layer{level}_rn", x, padding=1))

    def unit(name: str, y: Tensor) -> Tensor:
        z = _norm(t, f"{name}.bn1", _conv(t, f"{name}.conv1", y.relu(), padding=1))
        return y + _norm(t, f"{name}.bn2", _conv(t, f"{name}.conv2", z.relu(), padding=1))

    path = levels[3]
    for level in (4, 3, 2, 1):
        at = f"decoder.refinenet{level}"
        if level < 4:
            path = path + unit(f"{at}.resConfUnit1", levels[level - 1])
        path = _conv(t, f"{at}.out_conv", _grow(unit(f"{at}.resConfUnit2", path), 2))
    x = _norm(t, "decoder.output_conv.1", _conv(t, "decoder.output_conv.0", path, padding=1)).relu()
    return _grow(_conv(t, "decoder.output_conv.4", x), 2)


def augreg_features(arrays: Mapping[str, np.ndarray[Any, Any]], pixels: Tensor) -> list[Tensor]:
    """An AugReg archive in Flax's own layout: (B, 3, 224, 224) -> tokens (B, D, 14, 14) after four blocks."""
    a = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    x = torch.einsum(
        "bcrpsq,pqcd->brsd", pixels.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)), a["embedding/kernel"]
    ).add(a["embedding/bias"])
    grid = x.shape[1:3]
    x = torch.cat([a["cls"].expand(len(x), -1, -1), x.flatten(1, 2)], 1)
    x = x + a["Transformer/posembed_input/pos_embedding"]
    maps = []
    for block in range(VIT_BLOCKS[-1] + 1):
        at = f"Transformer/encoderblock_{block}"

        def norm(name: str, y: Tensor, at: str = at) -> Tensor:
            return F.layer_norm(y, y.shape[-1:], a[f"{at}/{name}/scale"], a[f"{at}/{name}/bias"], eps=1e-6)

        attention, y = f"{at}/MultiHeadDotProductAttention_1", norm("LayerNorm_0", x)
        q, k, v = (
            torch.einsum("bnd,dhk->bhnk", y, a[f"{attention}/{part}/kernel"]) + a[f"{attention}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        x = x + torch.einsum("bhnk,hkd->bnd", weights @ v, a[f"{attention}/out/kernel"]) + a[f"{attention}/out/bias"]
        mlp = f"{at}/MlpBlock_3/Dense"
        y = F.gelu(norm("LayerNorm_2", x) @ a[f"{mlp}_0/kernel"] + a[f"{mlp}_0/bias"])
        x = x + y @ a[f"{mlp}_1/kernel"] + a[f"{mlp}_1/bias"]
        if block in VIT_BLOCKS:
            maps.append(x[:, 1:].mT.unflatten(2, grid))
    return maps
