"""What each difference between two sets costs a model: the test set re-rendered toward the other, one factor at a time.

This is an experiment on pictures, not a cause: factors interact, a re-rendering reaches the other set's measures only
in part, and what no factor renders (anatomy, preparation, annotation) stays in the remainder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from polypseg.data.polyps import PolypDataset, Record
from polypseg.evaluation.metrics import pixel_counts, standard_scores
from polypseg.inference.prediction_source import PredictionSource
from polypseg.shift.comparison import MeasuredSet
from polypseg.shift.factors import FACTORS, SAMPLE, Factor, Look, Render
from polypseg.shift.frame_statistics import measure_frame
from polypseg.statistics import (
    RESAMPLES,
    Interval,
    PairComparison,
    compare_models,
    generalization_gaps,
    mean_intervals,
    score_set,
)

PLAIN, ALL = "as it is", "all factors"


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderedDataset(PolypDataset):
    """A dataset whose frames and masks are re-rendered on reading."""

    base: PolypDataset
    """The dataset as it is."""
    renders: tuple[Render, ...] = ()
    strength: float = 1.0
    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def pair(self, record: Record) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Frame and 0/1 mask, re-rendered; errors as of the dataset."""
        return _rendered(self, record.id)

    def mask(self, record: Record) -> NDArray[np.uint8]:
        """The re-rendered mask (H, W) in {0, 1}."""
        return self.pair(record)[1]

    def frame(self, record: Record) -> Image.Image:
        """The re-rendered frame."""
        return self.pair(record)[0]


