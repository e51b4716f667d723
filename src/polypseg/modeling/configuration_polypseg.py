"""Configuration of a polyp segmentation model: which timm encoder, which decoder, which input statistics."""

from typing import Any

import timm
from transformers.configuration_utils import PreTrainedConfig

POSITION_EMBEDDINGS = ("learned", "sincos_moco_v3", "sincos_mae")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DECODER_DROPOUT = {"deeplabv3plus": 0.5, "dpt": 0.1}


class PolypSegConfig(PreTrainedConfig):
    """An encoder (a timm name), a decoder, and the statistics of the images that the encoder expects.

    Raises ValueError for an unknown decoder or position embedding and for sizes that cannot be.
    """

    model_type = "polypseg"

    encoder: str = "resnet50"
    """timm architecture: a CNN with strided features or a plain ViT; ``deeplabv3plus`` reads ViTs of 16x16 patches."""
    decoder: str = "deeplabv3plus"
    """``deeplabv3plus`` (Chen et al. 2018) or ``dpt`` (Ranftl et al. 2021)."""
    decoder_channels: int = 256
    """Width of the decoder; 256 in both papers."""
    decoder_dropout: float | None = None
    """Dropout probability before the last projection; None takes the reference's 0.5 (DeepLabV3+) or 0.1 (DPT)."""
    position_embedding: str = "learned"
    """Of a ViT: ``learned``, or a fixed sine-cosine table in MoCo v3's or MAE's layout (they differ)."""
    position_embedding_trainable: bool = True
    """Whether fine-tuning moves the position embedding; the reference freezes the sine-cosine tables."""
    image_size: int = 224
    """Side in pixels to which the image processor resizes; the model itself takes other sizes too."""
    image_mean: list[float] | None = None
    """Per-channel mean of the input normalisation, in [0, 1] units; None takes what timm records of the encoder."""
    image_std: list[float] | None = None
    """Per-channel standard deviation of the input normalisation; None takes what timm records of the encoder."""
    weights_origin: dict[str, Any] | None = None
    """Where the weights come from (model id, initialisation, recipe, data); None for a bare architecture."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("id2label", {0: "background", 1: "polyp"})
        kwargs.setdefault("label2id", {"background": 0, "polyp": 1})
        if self.decoder not in DECODER_DROPOUT:
            raise ValueError(f"unknown decoder {self.decoder!r}; choose from {sorted(DECODER_DROPOUT)}")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"unknown position_embedding {self.position_embedding!r}; choose from {list(POSITION_EMBEDDINGS)}"
            )
        if self.decoder_channels < 1 or self.image_size < 32:
            raise ValueError("decoder_channels must be positive and image_size at least 32")
        if self.decoder_dropout is None:
            self.decoder_dropout = DECODER_DROPOUT[self.decoder]
        own = timm.get_pretrained_cfg(self.encoder) if timm.is_model(self.encoder) else None
        self.image_mean = list(self.image_mean or (own.mean if own else IMAGENET_MEAN))
        self.image_std = list(self.image_std or (own.std if own else IMAGENET_STD))
        super().__post_init__(**kwargs)
