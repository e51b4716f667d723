"""Models as sources of predictions: of transformers or segmentation_models_pytorch, or an ONNX file."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError, first_line
from polypseg.files import file_sha256, read_json
from polypseg.inference.memory import keep_freed_memory
from polypseg.inference.model import (
    build_image_processor,
    computing_in,
    current_origin,
    default_device,
    finite_images,
    laid_out_for,
    load_model,
    polyp_logits,
    resize_map,
    results_name,
)
from polypseg.inference.model_folder import ONNX, named_folder
from polypseg.inference.prediction_source import PredictionSource, Probability
from polypseg.inference.preparation import PREPROCESSOR, FrameProcessor
from polypseg.inference.runtimes import (
    AUTO,
    BF16,
    ONNXRUNTIME,
    OPENVINO,
    TORCH,
    OnnxRuntime,
    OpenVinoRuntime,
    Precision,
    check_names,
    choose_runtime,
    open_file,
    refuse_non_finite,
    runtime_files,
)
from polypseg.modeling import PolypSegConfig
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin

Output = Literal["logits", "probability"]
OPENVINO_SUFFIX = ".xml"
_ABOVE_HALF = float(np.nextafter(np.float32(0.5), np.float32(1)))


@dataclass(frozen=True, kw_only=True)
class ModelPredictions:
    """Any AutoModelForSemanticSegmentation with its image processor, as processing.load_model gives them."""

    name: str
    model: Any
    processor: Any
    batch_size: int = 8
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

        return _from_logits(forward, self.processor, dataset, ids, batch_size=self.batch_size)


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
    batch_size: int = 8
    device: torch.device | str = "cpu"

    @property
    def origin(self) -> dict[str, Any]:
        return {"source": "segmentation_models_pytorch", "class": type(self.model).__name__}

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """Resized as evaluation does: the frame to the model's size, the output back to the mask's."""
        model = self.model.to(self.device).eval()

        def forward(pixels: Tensor, images: Sequence[str]) -> Tensor:
            result = model(pixels.to(self.device)).float().cpu()
            return _one_channel(result, output=self.output, name=self.name, images=images)

        processor = _square_processor(self.image_size, mean=self.image_mean, std=self.image_std)
        return _from_logits(forward, processor, dataset, ids, batch_size=self.batch_size, output=self.output)


@dataclass(frozen=True, kw_only=True)
class OnnxPredictions:
    """An ONNX file: input (B, 3, h, w) of a normalized RGB frame, output (B, 1 or 2, h, w) of logits or probabilities.

    ``runtime`` computes it: ONNX Runtime, or OpenVINO (its own .xml files too), which can be asked for bf16 by
    ``precision``. ``image_size`` is needed only when the file leaves its input's size open. Without ``processor``,
    frames are prepared as the file's model folder says, or, for a file alone, with ImageNet's mean and standard
    deviation.
    """

    name: str
    path: Path
    processor: Any = None
    image_size: int | None = None
    output: Output = "logits"
    batch_size: int = 8
    runtime: str = ONNXRUNTIME
    precision: Precision = "fp32"

    @property
    def origin(self) -> dict[str, Any]:
        files = {"file": self.path.name, "sha256": file_sha256(self.path)}
        if self.path.suffix == OPENVINO_SUFFIX:
            files["weights_sha256"] = file_sha256(self.path.with_suffix(".bin"))
        if self.runtime == ONNXRUNTIME:
            return {"source": "onnx"} | files
        return {"source": self.runtime} | files | ({"precision": BF16} if self.precision == BF16 else {})

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """Raises UsageError without the runtime, and for a file that is not such a model."""
        keep_freed_memory()
        network = self._network
        batch, channels, height, width = network.input_shape if len(network.input_shape) == 4 else (None,) * 4
        if channels != 3:
            raise UsageError(
                f"{self.path} takes an input of shape {list(network.input_shape)}: (B, 3, height, width) is needed"
            )
        processor = self.processor or self._processor(height, width)

        def forward(pixels: Tensor, images: Sequence[str]) -> Tensor:
            result = torch.from_numpy(network.run(pixels.numpy()))
            return _one_channel(result, output=self.output, name=str(self.path), images=images)

        size = self.batch_size if batch is None else batch
        if size != 1 and batch is not None:
            raise UsageError(
                f"{self.path} takes batches of exactly {batch}: export it with a free batch size or with 1"
            )
        return _from_logits(forward, processor, dataset, ids, batch_size=size, output=self.output)

    @cached_property
    def _network(self) -> OnnxRuntime | OpenVinoRuntime:
        return open_file(self.path, runtime=self.runtime, precision=self.precision)

    def _processor(self, height: int | None, width: int | None) -> Any:
        for folder in self.path.resolve().parents[:2]:  # a model folder, whose files lie in its onnx/
            if (folder / PREPROCESSOR).is_file():
                return self._own_processor(folder, height, width)
        size = self.image_size if height is None else height
        if size is None:
            raise UsageError(f"{self.path} leaves its input's size open: give image_size")
        if width is not None and width != size:
            raise UsageError(f"{self.path} takes {width}x{size} pixels: give a processor for sizes that are not square")
        return _square_processor(size)

    def _own_processor(self, folder: Path, height: int | None, width: int | None) -> FrameProcessor:
        """The preparation that the file's own model folder states."""
        processor = FrameProcessor.from_pretrained(folder)
        stated = (processor.size["height"], processor.size["width"])
        asked = [(height, width), (self.image_size, self.image_size)]
        other = next((size for size in asked if size[0] is not None and size != stated), None)
        if other is not None:
            raise UsageError(
                f"{self.path} is asked for {other[1]}x{other[0]} pixels but {folder / PREPROCESSOR} says "
                f"{stated[1]}x{stated[0]}"
            )
        return processor


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


