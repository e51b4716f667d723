"""A tiny CNN model as a smoke run leaves it, for tests that need a model folder and no training."""

from pathlib import Path
from typing import Any

import torch

from polypseg.inference.model import build_image_processor
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation

SMOKE_ORIGIN: dict[str, Any] = {
    "model_id": "resnet10t_deeplabv3plus.random",
    "row": "resnet50_deeplabv3plus.random",
    "encoder_initialisation": "random",
    "scale": "small",
    "recipe": "smoke",
    "recipe_changes": [],
    "finetuned_on": "synthetic_a reference/train",
    "n": 120,
    "finished": True,
}
SMOKE_NAME = "resnet10t_deeplabv3plus.random-smoke-synthetic_a"
"""What such weights are published as."""


def write_tiny_model(folder: Path, *, origin: dict[str, Any] | None = None, **config: Any) -> Path:
    """ResNet10-T + DeepLabV3+ with fixed random weights and its processor; ``config`` overrides 64 px, 8 channels."""
    torch.manual_seed(0)
    fields = {"encoder": "resnet10t", "image_size": 64, "decoder_channels": 8} | config
    settings = PolypSegConfig(**fields, weights_origin=origin)
    PolypSegForSemanticSegmentation(settings).save_pretrained(folder)
    build_image_processor(settings).save_pretrained(folder)
    return folder
