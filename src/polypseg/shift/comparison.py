"""How two sets of frames differ: each measure by itself, all of them together, and as an encoder sees them.

Intervals draw whole video clips where clips are known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from polypseg.data.catalog import CLIP_COLUMN
from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.shift.frame_statistics import measure_frame
from polypseg.statistics import RESAMPLES, Gap, Interval, generalization_gaps, score_set

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
"""RGB frames -> embeddings (N, D)."""
FOLDS = 5
HALVES = 20
"""Splits of one set into halves, from which the distance that means nothing is estimated."""
_BATCH = 16
_ROWS = 512
"""Of a kernel, held at a time."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """Measures of N frames."""

    title: str
    values: Mapping[str, Floats]
    """Measure -> (N,); frames without the measure (a polyp's, without polyp) carry the mean of the others."""
    clusters: tuple[str, ...] | None
    """Clip of each frame, where clips are known."""
    embeddings: NDArray[np.float32] | None = None
    """(N, D)."""

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @cached_property
    def groups(self) -> NDArray[np.int64]:
        """(N,) number of each frame's cluster."""
        labels = self.clusters or tuple(map(str, range(len(self))))
        return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def measure_set(dataset: PolypDataset, ids: Sequence[str], *, title: str, embed: Embed | None = None) -> MeasuredSet:
    """Measure frames of a dataset, and their polyps where it has masks. Raises PolypSegError for a broken file."""
    records = [dataset.by_id[record_id] for record_id in ids]
    rows: list[dict[str, float]] = []
    vectors: list[NDArray[np.float32]] = []
    frames: list[Image.Image] = []
    for record in tqdm(records, desc=f"measuring {dataset.spec.title}", unit="frame", leave=False, disable=None):
        frame, mask = dataset.pair(record) if record.mask is not None else (dataset.frame(record), None)
        rows.append(measure_frame(np.asarray(frame), mask))
        frames.append(frame)
        if embed is not None and len(frames) == _BATCH:
            vectors.append(embed(frames))
        frames = frames if len(frames) < _BATCH else []
    if embed is not None and frames:
        vectors.append(embed(frames))
    names = dict.fromkeys(name for row in rows for name in row)
    table = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    clips = tuple(record.groups.get(CLIP_COLUMN, "") for record in records)
    return MeasuredSet(
        title=title,
        values={name: np.where(np.isnan(column), np.nanmean(column), column) for name, column in table.items()},
        clusters=clips if all(clips) else None,
        embeddings=np.concatenate(vectors) if vectors else None,
    )


@dataclass(frozen=True, kw_only=True)
class SetComparison:
    """Set a against set b."""

    titles: tuple[str, str]
    sizes: tuple[int, int]
    measures: tuple[dict[str, Any], ...]
    """One row a measure, greatest effect first: means, spreads, b - a with interval, effect (Cohen's d, pooled)."""
    measures_auc: Interval
    """How well a linear classifier of the measures tells the sets apart: 0.5 not at all, 1 always."""
    embedding_auc: Interval | None = None
    embedding_distance: Interval | None = None
    """Squared kernel distance (KID: unbiased MMD with (x y / D + 1)^3) of standardized embeddings."""
    embedding_floor: tuple[float, float] | None = None
    """2.5 and 97.5 % of the same distance between random halves of one set: what no shift looks like."""

    def content(self) -> dict[str, Any]:
        """For JSON."""

        def cells(value: Interval | None) -> dict[str, float | None] | None:
            return None if value is None else {"estimate": value.estimate, "low": value.low, "high": value.high}

        return {
            "titles": list(self.titles),
            "n": list(self.sizes),
            "measures": list(self.measures),
            "measures_auc": cells(self.measures_auc),
            "embedding_auc": cells(self.embedding_auc),
            "embedding_distance": cells(self.embedding_distance),
            "embedding_floor": None if self.embedding_floor is None else list(self.embedding_floor),
        }


def compare_sets(a: MeasuredSet, b: MeasuredSet, *, resamples: int = RESAMPLES, seed: int = 0) -> SetComparison:
    """Everything that is known about how two sets differ.

    Raises UsageError for sets of fewer frames or clips than there are folds.
    """
    for one in (a, b):
        if len(np.unique(one.groups)) < FOLDS:
            raise UsageError(f"{one.title} has fewer than {FOLDS} independent frames or clips: add some")
    names = [name for name in a.values if name in b.values]
    features = [np.stack([one.values[name] for name in names], axis=1) for one in (a, b)]
    embedded = a.embeddings is not None and b.embeddings is not None
    vectors = [np.asarray(one.embeddings, dtype=np.float64) for one in (a, b)] if embedded else None
    scaled = None if vectors is None else _standardized(vectors)
    common: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return SetComparison(
        titles=(a.title, b.title),
        sizes=(len(a), len(b)),
        measures=tuple(_measure_rows(a, b, names, **common)),
        measures_auc=classifier_auc(features, (a.groups, b.groups), **common),
        embedding_auc=None if vectors is None else classifier_auc(vectors, (a.groups, b.groups), **common),
        embedding_distance=None if scaled is None else kernel_distance(scaled, (a.groups, b.groups)),
        embedding_floor=None if scaled is None else _floor(scaled, (a.groups, b.groups), seed=seed),
    )


def _measure_rows(
    a: MeasuredSet, b: MeasuredSet, names: Sequence[str], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    sets = [
        score_set({name: one.values[name] for name in names}, title=one.title, clusters=one.clusters) for one in (b, a)
    ]
    gaps: Sequence[Gap] = generalization_gaps(*sets, resamples=resamples, seed=seed)
    rows = []
    for gap in gaps:
        x, y = a.values[gap.model], b.values[gap.model]
        pooled = float(np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2))
        rows.append(
            {
                "measure": gap.model,
                "mean_a": float(x.mean()),
                "mean_b": float(y.mean()),
                "spread_a": float(x.std(ddof=1)),
                "spread_b": float(y.std(ddof=1)),
                **gap.gap.cells("difference"),
                "effect": 0.0 if pooled == 0 else float(y.mean() - x.mean()) / pooled,
            }
        )
    return sorted(rows, key=lambda row: -abs(row["effect"]))


def classifier_auc(
    features: Sequence[Floats], groups: Sequence[NDArray[np.int64]], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Area under the ROC curve of a logistic regression that tells two sets (N_a, K), (N_b, K) apart.

    Out-of-fold scores of five stratified folds that keep clusters together; percentile interval over drawn clusters of
    both sets, for the fitted classifiers.
    """
    x = np.concatenate(features)
    y = np.repeat([0, 1], [len(part) for part in features])
    cluster = np.concatenate([groups[0], groups[1] + groups[0].max() + 1])
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    scores = cross_val_predict(model, x, y, groups=cluster, cv=folds, method="decision_function")
    members = [np.flatnonzero(cluster == c) for c in range(cluster.max() + 1)]
    first = int(groups[0].max()) + 1
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(min(resamples, 1000)):
        chosen = np.concatenate(
            [rng.integers(0, first, first), rng.integers(first, len(members), len(members) - first)]
        )
        places = np.concatenate([members[c] for c in chosen])
        draws.append(roc_auc_score(y[places], scores[places]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate=float(roc_auc_score(y, scores)), low=float(low), high=float(high))


def _standardized(vectors: Sequence[Floats]) -> list[Floats]:
    """Both sets centered and scaled by the first one's mean and standard deviation."""
    mean, std = vectors[0].mean(axis=0), vectors[0].std(axis=0)
    return [(part - mean) / np.where(std > 1e-6, std, 1) for part in vectors]


def kernel_distance(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]]) -> Interval:
    """Squared kernel distance of (N_a, D) and (N_b, D), pairs within one cluster left out, with a jackknife interval.

    Kernel (x y / D + 1)^3 as KID (Binkowski et al., ICLR 2018). Leaving each cluster out in turn gives the standard
    error; the interval is t with the smaller set's clusters - 1 degrees of freedom. What is left without a cluster is
    the whole less the cluster's own pairs, so the time grows with the square of the frames and the memory with them.
    """
    own = [_own_pairs(x, group) for x, group in zip(vectors, groups, strict=True)]
    cross = _cross_pairs(vectors, groups)
    estimate = sum(pairs.mean for pairs in own) - 2 * cross[0].mean
    variance = 0.0
    for side in (0, 1):
        left = own[side].without_each + own[1 - side].mean - 2 * cross[side].without_each
        variance += (len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum())
    freedom = min(int(part.max()) for part in groups)
    reach = float(stats.t.ppf(0.975, freedom)) * np.sqrt(variance)
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Sum of the kernel over pairs of frames and their number, in all and of the pairs that each cluster is in."""

    total: float
    count: float
    of_cluster: Floats
    """(C,)."""
    count_of_cluster: Floats

    @property
    def mean(self) -> float:
        return float(self.total / self.count)

    @property
    def without_each(self) -> Floats:
        """(C,): the mean without each cluster in turn."""
        return np.asarray((self.total - self.of_cluster) / (self.count - self.count_of_cluster))


def _own_pairs(x: Floats, groups: NDArray[np.int64]) -> _Pairs:
    """Ordered pairs of frames of different clusters of one set."""
    sizes, (sums, _) = _sizes(groups), _kernel_sums(x, x)
    between, count = np.bincount(groups, weights=sums) - _within_clusters(x, groups), sizes * (len(x) - sizes)
    return _Pairs(
        total=float(between.sum()), count=float(count.sum()), of_cluster=2 * between, count_of_cluster=2 * count
    )


def _cross_pairs(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]]) -> list[_Pairs]:
    """Pairs of a frame of either set, by the clusters of the first set and of the second."""
    x, y = vectors
    return [
        _Pairs(
            total=float(sums.sum()),
            count=float(len(x) * len(y)),
            of_cluster=np.asarray(np.bincount(group, weights=sums), dtype=np.float64),
            count_of_cluster=_sizes(group) * others,
        )
        for sums, group, others in zip(_kernel_sums(x, y), groups, (len(y), len(x)), strict=True)
    ]


def _sizes(groups: NDArray[np.int64]) -> Floats:
    return np.bincount(groups).astype(np.float64)


def _kernel(x: Floats, y: Floats) -> Floats:
    """(N, M): (x y / D + 1)^3."""
    root = x @ y.T
    root /= x.shape[1]
    root += 1
    return np.asarray(root * root * root)


def _kernel_sums(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """(N,) and (M,): sums of the kernel (N, M) over the other set's frames, some rows at a time."""
    of_x, of_y = np.empty(len(x)), np.zeros(len(y))
    for at in range(0, len(x), _ROWS):
        part = _kernel(x[at : at + _ROWS], y)
        of_x[at : at + _ROWS] = part.sum(axis=1)
        of_y += part.sum(axis=0)
    return of_x, of_y


