"""Scores of several models on the same images, with what is known about which images belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
METRICS = ("dice", "iou", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class ScoreSet:
    """Scores of M models, S trained networks each, on N observations of one test set, in C clusters.

    An observation is an image, or several that repeat each other. A cluster is what a new sample would draw as a whole:
    a video clip, or the single observation where no clips are known.
    """

    title: str
    models: tuple[str, ...]
    values: Floats
    """(M, S, N). Seeds of different models are not paired; images are the same for all."""
    clusters: Ints
    """(N,) number of each observation's cluster, 0 to C - 1."""
    images: int
    """Images before repeats were merged."""

    @property
    def observations(self) -> int:
        """N."""
        return self.values.shape[2]

    @property
    def seeds(self) -> int:
        """S."""
        return self.values.shape[1]

    @property
    def cluster_count(self) -> int:
        """C."""
        return int(self.clusters.max()) + 1

    @property
    def cluster_sizes(self) -> Ints:
        """(C,) observations of each cluster."""
        return np.bincount(self.clusters).astype(np.int64)

    @property
    def means(self) -> Floats:
        """(M,) mean over observations and seeds."""
        return self.values.mean(axis=(1, 2))

    def per_observation(self) -> Floats:
        """(M, N) mean over seeds."""
        return self.values.mean(axis=1)

    def cluster_sums(self) -> Floats:
        """(M, S, C) sum of each cluster's observations."""
        return sum_by(self.values, self.clusters)


def sum_by(values: Floats, groups: Ints) -> Floats:
    """(..., N) -> (..., G): sums over the members of each group; groups are numbered 0 to G - 1."""
    membership = coo_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))  # (G, N)
    flat = values.reshape(-1, values.shape[-1])
    return np.asarray(membership.tocsr() @ flat.T).T.reshape(*values.shape[:-1], -1)


def score_set(
    scores: Mapping[str, ArrayLike],
    *,
    title: str = "",
    clusters: Sequence[str | int] | None = None,
    repeats: Sequence[str | int] | None = None,
) -> ScoreSet:
    """Collect scores by model id: (N,) for one trained network, (S, N) for S of them; S is the same for all models.

    clusters: label of each image's clip. repeats: label shared by images that show the same frame. A repeat counts
    once: the scores of k repeats become one observation, their mean (each weighs 1/k), and clusters that share one are
    joined. Raises ValueError for unequal shapes, labels of another number, no image, or scores that are not finite.
    """
    if not scores:
        raise ValueError("a set of scores needs at least one model")
    tables = [np.atleast_2d(np.asarray(value, dtype=np.float64)) for value in scores.values()]
    if len({table.shape for table in tables}) > 1 or tables[0].ndim != 2:
        shapes = ", ".join(f"{name} {table.shape}" for name, table in zip(scores, tables, strict=True))
        raise ValueError(f"all models need scores of the same images and as many seeds: {shapes}")
    values = np.stack(tables)
    images = values.shape[2]
    if not images or not np.isfinite(values).all():
        raise ValueError("scores must be finite, of at least one image")
    for kind, labels in (("clusters", clusters), ("repeats", repeats)):
        if labels is not None and len(labels) != images:
            raise ValueError(f"{len(labels)} labels of {kind} for {images} images")
    observation, cluster = _layout(images, clusters, repeats)
    merged = sum_by(values, observation) / np.bincount(observation)
    return ScoreSet(title=title, models=tuple(scores), values=merged, clusters=cluster, images=images)


def _layout(
    images: int, clusters: Sequence[str | int] | None, repeats: Sequence[str | int] | None
) -> tuple[Ints, Ints]:
    """(images,) observation of each image; (N,) cluster of each observation."""
    single = list(range(images))
    observation = _numbers(repeats if repeats is not None else single)
    clip = _numbers(clusters if clusters is not None else single)
    if clusters is None:
        return observation, np.arange(observation.max() + 1)
    # Observations and clips are the nodes of a graph, images its edges: what hangs together is one cluster.
    count = int(observation.max()) + 1
    nodes = count + int(clip.max()) + 1
    graph = coo_array((np.ones(images), (observation, count + clip)), shape=(nodes, nodes))
    component = connected_components(graph, directed=False)[1][:count]
    return observation, _numbers(component.tolist())


def _numbers(labels: Sequence[str | int]) -> Ints:
    """Labels as numbers 0, 1, ... in order of first appearance."""
    known: dict[str | int, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)
