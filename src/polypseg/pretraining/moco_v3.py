"""MoCo v3 (Chen, Xie, He: An Empirical Study of Training Self-Supervised Vision Transformers, ICCV 2021).

Two views of each image; the query of one view must find, among the keys of the other views of the whole batch, the key
of its own image. Keys come from a slowly moving copy of the encoder. There is no queue.
"""

import copy
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from polypseg.pretraining.encoders import (
    PretrainingOutput,
    encode,
    feature_width,
    freeze_position_table,
    is_vit,
    refuse_chunks_with_batchnorm,
)
from polypseg.training.distributed import at_least_float32, gather_rows, process_index


class MoCoV3(nn.Module):
    """Online encoder, projector and predictor; momentum encoder and projector.

    A CNN has a projector of 2 layers and a predictor without last normalization; a ViT has 3 layers, a normalized
    predictor, fixed sine-cosine positions and a frozen random patch projection (section 4 and appendix of the paper).
    ``encoder_chunk`` encodes so many images at a time (see ``encode``). Raises UsageError for it with a BatchNorm
    encoder.
    """

    views = 2

    def __init__(
        self,
        encoder: nn.Module,
        *,
        hidden_width: int = 4096,
        output_width: int = 256,
        temperature: float,
        momentum: float = 0.99,
        encoder_chunk: int | None = None,
    ):
        super().__init__()
        refuse_chunks_with_batchnorm(encoder, chunk=encoder_chunk)
        vit = is_vit(encoder)
        if vit:
            initialize_vit(encoder)
        width = feature_width(encoder)
        layers = 3 if vit else 2
        self.encoder = encoder
        self.projector = mlp([width, *[hidden_width] * (layers - 1), output_width], normalize_output=True)
        self.predictor = mlp([output_width, hidden_width, output_width], normalize_output=vit)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.temperature, self.momentum, self.encoder_chunk = temperature, momentum, encoder_chunk

    @torch.no_grad()
    def start_step(self, share_done: float) -> None:
        """Move the momentum branch toward the online one: p' <- m p' + (1 - m) p, parameters only.

        m rises from ``momentum`` to 1 on a half cosine of ``share_done`` in [0, 1], the share of all epochs done.
        """
        m = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * share_done)) / 2
        for slow, fast in ((self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector)):
            for p_slow, p_fast in zip(slow.parameters(), fast.parameters(), strict=True):
                p_slow.lerp_(p_fast, 1 - m)

    def forward(self, views: Tensor) -> PretrainingOutput:
        """views (N, 2, 3, H, W) -> loss, and the encoder's features (N, D) of the first view."""
        first, second = views.unbind(1)
        h1, h2 = (encode(self.encoder, x, chunk=self.encoder_chunk) for x in (first, second))
        q1, q2 = (self.predictor(self.projector(h)) for h in (h1, h2))
        with torch.no_grad():
            k1, k2 = (self.momentum_projector(self.momentum_encoder(x)) for x in (first, second))
        with torch.autocast(views.device.type, enabled=False):
            loss = self._contrast(q1, k2) + self._contrast(q2, k1)
        return PretrainingOutput(loss=loss, embedding=h1.detach())

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """One direction of the symmetrized loss, in float32 and against the keys of all processes."""
        q, k = (F.normalize(at_least_float32(x), dim=1) for x in (queries, keys))
        return contrastive_loss(q, gather_rows(k), temperature=self.temperature, process=process_index())

    def represent(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> features (B, D) for k-NN and probes."""
        return self.encoder(images)  # type: ignore[no-any-return]


def contrastive_loss(queries: Tensor, keys: Tensor, *, temperature: float, process: int = 0) -> Tensor:
    """InfoNCE (eq. 1) times 2 tau: unit queries (N, D) of one process, unit keys (M, D) of all in rank order -> ().

    The positive of row i is key i + N * process. About 2 tau ln M when queries and keys know nothing of each other.
    """
    logits = queries @ keys.T / temperature
    positives = torch.arange(len(queries), device=queries.device) + len(queries) * process
    return 2 * temperature * F.cross_entropy(logits, positives)


def mlp(widths: list[int], *, normalize_output: bool) -> nn.Sequential:
    """Linear layers without bias, BatchNorm and ReLU between them; optionally a last BatchNorm without affine part."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=2):
        layers.append(nn.Linear(before, after, bias=False))
        if number < len(widths):
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif normalize_output:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return nn.Sequential(*layers)


@torch.no_grad()
def initialize_vit(encoder: VisionTransformer) -> None:
    """MoCo v3's ViT: Xavier uniform with Q, K and V apart, sine-cosine positions, a frozen random patch projection."""
    for name, module in encoder.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith("qkv"):
            bound = math.sqrt(6 / (module.out_features // 3 + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(encoder.cls_token, std=1e-6)
    projection = encoder.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + encoder.embed_dim))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
    freeze_position_table(encoder, "sincos_moco_v3")
