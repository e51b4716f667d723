"""Configuration of a polyp segmentation model: which timm encoder, which decoder, which input statistics."""

import math
from typing import Any

import timm
from transformers.configuration_utils import PreTrainedConfig

POSITION_EMBEDDINGS = ("learned", "sincos_moco_v3", "sincos_mae")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_IMAGE, LARGEST_SIDE, WIDEST_DECODER = 32, 4096, 4096
"""Pixels of a side and channels; more than any published model has."""
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
    """Per-channel mean of the input normalization, in [0, 1] units; None takes what timm records of the encoder."""
    image_std: list[float] | None = None
    """Per-channel standard deviation of the input normalization; None takes what timm records of the encoder."""
    weights_origin: dict[str, Any] | None = None
    """Where the weights come from (model id, initialization, recipe, data); None for a bare architecture."""

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("num_labels") not in (None, 2):
            raise ValueError(f"num_labels is 2, polyp and background, not {kwargs['num_labels']!r:.80}")
        labels: Any = getattr(self, "id2label", None) or {0: "background", 1: "polyp"}
        if not isinstance(labels, dict):
            raise ValueError(f"id2label names the labels 0 and 1, it cannot be {labels!r:.80}")
        self.id2label, self.label2id = labels, {name: int(label) for label, name in labels.items()}
        self._check_names()
        self._check_numbers()
        if self.decoder_dropout is None:
            self.decoder_dropout = DECODER_DROPOUT[self.decoder]
        own = timm.get_pretrained_cfg(self.encoder) if timm.is_model(self.encoder) else None
        self.image_mean = list(self.image_mean or (own.mean if own else IMAGENET_MEAN))
        self.image_std = list(self.image_std or (own.std if own else IMAGENET_STD))
        super().__post_init__(**kwargs)
        self.check_labels()

    def _check_names(self) -> None:
        for name in ("encoder", "decoder", "position_embedding"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is a name, not {getattr(self, name)!r:.80}")
        if self.decoder not in DECODER_DROPOUT:
            raise ValueError(f"unknown decoder {self.decoder!r}; choose from {sorted(DECODER_DROPOUT)}")
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(
                f"unknown position_embedding {self.position_embedding!r}; choose from {list(POSITION_EMBEDDINGS)}"
            )
        if not isinstance(self.position_embedding_trainable, bool):
            raise ValueError("position_embedding_trainable is true or false")
        if self.weights_origin is not None and not isinstance(self.weights_origin, dict):
            raise ValueError(
                f"weights_origin is a record (a mapping) or null, not {type(self.weights_origin).__name__}"
            )

    def _check_numbers(self) -> None:
        if not _is_whole(self.decoder_channels, 1, WIDEST_DECODER):
            raise ValueError(f"decoder_channels must be positive and at most {WIDEST_DECODER}")
        if not _is_whole(self.image_size, SMALLEST_IMAGE, LARGEST_SIDE):
            raise ValueError(f"image_size must be at least {SMALLEST_IMAGE} and at most {LARGEST_SIDE}")
        if self.decoder_dropout is not None and not (
            _is_finite(self.decoder_dropout) and 0 <= self.decoder_dropout < 1
        ):
            raise ValueError("decoder_dropout must be at least 0 and below 1")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is None:
                continue
            if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_finite, values)):
                raise ValueError(f"{name} must be three finite numbers, not {values!r:.80}")
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std must be positive, not {values!r:.80}")

    def check_labels(self) -> None:
        """Raise ValueError unless there are two labels and the second is the polyp's: the model has one logit map."""
        labels: dict[Any, Any] = self.id2label or {}
        if set(labels) != {0, 1} or str(labels[0]).lower() == "polyp":
            raise ValueError(
                f"the model tells polyp (label 1) from background (label 0), it does not have the labels "
                f"{labels!r:.200}"
            )


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