def is_smp_folder(path: Path) -> bool:
    """Whether a folder was written by ``save_pretrained`` of segmentation_models_pytorch."""
    config = path / "config.json"
    return config.is_file() and "_model_class" in read_json(config)


def open_model(
    model: str,
    *,
    folder: Path | None = None,
    name: str | None = None,
    image_size: int | None = None,
    gives_probabilities: bool = False,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    runtime: str | None = None,
    precision: Precision = "fp32",
) -> PredictionSource:
    """Any model that can be tested: transformers or segmentation_models_pytorch folder, Hub id, row's id, ONNX file.

    ``folder``: where ``model_folder`` found it, so that it is fetched once. ``image_size`` and ``gives_probabilities``
    (not logits) are of ONNX and segmentation_models_pytorch models, whose files do not say so; ``name`` is the one in
    results; ``trust_remote_code`` runs the code in the folder of a transformers model. ``runtime``: by default torch
    for a folder, whose weights are tested then, and ONNX Runtime for a file; with another, or another ``precision``,
    the folder's file for it. Raises UsageError for a model that is not there or cannot be loaded.
    """
    check_names(runtime or AUTO, precision=precision)
    output: Output = "probability" if gives_probabilities else "logits"
    if Path(model).suffix == ONNX:
        path = Path(model)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: give an ONNX file")
        if runtime == TORCH or precision not in ("fp32", BF16):
            raise UsageError(f"{path} has a precision of its own: ask onnxruntime or openvino to compute it")
        return OnnxPredictions(
            name=name or path.stem,
            path=path,
            image_size=image_size,
            output=output,
            runtime=(OPENVINO if precision == BF16 else ONNXRUNTIME) if runtime in (None, AUTO) else runtime,
            precision=precision,
        )
    folder = folder or named_folder(model, with_code=trust_remote_code)
    if is_smp_folder(folder):
        if runtime not in (None, TORCH) or precision != "fp32":
            raise UsageError(f"{folder} is computed by torch in fp32: leave out the runtime and the precision")
        return open_smp(folder, name=name or folder.resolve().name, image_size=image_size, output=output)
    if image_size is not None or gives_probabilities:
        raise UsageError("--image-size and --gives-probabilities are of ONNX and segmentation_models_pytorch models")
    if runtime is not None or precision != "fp32":
        chosen, path = choose_runtime(folder, runtime=runtime or AUTO, precision=precision)
        if chosen != TORCH:
            check_folder(folder, names=runtime_files(chosen, precision=precision))
            return OnnxPredictions(
                name=name or f"{results_name(PolypSegConfig.from_pretrained(folder), model)}.{chosen}.{precision}",
                path=path,
                processor=FrameProcessor.from_pretrained(folder),
                batch_size=batch_size,
                runtime=chosen,
                precision=precision,
            )
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


