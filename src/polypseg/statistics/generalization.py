"""How much is lost from the hospital a model was trained on to another, for each model and for groups of models.

gap = mean in distribution - mean out of distribution. The two sets' images are drawn independently, and each draw is
the same for all models, so contrasts between models keep what the models share.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polypseg import zoo
from polypseg.errors import UsageError, unknown_name
from polypseg.statistics.intervals import Interval, interval_of
from polypseg.statistics.rankings import RankChange, analyze_rank_change
from polypseg.statistics.resampling import RESAMPLES, Draws, draw_both
from polypseg.statistics.scores import Floats, ScoreSet
from polypseg.zoo import ZooEntry

Groups = tuple[tuple[str, ...], tuple[str, ...]]
"""The models on either side of a contrast."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One model in and out of distribution."""

    model: str
    inside: Interval
    outside: Interval
    gap: Interval
    relative: Interval | None
    """Gap over the mean in distribution; None where that mean is not positive in every draw."""

    def row(self) -> dict[str, Any]:
        """One row of a table."""
        name = "relative_gap"
        missing = dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        return {
            "model": self.model,
            **self.inside.cells("inside"),
            **self.outside.cells("outside"),
            **self.gap.cells("gap"),
            **(missing if self.relative is None else self.relative.cells(name)),
        }


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Mean over one group of models minus mean over another."""

    name: str
    groups: Groups
    inside: Interval
    outside: Interval
    gap: Interval
    """Negative: the first group loses less."""

    def row(self) -> dict[str, Any]:
        """One row of a table."""
        return {
            "contrast": self.name,
            "models_a": len(self.groups[0]),
            "models_b": len(self.groups[1]),
            **self.inside.cells("inside"),
            **self.outside.cells("outside"),
            **self.gap.cells("gap"),
        }


@dataclass(frozen=True, kw_only=True)
class Generalization:
    """Several models in and out of distribution: what each loses, and whether their ranking changes."""

    gaps: tuple[Gap, ...]
    """One a model, in the order of the sets."""
    change: RankChange | None
    """None for a single model."""


def analyze_generalization(
    inside: ScoreSet, outside: ScoreSet, *, resamples: int = RESAMPLES, seed: int = 0
) -> Generalization:
    """Gaps and change of ranking. Raises ValueError when the sets are not of the same models and seeds."""
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}
    return Generalization(
        gaps=tuple(generalization_gaps(inside, outside, **how)),
        change=analyze_rank_change(inside, outside, **how) if len(inside.models) > 1 else None,
    )


def generalization_gaps(inside: ScoreSet, outside: ScoreSet, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Gap]:
    """The gap of every model, with intervals. Raises ValueError when the sets are not of the same models and seeds."""
    draws = draw_both(inside, outside, resamples=resamples, seed=seed)
    gaps = []
    for m, name in enumerate(inside.models):
        one, other, gap = _weighted(draws, np.eye(len(inside.models))[m])
        gaps.append(Gap(model=name, inside=one, outside=other, gap=gap, relative=_relative(draws, m)))
    return gaps


def group_contrasts(
    inside: ScoreSet,
    outside: ScoreSet,
    groups: Mapping[str, Groups],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Contrast]:
    """Contrasts by name of two groups of models: in distribution, out of distribution, and of the gap.

    The models of a group are taken as they are, not as a sample of all models that could be in it. Raises UsageError
    for an unknown model, an empty group or a model in both groups.
    """
    draws = draw_both(inside, outside, resamples=resamples, seed=seed)
    contrasts = []
    for name, (first, second) in groups.items():
        for model in (*first, *second):
            if model not in inside.models:
                raise unknown_name("model", model, inside.models)
        if not first or not second or set(first) & set(second):
            raise UsageError(f"contrast {name!r} needs two groups of models without a common one")
        weights = np.array([(m in first) / len(first) - (m in second) / len(second) for m in inside.models])
        one, other, gap = _weighted(draws, weights)
        contrasts.append(Contrast(name=name, groups=(first, second), inside=one, outside=other, gap=gap))
    return contrasts


def study_groups(
    models: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
    random_starts: Collection[str] = (),
    unknown_starts: Collection[str] = (),
) -> dict[str, Groups]:
    """The study's questions as groups of the table's rows, of those in ``models``; one without a side is left out.

    ``names``: what the questions call an encoder or a corpus of the table, where others stand in for it.
    ``random_starts``: rows whose encoder in truth started at random, whatever pretraining they are named after;
    ``unknown_starts``: rows whose start is not recorded or is not their own, which no question of pretraining takes.
    Questions of pretraining compare within kinds of encoder: a kind that only one side has is left out of both.
    """
    called = {"vit_base": "ViT-B", "resnet50": "ResNet50", "imagenet1k": "ImageNet-1k", "hyperkvasir": "Hyperkvasir"}
    called |= names or {}
    rows = [row for row in zoo.ZOO if row.model_id in models]
    self_supervised = ("moco_v3", "barlow_twins", "mae")

    def started(methods: tuple[str, ...], *corpora: str) -> list[ZooEntry]:
        known = [row for row in rows if row.model_id not in unknown_starts]
        at_random = {row.model_id for row in known if row.method == "none" or row.model_id in random_starts}
        if methods == ("none",):
            return [row for row in known if row.model_id in at_random]
        return [
            row
            for row in known
            if row.model_id not in at_random and row.method in methods and (not corpora or row.corpus in corpora)
        ]

    def of(encoder: str) -> list[ZooEntry]:
        return [row for row in rows if row.encoder == encoder]

    def within_encoders(first: list[ZooEntry], second: list[ZooEntry]) -> tuple[list[ZooEntry], list[ZooEntry]]:
        both = {row.encoder for row in first} & {row.encoder for row in second}
        return [row for row in first if row.encoder in both], [row for row in second if row.encoder in both]

    imagenet, hyperkvasir = (started(self_supervised, corpus) for corpus in ("imagenet1k", "hyperkvasir"))
    questions = {
        f"{called['vit_base']} - {called['resnet50']}": (of("vit_base"), of("resnet50")),
        f"self-supervised - supervised, {called['imagenet1k']}": within_encoders(
            imagenet, started(("supervised",), "imagenet1k")
        ),
        f"{called['imagenet1k']} - {called['hyperkvasir']}, self-supervised": within_encoders(imagenet, hyperkvasir),
        "pretrained - random": within_encoders(started((*self_supervised, "supervised")), started(("none",))),
    }
    sides = {
        name: (tuple(row.model_id for row in first), tuple(row.model_id for row in second))
        for name, (first, second) in questions.items()
    }
    return {name: groups for name, groups in sides.items() if all(groups)}


def _weighted(draws: tuple[Draws, Draws], weights: Floats) -> tuple[Interval, Interval, Interval]:
    """Weighted sums (M,) of the models' means: in distribution, out of it, and the gap between the two."""
    one, other = (draw.values @ weights for draw in draws)
    means = [float(draw.estimates @ weights) for draw in draws]
    return (
        interval_of(one, means[0], freedom=draws[0].freedom),
        interval_of(other, means[1], freedom=draws[1].freedom),
        interval_of(one - other, means[0] - means[1], freedom=_joint_freedom(draws, one, other)),
    )


def _joint_freedom(draws: tuple[Draws, Draws], one: Floats, other: Floats) -> float | None:
    """Welch and Satterthwaite's degrees of freedom of a difference of two independent means; 0 if a set has none."""
    if min(draw.freedom for draw in draws) <= 0:
        return 0
    variances = [float(one.var()), float(other.var())]
    parts = sum(v**2 / draw.freedom for v, draw in zip(variances, draws, strict=True))
    return None if parts == 0 else sum(variances) ** 2 / parts


def _relative(draws: tuple[Draws, Draws], model: int) -> Interval | None:
    one, other = (draw.values[:, model] for draw in draws)
    means = [float(draw.estimates[model]) for draw in draws]
    if min(means[0], float(one.min())) <= 0:
        return None
    return interval_of(1 - other / one, 1 - means[1] / means[0], freedom=_joint_freedom(draws, one, other))