@lru_cache(maxsize=32)
def _rendered(dataset: RenderedDataset, record_id: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    image, mask = dataset.base.pair(dataset.by_id[record_id])
    frame = np.asarray(image)
    for render in dataset.renders:
        frame, mask = render(frame, mask, dataset.strength, record_id)
    return Image.fromarray(frame), mask


def render_dataset(dataset: PolypDataset, renders: Sequence[Render], *, strength: float = 1.0) -> RenderedDataset:
    """The dataset seen through some re-renderings, in order."""
    return RenderedDataset(
        spec=dataset.spec,
        source=dataset.source,
        records=dataset.records,
        base=dataset,
        renders=tuple(renders),
        strength=strength,
    )


@dataclass(frozen=True, kw_only=True)
class ShiftSet:
    """Images of one side of a shift, measured."""

    dataset: PolypDataset
    ids: tuple[str, ...]
    measured: MeasuredSet
    look: Look


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What re-rendering one set toward another costs one model."""

    model: str
    titles: tuple[str, str]
    sizes: tuple[int, int]
    strength: float
    inside: Interval
    """Mean Dice on the set as it is."""
    outside: Interval
    """Mean Dice on the other set."""
    drop: Interval
    """Inside minus outside."""
    costs: tuple[PairComparison, ...]
    """As it is minus re-rendered, one a factor and one for all together; p_holm over all of them."""
    cross_talk: dict[str, dict[str, float]]
    """Factor -> measure -> share of the difference between the sets that the re-rendering covers: 1 all, 0 nothing.

    Measures that differ by less than a tenth of their spread are left out.
    """
    dice: dict[str, NDArray[np.float64]]
    """Condition -> Dice (N,) of the set's images."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a factor, costliest first; ``share_of_drop`` None where nothing is lost between the sets."""
        drop = self.drop.estimate
        rows = []
        for cost in sorted(self.costs, key=lambda c: (c.b == ALL, -c.difference.estimate)):
            rows.append(
                {
                    "factor": cost.b,
                    **cost.difference.cells("cost"),
                    "p_holm": cost.p_holm,
                    "share_of_drop": cost.difference.estimate / drop if drop > 0 else None,
                    "covered": self.covered(cost.b),
                }
            )
        return rows

    def covered(self, factor: str) -> float | None:
        """How much of the difference in its own measures a factor's re-rendering covers, on average; None for none."""
        own = next((f.measures for f in FACTORS if f.name == factor), ())
        shares = [share for name, share in self.cross_talk[factor].items() if name in own]
        return float(np.mean(shares)) if shares else None

    def content(self) -> dict[str, Any]:
        """For JSON."""
        intervals = {name: vars(getattr(self, name)) for name in ("inside", "outside", "drop")}
        return {
            "model": self.model,
            "titles": list(self.titles),
            "n": list(self.sizes),
            "strength": self.strength,
            **intervals,
            "factors": self.rows(),
            "cross_talk": self.cross_talk,
            "images": {name: values.tolist() for name, values in self.dice.items()},
        }


def attribute_shift(
    source: PredictionSource,
    inside: ShiftSet,
    outside: ShiftSet,
    *,
    factors: Sequence[Factor] = FACTORS,
    strength: float = 1.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Attribution:
    """Test a model on ``inside`` as it is and re-rendered toward ``outside``, factor by factor and by all together.

    Raises ValueError for a strength outside [0, 1], whatever the source raises otherwise.
    """
    fitted = {factor.name: factor.render(inside.look, outside.look) for factor in factors}
    conditions = {PLAIN: (), **{name: (render,) for name, render in fitted.items()}, ALL: tuple(fitted.values())}
    dice, talk = {}, {}
    for name, renders in tqdm(conditions.items(), desc=f"re-rendering {inside.measured.title}", unit="condition"):
        rendered = render_dataset(inside.dataset, renders, strength=strength)
        dice[name] = dice_of(source, rendered, inside.ids)
        if renders:
            talk[name] = _cross_talk(rendered, inside, outside)
    scores = score_set(dice, title=inside.measured.title, clusters=inside.measured.clusters)
    elsewhere = score_set(
        {PLAIN: dice_of(source, outside.dataset, outside.ids)},
        title=outside.measured.title,
        clusters=outside.measured.clusters,
    )
    common: dict[str, Any] = {"resamples": resamples, "seed": seed}
    plain = score_set({PLAIN: dice[PLAIN]}, title=inside.measured.title, clusters=inside.measured.clusters)
    (gap,) = generalization_gaps(plain, elsewhere, **common)
    return Attribution(
        model=source.name,
        titles=(inside.measured.title, outside.measured.title),
        sizes=(len(inside.ids), len(outside.ids)),
        strength=strength,
        inside=mean_intervals(plain, **common)[PLAIN],
        outside=mean_intervals(elsewhere, **common)[PLAIN],
        drop=gap.gap,
        costs=tuple(compare_models(scores, pairs=[(PLAIN, name) for name in talk], **common)),
        cross_talk=talk,
        dice=dice,
    )


def dice_of(source: PredictionSource, dataset: PolypDataset, ids: Sequence[str]) -> NDArray[np.float64]:
    """(N,) Dice of each image at its mask's size, probability above 0.5; the textbook rule for empty masks."""
    counts = [
        pixel_counts(probability > 0.5, dataset.mask(dataset.by_id[record_id]).astype(bool))
        for record_id, probability in source.predict(dataset, ids)
    ]
    return standard_scores(*np.array(counts).T)["dice"]


def _cross_talk(rendered: RenderedDataset, inside: ShiftSet, outside: ShiftSet) -> dict[str, float]:
    """Share of each measure's difference between the sets that a re-rendering covers, on a sample."""
    before, after = [], []
    for record in _sample(rendered, inside.ids):
        image, mask = rendered.base.pair(record)
        changed, cut = rendered.pair(record)
        if mask.any() and cut.any():
            before.append(measure_frame(np.asarray(image), mask))
            after.append(measure_frame(np.asarray(changed), cut))
    shares = {}
    for name, values in inside.measured.values.items():
        difference = outside.look.means.get(name, np.nan) - inside.look.means[name]
        if before and abs(difference) > 0.1 * values.std():
            moved = np.mean([row[name] for row in after]) - np.mean([row[name] for row in before])
            shares[name] = float(moved / difference)
    return shares


def _sample(dataset: PolypDataset, ids: Sequence[str]) -> Iterator[Record]:
    places = np.unique(np.linspace(0, len(ids) - 1, SAMPLE).astype(int))
    return (dataset.by_id[ids[place]] for place in places)
