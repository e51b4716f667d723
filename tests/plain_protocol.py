"""The protocol written out plainly, image by image: the oracle for what `evaluation` does in threads and batches."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polypseg.evaluation.metrics import mean_with_interval, pixel_counts, score
from polypseg.inference.model import polyp_logits, predicted_mask
from polypseg.statistics.scores import METRICS


@dataclass(frozen=True, kw_only=True)
class PlainResult:
    """Counts of each image, and the scores and means that they give."""

    ids: tuple[str, ...]
    counts: NDArray[np.int64]
    convention: str

    def scores(self):
        return score(self.counts, convention=self.convention)

    def summary(self):
        return {name: mean_with_interval(self.scores()[name]) for name in METRICS}


@torch.inference_mode()
def evaluate_plainly(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    split: str = "full",
    part: str = "full",
    limit: int | None = None,
    batch_size: int = 8,
    convention: str = "standard",
) -> PlainResult:
    """Predict at the model's size, compare at the mask's own size."""
    ids, _ = dataset.part(split, part, limit=limit)
    counts = []
    for start in range(0, len(ids), batch_size):
        pairs = [dataset.pair(dataset.by_id[record_id]) for record_id in ids[start : start + batch_size]]
        pixel_values = processor(images=[frame for frame, _ in pairs], return_tensors="pt")["pixel_values"]
        polyp = polyp_logits(model.eval()(pixel_values=pixel_values).logits.float(), model.config)
        counts += [
            pixel_counts(predicted_mask(z, mask.shape), mask.astype(bool))
            for z, (_, mask) in zip(polyp, pairs, strict=True)
        ]
    return PlainResult(ids=tuple(ids), counts=np.array(counts, dtype=np.int64), convention=convention)
