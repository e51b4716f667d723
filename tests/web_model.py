"""A model folder as the page takes it: the shipped one where there is one, else random weights of its architecture."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.inference.model import build_image_processor, polyp_logits
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation

STARTER = Path(__file__).resolve().parents[1] / "src" / "polypseg" / "starter"


class TwoClassLogits(nn.Module):
    """Pixel values (B, 3, S, S) -> logits (B, 2, S, S), without the dictionary around them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


def model_folder(folder: Path, *, image_size: int = 128) -> Path:
    """The folder named by POLYPSEG_WEB_MODEL, else the shipped one, else random weights written to ``folder``."""
    named = os.environ.get("POLYPSEG_WEB_MODEL")
    for place in (Path(named) if named else STARTER, STARTER):
        if (place / "onnx" / "model.onnx").is_file():
            return place
    return write_random_model(folder, image_size=image_size)


def write_random_model(folder: Path, *, encoder: str = "efficientnet_lite0", image_size: int = 128) -> Path:
    """EfficientNet-Lite + DeepLabV3+ with random weights whose masks cover a part of a synthetic frame."""
    pytest.importorskip("onnxscript", reason="no shipped model, and no onnxscript to export another")
    torch.manual_seed(3)
    settings = PolypSegConfig(encoder=encoder, image_size=image_size, decoder_channels=64)
    model = PolypSegForSemanticSegmentation(settings)
    processor = build_image_processor(settings)
    frames = [Image.fromarray(synthesize_frame(CAMERAS["a"], seed=0, index=index)[0]) for index in range(4)]
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        for module in model.modules():  # statistics of real inputs: with the initial ones, deep layers die out
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(pixels)
        values = polyp_logits(model.eval()(pixels[:1]).logits, settings)
        head = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1][-1]
        head.bias -= values.quantile(0.8)
        head.weight *= 3 / values.std()
        head.bias *= 3 / values.std()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "onnx").mkdir()
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        TwoClassLogits(model).eval(),
        (torch.from_numpy(np.stack([pixels[0].numpy()] * 2)),),
        folder / "onnx" / "model.onnx",
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return folder
