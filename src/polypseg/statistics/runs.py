"""Run-to-run variation: how far apart trained networks lie that differ in nothing but their training run.

Intervals over images say nothing of it. It is measured from repeated runs and stated as a noise floor: the difference
that two identical recipes stay below in 95 of 100 cases.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from polypseg.statistics.intervals import LEVEL, Interval


@dataclass(frozen=True, kw_only=True)
class RunVariation:
    """Standard deviation of a score between repeated training runs, pooled over groups of identical runs."""

    deviation: float
    freedom: int
    """Runs minus groups."""
    groups: int
    runs: int

    def floor(self, *sides: int, seeds: int) -> float:
        """Noise floor of a difference between means over groups of models, one number of models per side.

        Half width of the 95 % range of that difference where every model is the mean of ``seeds`` runs and the models
        differ in nothing but the run.
        """
        spread = self.deviation * math.sqrt(sum(1 / models for models in sides) / seeds)
        return float(stats.t.ppf((1 + LEVEL) / 2, self.freedom)) * spread


def run_variation(groups: Iterable[Sequence[float]]) -> RunVariation | None:
    """Pool the scores of groups of identical runs; groups of one run say nothing. None without a repeated run."""
    repeated = [np.asarray(group, dtype=np.float64) for group in groups if len(group) > 1]
    if not repeated:
        return None
    runs = sum(len(group) for group in repeated)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in repeated)
    freedom = runs - len(repeated)
    return RunVariation(deviation=math.sqrt(squares / freedom), freedom=freedom, groups=len(repeated), runs=runs)


def widened(interval: Interval, floor: float | None) -> Interval:
    """An interval over images with the noise floor of the runs added in quadrature; no bounds where it is unknown."""
    if floor is None or interval.low is None or interval.high is None:
        return Interval(estimate=interval.estimate, low=None, high=None)
    low = interval.estimate - math.hypot(interval.estimate - interval.low, floor)
    return Interval(
        estimate=interval.estimate,
        low=low,
        high=interval.estimate + math.hypot(interval.high - interval.estimate, floor),
    )
