"""An ONNX or OpenVINO file as a source of predictions, computed without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.files import file_sha256
from polypseg.inference.memory import keep_freed_memory
from polypseg.inference.prediction_source import ABOVE_HALF, Output, Probability
from polypseg.inference.preparation import PREPROCESSOR, FrameProcessor
from polypseg.inference.prepared_frames import prepared_frames, usual_batch_size
from polypseg.inference.runtimes import (
    BF16,
    ONNXRUNTIME,
    OnnxRuntime,
    OpenVinoRuntime,
    Precision,
    one_logit,
    open_file,
    refuse_non_finite,
    resize_bilinear,
    sigmoid,
)
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD

OPENVINO_SUFFIX = ".xml"


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
    batch_size: int = usual_batch_size("cpu")
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
        size = self.batch_size if batch is None else batch
        if size != 1 and batch is not None:
            raise UsageError(
                f"{self.path} takes batches of exactly {batch}: export it with a free batch size or with 1"
            )
        return self._maps(network, processor, dataset, ids, batch_size=size)

    def _maps(
        self,
        network: OnnxRuntime | OpenVinoRuntime,
        processor: Any,
        dataset: PolypDataset,
        ids: Sequence[str],
        *,
        batch_size: int,
    ) -> Iterator[tuple[str, Probability]]:
        for batch in prepared_frames(dataset, processor, ids, batch_size=batch_size):
            result = network.run(batch.pixels)
            maps = one_channel(result, output=self.output, name=str(self.path), images=batch.ids)
            for record_id, values, size in zip(batch.ids, maps, batch.sizes, strict=True):
                yield record_id, _probability_map(values, size, output=self.output)

    @cached_property
    def _network(self) -> OnnxRuntime | OpenVinoRuntime:
        return open_file(self.path, runtime=self.runtime, precision=self.precision)

    def _processor(self, height: int | None, width: int | None) -> FrameProcessor:
        for folder in self.path.resolve().parents[:2]:  # a model folder, whose files lie in its onnx/
            if (folder / PREPROCESSOR).is_file():
                return self._own_processor(folder, height, width)
        size = self.image_size if height is None else height
        if size is None:
            raise UsageError(f"{self.path} leaves its input's size open: give image_size")
        if width is not None and width != size:
            raise UsageError(f"{self.path} takes {width}x{size} pixels: give a processor for sizes that are not square")
        return FrameProcessor(
            size={"height": size, "width": size}, image_mean=[*IMAGENET_MEAN], image_std=[*IMAGENET_STD]
        )

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


def one_channel(result: NDArray[np.float32], *, output: Output, name: str, images: Sequence[str]) -> Probability:
    """(B, 1 or 2, h, w) logits or probabilities -> (B, h, w) of the same kind for the polyp.

    Raises UsageError for another shape or values that cannot be of this kind, PolypSegError for those that are not
    finite.
    """
    if result.ndim != 4 or result.shape[1] not in (1, 2):
        raise UsageError(f"{name} gives {tuple(result.shape)}: (B, 1 or 2, h, w) is needed")
    refuse_non_finite([bool(np.isfinite(one).all()) for one in result], model=name, images=images)
    within = bool(result.min() >= 0 and result.max() <= 1)
    if output == "logits":
        if within:  # as logits every pixel would be polyp
            raise UsageError(f"{name} gives values between 0 and 1, which are no logits: say output='probability'")
        return one_logit(result, name=name)
    if not within:
        raise UsageError(f"{name} gives values outside 0 and 1, which are no probabilities: say output='logits'")
    return result[:, -1]


def _probability_map(values: NDArray[np.float32], size: tuple[int, int], *, output: Output) -> Probability:
    """Logits or probabilities (h, w) -> probability (H, W) of ``size``; see ``predictors.probability_map``."""
    resized = resize_bilinear(values, size)
    if output == "probability":
        return np.clip(resized, 0, 1)
    probability = sigmoid(resized)
    np.maximum(probability, ABOVE_HALF, out=probability, where=resized > 0)
    return probability