def _one_channel(result: Tensor, *, output: Output, name: str, images: Sequence[str]) -> Tensor:
    """(B, 1 or 2, h, w) logits or probabilities -> (B, h, w) of the same kind for the polyp."""
    if result.ndim != 4 or result.shape[1] not in (1, 2):
        raise UsageError(f"{name} gives {tuple(result.shape)}: (B, 1 or 2, h, w) is needed")
    refuse_non_finite(finite_images(result), model=name, images=images)
    within = bool(result.min() >= 0 and result.max() <= 1)
    if output == "logits":
        if within:  # as logits every pixel would be polyp
            raise UsageError(f"{name} gives values between 0 and 1, which are no logits: say output='probability'")
        return polyp_logits(result, None)
    if not within:
        raise UsageError(f"{name} gives values outside 0 and 1, which are no probabilities: say output='logits'")
    return result[:, -1]


def _from_logits(
    forward: Callable[[Tensor, Sequence[str]], Tensor],
    processor: Any,
    dataset: PolypDataset,
    ids: Sequence[str],
    *,
    batch_size: int,
    output: Output = "logits",
) -> Iterator[tuple[str, Probability]]:
    """Run a model over prepared batches; logits are resized before the sigmoid, as in evaluation."""
    names = iter(ids)
    for pixels, sizes in prepared_frames(dataset, processor, ids, batch_size=batch_size):
        images = list(islice(names, len(sizes)))
        with torch.inference_mode():  # inside the loop: a generator must not leave the mode on for its caller
            results = forward(pixels, images)
            maps = [probability_map(z, size, output=output) for z, size in zip(results, sizes, strict=True)]
        yield from zip(images, maps, strict=True)


def probability_map(values: Tensor, size: tuple[int, ...], *, output: Output = "logits") -> Probability:
    """Logits or probabilities (h, w) -> probability (H, W) of ``size``: bilinear, no antialias.

    Above 0.5 exactly where model.predicted_mask is true, also where the sigmoid would round to 0.5.
    """
    resized = resize_map(values, size)
    if output == "probability":
        return resized.clamp(0, 1).numpy()
    probability = torch.sigmoid(resized)
    return torch.where(resized > 0, probability.clamp(min=_ABOVE_HALF), probability).numpy()


Batch = TypeVar("Batch")


FrameChange: TypeAlias = Callable[[Image.Image, str], Image.Image]
"""An RGB frame and its id -> the frame that the model sees, of the same size."""


def prepared_frames(
    dataset: PolypDataset, processor: Any, ids: Sequence[str], *, batch_size: int
) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Prepared batches (B, 3, h, w) with the frames' sizes (H, W), as ``prepared_batches``; no mask is read."""

    def prepare(chunk: Sequence[str]) -> tuple[Tensor, list[tuple[int, int]]]:
        frames = [dataset.frame(dataset.by_id[record_id]) for record_id in chunk]
        inputs = processor(images=frames, return_tensors="pt")
        return inputs["pixel_values"], [(frame.height, frame.width) for frame in frames]

    yield from _prepared_ahead(prepare, ids, batch_size=batch_size)


def _prepared_ahead(
    prepare: Callable[[Sequence[str]], Batch], ids: Sequence[str], *, batch_size: int
) -> Iterator[Batch]:
    """Each batch, while the next one is prepared in a thread."""
    chunks = [ids[i : i + batch_size] for i in range(0, len(ids), batch_size)]
    with ThreadPoolExecutor(max_workers=1) as ahead:
        pending = ahead.submit(prepare, chunks[0])
        for following in [*chunks[1:], None]:
            batch = pending.result()
            if following is not None:
                pending = ahead.submit(prepare, following)
            yield batch
