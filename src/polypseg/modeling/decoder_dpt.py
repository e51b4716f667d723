"""The DPT decoder (Ranftl et al. 2021, arXiv 2103.13413) in the variant of the reference study.

Reads a ViT's tokens, as in the paper, or a CNN's pyramid. Class token ignored, BatchNorm in the fusion blocks, and no
skip unit in the deepest fusion block: it receives nothing coarser, and the reference skips the unit there, so here it
does not exist.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualConvUnit(nn.Module):
    """x + BN(conv(ReLU(BN(conv(ReLU(x)))))): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Fusion(nn.Module):
    """Add the level to the coarser path, refine, upsample, project: (B, C, h, w) -> (B, C, *size)."""

    def __init__(self, channels: int, *, has_coarser: bool):
        super().__init__()
        self.skip = ResidualConvUnit(channels) if has_coarser else nn.Identity()
        self.refine = ResidualConvUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, level: Tensor, coarser: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = self.skip(level)
        if coarser is not None:
            x = x + coarser
        return self.enlarge(self.refine(x), size)

    def enlarge(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Upsample, then project: (B, C, h, w) -> (B, C, *size)."""
        return self.project(F.interpolate(x, size=size, mode="bilinear", align_corners=True))


def reassemble_tokens(width: int, channels: int) -> nn.ModuleList:
    """Of a ViT: four maps (B, width, h, w) on the patch grid -> (B, channels, ...) of 4, 2, 1, 1/2 times its size."""
    widths = [
        max(1, width // 8),
        max(1, width // 4),
        max(1, width // 2),
        width,
    ]  # (96, 192, 384, 768) for ViT-B
    resample = [
        nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
        nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
        nn.Identity(),
        nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
    ]
    return nn.ModuleList(
        nn.Sequential(nn.Conv2d(width, w, 1), resize, nn.Conv2d(w, channels, 3, padding=1, bias=False))
        for w, resize in zip(widths, resample, strict=True)
    )


def project_pyramid(widths: list[int], channels: int) -> nn.ModuleList:
    """Of a CNN: maps of strides 4, 8, 16, 16 -> (B, channels, ...) at strides 4, 8, 16, 32.

    A pyramid needs no reassembling: one 3x3 convolution a level, as in MiDaS (Ranftl et al. 2020, arXiv 1907.01341).
    The dilated last stage stays at stride 16, so its convolution takes every second cell, as a ViT's last level does.
    """
    strides = (1, 1, 1, 2)
    return nn.ModuleList(
        nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False)
        for width, stride in zip(widths, strides, strict=True)
    )


class DPTDecoder(nn.Module):
    """Four feature maps, brought to strides 4, 8, 16, 32 by ``reassemble`` -> one logit map of the image's size."""

    def __init__(self, reassemble: nn.ModuleList, *, channels: int, dropout: float):
        super().__init__()
        self.reassemble = reassemble
        self.fusion = nn.ModuleList(Fusion(channels, has_coarser=level < 3) for level in range(4))
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(channels, 1, 1),
        )

    def forward(self, features: list[Tensor], image_size: tuple[int, int]) -> Tensor:
        """Four (B, Ci, hi, wi) and (H, W) -> (B, 1, H, W)."""
        levels = [reassemble(x) for reassemble, x in zip(self.reassemble, features, strict=True)]
        finest = levels[0].shape[2:]
        sizes = [(2 * finest[0], 2 * finest[1]), *(level.shape[2:] for level in levels[:3])]
        path = None
        for level, fusion, size in zip(levels[::-1], self.fusion[::-1], sizes[::-1], strict=True):
            path = fusion(level, path, size)
        return F.interpolate(self.head(path), size=image_size, mode="bilinear", align_corners=True)
