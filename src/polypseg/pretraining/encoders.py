"""timm encoders as pretraining sees them: whole, without head, under the key names of the published weights."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polypseg.errors import UsageError
from polypseg.modeling.encoders_polypseg import sincos_position_embedding


@dataclass
class PretrainingOutput:
    """What a method's forward gives: the loss to minimize and detached embeddings (N, D) to watch for collapse."""

    loss: Tensor
    embedding: Tensor


def build_encoder(name: str) -> Any:
    """A timm CNN or plain ViT without head: images (B, 3, H, W) -> features (B, D), D = ``encoder.num_features``.

    A CNN gives its pooled last map; timm starts the last gain of each residual block at 0, as the published recipes do.
    A ViT gives the class token after the final norm and takes other image sizes by interpolating its position table.
    Raises UsageError when timm does not know ``name``.
    """
    if not timm.is_model(name):
        raise UsageError(f"timm knows no encoder {name!r}; see timm.list_models()")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # only ViTs know dynamic_img_size
        return timm.create_model(name, pretrained=False, num_classes=0)


def is_vit(encoder: nn.Module) -> bool:
    """Whether the encoder is a plain timm ViT with a class token and position embeddings."""
    return type(encoder) is VisionTransformer and encoder.pos_embed is not None and encoder.cls_token is not None


def freeze_position_table(encoder: VisionTransformer, layout: str) -> None:
    """Fix the position embedding to a sine-cosine table of the method's layout; the class token's row is zero."""
    table = sincos_position_embedding(layout, grid=encoder.patch_embed.grid_size, width=encoder.embed_dim)
    with torch.no_grad():
        encoder.pos_embed.zero_()
        encoder.pos_embed[:, -table.shape[1] :] = table
    encoder.pos_embed.requires_grad = False


def encode(encoder: nn.Module, images: Tensor, *, chunk: int | None) -> Tensor:
    """Features (B, D) of images (B, 3, H, W); with ``chunk``, that many images at a time in little memory.

    The backward pass then computes each chunk again, so activations of one chunk only are held: the memory of a small
    batch, the loss of the whole one (as GradCache, Gao et al. 2021). Exact for encoders that treat images one by one.
    """
    if chunk is None or chunk >= len(images):
        return encoder(images)  # type: ignore[no-any-return]
    parts = [checkpoint(encoder, part, use_reentrant=False) for part in images.split(chunk)]
    return torch.cat(parts)


def feature_width(encoder: Any) -> int:
    """D of the encoder's features (B, D)."""
    return int(encoder.num_features)


def refuse_chunks_with_batchnorm(encoder: nn.Module, *, chunk: int | None) -> None:
    """Raise UsageError for ``encode`` in chunks with an encoder in which the images of a batch meet."""
    if chunk and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
        raise UsageError(
            "encoder_chunk would change the encoder's BatchNorm statistics, which are those of the whole batch: "
            "use it with a ViT, or more processes"
        )
