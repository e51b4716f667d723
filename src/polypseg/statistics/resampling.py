"""The bootstrap behind every interval: clusters of images are drawn with replacement, the same ones for all models.

With several seeds a model's trained networks are drawn too, for each model by itself (two levels: seed and cluster).
With one seed the intervals speak of these trained networks on other images, not of training again.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from polypseg.statistics.scores import Floats, ScoreSet

RESAMPLES = 5000
_BLOCK = 10**7
"""Most numbers that are drawn at a time."""
_KEPT = 4 * 10**6
"""Most numbers of a draw that is kept for the next scores of the same clusters: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Resampled means of M models on one set."""

    models: tuple[str, ...]
    estimates: Floats
    """(M,) means of the sample itself."""
    values: Floats
    """(B, M) means of the resamples; a row is one draw of images for all models."""
    clusters: int
    """C: what the images were drawn in."""

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a variance over clusters, C - 1."""
        return self.clusters - 1


def draw_means(scores: ScoreSet, *, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
    """Cluster bootstrap of every model's mean: sum of the drawn clusters' scores over the sum of their sizes.

    Where each image is its own cluster this is the ordinary image bootstrap.
    """
    return _draw(
        scores, _draw_networks(scores, resamples, seed), resamples=resamples, seed=seed, stream=_stream(scores)
    )


def _stream(scores: ScoreSet) -> int:
    """A set's own stream of random numbers, by its title: it is drawn alike alone and together with another."""
    return zlib.crc32(scores.title.encode())


def draw_both(inside: ScoreSet, outside: ScoreSet, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Draws, Draws]:
    """Draws of two sets, row by row from the same trained networks; the images of the two are drawn independently.

    Raises ValueError when the sets are not of the same models and seeds.
    """
    if inside.models != outside.models or inside.seeds != outside.seeds:
        raise ValueError(f"both sets need the same models and seeds: {inside.models} and {outside.models}")
    networks = _draw_networks(inside, resamples, seed)
    first, second = _stream(inside), _stream(outside)
    if first == second:
        second += 1
    one = _draw(inside, networks, resamples=resamples, seed=seed, stream=first)
    return one, _draw(outside, networks, resamples=resamples, seed=seed, stream=second)


def _draw_networks(scores: ScoreSet, resamples: int, seed: int) -> Floats | None:
    """(B, M, S) share of each trained network in each resample; None for one seed."""
    if scores.seeds == 1:
        return None
    rng = np.random.default_rng([seed, 0, 1])
    shares = np.full(scores.seeds, 1 / scores.seeds)
    return rng.multinomial(scores.seeds, shares, size=(resamples, len(scores.models))) / scores.seeds


def _draw(scores: ScoreSet, networks: Floats | None, *, resamples: int, seed: int, stream: int) -> Draws:
    count = scores.cluster_count
    sums, sizes = scores.cluster_sums(), scores.cluster_sizes  # (M, S, C), (C,)
    step = max(1, _BLOCK // max(count, sums[..., 0].size))
    blocks: list[Floats] = []
    for times in times_drawn(count, resamples=resamples, step=step, seed=(seed, stream)):
        start, size = sum(map(len, blocks)), len(times)
        drawn = (times @ sums.reshape(-1, count).T) / (times @ sizes)[:, None]  # (b, M * S)
        by_network = drawn.reshape(size, len(scores.models), scores.seeds)
        shares = None if networks is None else networks[start : start + size]
        blocks.append(by_network[..., 0] if shares is None else (by_network * shares).sum(axis=-1))
    return Draws(
        models=scores.models,
        estimates=scores.means,
        values=np.concatenate(blocks),
        clusters=count,
    )


def times_drawn(count: int, *, resamples: int, step: int, seed: int | tuple[int, ...]) -> Iterator[Floats]:
    """(b, count), b <= step, over all resamples: how often each of ``count`` clusters is drawn in a resample.

    The same for the same arguments; read only.
    """
    draw = _kept_draw if resamples <= step and resamples * count <= _KEPT else _draw_blocks
    return iter(draw(count, resamples, step, seed))


def _draw_blocks(count: int, resamples: int, step: int, seed: int | tuple[int, ...]) -> Iterator[Floats]:
    rng, shares = np.random.default_rng(seed), np.full(count, 1 / count)
    for start in range(0, resamples, step):
        times = rng.multinomial(count, shares, size=min(step, resamples - start)).astype(np.float64)
        times.flags.writeable = False
        yield times


@lru_cache(maxsize=2)
def _kept_draw(count: int, resamples: int, step: int, seed: int | tuple[int, ...]) -> tuple[Floats, ...]:
    """As _draw_blocks: the scores of a set are many, its clusters the same."""
    return tuple(_draw_blocks(count, resamples, step, seed))


def leave_one_out(scores: ScoreSet) -> Floats:
    """(C, M) means without each cluster in turn. Raises ValueError for a single cluster."""
    if scores.cluster_count < 2:
        raise ValueError("leaving one cluster out needs at least two")
    sums, sizes = scores.cluster_sums().mean(axis=1), scores.cluster_sizes  # (M, C), (C,)
    return ((sums.sum(axis=1, keepdims=True) - sums) / (sizes.sum() - sizes)).T
