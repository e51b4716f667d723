"""Models that torch computes as sources of predictions: of transformers or segmentation_models_pytorch."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError, first_line
from polypseg.inference.memory import keep_freed_memory
from polypseg.inference.model import (
    build_image_processor,
    computing_in,
    current_origin,
    default_device,
    laid_out_for,
    load_model,
    polyp_logits,
    resize_map,
)
from polypseg.inference.model_folder import results_name
from polypseg.inference.onnx_predictions import one_channel
from polypseg.inference.prediction_source import ABOVE_HALF, Output, Probability
from polypseg.inference.prepared_frames import prepared_frames, usual_batch_size
from polypseg.inference.runtimes import BF16, TORCH, Precision
from polypseg.modeling import PolypSegConfig
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin


@dataclass(frozen=True, kw_only=True)
class ModelPredictions:
    """Any AutoModelForSemanticSegmentation with its image processor, as processing.load_model gives them."""

    name: str
    model: Any
    processor: Any
    batch_size: int | None = None
    """Of a forward pass; None for the device's usual one."""
    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    """Or bf16, in which torch then rounds."""

    @property
    def origin(self) -> dict[str, Any]:
        found = {"source": "model", WEIGHTS_ORIGIN: WeightsOrigin.within(self.model.config).content}
        return found | ({"precision": BF16} if self.precision == BF16 else {})

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """Thresholded at 0.5 (strictly), these are predicted_mask's masks."""
        if torch.device(self.device).type == "cpu":
            keep_freed_memory()
        model = self.model.to(self.device).eval()

        def forward(pixels: Tensor, images: Sequence[str]) -> Tensor:
            with computing_in(self.precision, device=self.device):
                logits = model(pixel_values=pixels.to(self.device)).logits.float()
            return polyp_logits(logits, model.config, model=self.name, images=images).cpu()

        return _from_logits(forward, self.processor, dataset, ids, batch_size=self.batch_size, device=self.device)


@dataclass(frozen=True, kw_only=True)
class SmpPredictions:
    """A segmentation_models_pytorch model, or any module (B, 3, h, w) -> (B, 1 or 2, h, w), trained on RGB.

    ``output`` says whether it ends in logits or, with an activation, in probabilities.
    """

    name: str
    model: Any
    image_size: int
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)
    output: Output = "logits"
    batch_size: int | None = None
    """Of a forward pass; None for the device's usual one."""
    device: torch.device | str = "cpu"

    @property
    def origin(self) -> dict[str, Any]:
        return {"source": "segmentation_models_pytorch", "class": type(self.model).__name__}

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """Resized as evaluation does: the frame to the model's size, the output back to the mask's."""
        model = self.model.to(self.device).eval()

        def forward(pixels: Tensor, images: Sequence[str]) -> Tensor:
            result = model(pixels.to(self.device)).float().cpu().numpy()
            return torch.from_numpy(one_channel(result, output=self.output, name=self.name, images=images))

        processor = _square_processor(self.image_size, mean=self.image_mean, std=self.image_std)
        return _from_logits(
            forward, processor, dataset, ids, batch_size=self.batch_size, device=self.device, output=self.output
        )


def open_smp(path: Path, *, name: str, image_size: int | None, output: Output = "logits") -> SmpPredictions:
    """A folder that ``save_pretrained`` of segmentation_models_pytorch wrote.

    Raises UsageError without that package or without ``image_size``, which such folders do not record, and for a folder
    that cannot be loaded.
    """
    try:
        smp = importlib.import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise UsageError(
            f"{path} needs segmentation_models_pytorch: run `python -m pip install segmentation-models-pytorch`"
        ) from error
    if image_size is None:
        raise UsageError(f"{path} does not say for which size its model was trained: give --image-size")
    try:
        model = smp.from_pretrained(str(path))
    except Exception as error:  # of huggingface_hub, safetensors, torch or smp
        raise UsageError(f"cannot load {path} as a segmentation_models_pytorch model: {first_line(error)}") from error
    return SmpPredictions(name=name, model=model, image_size=image_size, output=output)


def open_transformers_model(
    model: str, *, folder: Path, name: str | None, batch_size: int | None, trust_remote_code: bool, precision: Precision
) -> ModelPredictions:
    """A transformers model folder, computed by torch; see ``open_model``."""
    check_folder(folder)
    network, processor = load_model(str(folder), trust_remote_code=trust_remote_code)
    origin = WeightsOrigin.within(network.config)
    if not origin.content and (folder / SAFE_WEIGHTS_NAME).is_file():
        network.config.weights_origin = current_origin(origin, folder).content  # the digest at least
    own_name = results_name(network.config, model)
    return ModelPredictions(
        name=name or (own_name if precision == "fp32" else f"{own_name}.{TORCH}.{precision}"),
        model=laid_out_for(precision, network),
        processor=processor,
        batch_size=batch_size,
        device=default_device(),
        precision=precision,
    )


def _square_processor(size: int, **statistics: Sequence[float]) -> Any:
    named = {f"image_{name}": list(values) for name, values in statistics.items()}
    return build_image_processor(PolypSegConfig(image_size=size, **named))


def _from_logits(
    forward: Callable[[Tensor, Sequence[str]], Tensor],
    processor: Any,
    dataset: PolypDataset,
    ids: Sequence[str],
    *,
    batch_size: int | None,
    device: torch.device | str,
    output: Output = "logits",
) -> Iterator[tuple[str, Probability]]:
    """Run a model over prepared batches; logits are resized before the sigmoid, as in evaluation."""
    size = batch_size or usual_batch_size(torch.device(device).type)
    for batch in prepared_frames(dataset, processor, ids, batch_size=size):
        with torch.inference_mode():  # inside the loop: a generator must not leave the mode on for its caller
            results = forward(torch.from_numpy(batch.pixels), batch.ids)
            maps = [probability_map(z, size, output=output) for z, size in zip(results, batch.sizes, strict=True)]
        yield from zip(batch.ids, maps, strict=True)


def probability_map(values: Tensor, size: tuple[int, ...], *, output: Output = "logits") -> Probability:
    """Logits or probabilities (h, w) -> probability (H, W) of ``size``: bilinear, no antialias.

    Above 0.5 exactly where model.predicted_mask is true, also where the sigmoid would round to 0.5.
    """
    resized = resize_map(values, size)
    if output == "probability":
        return resized.clamp(0, 1).numpy()
    probability = torch.sigmoid(resized)
    return torch.where(resized > 0, probability.clamp(min=float(ABOVE_HALF)), probability).numpy()
