"""Layers that train slowly on CPU: the same sums, in a form for which there are fast kernels.

A dilated depthwise convolution of dilation d acts on d x d interleaved grids that never mix. Taken apart (Shi et al.
2016's sub-pixel layout, backwards), each grid sees an ordinary convolution, whose backward pass is several times
faster. A dilation of more than half the map's size leaves the center tap and narrow strips, which are added tap by tap:
as grids they took two fifths of a bf16 step of ResNet50 at 224 px. Attention in bf16 has a fused backward pass on CPU
that is three times slower than two matrix products. A 1x1 convolution commutes with interpolation: done first, it
meets a quarter of the cells. The weights, their names and, to rounding, the results stay as they were.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from types import EllipsisType
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from polypseg.modeling.decoder_dpt import Fusion


class InterleavedConv2d(nn.Conv2d):
    """A dilated depthwise convolution of stride 1 that keeps the map's size."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        dilation, taps = int(self.dilation[0]), int(self.kernel_size[0])
        batch, channels, height, width = x.shape
        if 2 * dilation > max(height, width):
            return cast(Tensor, _ShiftedTaps.apply(x, self.weight.to(x.dtype), dilation))
        below, right = -height % dilation, -width % dilation
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        rows, columns = (height + below) // dilation, (width + right) // dilation
        x = x.permute(0, 2, 3, 1).reshape(batch, rows, dilation, columns, dilation, channels)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch * dilation**2, rows, columns, channels).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.weight, None, padding=taps // 2, groups=channels)
        x = x.permute(0, 2, 3, 1).reshape(batch, dilation, dilation, rows, columns, channels)
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(batch, rows * dilation, columns * dilation, channels)
        return x[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class _ShiftedTaps(torch.autograd.Function):
    """A dilated depthwise convolution as one weighted sum of shifted maps; taps that leave the map cost nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        """(B, C, H, W) and (C, 1, K, K) -> (B, C, H, W)."""
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        center = weight.shape[-1] // 2
        y = x * _per_channel(weight[:, 0, center, center])
        for tap, to, source in _reaching_taps(x, weight, dilation):
            y[to] += x[source] * _per_channel(weight[:, 0, *tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and of the weight; sums over the map in float32 or wider."""
        x, weight = ctx.saved_tensors
        center = weight.shape[-1] // 2
        grad_x = grad * _per_channel(weight[:, 0, center, center])
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, 0, center, center] = _sum_per_channel(grad * x)
        for tap, to, source in _reaching_taps(x, weight, ctx.dilation):
            grad_x[source] += grad[to] * _per_channel(weight[:, 0, *tap])
            grad_weight[:, 0, *tap] = _sum_per_channel(grad[to] * x[source])
        return grad_x, grad_weight, None


_Window = tuple[EllipsisType, slice, slice]


def _reaching_taps(x: Tensor, weight: Tensor, dilation: int) -> Iterator[tuple[tuple[int, int], _Window, _Window]]:
    """Taps other than the center that fall on the map, each with the window that it writes and the one it reads."""
    height, width = x.shape[-2:]
    taps = weight.shape[-1]
    for row, column in product(range(taps), repeat=2):
        down, right = ((index - taps // 2) * dilation for index in (row, column))
        if (down or right) and abs(down) < height and abs(right) < width:
            to = (..., _kept(-down, height), _kept(-right, width))
            yield (row, column), to, (..., _kept(down, height), _kept(right, width))


def _kept(shift: int, size: int) -> slice:
    """The part of an axis that has a partner ``shift`` before it."""
    return slice(max(0, shift), size + min(0, shift))


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _sum_per_channel(values: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.sum((0, 2, 3), dtype=wide).to(values.dtype)


class EarlyProjection(Fusion):
    """A fusion block of DPT that projects before it upsamples."""

    def enlarge(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Project, then upsample: (B, C, h, w) -> (B, C, *size)."""
        return F.interpolate(self.project(x), size=size, mode="bilinear", align_corners=True)


@contextmanager
def fast_layers(model: nn.Module, *, bf16: bool, enabled: bool = True) -> Iterator[None]:
    """Train a model on CPU with every layer in its fast form inside the block; attention only where ``bf16`` slows it.

    ``enabled``: False leaves the model as it is, as on a GPU.
    """
    with (
        interleaved_convolutions(model, enabled=enabled),
        early_projections(model, enabled=enabled),
        attention_by_products(model, enabled=enabled and bf16),
    ):
        yield


def interleaved_convolutions(model: nn.Module, *, enabled: bool = True) -> AbstractContextManager[int]:
    """Run the model's dilated depthwise convolutions in the fast form inside the block; gives their number."""
    found = [layer for layer in model.modules() if enabled and _fits(layer)]
    return _changed(found, "__class__", InterleavedConv2d)


def attention_by_products(model: nn.Module, *, enabled: bool = True) -> AbstractContextManager[int]:
    """Run timm's attention as matrix products inside the block, not as one fused call; gives the number of layers.

    A layer then keeps (B, heads, tokens, tokens) weights for its backward pass.
    """
    found = [layer for layer in model.modules() if enabled and isinstance(layer, Attention) and layer.fused_attn]
    return _changed(found, "fused_attn", False)


def early_projections(model: nn.Module, *, enabled: bool = True) -> AbstractContextManager[int]:
    """Let DPT's fusion blocks project before they upsample inside the block; gives their number."""
    found = [layer for layer in model.modules() if enabled and type(layer) is Fusion]
    return _changed(found, "__class__", EarlyProjection)


@contextmanager
def _changed(layers: Sequence[nn.Module], name: str, value: object) -> Iterator[int]:
    """Give an attribute of the layers this value inside the block, and their own back; gives their number."""
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield len(layers)
    finally:
        for layer, own in zip(layers, before, strict=True):
            setattr(layer, name, own)


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d or layer.bias is not None or layer.groups != layer.in_channels:
        return False
    same = tuple(d * (k // 2) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    one = len(set(layer.dilation)) == 1 and len(set(layer.kernel_size)) == 1 and layer.out_channels == layer.groups
    odd, dilated = layer.kernel_size[0] % 2 == 1, layer.dilation[0] > 1
    return one and odd and dilated and layer.padding == same and layer.stride == (1, 1)
