"""Whether a frame is like those that the expected Dice was learned from: colors and texture by place, NumPy alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polypseg.errors import PolypSegError
from polypseg.inference.features import Plane

Floats = NDArray[np.float64]
GRID = 4
DIRECTIONS = 20
"""Principal directions that are told apart; the rest counts as one."""
TOLERATED = 0.005
"""Share of the frames learned from that lie outside by construction."""
MOST_UNLIKE = 0.2
"""Share of unlike frames above which nothing is said of a set."""


def describe_place(colors: Plane) -> Floats:
    """Colors (3, h, w) in 0 to 1 -> (66,): lightness, red-green, yellow-blue and spread on a grid, fine texture."""
    red, green, blue = colors
    light = colors.mean(axis=0)
    planes = (light, red - green, (red + green) / 2 - blue)
    rows, columns = (np.linspace(0, side, GRID + 1).astype(int) for side in light.shape)
    cells = [(slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1])) for i in range(GRID) for j in range(GRID)]
    means = [float(plane[cell].mean(dtype=np.float64)) for plane in planes for cell in cells]
    spreads = [float(np.log10(light[cell].std(dtype=np.float64) + 1e-2)) for cell in cells]
    steps = [np.abs(np.diff(light, axis=axis)) for axis in (0, 1)]
    texture = [float(np.log10(np.mean([step.mean() for step in steps]) + 1e-3))]
    texture += [float(np.log10(np.mean([_median(step) for step in steps]) + 1e-3))]
    return np.array(means + spreads + texture)


def _median(values: Plane) -> np.floating[Any]:
    """As ``np.median``, whose partition at two places at once takes ten times as long as this one."""
    half = values.size // 2
    parted = np.partition(values, half, axis=None)
    return parted[half] if values.size % 2 else np.mean([parted[:half].max(), parted[half]])


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A Gaussian of the frames learned from: principal directions, and one variance for the rest."""

    mean: Floats
    """(D,)."""
    directions: Floats
    """(K, D), each divided by its standard deviation."""
    rest: float
    """Variance of each remaining dimension."""
    limit: float
    """Distance that TOLERATED of the frames learned from exceed."""
    low: Floats
    high: Floats
    """(D,) least and greatest values of the frames learned from, a tenth of their range wider."""

    def distances(self, descriptions: ArrayLike) -> Floats:
        """(N, D) -> (N,) distances from the frames learned from, per dimension."""
        centered = np.asarray(descriptions, dtype=np.float64) - self.mean
        within = centered @ self.directions.T
        length = np.linalg.norm(self.directions, axis=1)
        outside = (centered**2).sum(axis=1) - ((within / length) ** 2).sum(axis=1)
        return ((within**2).sum(axis=1) + np.maximum(outside, 0) / self.rest) / len(self.mean)

    def unlike(self, descriptions: ArrayLike) -> NDArray[np.bool_]:
        """(N, D) -> (N,) whether a frame lies outside, by its distance or in any dimension."""
        table = np.asarray(descriptions, dtype=np.float64)
        outside: NDArray[np.bool_] = np.any((table < self.low) | (table > self.high), axis=1)
        return outside | (self.distances(table) > self.limit)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "mean": np.round(self.mean, 6).tolist(),
            "directions": [[float(f"{value:.5g}") for value in row] for row in self.directions],
            "rest": float(f"{self.rest:.6g}"),
            "limit": float(f"{self.limit:.6g}"),
            "low": np.round(self.low, 6).tolist(),
            "high": np.round(self.high, 6).tolist(),
        }


def read_gate(content: Mapping[str, Any]) -> Gate:
    """What ``content()`` gave. Raises PolypSegError for anything else."""
    try:
        arrays = {name: np.array(content[name], dtype=np.float64) for name in ("mean", "directions", "low", "high")}
        return Gate(**arrays, rest=float(content["rest"]), limit=float(content["limit"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PolypSegError(f"what was learned of this model is damaged ({error!r}): get the model again") from error


def learn_gate(descriptions: Sequence[Floats], groups: Sequence[Any]) -> Gate:
    """A gate from descriptions (N, D); ``groups``: frames of one group count as one in the limit, which is found on
    halves that the Gaussian did not see."""
    table = np.array(descriptions)
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    half = np.random.default_rng(0).permutation(number.max() + 1)[number] % 2 == 0
    unseen = np.concatenate([_gaussian(table[~part]).distances(table[part]) for part in (half, ~half)])
    fitted = _gaussian(table)
    return replace(fitted, limit=float(np.quantile(unseen, 1 - TOLERATED)))


def _gaussian(table: Floats) -> Gate:
    mean = table.mean(axis=0)
    _, sizes, directions = np.linalg.svd(table - mean, full_matrices=False)
    variances = sizes**2 / max(1, len(table) - 1)
    kept = min(DIRECTIONS, len(variances) - 1)
    rest = float(max(variances[kept:].mean(), 1e-8))
    scaled = directions[:kept] / np.sqrt(np.maximum(variances[:kept], rest))[:, None]
    low, high = table.min(axis=0), table.max(axis=0)
    wider = (high - low) / 10
    return Gate(mean=mean, directions=scaled, rest=rest, limit=np.inf, low=low - wider, high=high + wider)
