"""The kernel distance of two sets of embeddings with its jackknife, against leaving out cluster by cluster.

OMP_NUM_THREADS=1 python benchmarks/embedding_distance.py --clusters 400
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from typer import Option

from polypseg.cli.console import run_script
from polypseg.shift.comparison import kernel_distance
from polypseg.statistics import Interval
from polypseg.statistics.scores import sum_by
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

Floats = NDArray[np.float64]
Block = tuple[Floats, Floats]


def before(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]]) -> Interval:
    """As it was: the sums by cluster (C, C), copied without each cluster in turn, so time by the cube."""
    blocks = [_block_sums(vectors[i], vectors[j], groups[i], groups[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
    estimate, variance = _distance(*blocks), 0.0
    for side in (0, 1):
        count = int(groups[side].max()) + 1
        left = np.array([_distance(*_without(blocks, side, c)) for c in range(count)])
        variance += (count - 1) / count * float(((left - left.mean()) ** 2).sum())
    reach = float(stats.t.ppf(0.975, min(int(part.max()) for part in groups))) * np.sqrt(variance)
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach)


def _block_sums(x: Floats, y: Floats, gx: NDArray[np.int64], gy: NDArray[np.int64]) -> Block:
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return sum_by(sum_by(kernel, gy).T, gx).T, np.outer(np.bincount(gx), np.bincount(gy)).astype(np.float64)


def _distance(aa: Block, bb: Block, ab: Block) -> float:
    between = [(sums.sum() - np.trace(sums)) / (counts.sum() - np.trace(counts)) for sums, counts in (aa, bb)]
    return float(between[0] + between[1] - 2 * ab[0].sum() / ab[1].sum())


def _without(blocks: Sequence[Block], side: int, cluster: int) -> list[Block]:
    own, cross = blocks[side], blocks[2]
    result = list(blocks)
    result[side] = (
        np.delete(np.delete(own[0], cluster, 0), cluster, 1),
        np.delete(np.delete(own[1], cluster, 0), cluster, 1),
    )
    result[2] = (np.delete(cross[0], cluster, side), np.delete(cross[1], cluster, side))
    return result


def rows(*, clusters: int = 400, repeats: int = 5) -> list[Row]:
    """Two sets of ``clusters`` frames, each a cluster of its own; both ways must agree to 1e-9."""
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(clusters, 384)), 0.1 + rng.normal(size=(clusters, 384))]
    groups = [np.arange(clusters)] * 2
    one, other = (
        np.array([found.estimate, found.low, found.high], dtype=np.float64)
        for found in (before(vectors, groups), kernel_distance(vectors, groups))
    )
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    ways = {BASELINE: lambda: before(vectors, groups), "closed form": lambda: kernel_distance(vectors, groups)}
    return side_by_side(f"embedding distance of {clusters:,} clusters", ways, repeats=repeats)


def main(
    clusters: Annotated[int, Option(help="Clusters of each set.")] = 400,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Time the kernel distance against leaving out cluster by cluster."""
    neighbors = Neighbors()
    print(show(rows(clusters=clusters, repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
