"""Margins learned from cells: needed widths on the validation frames, coverage elsewhere, and the alarm."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from polypseg.expectation.cells import CLEAN, NEVER
from polypseg.expectation.folds import Columns
from polypseg.expectation.intervals import LEVEL, group_means
from polypseg.inference.margin import COVERED, Margin
from polypseg.inference.predictor import Steps

Floats = NDArray[np.float64]
SPLITS = 50
BATCH = 30
"""Frames of the batches on which false alarms are counted."""
_BATCHES = 200
HARMED = 0.8
"""Coverage below which an alarm is wanted."""


def relative_needs(columns: Columns) -> Floats:
    """(N,) needed margins in units of the square root of the mask's area; infinite for empty masks."""
    needs = np.full(len(columns["need"]), np.inf)
    made = columns["need"] != NEVER
    needs[made] = columns["need"][made] / columns["size"][made]
    return needs


def learn_margin(columns: Columns, expected: Floats, *, model: str, anchor: str, usual: str) -> Margin:
    """A margin calibrated on the frames of ``anchor``; ``expected`` (N,): held-out expected Dice, NaN where none is.

    ``usual``: the set, like the anchor, whose probability of holding is the usual one.
    """
    own = columns["model"] == model
    needs = np.sort(relative_needs(columns)[own & (columns["set"] == anchor)])
    start = Steps(feature="expected_dice", x=(0.0, 1.0), y=(0.0, 0.0))
    margin = Margin(
        needs=tuple(None if np.isinf(need) else float(need) for need in needs),
        holds=start,
        level=LEVEL,
        usual=0.0,
        spread=0.0,
    )
    held = _held(columns, margin)
    rows = own & ~np.isnan(expected)
    fitted = IsotonicRegression(out_of_bounds="clip").fit(expected[rows], held[rows].astype(np.float64))
    holds = Steps(
        feature="expected_dice",
        x=tuple(np.round(fitted.X_thresholds_, 5).tolist()),
        y=tuple(np.round(fitted.y_thresholds_, 5).tolist()),
    )
    there = rows & (columns["set"] == usual) & (columns["kind"] == CLEAN)
    values = holds(expected[there][:, None])
    return Margin(
        needs=margin.needs, holds=holds, level=LEVEL, usual=float(values.mean()), spread=float(values.std(ddof=1))
    )


def _held(columns: Columns, margin: Margin) -> NDArray[np.bool_]:
    held: NDArray[np.bool_] = relative_needs(columns) <= margin.factor(margin.level)
    return held


def margin_evidence(
    columns: Columns, margin: Margin, expected: Floats, *, model: str, anchor: str, usual: str
) -> dict[str, Any]:
    """Coverage over random splits, by set, clip and corruption; what the alarm finds and how often it is false."""
    own, clean = columns["model"] == model, columns["kind"] == CLEAN
    held, needs = _held(columns, margin), relative_needs(columns)
    pool = needs[own & clean & np.isin(columns["set"], [anchor, usual])]
    rng, half = np.random.default_rng(0), len(pool) // 2
    rank = ceil(round(margin.level * (half + 1), 9)) - 1
    splits = []
    for _ in range(SPLITS):
        order = rng.permutation(pool)
        splits.append(float((order[half:] <= np.sort(order[:half])[rank]).mean()))
    factor = margin.factor(margin.level)
    sizes = columns["size"][own & (columns["set"] == anchor) & (columns["need"] != NEVER)]
    sets = {}
    for name in sorted(set(columns["set"][own].tolist())):
        rows = own & clean & (columns["set"] == name)
        by_clip = group_means(held[rows], columns["group"][rows].tolist())
        sets[name] = {
            "n": int(rows.sum()),
            "coverage": float(held[rows].mean()),
            "coverage_by_clip": float(by_clip.mean()),
            "clips": len(by_clip),
            "empty": int((columns["need"][rows] == NEVER).sum()),
        }
    batches = _alarms(columns, margin, held, expected, own=own)
    like = np.flatnonzero(own & clean & (columns["set"] == usual))
    batch = min(BATCH, len(like))
    false = [bool(margin.alarm(_known(expected, rng.choice(like, batch, replace=False)))) for _ in range(_BATCHES)]
    harmed = [row["alarm"] for row in batches if row["coverage"] < HARMED]
    return {
        "covered": COVERED,
        "level": margin.level,
        "factor": factor,
        "n": len(margin.needs),
        "splits": {"number": SPLITS, "mean": float(np.mean(splits)), "sd": float(np.std(splits, ddof=1))},
        # A disc of the mask's area that grows by the margin.
        "area_factor": float((1 + factor * np.sqrt(np.pi)) ** 2),
        "mean_size": float(sizes.mean()),
        "sets": sets,
        "cells": batches,
        "alarm": {
            "harmed": len(harmed),
            "found": int(sum(harmed)),
            "not_harmed": len(batches) - len(harmed),
            "raised_on_not_harmed": sum(row["alarm"] for row in batches if row["coverage"] >= HARMED),
            "batches": _BATCHES,
            "batch_frames": batch,
            "false": float(np.mean(false)),
        },
    }


def _known(expected: Floats, rows: NDArray[np.int64]) -> Sequence[float | None]:
    return [None if np.isnan(value) else float(value) for value in expected[rows]]


def _alarms(
    columns: Columns, margin: Margin, held: NDArray[np.bool_], expected: Floats, *, own: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Of each set and each corruption at a severity: coverage, and whether the alarm is raised."""
    found = []
    keys = dict.fromkeys(
        (name if kind == CLEAN else "all sets", kind, int(severity))
        for name, kind, severity, mine, known in zip(
            columns["set"].tolist(), columns["kind"].tolist(), columns["severity"].tolist(), own, ~np.isnan(expected),
            strict=True,
        )
        if mine and known
    )  # fmt: skip
    for name, kind, severity in keys:
        rows = own & (columns["kind"] == kind) & (columns["severity"] == severity) & ~np.isnan(expected)
        if kind == CLEAN:
            rows &= columns["set"] == name
        places = np.flatnonzero(rows)
        found.append(
            {
                "set": name,
                "corruption": kind,
                "severity": severity,
                "n": len(places),
                "coverage": float(held[rows].mean()),
                "expected": margin.expected_coverage(_known(expected, places)),
                "alarm": bool(margin.alarm(_known(expected, places))),
            }
        )
    return found
