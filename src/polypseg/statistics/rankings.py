"""Is the change of ranking between two sets real, or would other images have ranked the models otherwise?

All models are ranked anew on each draw of images, the same images for all (the joint bootstrap of rank-stability
plots, after the idea of Wiesenfarth et al., Scientific Reports 11, 2021). Shares of draws describe how firm a ranking
is; they are not p-values. Rank 1 is the greatest mean; tied models share their ranks evenly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.statistics.comparisons import compare_models, difference_interval, holm
from polypseg.statistics.intervals import Interval, interval_of
from polypseg.statistics.orders import in_blocks, kendall_tau, one_order_p_value, same_order_taus
from polypseg.statistics.resampling import RESAMPLES, Draws, draw_both
from polypseg.statistics.scores import Floats, ScoreSet


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How firmly M models are ranked on one set."""

    ranks: Floats
    """(M,) rank by the mean; ties share the mean rank."""
    probability: Floats
    """(M, M) share of draws in which model m has rank r + 1; rows and columns sum to 1."""
    above: Floats
    """(M, M) share of draws in which model i is above model j, ties half."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two rankings agree, and how far they could."""

    tau: Interval
    """Kendall's tau-b of the two rankings. The draws add noise to estimates that hold noise already, so the interval
    lies low: it may end below the estimate, and it does not support "the rankings disagree" by itself."""
    expected_tau: float
    """Mean tau if one strict order were true in both sets: what noise alone leaves of perfect agreement."""
    noise_share: float | None
    """(1 - expected_tau) / (1 - tau), at most 1: the part of the disagreement that noise alone would make. None when
    the rankings agree. Describes, as expected_tau does; what can be concluded is p_one_order and the pairs' p_flip."""
    p_one_order: float
    """Test of one true order, ties allowed, in both sets; see ``one_order_p_value``. Small: the order does change."""
    retest_inside: float
    """Mean tau between two draws of the first set: what a ranking there agrees with itself on other such images."""
    retest_outside: float
    same_winner: float
    """Share of draws in which the best model in distribution is the best outside, ties shared."""
    winner_stays: float
    """Share of draws in which the model that is best in distribution by its mean is the best outside."""


@dataclass(frozen=True, kw_only=True)
class RankChange:
    """All that is known about one change of ranking; the object that plots are drawn from."""

    models: tuple[str, ...]
    titles: tuple[str, str]
    inside: Ranking
    outside: Ranking
    flips: Floats
    """(M, M) probability that two models stand in opposite orders in the two sets; a tie in a set counts half."""
    agreement: Agreement
    tau_draws: Floats
    """(B,) tau of each draw."""
    same_order_draws: Floats
    """(B,) tau under one true order; see ``same_order_taus``."""
    pairs: tuple[dict[str, Any], ...]
    """One row a pair of models: ``pair_rows`` of the tables."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a model: both ranks, their mean and 95 % range over draws, the probability of being best."""
        return [
            {
                "model": name,
                **_rank_cells("inside", self.inside, m),
                **_rank_cells("outside", self.outside, m),
                "rank_change": float(self.inside.ranks[m] - self.outside.ranks[m]),
            }
            for m, name in enumerate(self.models)
        ]

    def content(self) -> dict[str, Any]:
        """Everything but the draws, of which histograms are kept, for JSON."""
        edges = np.linspace(-1, 1, 41)
        return {
            "models": list(self.models),
            "titles": list(self.titles),
            "rows": self.rows(),
            "pairs": list(self.pairs),
            "rank_probability": {
                "inside": self.inside.probability.tolist(),
                "outside": self.outside.probability.tolist(),
            },
            "flips": self.flips.tolist(),
            "agreement": agreement_row(self.agreement),
            "tau_histogram": {
                "edges": edges.tolist(),
                "draws": np.histogram(self.tau_draws, edges)[0].tolist(),
                "same_order": np.histogram(self.same_order_draws, edges)[0].tolist(),
            },
        }


def agreement_row(agreement: Agreement) -> dict[str, Any]:
    """The agreement as one row of a table."""
    names = ("expected_tau", "noise_share", "p_one_order", "retest_inside", "retest_outside")
    winner = ("same_winner", "winner_stays")
    return {**agreement.tau.cells("tau"), **{name: getattr(agreement, name) for name in (*names, *winner)}}


