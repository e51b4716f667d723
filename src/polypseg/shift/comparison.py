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
from polypseg.shift.measures import measure_frame
from polypseg.statistics import RESAMPLES, Gap, Interval, generalisation_gaps, score_set
from polypseg.statistics.scores import sum_by

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[Image.Image]], NDArray[np.float32]]
"""RGB frames -> embeddings (N, D)."""
FOLDS = 5
HALVES = 20
"""Splits of one set into halves, from which the distance that means nothing is estimated."""
_BATCH = 16


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
class Comparison:
    """Set a against set b."""

    titles: tuple[str, str]
    sizes: tuple[int, int]
    measures: tuple[dict[str, Any], ...]
    """One row a measure, greatest effect first: means, spreads, b - a with interval, effect (Cohen's d, pooled)."""
    measures_auc: Interval
    """How well a linear classifier of the measures tells the sets apart: 0.5 not at all, 1 always."""
    embedding_auc: Interval | None = None
    embedding_distance: Interval | None = None
    """Squared kernel distance (KID: unbiased MMD with (x y / D + 1)^3) of standardised embeddings."""
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


def compare_sets(a: MeasuredSet, b: MeasuredSet, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
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
    scaled = None if vectors is None else _standardised(vectors)
    common: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return Comparison(
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
    gaps: Sequence[Gap] = generalisation_gaps(*sets, resamples=resamples, seed=seed)
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


def _standardised(vectors: Sequence[Floats]) -> list[Floats]:
    """Both sets centred and scaled by the first one's mean and standard deviation."""
    mean, std = vectors[0].mean(axis=0), vectors[0].std(axis=0)
    return [(part - mean) / np.where(std > 1e-6, std, 1) for part in vectors]


def kernel_distance(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]]) -> Interval:
    """Squared kernel distance of (N_a, D) and (N_b, D), pairs within one cluster left out, with a jackknife interval.

    Kernel (x y / D + 1)^3 as KID (Binkowski et al., ICLR 2018). Leaving each cluster out in turn gives the standard
    error; the interval is t with the smaller set's clusters - 1 degrees of freedom.
    """
    blocks = [_block_sums(vectors[i], vectors[j], groups[i], groups[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
    estimate = _distance(*blocks)
    variance = 0.0
    for side in (0, 1):
        count = int(groups[side].max()) + 1
        left = np.array([_distance(*_without(blocks, side, c)) for c in range(count)])
        variance += (count - 1) / count * float(((left - left.mean()) ** 2).sum())
    freedom = min(int(part.max()) for part in groups)
    reach = float(stats.t.ppf(0.975, freedom)) * np.sqrt(variance)
    return Interval(estimate=estimate, low=estimate - reach, high=estimate + reach)


Block = tuple[Floats, Floats]
"""Sums of the kernel and numbers of pairs, by cluster of either side."""


def _block_sums(x: Floats, y: Floats, gx: NDArray[np.int64], gy: NDArray[np.int64]) -> Block:
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    sums = sum_by(sum_by(kernel, gy).T, gx).T
    return sums, np.outer(np.bincount(gx), np.bincount(gy)).astype(np.float64)


def _distance(aa: Block, bb: Block, ab: Block) -> float:
    def between(block: Block) -> float:
        """Mean over pairs of different clusters."""
        sums, counts = block
        return float((sums.sum() - np.trace(sums)) / (counts.sum() - np.trace(counts)))

    return between(aa) + between(bb) - 2 * float(ab[0].sum() / ab[1].sum())


def _without(blocks: Sequence[Block], side: int, cluster: int) -> list[Block]:
    own, cross = blocks[side], blocks[2]
    reduced = tuple(np.delete(np.delete(part, cluster, 0), cluster, 1) for part in own)
    crossed = tuple(np.delete(part, cluster, side) for part in cross)
    result = list(blocks)
    result[side], result[2] = (reduced[0], reduced[1]), (crossed[0], crossed[1])
    return result


def _floor(vectors: Sequence[Floats], groups: Sequence[NDArray[np.int64]], *, seed: int) -> tuple[float, float]:
    """The distance between halves of either set, by cluster, in HALVES splits."""
    rng, found = np.random.default_rng(seed), []
    for x, group in zip(vectors, groups, strict=True):
        count = int(group.max()) + 1
        for _ in range(HALVES // 2):
            half = np.isin(group, rng.permutation(count)[: count // 2])
            parts = [np.unique(group[side], return_inverse=True)[1] for side in (half, ~half)]
            blocks = [
                _block_sums(p, q, gp, gq)
                for p, q, gp, gq in (
                    (x[half], x[half], parts[0], parts[0]),
                    (x[~half], x[~half], parts[1], parts[1]),
                    (x[half], x[~half], parts[0], parts[1]),
                )
            ]
            found.append(_distance(*blocks))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
