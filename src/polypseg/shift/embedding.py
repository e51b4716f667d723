"""Frames as an encoder sees them: the embedding in which sets are compared."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from polypseg import zoo
from polypseg.errors import UsageError
from polypseg.inference.model import build_image_processor, finite_images, load_model
from polypseg.inference.runtimes import refuse_non_finite
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.recipe import load_recipe
from polypseg.shift.comparison import Embed
from polypseg.training.finetune import build_model
from polypseg.weights.loading import STARTER_ENCODER, starter_installed


def open_embedding(name: str) -> Embed:
    """``starter`` (the extra's ImageNet-1k EfficientNet-Lite0) or a model folder of this package.

    Raises UsageError for a missing extra and for models whose encoder cannot be read.
    """
    if name == "starter":
        if not starter_installed(STARTER_ENCODER):
            raise UsageError(
                "the starter encoder is not installed: run `pip install polypseg[starter]`, or give a model"
            )
        recipe = load_recipe("finetune_small")
        model = build_model(zoo.get("RN-IN-SL"), recipe, encoder_weights="starter")
        return embed_with(model, build_image_processor(model.config))
    if not Path(name).is_dir():
        raise UsageError(f"{name} is no model folder: give one, or starter, or none")
    model, processor = load_model(name)
    if not isinstance(model, PolypSegForSemanticSegmentation):
        raise UsageError(f"{name} is no model of this package: its encoder cannot be read")
    return embed_with(model, processor)


def embed_with(model: PolypSegForSemanticSegmentation, processor: object) -> Embed:
    """RGB frames -> (N, D): the mean over places of the deepest features that the decoder reads."""
    model.eval()

    @torch.inference_mode()
    def embed(frames: Sequence[Image.Image]) -> NDArray[np.float32]:
        pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]  # type: ignore[operator]
        deepest = model.extract_features(pixels)[-1]
        refuse_non_finite(
            finite_images(deepest), model=str(getattr(model.config, "_name_or_path", "") or "the encoder")
        )
        found: NDArray[np.float32] = deepest.mean(dim=(2, 3)).float().numpy()
        return found

    return embed
