"""What was learnt, as plain numbers: features of a frame -> its expected Dice, by NumPy alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, kw_only=True)
class Trees:
    """A sum of regression trees, as gradient boosting gives them."""

    features: tuple[str, ...]
    start: float
    trees: tuple[Mapping[str, Sequence[float]], ...]
    """Each with ``feature``, ``threshold``, ``left``, ``right``, ``value`` for every node; -1 marks a leaf."""

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], Floats]:
        """All trees' nodes one after another, and where each tree begins."""
        sizes = [len(tree["feature"]) for tree in self.trees]
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        joined = {
            name: np.concatenate([np.asarray(tree[name], dtype=np.float64) for tree in self.trees])
            for name in ("feature", "threshold", "left", "right", "value")
        }
        shift = np.repeat(offsets, sizes)
        leaf = joined["feature"] < 0
        own = np.arange(len(leaf))
        left = np.where(leaf, own, joined["left"] + shift).astype(np.int64)
        right = np.where(leaf, own, joined["right"] + shift).astype(np.int64)
        feature = np.maximum(joined["feature"], 0).astype(np.int64)
        return feature, joined["threshold"].astype(np.float32), np.stack([left, right]), offsets, joined["value"]

    def __call__(self, values: ArrayLike) -> Floats:
        """(N, K) -> (N,), kept within 0 and 1."""
        feature, threshold, branches, offsets, value = self._arrays
        table = np.asarray(values, dtype=np.float32)
        rows = np.arange(len(table))[:, None]
        node = np.repeat(offsets[None], len(table), axis=0)
        while True:
            step = (table[rows, feature[node]] > threshold[node]).astype(np.int64)
            following = branches[step, node]
            if (following == node).all():
                return np.clip(self.start + value[node].sum(axis=1), 0, 1)
            node = following

    def content(self) -> dict[str, Any]:
        """For JSON."""
        trees = [{name: list(column) for name, column in tree.items()} for tree in self.trees]
        return {"kind": "trees", "features": list(self.features), "start": self.start, "trees": trees}


Predictor = Steps | Linear | Trees


def read_predictor(content: Mapping[str, Any]) -> Predictor:
    """What ``content()`` gave. Raises PolypSegError for anything else."""
    try:
        if content["kind"] == "steps":
            return Steps(feature=content["feature"], x=tuple(content["x"]), y=tuple(content["y"]))
        if content["kind"] == "linear":
            lists = {name: tuple(content[name]) for name in ("features", "low", "high", "weights")}
            return Linear(**lists, intercept=content["intercept"])
        if content["kind"] == "trees":
            return Trees(features=tuple(content["features"]), start=content["start"], trees=tuple(content["trees"]))
    except (KeyError, TypeError) as error:
        raise PolypSegError(f"what was learnt of this model is damaged ({error!r}): get the model again") from error
    raise PolypSegError(f"what was learnt of this model is of an unknown kind {content['kind']!r}: update polypseg")
