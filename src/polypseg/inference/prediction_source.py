"""Where predictions come from, as evaluation asks for them, and such a source under another name or threshold.

Each source gives (id, probability) for the asked images, in order: float32 (H, W) in [0, 1] at the mask's own size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from polypseg.data.polyps import PolypDataset
from polypseg.inference.operating_point import OPERATING_POINT_KEY, OperatingPoint

Probability = NDArray[np.float32]
Output = Literal["logits", "probability"]
"""What a model ends in."""
ABOVE_HALF = np.nextafter(np.float32(0.5), np.float32(1))
"""The probability of a positive logit that a sigmoid would round to 0.5."""


class PredictionSource(Protocol):
    """Anything that predicts the polyps of a dataset's images."""

    @property
    def name(self) -> str:
        """What the predictions are called in results: a file-name-safe word."""

    @property
    def origin(self) -> dict[str, Any]:
        """Where the predictions come from, JSON-able."""

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """(id, probability (H, W) in [0, 1] at the mask's size) for each id, in order."""


@dataclass(frozen=True, kw_only=True)
class RenamedPredictions:
    """A source of predictions under another name."""

    name: str
    source: PredictionSource

    @property
    def origin(self) -> dict[str, Any]:
        return self.source.origin

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """As the source predicts."""
        return self.source.predict(dataset, ids)


@dataclass(frozen=True, kw_only=True)
class PointedPredictions:
    """A source whose maps exceed 0.5 where an operating point's masks are."""

    source: PredictionSource
    point: OperatingPoint

    @property
    def name(self) -> str:
        """The source's: another operating point is no other model."""
        return self.source.name

    @property
    def origin(self) -> dict[str, Any]:
        return self.source.origin | {OPERATING_POINT_KEY: self.point.content()}

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """As the source predicts, moved."""
        for record_id, probability in self.source.predict(dataset, ids):
            yield record_id, self.point.moved(probability)
