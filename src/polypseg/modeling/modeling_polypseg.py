"""Encoder -> decoder -> logits: the one model sentence of this package."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_polypseg import PolypSegConfig
from .decoder_deeplabv3plus import DeepLabV3PlusDecoder
from .decoder_dpt import DPTDecoder, project_pyramid, reassemble_tokens
from .encoders_polypseg import build_cnn_encoder, build_vit_encoder, feature_levels, is_plain_vit, level_widths

SMALLEST_SIDE = 32  # pixels; below, DeepLabV3+'s deepest map is a single cell


class PolypSegForSemanticSegmentation(PreTrainedModel):
    """A timm encoder (CNN or plain ViT) with a DeepLabV3+ or DPT decoder that marks polyps.

    The study pairs CNNs with DeepLabV3+ and ViTs with DPT; the two other pairs separate encoder from decoder. Raises
    ValueError for an encoder that timm does not know or that the decoder cannot read.
    """

    config_class = PolypSegConfig
    config: PolypSegConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: PolypSegConfig):
        super().__init__(config)
        config.check_labels()
        self.encoder = self._build_encoder()
        self._encoder_awaits_values = any(tensor.is_meta for tensor in _tensors(self.encoder).values())
        self.levels = feature_levels(self.encoder, decoder=config.decoder)
        self.decoder = self._build_decoder()
        self.post_init()

    def _build_encoder(self) -> Any:
        """A new encoder as timm and the reference initialize it."""
        config = self.config
        if is_plain_vit(config.encoder):
            return build_vit_encoder(
                config.encoder,
                position_embedding=config.position_embedding,
                position_embedding_trainable=config.position_embedding_trainable,
            )
        return build_cnn_encoder(config.encoder)

    def _build_decoder(self) -> nn.Module:
        widths, channels = level_widths(self.encoder, self.levels), self.config.decoder_channels
        sizes: dict[str, Any] = {"channels": channels, "dropout": self.config.decoder_dropout}
        if self.config.decoder == "deeplabv3plus":
            return DeepLabV3PlusDecoder(*widths, **sizes)
        reassemble = reassemble_tokens(widths[0], channels) if self.has_vit else project_pyramid(widths, channels)
        return DPTDecoder(reassemble, **sizes)

    @property
    def has_vit(self) -> bool:
        """Whether the encoder is a plain ViT, which gives tokens on a patch grid, and not a CNN."""
        return isinstance(self.encoder, VisionTransformer)

    def check_image_size(self, height: int, width: int) -> None:
        """Raise ValueError when images of this size do not fit the encoder."""
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"images of {height}x{width} are too small: each side needs {SMALLEST_SIDE} pixels")
        if self.has_vit:
            rows, columns = self.encoder.patch_embed.patch_size
            if height % rows or width % columns:
                raise ValueError(
                    f"{self.config.encoder} takes sides that are multiples of {rows} pixels, not {height}x{width}"
                )

    def extract_features(self, pixel_values: Tensor) -> list[Tensor]:
        """pixel_values (B, 3, H, W) -> the feature maps that the decoder reads; ValueError as ``check_image_size``.

        DeepLabV3+ wants its skip at stride 4, which a ViT does not have: there an early block's tokens are spread
        bilinearly over H/4 x W/4. They bring early features to the skip but no finer detail than the patches.
        """
        height, width = pixel_values.shape[-2:]
        self.check_image_size(height, width)
        if not self.has_vit:
            pyramid = self.encoder(pixel_values)
            return [pyramid[level] for level in self.levels]
        tokens: list[Tensor] = self.encoder.forward_intermediates(
            pixel_values, indices=self.levels, norm=False, intermediates_only=True
        )
        if self.config.decoder == "deeplabv3plus":
            size = (height // 4, width // 4)
            tokens[0] = F.interpolate(tokens[0], size=size, mode="bilinear", align_corners=True)
        return tokens

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """pixel_values (B, 3, H, W), labels (B, H, W) in [0, 1] -> logits (B, 2, H, W) and the soft Dice loss.

        The logits are [0, z]: softmax of the polyp channel is sigmoid(z) and argmax is z > 0. Labels may be soft.
        ``output_hidden_states`` adds the feature maps (B, C, h, w) that the decoder reads, finest first;
        ``return_dict=False`` gives a tuple of what there is. Where they are None, the configuration decides. Raises
        ValueError for ``output_attentions``: timm's encoders give no attention maps.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is not possible: the encoders of timm give no attention maps")
        image_size = (pixel_values.shape[-2], pixel_values.shape[-1])
        features = self.extract_features(pixel_values)
        polyp = self.decoder(features, image_size)  # (B, 1, H, W)
        logits = torch.cat([torch.zeros_like(polyp), polyp], dim=1)
        loss = None if labels is None else soft_dice_loss(polyp[:, 0], labels)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=tuple(features) if wanted else None)
        as_record = self.config.return_dict if return_dict is None else return_dict
        return output if as_record else output.to_tuple()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the encoder recomputes its blocks in the backward pass; transformers sets this."""
        return bool(getattr(self.encoder, "grad_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.encoder.set_grad_checkpointing(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """The reference's initialization of everything that a checkpoint did not bring.

        Encoder: timm's own, which has happened already unless the model was built without memory (``from_pretrained``).
        DeepLabV3+: Kaiming uniform (fan in) convolutions, Xavier uniform head. DPT: PyTorch's defaults, which for
        convolutions are Kaiming uniform with a = sqrt(5). BatchNorm starts at the identity.
        """
        if any(module is layer for layer in self.decoder.modules()):
            self._init_decoder_layer(module)
        elif self._encoder_awaits_values:  # a layer of the encoder lacks something, and others may too
            self._fill_encoder()

    def _fill_encoder(self) -> None:
        """Give each tensor of the encoder that was not loaded its value in a newly initialized encoder."""
        fresh = _tensors(self._build_encoder())
        for name, tensor in _tensors(self.encoder).items():
            init.copy_(tensor, fresh[name])  # leaves what was loaded
        self._encoder_awaits_values = False

    def _init_decoder_layer(self, module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            return
        if self.config.decoder == "dpt":
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = nn.init._calculate_fan_in_and_fan_out(module.weight)[0] ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif module is self.decoder.get_submodule("head"):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        else:
            init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, buffers that are not saved included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def soft_dice_loss(logits: Tensor, labels: Tensor, *, smooth: float = 1e-8) -> Tensor:
    """Mean over images of 1 - 2(I + s) / (sum p^2 + sum y^2 + s), squared denominators: (B, H, W) twice -> ().

    logits are polyp logits, labels in [0, 1] may be soft; computed in float32. With an empty label the loss is close to
    1 unless the prediction is empty too. Raises ValueError when the shapes differ.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    p, y = logits.float().sigmoid(), labels.float()
    overlap = (p * y).sum((1, 2))
    return (1 - 2 * (overlap + smooth) / (p.square().sum((1, 2)) + y.square().sum((1, 2)) + smooth)).mean()
