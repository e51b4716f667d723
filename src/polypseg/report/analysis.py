"""What polypseg.statistics says of a study's receipts; nothing is computed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polypseg.card_facts import CONVENTION, Test
from polypseg.metrics import METRICS
from polypseg.report.material import Material, Receipt
from polypseg.statistics import (
    RESAMPLES,
    Comparison,
    Contrast,
    Gap,
    RankChange,
    ScoreSet,
    analyse_rank_change,
    compare_models,
    generalisation_gaps,
    group_contrasts,
    mean_rows,
    read_score_set,
    study_groups,
)

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
    comparisons: tuple[tuple[Comparison, ...], ...] = ()
    """All pairs in distribution, then out of it."""
    change: RankChange | None = None


def score_set_of(receipts: Mapping[str, Sequence[Receipt]], *, metric: str = "dice") -> ScoreSet:
    """Scores of rows, one receipt a seed, on one test; images of equal pixels count once."""
    contents = {model: [receipt.content for receipt in seeds] for model, seeds in receipts.items()}
    return read_score_set(contents, metric=f"{CONVENTION}.{metric}")


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
    several = len(material.compared) > 1
    groups = study_groups(list(material.compared), names=material.names)
    return Analysis(
        **common,  # type: ignore[arg-type]
        inside=inside,
        outside=outside,
        gaps=tuple(generalisation_gaps(inside, outside, resamples=resamples)),
        contrasts=tuple(group_contrasts(inside, outside, groups, resamples=resamples)),
        comparisons=tuple(tuple(compare_models(s, resamples=resamples)) for s in (inside, outside) if several),
        change=analyse_rank_change(inside, outside, resamples=resamples) if several else None,
    )


def _drawn_together(material: Material, test: Test) -> list[list[str]]:
    """Rows with as many seeds on a test, the compared ones by themselves: so all tables state the same intervals."""
    groups: dict[tuple[bool, int], list[str]] = {}
    for model in material.models:
        count = len(material.used(model, test))
        if count:
            groups.setdefault((model in material.compared, count), []).append(model)
    return list(groups.values())
