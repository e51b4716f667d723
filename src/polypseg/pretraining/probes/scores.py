"""How well frozen embeddings separate known classes: k nearest neighbors and a linear probe on grouped folds."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from polypseg.errors import PolypSegError, UsageError
from polypseg.pretraining.probes.labeled import FOLDS, LabeledFrames, check_folds

REPEATS, NEIGHBORS = 5, 20
PROBE_C = 0.1
"""Inverse strength of the probe's L2 penalty (scikit-learn's C) on standardized features; see ``probe_scores``."""
INTERVAL = (
    "mean over the test folds of repeated stratified grouped cross-validation; 95 % t-interval with the corrected "
    "variance (1/J + test/train) s^2 of Nadeau & Bengio (2003) over the J fold scores, which share frames and are not "
    "independent"
)


@dataclass(frozen=True, kw_only=True)
class FoldScores:
    """Scores on the test folds of one classifier, or the paired differences of two.

    Fold scores are not independent: training parts overlap, and repeats reuse all frames. A plain t-interval would be
    far too narrow; the corrected one (Nadeau & Bengio 2003, for repeated folds Bouckaert & Frank 2004) is about right
    in their experiments and remains an approximation. It is not clipped to [0, 1].
    """

    values: NDArray[np.float64]
    """(J,) accuracy of each fold."""
    balanced: NDArray[np.float64]
    """(J,) mean recall over classes of each fold."""
    folds: int
    """Folds of a repeat."""
    folds_id: str
    """Hash of the folds: only scores that share it are paired."""

    @property
    def mean(self) -> float:
        """Mean accuracy over folds."""
        return float(self.values.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Corrected 95 % t-interval of the mean accuracy."""
        return corrected_interval(self.values, folds=self.folds)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Mean, interval and folds of accuracy and balanced accuracy, for JSON."""
        content = {}
        for name, values in (("accuracy", self.values), ("balanced_accuracy", self.balanced)):
            low, high = corrected_interval(values, folds=self.folds)
            content[name] = {"mean": float(values.mean()), "low": low, "high": high, "folds": values.tolist()}
        return content


def corrected_interval(values: NDArray[np.float64], *, folds: int) -> tuple[float, float]:
    """95 % t-interval of the mean of J fold scores with variance (1/J + 1/(folds - 1)) s^2."""
    count = len(values)
    error = np.sqrt((1 / count + 1 / (folds - 1)) * values.var(ddof=1))
    half = float(stats.t.ppf(0.975, count - 1) * error)
    return float(values.mean()) - half, float(values.mean()) + half


def difference(a: FoldScores, b: FoldScores) -> FoldScores:
    """a minus b, fold by fold. Raises ValueError when the two were not scored on the same folds."""
    if a.folds_id != b.folds_id:
        raise ValueError("scores of different frames or folds cannot be paired: use the same frames, folds and seed")
    return FoldScores(values=a.values - b.values, balanced=a.balanced - b.balanced, folds=a.folds, folds_id=a.folds_id)


def knn_scores(
    embeddings: NDArray[np.float32],
    frames: LabeledFrames,
    *,
    k: int = NEIGHBORS,
    folds: int = FOLDS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> FoldScores:
    """Scores of k-nearest-neighbor classification: cosine distance, votes weighted by inverse distance.

    Raises UsageError for too few frames or a k that a training part cannot serve.
    """
    smallest = smallest_training_part(frames, folds=folds, repeats=repeats, seed=seed)
    if not 1 <= k <= smallest:
        raise UsageError(f"k must be between 1 and {smallest}, the frames of the smallest training part, not {k}")
    classifier = KNeighborsClassifier(n_neighbors=k, metric="cosine", weights="distance", algorithm="brute")
    return _cross_validate(classifier, embeddings, frames, folds=folds, repeats=repeats, seed=seed)


def probe_scores(
    embeddings: NDArray[np.float32],
    frames: LabeledFrames,
    *,
    folds: int = FOLDS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> FoldScores:
    """Scores of a linear probe: standardized features, multinomial logistic regression with L2 penalty, C = 0.1.

    The penalty was settled on randomly initialized encoders and is fixed, so that no encoder has more tries than
    another. Raises UsageError for too few frames.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=PROBE_C, max_iter=2000))
    return _cross_validate(classifier, embeddings, frames, folds=folds, repeats=repeats, seed=seed)


Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Indices of the training part and of the test part."""


def grouped_folds(frames: LabeledFrames, *, folds: int, repeats: int, seed: int) -> list[Fold]:
    """``repeats`` times ``folds`` stratified folds that keep near-duplicates together; the same for every encoder.

    Raises UsageError when a class has fewer distinct frames than there are folds.
    """
    check_folds(frames, folds=folds)
    labels, groups = frames.labels.astype(np.int64).tobytes(), frames.groups.astype(np.int64).tobytes()
    return [
        (np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold))
        for repeat in range(repeats)
        for fold_of in [_fold_of_frames(labels, groups, folds, seed + repeat)]
        for fold in range(folds)
    ]


@lru_cache(maxsize=32)  # half a second for 1000 frames, and every encoder asks for the same
def _fold_of_frames(labels: bytes, groups: bytes, folds: int, seed: int) -> NDArray[np.int64]:
    """(N,) number of the fold that tests each frame; int64 labels and groups as bytes."""
    classes = np.frombuffer(labels, dtype=np.int64)
    fold_of = np.empty(len(classes), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(classes, classes, np.frombuffer(groups, dtype=np.int64))):
        fold_of[test] = fold
    fold_of.flags.writeable = False
    return fold_of


def smallest_training_part(frames: LabeledFrames, *, folds: int, repeats: int, seed: int) -> int:
    """Frames of the smallest training part of all folds."""
    return min(len(train) for train, _ in grouped_folds(frames, folds=folds, repeats=repeats, seed=seed))


def _cross_validate(
    classifier: Any, embeddings: NDArray[np.float32], frames: LabeledFrames, *, folds: int, repeats: int, seed: int
) -> FoldScores:
    """Fit on each training part, score on its test part."""
    check_embeddings(embeddings, frames)
    accuracy, balanced = [], []
    digest = hashlib.sha256(frames.labels.tobytes())
    for train, test in grouped_folds(frames, folds=folds, repeats=repeats, seed=seed):
        predicted = clone(classifier).fit(embeddings[train], frames.labels[train]).predict(embeddings[test])
        accuracy.append(float((predicted == frames.labels[test]).mean()))
        balanced.append(float(balanced_accuracy_score(frames.labels[test], predicted)))
        digest.update(test.tobytes())
    return FoldScores(
        values=np.array(accuracy), balanced=np.array(balanced), folds=folds, folds_id=digest.hexdigest()[:16]
    )


def check_embeddings(embeddings: NDArray[np.float32], frames: LabeledFrames) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(frames):
        raise ValueError(f"embeddings of {len(frames)} frames must be ({len(frames)}, D), not {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise PolypSegError(
            "the encoder's embeddings are not finite: its training diverged, or its weights are damaged"
        )
