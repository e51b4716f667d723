"""Evaluation by the reference's protocol: predict at the model's size, compare at the mask's own size.

Per image first: logits are resized to the mask (bilinear, no antialias) and thresholded at probability 0.5 (strictly);
then means over images, with bootstrap intervals. Results stay in memory; scoring.py writes receipts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from polypseg.data.images import as_frame
from polypseg.data.polyps import PolypDataset
from polypseg.evaluation.metrics import Scores, mean_with_interval, pixel_counts, score
from polypseg.inference.model import polyp_logits, resize_map
from polypseg.inference.predictors import FrameChange, _prepared_ahead
from polypseg.statistics.scores import METRICS

INTERVAL = "95 % percentile bootstrap over images, 5000 resamples, seed 0"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Scores of one model on one part of one dataset."""

    model_id: str
    dataset: str
    title: str
    split: str
    part: str
    content_id: str
    ids: tuple[str, ...]
    counts: NDArray[np.int64]
    """(N, 3): intersection, predicted and true pixels of each image at the mask's size."""
    convention: str = "standard"
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the model's weights come from."""

    def scores(self) -> Scores:
        """Per-image scores (N,) under the result's convention."""
        return score(self.counts, convention=self.convention)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Mean and interval of each metric over images."""
        scores = self.scores()
        return {name: mean_with_interval(scores[name]) for name in METRICS}


@torch.inference_mode()
def evaluate_model(
    model: Any,
    processor: Any,
    dataset: PolypDataset,
    *,
    model_id: str,
    split: str = "full",
    part: str = "full",
    limit: int | None = None,
    batch_size: int = 8,
    convention: str = "standard",
    device: torch.device | str = "cpu",
    change: FrameChange | None = None,
) -> EvaluationResult:
    """Evaluate any semantic segmentation model on one part of a split; ``limit`` takes only the first images of it.

    ``change`` alters each frame (not its mask) before the model sees it. Raises UsageError for an unknown part or
    convention, PolypSegError for a broken image or mask.
    """
    ids, label = dataset.part(split, part, limit=limit)
    score(np.zeros((1, 3)), convention=convention)  # an unknown convention fails before the work
    model = model.to(device).eval()
    counts: list[tuple[int, int, int]] = []
    with tqdm(
        total=len(ids), desc=f"evaluating on {dataset.spec.title}", unit="image", leave=False, disable=None
    ) as progress:
        for pixel_values, masks in prepared_batches(dataset, processor, ids, batch_size=batch_size, change=change):
            logits = model(pixel_values=pixel_values.to(device)).logits.float()
            polyp = polyp_logits(logits, model.config, model=model_id, images=ids[len(counts) :]).cpu()
            for z, mask in zip(polyp, masks, strict=True):
                counts.append(pixel_counts(predicted_mask(z, mask.shape), mask.astype(bool)))
            progress.update(len(masks))
    return EvaluationResult(
        model_id=model_id,
        dataset=dataset.spec.name,
        title=dataset.spec.title,
        split=split,
        part=label,
        content_id=dataset.content_id,
        ids=ids,
        counts=np.array(counts, dtype=np.int64),
        convention=convention,
        origin=getattr(model.config, "weights_origin", None) or {},
    )


@torch.inference_mode()
def predict_masks(model: Any, processor: Any, frames: Sequence[Image.Image]) -> list[NDArray[np.bool_]]:
    """PIL images of any size -> boolean masks (H, W) of their sizes."""
    masks = []
    for number, frame in enumerate(frames, start=1):
        logits = model.eval()(**processor(images=[as_frame(frame)], return_tensors="pt")).logits.float()
        polyp = polyp_logits(logits, model.config, images=[f"frame {number}"])
        masks.append(predicted_mask(polyp[0], (frame.height, frame.width)))
    return masks


def predicted_mask(logits: Tensor, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Polyp logits (h, w) -> boolean mask of ``size`` (H, W): bilinear, no antialias, probability > 0.5."""
    return (resize_map(logits, size) > 0).numpy()


def prepared_batches(
    dataset: PolypDataset, processor: Any, ids: Sequence[str], *, batch_size: int, change: FrameChange | None = None
) -> Iterator[tuple[Tensor, list[NDArray[np.uint8]]]]:
    """Prepared batches (B, 3, h, w) with their masks; the next one is decoded while the model works."""

    def prepare(chunk: Sequence[str]) -> tuple[Tensor, list[NDArray[np.uint8]]]:
        pairs = [dataset.pair(dataset.by_id[record_id]) for record_id in chunk]
        frames = [frame for frame, _ in pairs]
        if change is not None:
            frames = [change(frame, record_id) for frame, record_id in zip(frames, chunk, strict=True)]
        return processor(images=frames, return_tensors="pt")["pixel_values"], [mask for _, mask in pairs]

    yield from _prepared_ahead(prepare, ids, batch_size=batch_size)
