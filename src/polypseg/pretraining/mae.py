"""Masked autoencoders (He, Chen, Xie, Li, Dollar, Girshick, CVPR 2022).

Three quarters of the patches are hidden; the encoder sees the rest only, a light decoder paints the hidden ones.
Letters: B images, L patches, K kept patches, D encoder width, E decoder width, P pixels of a patch times 3.
"""

from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from polypseg.errors import UsageError
from polypseg.modeling.encoders_polypseg import sincos_position_embedding
from polypseg.pretraining.encoders import PretrainingOutput, freeze_position_table, is_vit
from polypseg.training.distributed import at_least_float32


class MAE(nn.Module):
    """A timm ViT as encoder and a transformer decoder, both with fixed sine-cosine positions.

    Raises UsageError for another encoder or an image size that its patches do not divide.
    """

    views = 1

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_size: int = 224,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise_targets: bool = True,
    ):
        super().__init__()
        if not is_vit(encoder):
            raise UsageError("MAE drops patches, which a plain ViT with a class token allows: choose such an encoder")
        self.encoder = cast(VisionTransformer, encoder)
        self.patch_size = self.encoder.patch_embed.patch_size[0]
        if image_size % self.patch_size:
            raise UsageError(f"an image size of {image_size} is no multiple of the patch size {self.patch_size}")
        self.grid = image_size // self.patch_size
        self.kept = int(self.grid**2 * (1 - mask_ratio))
        self.normalise_targets = normalise_targets
        self.decoder_embed = nn.Linear(self.encoder.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        table = sincos_position_embedding("sincos_mae", grid=(self.grid, self.grid), width=decoder_width)
        class_row = torch.zeros(1, 1, decoder_width)
        self.decoder_pos_embed = nn.Parameter(torch.cat([class_row, table], dim=1), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, 3 * self.patch_size**2)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Xavier uniform everywhere, Q, K and V as one matrix; the patch projection as if it were a linear layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        freeze_position_table(self.encoder, "sincos_mae")

    @property
    def patches(self) -> int:
        """L, the number of patches of an image."""
        return self.grid**2

    def start_step(self, share_done: float) -> None:
        """Nothing moves between steps."""

    def forward(self, views: Tensor, noise: Tensor) -> PretrainingOutput:
        """views (B, 1, 3, H, W), noise (B, L): the patches of least noise are kept -> loss, class tokens (B, D)."""
        images = views[:, 0]
        tokens, mask, order = self.encode(images, noise)
        painted = self.decode(tokens, order)
        with torch.autocast(images.device.type, enabled=False):
            loss = self.reconstruction_loss(images, at_least_float32(painted), mask)
        return PretrainingOutput(loss=loss, embedding=tokens[:, 0].detach())

    def encode(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W), noise (B, L) -> tokens (B, 1 + K, D), mask (B, L) of 1 = hidden, rank of each patch."""
        x = self.encoder.norm_pre(self.encoder._pos_embed(self.encoder.patch_embed(images)))  # (B, 1 + L, D)
        kept, mask, rank = choose_patches(noise, keep=self.kept)
        patches = x[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        return self.encoder.norm(self.encoder.blocks(torch.cat([x[:, :1], patches], dim=1))), mask, rank

    def decode(self, tokens: Tensor, rank: Tensor) -> Tensor:
        """tokens (B, 1 + K, D) and the rank (B, L) of each patch -> painted patches (B, L, P)."""
        x = self.decoder_embed(tokens)
        hidden = self.mask_token.expand(len(x), rank.shape[1] - self.kept, -1).to(x.dtype)
        shuffled = torch.cat([x[:, 1:], hidden], dim=1)  # (B, L, E) in order of rank
        patches = shuffled.gather(1, rank[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]  # type: ignore[no-any-return]

    def reconstruction_loss(self, images: Tensor, painted: Tensor, mask: Tensor) -> Tensor:
        """Mean square over pixels, then over hidden patches: painted (B, L, P), mask (B, L) -> ()."""
        target = patchify(at_least_float32(images), size=self.patch_size)
        if self.normalise_targets:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return ((painted - target).square().mean(-1) * mask).sum() / mask.sum()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W), noise (B, L) -> the images with hidden patches at zero, and with them painted.

        With normalized targets, each painted patch gets the true patch's mean and deviation, as the authors show it.
        """
        tokens, mask, rank = self.encode(images, noise)
        painted, truth = self.decode(tokens, rank).float(), patchify(images, size=self.patch_size)
        if self.normalise_targets:
            painted = painted * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
        hidden = mask[:, :, None]
        parts = (truth * (1 - hidden), truth * (1 - hidden) + painted * hidden)
        return tuple(unpatchify(part, size=self.patch_size, grid=self.grid) for part in parts)  # type: ignore[return-value]

    def represent(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> mean of all patch tokens after the final norm (B, D), for k-NN and probes."""
        return self.encoder.forward_features(images)[:, 1:].mean(1)  # type: ignore[no-any-return]


def choose_patches(noise: Tensor, *, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, L) -> kept patches (B, K) by rising noise, mask (B, L) of 1 = hidden, rank (B, L) of each patch."""
    order = noise.argsort(dim=1)
    rank = order.argsort(dim=1)
    return order[:, :keep], (rank >= keep).to(noise.dtype), rank


def patchify(images: Tensor, *, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, L, size * size * 3), pixels in the order row, column, channel."""
    b, c, h, w = images.shape
    blocks = images.reshape(b, c, h // size, size, w // size, size)
    return blocks.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)


def unpatchify(patches: Tensor, *, size: int, grid: int) -> Tensor:
    """The inverse of ``patchify`` for square images: (B, grid * grid, size * size * 3) -> (B, 3, H, W)."""
    blocks = patches.reshape(len(patches), grid, grid, size, size, 3)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, grid * size, grid * size)
