"""Intervals of an expected mean Dice that hold over sets, not only over frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
LEVEL = 0.9
RESAMPLES = 1000
_NORMAL = 1.6449
"""Standard deviations of a normal distribution that hold 90 %."""


def conformal_quantile(scores: ArrayLike, *, level: float = LEVEL) -> float:
    """The ceil(level (n + 1))-th smallest of n scores, which the next exchangeable one stays within with ``level``.

    Infinite where n is too small for any: below 9 at 90 %.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    rank = ceil(round(level * (len(ordered) + 1), 9))
    return float(ordered[rank - 1]) if 1 <= rank <= len(ordered) else float("inf")


@dataclass(frozen=True, kw_only=True)
class SetInterval:
    """How wide the interval of a set's expected mean Dice is."""

    half_width: float
    """Of sets of ``frames`` independent frames or more."""
    frames: int
    spread: float
    """Standard deviation of Dice over frames of a set."""

    def bounds(self, expected: float, *, groups: int) -> tuple[float, float]:
        """Low and high for a set of ``groups`` independent frames or clips, within 0 and 1."""
        sampling = max(0.0, 1 / max(1, groups) - 1 / self.frames) * (_NORMAL * self.spread) ** 2
        half = float(np.sqrt(self.half_width**2 + sampling))
        return max(0.0, expected - half), min(1.0, expected + half)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {"half_width": self.half_width, "frames": self.frames, "spread": self.spread}


def read_interval(content: Mapping[str, Any]) -> SetInterval:
    """What ``content()`` gave."""
    return SetInterval(**{name: content[name] for name in ("half_width", "frames", "spread")})


def covered_when_left_out(errors: Sequence[float], *, level: float = LEVEL) -> list[bool]:
    """Of each of n absolute errors, whether the quantile of the others covers it."""
    values = np.asarray(errors, dtype=np.float64)
    return [bool(values[j] <= conformal_quantile(np.delete(values, j), level=level)) for j in range(len(values))]


def group_means(values: ArrayLike, groups: Sequence[Any]) -> Floats:
    """(N,) values in groups (clips, or equal frames) -> the mean of each group."""
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    return np.bincount(number, weights=np.asarray(values, dtype=np.float64)) / np.bincount(number)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Probability that a positive has a lower score than a negative, ties half. NaN where there is none of either."""
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    order = np.unique(values, return_inverse=True)[1]
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    n, m = int(wanted.sum()), int((~wanted).sum())
    return float("nan") if n == 0 or m == 0 else float(1 - (ranks[wanted].sum() - n * (n + 1) / 2) / (n * m))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's, ties at their mean rank. NaN where one does not vary."""
    ranks = []
    for values in (one, other):
        order = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)[1]
        counts = np.bincount(order)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[order])
    if min(np.ptp(rank) for rank in ranks) == 0:
        return float("nan")
    first, second = (rank - rank.mean() for rank in ranks)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def by_group_interval(
    statistic: Any, groups: Sequence[Any], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of ``statistic(indices)`` over drawn groups; draws where it is NaN are left out."""
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    members = [np.flatnonzero(number == g) for g in range(number.max() + 1)]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(0, len(members), len(members))
        value = statistic(np.concatenate([members[g] for g in chosen]))
        if not np.isnan(value):
            draws.append(value)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
