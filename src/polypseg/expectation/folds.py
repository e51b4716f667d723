"""Held-out predictions of the expected Dice: of sets, corruption families and models that the learner had not seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.expectation.cells import CLEAN
from polypseg.expectation.learner import Learn, baselines, predict

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Columns = Mapping[str, NDArray[Any]]
MILD = 0.6
"""Cells above this Dice are reported apart: severe corruptions are easy to predict."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Rows to learn from and rows to predict: no row of the first shares set, frame, family or model with the second's
    held-out thing."""

    train: Bools
    test: Bools


def folds(columns: Columns, *, model: str, anchor: str) -> Iterator[Fold]:
    """A fold for every (set, corruption) of ``model`` and every (set, other model); the set ``anchor`` is never
    predicted.

    To learn from: other sets, under other corruptions (a corrupted cell), or by other models (another model's cell).
    """
    for name in sorted(set(columns["set"].tolist()) - {anchor}):
        here = columns["set"] == name
        for kind in sorted(set(columns["kind"].tolist())):
            test = here & (columns["kind"] == kind) & (columns["model"] == model)
            other = np.ones(len(here), dtype=bool) if kind == CLEAN else columns["kind"] != kind
            if test.any():
                yield Fold(train=~here & other, test=test)
        for one in sorted(set(columns["model"].tolist()) - {model}):
            test = here & (columns["model"] == one)
            if test.any():
                yield Fold(train=~here & (columns["model"] != one), test=test)


def held_out(columns: Columns, learn: Learn, *, model: str, anchor: str) -> Floats:
    """(N,) expected Dice of every row by a learner that had not seen its set, nor its family or model; NaN for rows
    that no fold predicts."""
    expected = np.full(len(columns["dice"]), np.nan)
    for fold in folds(columns, model=model, anchor=anchor):
        predictor = learn(columns["features"][fold.train], columns["dice"][fold.train])
        expected[fold.test] = predict(predictor, columns["features"][fold.test])
    return expected


def held_out_baselines(columns: Columns, *, model: str, anchor: str) -> dict[str, Floats]:
    """The baselines' values (N,) of every row, from ``model`` on the labeled set ``anchor``, which no row is of."""
    source = (columns["set"] == anchor) & (columns["model"] == model)
    found = baselines(columns["features"][source], columns["dice"][source])
    return {name: predict(steps, columns["features"]) for name, steps in found.items()}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is predicted as one: a real set, or all sets under a corruption at a severity, or by another model."""

    sort: str
    """``set``, ``corruption`` or ``model``."""
    family: str
    """The set, the corruption's kind or the model: what was held out."""
    severity: int
    rows: Bools


def units(columns: Columns, *, model: str, anchor: str) -> list[Unit]:
    """The units of a matrix, without the anchor."""
    own, clean = columns["model"] == model, columns["kind"] == CLEAN
    here = columns["set"] != anchor
    found = [
        Unit(sort="set", family=name, severity=0, rows=own & clean & (columns["set"] == name))
        for name in _values(columns["set"][own & clean & here])
    ]
    for kind in _values(columns["kind"][~clean]):
        for severity in _values(columns["severity"][columns["kind"] == kind]):
            rows = own & here & (columns["kind"] == kind) & (columns["severity"] == severity)
            found.append(Unit(sort="corruption", family=kind, severity=int(severity), rows=rows))
    for one in _values(columns["model"][~own]):
        found.append(Unit(sort="model", family=one, severity=0, rows=here & clean & (columns["model"] == one)))
    return found


def _values(column: NDArray[Any]) -> list[Any]:
    return sorted(set(column.tolist()))


def unit_errors(found: Sequence[Unit], expected: Floats, dice: Floats) -> Floats:
    """(U,) expected minus measured mean Dice."""
    return np.array([expected[unit.rows].mean() - dice[unit.rows].mean() for unit in found])


def family_errors(found: Sequence[Unit], errors: Floats) -> dict[tuple[str, str], float]:
    """(sort, family) -> the greatest absolute error of its units: one entry for each thing that was held out."""
    greatest: dict[tuple[str, str], float] = {}
    for unit, error in zip(found, errors, strict=True):
        key = (unit.sort, unit.family)
        greatest[key] = max(greatest.get(key, 0.0), abs(float(error)))
    return greatest


def mean_absolute(found: Sequence[Unit], errors: Floats, keep: Callable[[Unit], bool] = lambda unit: True) -> float:
    """Mean absolute error over units, every held-out family counting as one. NaN where none is kept."""
    families: dict[tuple[str, str], list[float]] = {}
    for unit, error in zip(found, errors, strict=True):
        if keep(unit):
            families.setdefault((unit.sort, unit.family), []).append(abs(float(error)))
    return float(np.mean([np.mean(values) for values in families.values()])) if families else float("nan")
