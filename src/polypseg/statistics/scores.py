"""Scores of several models on the same images, with what is known about which images belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from polypseg.errors import UsageError, unknown_name

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
_CONVENTION = "paper"
"""Of a metric that names none."""


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


def read_score_set(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    metric: str = "dice",
    repeats: Sequence[Sequence[str]] = (),
) -> ScoreSet:
    """Scores from the contents of receipts: model id -> one content a seed.

    metric: a column of the images' rows, ``convention.output``, such as ``paper.dice``;
    without a convention ``paper`` is meant. Frames of known clips are clustered by clip. repeats: groups of ids that
    show the same frame, beside images of equal pixels, which receipts tell by themselves. Raises UsageError when the
    receipts are not of the same images, and for a column that they do not have or that some images leave undefined.
    """
    contents = [content for seeds in results.values() for content in seeds]
    if not contents or not all(results.values()):
        raise UsageError("models can be compared only by results: each needs at least one receipt")
    if len({len(seeds) for seeds in results.values()}) > 1:
        counts = ", ".join(f"{name} {len(seeds)}" for name, seeds in results.items())
        raise UsageError(f"models are compared with as many seeds each, not {counts}: leave the surplus out")
    first = contents[0]
    ids = [row["id"] for row in first["images"]]
    for content in contents[1:]:
        _check_same_images(first, content, ids)
    return score_set(
        {name: np.array([_column(content, metric) for content in seeds]) for name, seeds in results.items()},
        title=f"{first['dataset']['title']}, {first['dataset']['split']} {first['dataset']['part']}",
        clusters=_clips(first),
        repeats=_repeats(first, ids, repeats),
    )


def _column(content: Mapping[str, Any], metric: str) -> list[float]:
    """One score an image."""
    wanted, rows = metric if "." in metric else f"{_CONVENTION}.{metric}", content["images"]
    columns = [key for key in rows[0] if "." in key]
    if wanted not in columns:
        raise unknown_name("metric", metric, [*METRICS, *columns])
    values = [row[wanted] for row in rows]
    undefined = sum(value is None for value in values)
    if undefined:
        raise UsageError(f"{wanted} is undefined on {undefined} of {len(rows)} images: choose another metric")
    return values


def _clips(content: Mapping[str, Any]) -> list[str] | None:
    """The clip of each image; None where the receipt does not know all of them."""
    clips = [row["clip"] for row in content["images"]]
    return None if None in clips else clips


def _repeats(content: Mapping[str, Any], ids: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """A label an image, shared by repeats: by the given groups, else by equal pixels."""
    labels = dict(zip(ids, content["manifest"]["pixels"], strict=True))
    labels |= {record_id: f"group {number}" for number, group in enumerate(groups) for record_id in group}
    return [labels[record_id] for record_id in ids]


def _check_same_images(first: Mapping[str, Any], other: Mapping[str, Any], ids: list[str]) -> None:
    names = [f"{content['name']} on {content['dataset']['title']}" for content in (first, other)]
    for what, a, b in (
        ("the images", ids, [row["id"] for row in other["images"]]),
        ("the content of the images", first["dataset"]["manifest"], other["dataset"]["manifest"]),
    ):
        if a != b:
            raise UsageError(f"{names[0]} and {names[1]} differ in {what}: evaluate both again on the same images")


METRICS = ("dice", "iou", "precision", "recall")