def _within_clusters(x: Floats, groups: NDArray[np.int64]) -> Floats:
    """(C,): the kernel's sum over ordered pairs of frames of each cluster, a frame and itself included."""
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
    members = np.split(x[order], np.cumsum(sizes)[:-1])
    return np.array([_kernel(part, part).sum() for part in members])


def _floor(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]], *, seed: int) -> tuple[float, float]:
    """The distance between halves of either set, by cluster, in HALVES splits."""
    rng, found = np.random.default_rng(seed), []
    for x, group in zip(vectors, groups, strict=True):
        count, sizes, within = int(group.max()) + 1, _sizes(group), _within_clusters(x, group)
        chosen = np.zeros((count, HALVES // 2))
        for split in range(HALVES // 2):
            chosen[rng.permutation(count)[: count // 2], split] = 1
        half = chosen[group]  # (N, splits): whether a frame is in the first half
        weights = np.concatenate([half, 1 - half], axis=1)
        product = np.concatenate([_kernel(x[at : at + _ROWS], x) @ weights for at in range(0, len(x), _ROWS)])
        to_first, to_second = np.split(product, 2, axis=1)
        first, second = (half * to_first).sum(axis=0), ((1 - half) * to_second).sum(axis=0)
        cross = (half * to_second).sum(axis=0)
        frames = half.sum(axis=0)
        own = [
            (total - within @ side) / (number**2 - sizes**2 @ side)
            for total, side, number in ((first, chosen, frames), (second, 1 - chosen, len(x) - frames))
        ]
        found.append(own[0] + own[1] - 2 * cross / (frames * (len(x) - frames)))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)
