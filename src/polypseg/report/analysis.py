"""What polypseg.statistics says of a study's receipts; nothing is computed here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polypseg.evaluation.receipt import CONVENTION, Receipt, Test, read_score_set
from polypseg.report.receipts import Material
from polypseg.report.wording import ALPHA
from polypseg.statistics import (
    RESAMPLES,
    Contrast,
    Gap,
    Interval,
    PairComparison,
    RankChange,
    RunVariation,
    ScoreSet,
    analyze_generalization,
    compare_models,
    group_contrasts,
    mean_rows,
    run_variation,
    study_groups,
    widened,
)
from polypseg.statistics.scores import METRICS

SIDES = ("inside", "outside", "gap")
"""Mean Dice in and out of distribution, and the loss between the two."""
MeanKey = tuple[str, Test, str]
"""Row, test, metric."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The numbers of a report. What needs both tests, or two rows, is empty or None without them."""

    material: Material
    means: Mapping[MeanKey, Mapping[str, Any]]
    """Rows of statistics.mean_rows."""
    seed_means: Mapping[MeanKey, tuple[float, ...]]
    """Mean of each trained network, by seed."""
    inside: ScoreSet | None
    outside: ScoreSet | None
    """Dice of the compared rows."""
    gaps: tuple[Gap, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    comparisons: tuple[tuple[PairComparison, ...], ...] = ()
    """All pairs in distribution, then out of it."""
    change: RankChange | None = None
    runs: Mapping[str, RunVariation] = field(default_factory=dict)
    """Variation of mean Dice between repeated runs, ``inside``, ``outside`` and of the loss (``gap``), where measured.

    Measured from every repeated run among the receipts: seeds of a row, and rows that share start and recipe.
    """

    @property
    def seeds(self) -> int:
        """Training runs of each compared row; 0 without compared rows."""
        return self.inside.seeds if self.inside else 0

    @property
    def claims(self) -> bool:
        """Whether anything may be said of differences between trained models: not from one training run of each."""
        return self.seeds > 1

    def floor(self, which: str, *sides: int) -> float | None:
        """Noise floor of a difference of groups of so many models: what identical recipes differ by; None: unknown."""
        runs = self.runs.get(which)
        return None if runs is None or not self.seeds else runs.floor(*sides, seeds=self.seeds)

    def is_shown(self, value: Interval) -> bool:
        """Whether a difference between trained models is beyond the chance of images and training runs."""
        return self.claims and value.excludes_zero

    def certain_flips(self) -> list[dict[str, Any]]:
        """Pairs shown to change places: by Holm's p over images, and both differences beyond that of training runs."""
        if self.change is None or not self.claims:
            return []
        return [
            pair
            for pair, one, other in zip(self.change.pairs, *self.comparisons, strict=True)
            if pair["p_flip_holm"] < ALPHA and self.is_shown(one.difference) and self.is_shown(other.difference)
        ]


def score_set_of(receipts: Mapping[str, Sequence[Receipt]], *, metric: str = "dice") -> ScoreSet:
    """Scores of rows, one receipt a seed, on one test; images of equal pixels count once."""
    return read_score_set(receipts, metric=f"{CONVENTION}.{metric}")


def analyse(material: Material, *, resamples: int = RESAMPLES) -> Analysis:
    """All statistics of a study's receipts. Raises UsageError for receipts that are not of the same images."""
    means, seed_means = {}, {}
    for test in material.polyp_tests:
        for models in _drawn_together(material, test):
            used = {model: material.used(model, test) for model in models}
            for metric in METRICS:
                scores = score_set_of(used, metric=metric)
                for row, values in zip(mean_rows(scores, resamples=resamples), scores.values, strict=True):
                    means[row["model"], test, metric] = row
                    seed_means[row["model"], test, metric] = tuple(values.mean(axis=1).tolist())
    common = {"material": material, "means": means, "seed_means": seed_means}
    if not material.compared:
        return Analysis(**common, inside=None, outside=None)  # type: ignore[arg-type]
    inside, outside = (
        score_set_of({model: material.used(model, test) for model in material.compared})
        for test in (material.inside, material.outside)
    )
    found = analyze_generalization(inside, outside, resamples=resamples)
    groups = study_groups(
        list(material.compared),
        names=material.names,
        random_starts=material.random_starts,
        unknown_starts=material.unknown_starts,
    )
    runs = _measure_runs(material)
    sets = {"inside": inside, "outside": outside} if found.change else {}
    return Analysis(
        **common,  # type: ignore[arg-type]
        inside=inside,
        outside=outside,
        gaps=found.gaps,
        contrasts=tuple(
            _contrast_with_runs(contrast, runs, seeds=inside.seeds)
            for contrast in group_contrasts(inside, outside, groups, resamples=resamples)
        ),
        comparisons=tuple(
            tuple(
                replace(pair, difference=_with_runs(pair.difference, runs.get(which), 1, 1, seeds=scores.seeds))
                for pair in compare_models(scores, resamples=resamples)
            )
            for which, scores in sets.items()
        ),
        change=found.change,
        runs=runs,
    )


def _measure_runs(material: Material) -> dict[str, RunVariation]:
    """The variation between repeated runs in and out of distribution, and of the loss of runs tested on both."""
    tests = {"inside": material.inside, "outside": material.outside}
    means = {which: [_run_means(group) for group in material.repeated_runs(test)] for which, test in tests.items()}
    outside = {weights: mean for group in means["outside"] for weights, mean in group.items()}
    means["gap"] = [
        {weights: mean - outside[weights] for weights, mean in group.items() if weights in outside}
        for group in means["inside"]
    ]
    found = {which: run_variation(list(group.values()) for group in groups) for which, groups in means.items()}
    return {which: runs for which, runs in found.items() if runs is not None}


def _run_means(receipts: Sequence[Receipt]) -> dict[str, float]:
    return {str(receipt.model_sha256): receipt.mean_dice for receipt in receipts}


def _with_runs(value: Interval, runs: RunVariation | None, *sides: int, seeds: int) -> Interval:
    """A difference's interval with what its draws leave out of run-to-run variation: all with one seed, else 1/seeds.

    Drawing S trained networks from S shows (S - 1) / S of the variance of their mean. With one seed and no repeated
    run the variation is not known, and the interval loses its bounds.
    """
    if runs is None:
        return value if seeds > 1 else widened(value, None)
    return widened(value, runs.floor(*sides, seeds=seeds) / math.sqrt(seeds))


def _contrast_with_runs(contrast: Contrast, runs: Mapping[str, RunVariation], *, seeds: int) -> Contrast:
    sides = tuple(map(len, contrast.groups))
    inside, outside, gap = (
        _with_runs(getattr(contrast, which), runs.get(which), *sides, seeds=seeds) for which in SIDES
    )
    return replace(contrast, inside=inside, outside=outside, gap=gap)


def _drawn_together(material: Material, test: Test) -> list[list[str]]:
    """Rows with as many seeds on a test, the compared ones by themselves: so all tables state the same intervals."""
    groups: dict[tuple[bool, int], list[str]] = {}
    for model in material.models:
        count = len(material.used(model, test))
        if count:
            groups.setdefault((model in material.compared, count), []).append(model)
    return list(groups.values())