def competition_ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Rank of each key by value, 1 for the greatest; ties share the better rank (1, 2, 2, 4)."""
    return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}


def _rank_cells(where: str, ranking: Ranking, model: int) -> dict[str, float]:
    shares = ranking.probability[model]
    low, high = (int(np.searchsorted(shares.cumsum(), tail - 1e-12)) + 1 for tail in (0.025, 0.975))
    return {
        f"rank_{where}": float(ranking.ranks[model]),
        f"rank_{where}_mean": float(shares @ np.arange(1, len(shares) + 1)),
        f"rank_{where}_low": low,
        f"rank_{where}_high": high,
        f"best_{where}": float(shares[0]),
    }


def analyze_rank_change(
    inside: ScoreSet, outside: ScoreSet, *, resamples: int = RESAMPLES, seed: int = 0
) -> RankChange:
    """Rank the models of two sets on joint draws and compare the rankings.

    With several seeds a draw takes the same trained networks in both sets. Raises ValueError for fewer than two models
    or sets that are not of the same models and seeds.
    """
    if len(inside.models) < 2:
        raise ValueError("a ranking needs at least two models")
    draws = draw_both(inside, outside, resamples=resamples, seed=seed)
    values = draws[0].values, draws[1].values
    agreeing = sum((one * other).sum(axis=0, dtype=np.int64) for _, (one, other) in in_blocks(*values))
    flips = (1 - agreeing / len(values[0])) / 2
    np.fill_diagonal(flips, 0)
    orders = [_Orders.of(draw.values) for draw in draws]
    taus, null = kendall_tau(*values), same_order_taus(*draws)
    return RankChange(
        models=inside.models,
        titles=(inside.title, outside.title),
        inside=_ranking(orders[0], draws[0]),
        outside=_ranking(orders[1], draws[1]),
        flips=flips,
        agreement=_agreement(orders, taus, null, draws),
        tau_draws=taus,
        same_order_draws=null,
        pairs=tuple(_pair_rows(inside, outside, draws, flips, resamples=resamples, seed=seed)),
    )


@dataclass(frozen=True, kw_only=True)
class _Orders:
    """Where the models stand in B orders."""

    best: NDArray[np.int64]
    """(B, M) the better rank of each model."""
    tied: NDArray[np.int64]
    """(B, M) how many models, itself included, share it."""
    above: Floats
    """(M, M) share of orders in which model i is above model j, ties half."""

    @classmethod
    def of(cls, means: Floats) -> "_Orders":
        """The orders of means (B, M)."""
        best, tied = np.empty(means.shape, dtype=np.int64), np.empty(means.shape, dtype=np.int64)
        total = np.zeros((means.shape[1],) * 2, dtype=np.int64)
        for rows, (signs,) in in_blocks(means):
            best[rows] = 1 + (signs < 0).sum(axis=2)
            tied[rows] = (signs == 0).sum(axis=2)
            total += signs.sum(axis=0, dtype=np.int64)
        return cls(best=best, tied=tied, above=(1 + total / len(means)) / 2)

    def holding(self, place: int) -> Floats:
        """(B, M) whether a model holds a place, as a share where it is tied over several."""
        return ((self.best <= place) & (place < self.best + self.tied)) / self.tied


def _ranking(orders: _Orders, draws: Draws) -> Ranking:
    observed = _Orders.of(draws.estimates[None])
    places = range(1, len(draws.models) + 1)
    return Ranking(
        ranks=(observed.best + (observed.tied - 1) / 2)[0],
        probability=np.stack([orders.holding(place).mean(axis=0) for place in places], axis=1),
        above=orders.above,
    )


def _agreement(orders: Sequence[_Orders], taus: Floats, null: Floats, draws: tuple[Draws, Draws]) -> Agreement:
    first = [order.holding(1) for order in orders]
    tau = float(kendall_tau(*(draw.estimates[None] for draw in draws))[0])
    winner = int(np.argmax(draws[0].estimates))
    freedom = None if min(draw.freedom for draw in draws) > 0 else 0
    expected = float(null.mean())
    retest = [float(kendall_tau(draw.values, np.roll(draw.values, 1, axis=0)).mean()) for draw in draws]
    return Agreement(
        tau=interval_of(taus, tau, freedom=freedom),
        expected_tau=expected,
        noise_share=None if tau >= 1 - 1e-9 else min(1.0, (1 - expected) / (1 - tau)),
        p_one_order=one_order_p_value(*draws),
        retest_inside=retest[0],
        retest_outside=retest[1],
        same_winner=float((first[0] * first[1]).sum(axis=1).mean()),
        winner_stays=float(first[1][:, winner].mean()),
    )


def _pair_rows(
    inside: ScoreSet, outside: ScoreSet, draws: tuple[Draws, Draws], flips: Floats, *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row a pair: differences in both sets, probability of a flip, and a test of it.

    p_flip tests "not in opposite orders": both differences must be real, so it is the greater of the two sets'
    sign-flip p-values when the observed orders are opposite, and 1 otherwise (an intersection-union test of what Gail &
    Simon 1985 call a qualitative interaction). p_flip_holm adjusts for all pairs.
    """
    sets = [compare_models(scores, resamples=resamples, seed=seed) for scores in (inside, outside)]
    rows = []
    for (i, j), one, other in zip(combinations(range(len(inside.models)), 2), *sets, strict=True):
        opposite = one.difference.estimate * other.difference.estimate < 0
        rows.append(
            {
                "a": one.a,
                "b": one.b,
                **difference_interval(draws[0], one.a, one.b).cells("inside"),
                **difference_interval(draws[1], one.a, one.b).cells("outside"),
                "flip_probability": float(flips[i, j]),
                "flipped": opposite,
                "p_flip": max(one.p_permutation, other.p_permutation) if opposite else 1.0,
            }
        )
    adjusted = holm([row["p_flip"] for row in rows])
    return [row | {"p_flip_holm": float(p)} for row, p in zip(rows, adjusted, strict=True)]
