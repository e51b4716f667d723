"""Dilated depthwise convolutions on CPU: the same sums, in a form for which oneDNN has fast kernels.

A convolution of dilation d acts on d x d interleaved grids that never mix. Taken apart (Shi et al. 2016's sub-pixel
layout, backwards), each grid sees an ordinary convolution, whose backward pass is several times faster; a dilation
beyond the map's size leaves only the center tap. The weights, their names and the results stay as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InterleavedConv2d(nn.Conv2d):
    """A dilated depthwise convolution of stride 1 that keeps the map's size."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        dilation, taps = int(self.dilation[0]), int(self.kernel_size[0])
        batch, channels, height, width = x.shape
        if dilation >= max(height, width):
            return x * self.weight[:, 0, taps // 2, taps // 2].view(1, -1, 1, 1)
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


@contextmanager
def interleaved_convolutions(model: nn.Module, *, enabled: bool = True) -> Iterator[int]:
    """Run the model's dilated depthwise convolutions in the fast form inside the block; gives their number."""
    found = [layer for layer in model.modules() if enabled and _fits(layer)]
    for layer in found:
        layer.__class__ = InterleavedConv2d
    try:
        yield len(found)
    finally:
        for layer in found:
            layer.__class__ = nn.Conv2d


def _fits(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d or layer.bias is not None or layer.groups != layer.in_channels:
        return False
    same = tuple(d * (k // 2) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    one = len(set(layer.dilation)) == 1 and len(set(layer.kernel_size)) == 1 and layer.out_channels == layer.groups
    odd, dilated = layer.kernel_size[0] % 2 == 1, layer.dilation[0] > 1
    return one and odd and dilated and layer.padding == same and layer.stride == (1, 1)
