"""The DeepLabV3+ decoder (Chen et al. 2018, arXiv 1802.02611) in the variant of the reference study.

Atrous spatial pyramid pooling with separable convolutions at rates 12, 24, 36, and one skip at stride 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATROUS_RATES = (12, 24, 36)
SKIP_CHANNELS = 48  # section 4.1 of the paper


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm, ReLU: (B, Ci, H, W) -> (B, Co, H, W)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


def separable_bn_relu(in_channels: int, out_channels: int, *, dilation: int = 1) -> nn.Sequential:
    """Depthwise 3x3, pointwise 1x1, BatchNorm, ReLU: (B, Ci, H, W) -> (B, Co, H, W)."""
    depthwise = nn.Conv2d(
        in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
    )
    return nn.Sequential(depthwise, *conv_bn_relu(in_channels, out_channels))


class ImagePooling(nn.Module):
    """The image-level branch of ASPP: average everything, project, spread out again, (B, Ci, h, w) -> (B, Co, h, w)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.project = conv_bn_relu(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            raise ValueError("DeepLabV3+ cannot train on a batch of one image: BatchNorm pools it to one value")
        return self.project(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: (B, Ci, h, w) -> (B, Co, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, *, dropout: float):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_bn_relu(in_channels, out_channels),
                *(separable_bn_relu(in_channels, out_channels, dilation=rate) for rate in ATROUS_RATES),
                ImagePooling(in_channels, out_channels),
            ]
        )
        self.project = conv_bn_relu(len(self.branches) * out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.project(torch.cat([branch(x) for branch in self.branches], dim=1)))


class DeepLabV3PlusDecoder(nn.Module):
    """Features of stride 4 and 16 -> one logit map of the image's size."""

    def __init__(self, skip_channels: int, deep_channels: int, *, channels: int, dropout: float):
        super().__init__()
        self.aspp = ASPP(deep_channels, channels, dropout=dropout)
        self.refine = separable_bn_relu(channels, channels)
        self.skip = conv_bn_relu(skip_channels, SKIP_CHANNELS)
        self.fuse = separable_bn_relu(SKIP_CHANNELS + channels, channels)
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, features: list[Tensor], image_size: tuple[int, int]) -> Tensor:
        """[(B, Cs, H/4, W/4), (B, Cd, H/16, W/16)] and (H, W) -> (B, 1, H, W)."""
        skip, deep = features
        x = self.refine(self.aspp(deep))
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
        x = self.head(self.fuse(torch.cat([x, self.skip(skip)], dim=1)))
        return F.interpolate(x, size=image_size, mode="bilinear", align_corners=True)
