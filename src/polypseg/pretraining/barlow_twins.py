"""Barlow Twins (Zbontar, Jing, Misra, LeCun, Deny, ICML 2021).

The cross-correlation of two views' embeddings over the batch should be the identity: each dimension agrees with itself
and tells nothing about the others.
"""

import torch
from torch import Tensor, nn

from polypseg.pretraining.encoders import (
    PretrainingOutput,
    encode,
    feature_width,
    refuse_chunks_with_batchnorm,
)
from polypseg.training.distributed import at_least_float32, process_count, sum_over_processes


class BarlowTwins(nn.Module):
    """Encoder and projector of three linear layers without bias, then a BatchNorm without affine part.

    ``encoder_chunk`` encodes so many images at a time (see ``encode``). Raises UsageError for it with a BatchNorm
    encoder.
    """

    views = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projector_width: int = 8192,
        off_diagonal_weight: float = 0.0051,
        encoder_chunk: int | None = None,
    ):
        super().__init__()
        refuse_chunks_with_batchnorm(encoder, chunk=encoder_chunk)
        width = projector_width
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(feature_width(encoder), width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
        )
        self.normalise = nn.BatchNorm1d(width, affine=False)
        self.off_diagonal_weight, self.encoder_chunk = off_diagonal_weight, encoder_chunk

    def start_step(self, share_done: float) -> None:
        """Nothing moves between steps."""

    def forward(self, views: Tensor) -> PretrainingOutput:
        """views (N, 2, 3, H, W) -> loss, and the encoder's features (N, D) of the first view."""
        first, second = views.unbind(1)
        h1, h2 = (encode(self.encoder, x, chunk=self.encoder_chunk) for x in (first, second))
        z1, z2 = self.projector(h1), self.projector(h2)
        with torch.autocast(views.device.type, enabled=False):  # squares of small correlations underflow in float16
            z1, z2 = (self.normalise(at_least_float32(z)) for z in (z1, z2))
            loss = redundancy_loss(cross_correlation(z1, z2), off_diagonal_weight=self.off_diagonal_weight)
        return PretrainingOutput(loss=loss, embedding=h1.detach())

    def represent(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> features (B, D) for k-NN and probes."""
        return self.encoder(images)  # type: ignore[no-any-return]


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """Standardized embeddings (N, D) of this process, twice -> their correlation (D, D) over all processes.

    The gradient is the true one at any number of processes once data-parallel training has averaged it. The authors'
    code gives it divided by the number of processes, which their learning rate of the biases includes.
    """
    return sum_over_processes(z1.T @ z2) / (len(z1) * process_count())


def redundancy_loss(correlation: Tensor, *, off_diagonal_weight: float) -> Tensor:
    """Eq. 1: sum of (C_ii - 1)^2 plus lambda times the sum of C_ij^2 over i != j: (D, D) -> ()."""
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + off_diagonal_weight * off_diagonal
