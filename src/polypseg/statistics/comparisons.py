"""Two models on the same images: how large the difference is, how sure, and whether it is small enough to ignore.

Tests treat clusters as the independent units. Their null hypothesis concerns these trained networks: with one seed a
significant difference may still be one of the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from polypseg.errors import unknown_name
from polypseg.statistics.intervals import Interval, interval_of
from polypseg.statistics.resampling import RESAMPLES, Draws, draw_means
from polypseg.statistics.scores import Floats, ScoreSet, sum_by

EXACT_CLUSTERS = 15
"""Up to so many clusters all 2^C sign patterns are tried."""
SIGN_PATTERNS = 19_999
"""Random sign patterns beyond; the least p-value is then 1/20000."""
MARGIN = 0.01
"""Difference in mean Dice that is called equivalent unless another margin is given."""
NEGLIGIBLE = 1e-12
"""Differences of means up to this are rounding: no difference."""
_BLOCK = 10**7


@dataclass(frozen=True, kw_only=True)
class PairComparison:
    """Model a minus model b on the same observations."""

    a: str
    b: str
    difference: Interval
    """Mean difference with its 95 % cluster bootstrap interval."""
    margin: float
    p_permutation: float
    """Sign-flip permutation test over clusters, two-sided."""
    p_wilcoxon: float
    """Wilcoxon signed-rank test of the clusters' mean differences, two-sided."""
    p_holm: float
    """p_permutation, adjusted for all comparisons made together."""
    effect: dict[str, float | None]
    """See effect_sizes."""

    @property
    def reading(self) -> str:
        """What the interval allows to say; see ``reading``."""
        return reading(self.difference, margin=self.margin)

    def row(self) -> dict[str, Any]:
        """One row of a table."""
        return {
            "a": self.a,
            "b": self.b,
            **self.difference.cells("difference"),
            "p_permutation": self.p_permutation,
            "p_wilcoxon": self.p_wilcoxon,
            "p_holm": self.p_holm,
            **self.effect,
            "margin": self.margin,
            "reading": self.reading,
        }


def compare_models(
    scores: ScoreSet,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    margin: float = MARGIN,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[PairComparison]:
    """Compare pairs of models (default: each with each) as one family of tests.

    Raises UsageError for an unknown model, ValueError for a margin that is not positive.
    """
    if not margin > 0:
        raise ValueError(f"a margin of equivalence is positive, not {margin}")
    chosen = list(combinations(scores.models, 2)) if pairs is None else list(pairs)
    for name in (name for pair in chosen for name in pair):
        if name not in scores.models:
            raise unknown_name("model", name, scores.models)
    if not chosen:
        return []
    index = {name: m for m, name in enumerate(scores.models)}
    per_image = scores.per_observation()
    differences = np.stack([per_image[index[a]] - per_image[index[b]] for a, b in chosen])  # (P, N)
    sums = sum_by(differences, scores.clusters)
    p_values = sign_flip_p_values(sums, seed=seed)
    adjusted = holm(p_values)
    draws = draw_means(scores, resamples=resamples, seed=seed)
    return [
        PairComparison(
            a=a,
            b=b,
            difference=difference_interval(draws, a, b),
            margin=margin,
            p_permutation=float(p_values[k]),
            p_wilcoxon=wilcoxon_p_value(sums[k] / scores.cluster_sizes),
            p_holm=float(adjusted[k]),
            effect=effect_sizes(differences[k]),
        )
        for k, (a, b) in enumerate(chosen)
    ]


def difference_interval(draws: Draws, a: str, b: str) -> Interval:
    """Mean of a minus mean of b with its interval; the same images are drawn for both."""
    i, j = draws.models.index(a), draws.models.index(b)
    difference = without_rounding(draws.values[:, i] - draws.values[:, j])
    estimate = float(without_rounding(draws.estimates[i] - draws.estimates[j]))
    return interval_of(difference, estimate, freedom=draws.freedom)


def without_rounding(differences: ArrayLike) -> Floats:
    """Differences with those that are mere rounding set to 0."""
    values = np.asarray(differences, dtype=np.float64)
    return np.where(np.abs(values) <= NEGLIGIBLE, 0.0, values)


def sign_flip_p_values(cluster_sums: ArrayLike, *, patterns: int = SIGN_PATTERNS, seed: int = 0) -> Floats:
    """Two-sided p of P paired comparisons from the clusters' sums of differences (P, C) -> (P,).

    Under the null hypothesis a cluster's differences are as likely with the other sign, all of one cluster together.
    p is the share of sign patterns whose absolute total is at least the observed one: of all 2^C patterns for at most
    15 clusters, otherwise (k + 1) / (B + 1) of B random ones, the same for all comparisons.
    """
    sums = np.atleast_2d(np.asarray(cluster_sums, dtype=np.float64))
    count = sums.shape[1]
    exact = count <= EXACT_CLUSTERS
    total = 2**count if exact else patterns
    observed = np.abs(sums.sum(axis=1))
    bound = observed - 1e-9 * np.abs(sums).sum(axis=1)  # totals that are equal but for rounding count
    rng = np.random.default_rng(seed)
    reached = np.zeros(len(sums), dtype=np.int64)
    step = max(1, _BLOCK // count)
    at_once = max(1, _BLOCK // (10 * min(step, total)))  # comparisons
    for start in range(0, total, step):
        size = min(step, total - start)
        if exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(count)) & 1
        else:
            bits = rng.integers(0, 2, size=(size, count), dtype=np.int8)
        signs = 2.0 * bits - 1.0
        for first in range(0, len(sums), at_once):
            some = slice(first, first + at_once)
            reached[some] += (np.abs(signs @ sums[some].T) >= bound[some]).sum(axis=0)
    return reached / total if exact else (reached + 1) / (total + 1)


def wilcoxon_p_value(differences: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank p of (N,) differences; zeros are left out, and nothing but zeros gives 1."""
    values = without_rounding(differences)
    if not values.any():
        return 1.0
    return float(stats.wilcoxon(values[values != 0]).pvalue)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment (1979) of m p-values: running maximum of (m - k) p_(k), k = 0, 1, ..., at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def effect_sizes(differences: ArrayLike) -> dict[str, float | None]:
    """Size of paired differences d (N,) in three ways that do not grow with N.

    cohens_dz: mean / standard deviation (None without spread). rank_biserial: (W+ - W-) / (W+ + W-) of the signed ranks
    (Kerby 2014), in [-1, 1], 0 without differences. superiority: share of images with d > 0, ties half.
    """
    d = without_rounding(differences)
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    changed = d[d != 0]
    ranks = stats.rankdata(np.abs(changed))
    return {
        "cohens_dz": None if spread <= NEGLIGIBLE else float(d.mean()) / spread,
        "rank_biserial": float((np.sign(changed) * ranks).sum() / ranks.sum()) if len(changed) else 0.0,
        "superiority": float((d > 0).mean() + (d == 0).mean() / 2),
    }


def reading(difference: Interval, *, margin: float) -> str:
    """What a difference's 95 % interval says; equivalence needs the whole interval within +-margin.

    This is stricter than two one-sided tests at 5 %, which need the 90 % interval to lie inside.
    """
    if difference.low is None or difference.high is None:
        return "undecided"
    inside = -margin < difference.low and difference.high < margin
    if difference.excludes_zero:
        return "different, but by less than the margin" if inside else "different"
    return "equivalent" if inside else "undecided"
