"""polypseg's metrics as an ``evaluate`` module: evaluate.load("hub_configs/metrics/polyp_segmentation")."""

from typing import Any

import datasets
import numpy as np

import evaluate
from polypseg.evaluation.metrics import pixel_counts, score
from polypseg.statistics.scores import METRICS

_DESCRIPTION = "Dice, IoU, precision and recall of polyp masks: per image, then the mean over images."
_INPUTS = """
predictions, references: masks (H, W) of 0 and 1, one an image; sizes may differ between images.
convention: "standard" (defined for empty masks) or "ssl4gie" (the reference study's smoothed formulas).
Returns the four means and, under "per_image", the scores of each image.
"""


class PolypSegmentation(evaluate.Metric):
    """Thin adapter; the definitions are in polypseg.evaluation.metrics."""

    def _info(self) -> evaluate.MetricInfo:
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(self, predictions: Any, references: Any, convention: str = "standard") -> dict[str, Any]:
        counts = [
            pixel_counts(np.asarray(prediction) > 0, np.asarray(reference) > 0)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        scores = score(counts, convention=convention)
        means: dict[str, Any] = {name: float(scores[name].mean()) for name in METRICS}
        return means | {"per_image": {name: scores[name].tolist() for name in METRICS}}
