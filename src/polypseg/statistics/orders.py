"""Orders of models by their means: agreement of two, and what they would be like if one true order held in both."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from polypseg.statistics.comparisons import without_rounding
from polypseg.statistics.resampling import Draws
from polypseg.statistics.scores import Floats, Ints

Signs = NDArray[np.int8]
_BLOCK = 10**6
"""Comparisons of two means that are held at once."""


def order_signs(means: Floats) -> Signs:
    """Means (B, M) -> (B, M, M): 1 where model i is above model j, -1 where below, 0 where tied."""
    return np.sign(without_rounding(means[:, :, None] - means[:, None, :])).astype(np.int8)


def in_blocks(*means: Floats) -> Iterator[tuple[slice, tuple[Signs, ...]]]:
    """Which rows of the means (B, M), and their ``order_signs``: together they would grow as B x M x M."""
    draws, models = means[0].shape
    step = max(1, _BLOCK // models**2)
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        yield rows, tuple(order_signs(each[rows]) for each in means)


def kendall_tau(one: Floats, other: Floats) -> Floats:
    """Kendall's tau-b (B,) of the orders of means (B, M) and (B, M); 0 where one of them ties all models."""
    taus = np.zeros(len(one))
    for rows, signs in in_blocks(one, other):
        a, b = (sign.reshape(len(sign), -1).astype(np.float64) for sign in signs)
        scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        np.divide((a * b).sum(axis=1), scale, out=taus[rows], where=scale > 0)
    return taus


def same_order_taus(inside: Draws, outside: Draws) -> Floats:
    """(B,) tau between the sets if one strict order of the models were true in both: what sampling noise alone does.

    The order is the common one (see ``common_order``). The true means of each set are taken to be its own estimates,
    sorted into that order and drawn together by sqrt(1 - noise variance / variance of the estimates), as estimates lie
    further apart than what they estimate. Each draw's deviations from the estimates are added: noise of the size, and
    with the dependence between models, that the bootstrap found.

    A description, not a test. In simulations of 12 models on 100 images and 29 clips its mean was 0.04 to 0.1 below the
    mean tau of data with one strict order; it is too high, by up to 0.2, where groups of models are truly equal.
    """
    order = common_order(inside.estimates[None], outside.estimates[None], _noise(inside, outside))[0]
    drawn = []
    for draw, variance in zip((inside, outside), _noise(inside, outside), strict=True):
        means = draw.estimates - draw.estimates.mean()
        true_share = max(0.0, 1 - variance / max(float(means.var(ddof=1)), variance))
        supposed = np.empty_like(means)
        supposed[order] = -np.sort(-means) * np.sqrt(true_share)
        drawn.append(supposed + draw.values - draw.estimates)
    return kendall_tau(*drawn)


def one_order_p_value(inside: Draws, outside: Draws) -> float:
    """p of the hypothesis that some order of the models, ties allowed, is true in both sets; small: none is.

    The statistic is the weighted squared distance of both sets' means from the nearest means in the common order
    (isotonic regression): order violations count by their size, so noise among equal models does not. Its null
    distribution comes from those nearest means with each draw's deviations from the estimates added; p = (k + 1) /
    (B + 1).

    In 200 simulations each of 12 models on 100 images and 29 clips, p fell below 0.05 in 0 to 5 % of cases with one
    order, models tied or not (two models, tied in one set: 9 %), and in 90 % where half of the models changed places.
    """
    noise = _noise(inside, outside)
    estimates = inside.estimates[None], outside.estimates[None]
    observed, (one, other) = _violation(*estimates, noise)
    moved = (
        one + inside.values - inside.estimates,
        other + outside.values - outside.estimates,
    )
    null, _ = _violation(*moved, noise)
    return float((np.sum(null >= observed - 1e-9) + 1) / (len(null) + 1))


def common_order(inside: Floats, outside: Floats, noise: tuple[float, float]) -> Ints:
    """(B, M) models from best to worst by the sum of both sets' centered means (B, M), each over its noise variance."""
    centered = (means - means.mean(axis=1, keepdims=True) for means in (inside, outside))
    weighted = [means / variance for means, variance in zip(centered, noise, strict=True)]
    return np.argsort(-(weighted[0] + weighted[1]), axis=1, kind="stable")


def _noise(inside: Draws, outside: Draws) -> tuple[float, float]:
    """Each set's variance over draws of a model's distance from the mean of all, with M - 1 as divisor over models."""
    variances = []
    for draws in (inside, outside):
        centered = draws.values - draws.values.mean(axis=1, keepdims=True)
        variances.append(max(float(centered.var(axis=0).sum()) / (len(draws.models) - 1), 1e-24))
    return variances[0], variances[1]


def _violation(inside: Floats, outside: Floats, noise: tuple[float, float]) -> tuple[Floats, tuple[Floats, Floats]]:
    """(B,) squared distance over noise variance from the nearest means in the common order; and those means (B, M)."""
    order = common_order(inside, outside, noise)
    total, nearest = np.zeros(len(inside)), []
    for means, variance in zip((inside, outside), noise, strict=True):
        sorted_means = np.take_along_axis(means, order, axis=1)
        fitted = np.stack([isotonic_regression(row, increasing=False).x for row in sorted_means])
        total += ((sorted_means - fitted) ** 2).sum(axis=1) / variance
        placed = np.empty_like(means)
        np.put_along_axis(placed, order, fitted, axis=1)
        nearest.append(placed)
    return total, (nearest[0], nearest[1])
