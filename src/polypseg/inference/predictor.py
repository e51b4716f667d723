"""What was learned, as plain numbers: features of a frame -> its expected Dice, by NumPy alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polypseg.errors import PolypSegError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A line through points of one feature: what isotonic regression gives."""

    feature: str
    x: tuple[float, ...]
    y: tuple[float, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns that are read."""
        return (self.feature,)

    def __call__(self, values: ArrayLike) -> Floats:
        """(N, 1) -> (N,)."""
        return np.interp(np.asarray(values, dtype=np.float64)[:, 0], self.x, self.y)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {"kind": "steps", "feature": self.feature, "x": list(self.x), "y": list(self.y)}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear combination of features, each kept within what was seen of it, then a logistic curve."""

    features: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float

    def __call__(self, values: ArrayLike) -> Floats:
        """(N, K) -> (N,)."""
        inside = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        return 1 / (1 + np.exp(-(inside @ np.array(self.weights) + self.intercept)))

    def content(self) -> dict[str, Any]:
        """For JSON."""
        lists = {name: list(getattr(self, name)) for name in ("features", "low", "high", "weights")}
        return {"kind": "linear", **lists, "intercept": self.intercept}


Predictor = Steps | Linear


def read_predictor(content: Mapping[str, Any]) -> Predictor:
    """What ``content()`` gave. Raises PolypSegError for anything else."""
    try:
        if content["kind"] == "steps":
            return Steps(feature=content["feature"], x=tuple(content["x"]), y=tuple(content["y"]))
        if content["kind"] == "linear":
            lists = {name: tuple(content[name]) for name in ("features", "low", "high", "weights")}
            return Linear(**lists, intercept=content["intercept"])
    except (KeyError, TypeError) as error:
        raise PolypSegError(f"what was learned of this model is damaged ({error!r}): get the model again") from error
    raise PolypSegError(f"what was learned of this model is of an unknown kind {content['kind']!r}: update polypseg")
