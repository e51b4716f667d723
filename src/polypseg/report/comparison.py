"""A study's rows compared on two tests: ranks, gaps, figures and the page, from receipts and kept masks only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from polypseg import plotting
from polypseg.data.polyps import PolypDataset
from polypseg.evaluation.receipt import BY_CLUSTER, Receipt
from polypseg.files import environment_record, write_csv, write_json
from polypseg.provenance.origin import UNKNOWN, describe_start
from polypseg.report import write_report
from polypseg.report.analysis import score_set_of
from polypseg.report.gallery import read_mask
from polypseg.report.receipts import entry_of, table_name
from polypseg.statistics import (
    Gap,
    RankChange,
    agreement_row,
    analyze_generalization,
    competition_ranks,
)
from polypseg.statistics.scores import METRICS
from polypseg.tables import Column, Table

SAMPLES = 2
"""Frames of each dataset that the overlay figure shows."""
RANKED = 3
"""Models from which on a change of their ranking is analyzed."""


@dataclass(frozen=True, kw_only=True)
class ComparedRows:
    """What the receipts of several models on both sets say."""

    results: Mapping[str, Sequence[Receipt]]
    """Model id -> its (in-distribution, out-of-distribution) receipts."""
    gaps: tuple[Gap, ...]
    """Of the Dice, one a model, in the order of ``results``."""
    change: RankChange | None
    """Of the ranking by Dice; None for fewer than RANKED models."""

    @classmethod
    def of(cls, results: Mapping[str, Sequence[Receipt]]) -> "ComparedRows":
        """Compare receipts of the same images. Raises UsageError where they are of different ones."""
        inside, outside = (score_set_of({name: [pair[k]] for name, pair in results.items()}) for k in (0, 1))
        found = analyze_generalization(inside, outside)
        return cls(results=results, gaps=found.gaps, change=found.change if len(results) >= RANKED else None)

    def rows(self, starts: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row a model: start, both sets' four means, the Dice's effective n, its gap, both ranks and the change.

        Every mean and gap has its interval by cluster. A positive change of rank is a rise.
        """
        dice = {name: [result.mean_dice for result in pair] for name, pair in self.results.items()}
        inside, outside = (competition_ranks({name: pair[k] for name, pair in dice.items()}) for k in (0, 1))
        rows = []
        for (name, pair), gap in zip(self.results.items(), self.gaps, strict=True):
            row: dict[str, Any] = {"model": name, "start": starts[name]}
            for where, result in zip(("in", "out"), pair, strict=True):
                for metric in METRICS:
                    value = result.stated[metric]
                    row |= {f"{where}_m{metric}": value.mean}
                    row |= {f"{where}_m{metric}_low": value.low, f"{where}_m{metric}_high": value.high}
                row[f"{where}_effective_n"] = result.stated["dice"].effective_size
            row |= gap.gap.cells("gap_mdice")
            row |= {"rank_in": inside[name], "rank_out": outside[name], "rank_change": inside[name] - outside[name]}
            rows.append(row)
        return rows


@dataclass(frozen=True, kw_only=True)
class ComparedSet:
    """A test set of the comparison, for pictures."""

    dataset: PolypDataset
    masks: str
    """Name of the folder with each model's predicted masks, as in ``<results>/<model>/masks/<name>``."""


def write_comparison(
    receipts: Mapping[str, Sequence[Receipt]],
    sets: Sequence[ComparedSet],
    *,
    results: Path,
    output: Path,
    scale: str,
    grid: Mapping[str, Any],
    console: Console,
) -> Path:
    """Write ``comparison.csv``, ``study.json``, figures and ``report.html`` to ``output``; return the page's path.

    ``receipts``: row -> its receipts in and out of distribution; ``sets``: the two sets in that order; ``results``: the
    folder of receipts and masks; ``grid``: what was run, for the record. Prints the table too.
    """
    comparison = ComparedRows.of(receipts)
    first = next(iter(receipts.values()))
    labels = {name: table_name(name) for name in receipts}
    rows = comparison.rows({name: start_of(name, pair[0]) for name, pair in receipts.items()})
    titles = [f"{r.dataset.title}, {r.dataset.split} {r.dataset.part}" for r in first]
    note = caveat(receipts, scale=scale)
    how: dict[str, Any] = {"labels": labels, "titles": [r.dataset.title for r in first], "note": note}
    dice = {name: [result.per_image("dice") for result in pair] for name, pair in receipts.items()}
    plotting.plot_dice_distributions(dice, **how, path=output / "figures" / "dice_distributions.png")
    ranks = {row["model"]: (row["rank_in"], row["rank_out"]) for row in rows}
    plotting.plot_rank_changes(ranks, **how, path=output / "figures" / "rank_changes.png")
    drawn = {labels[name]: receipts[name] for name in drawn_models(rows)}
    _draw_overlays(drawn, sets, results=results, note=note, path=output / "figures" / "overlays.png")
    console.print(_comparison_table(rows, labels, titles=titles, note=note).rich(no_wrap=True))
    write_csv(output / "comparison.csv", rows)
    write_json(
        output / "study.json",
        {
            "scale": scale,
            "grid": grid,
            "tests": titles,
            "rows": rows,
            "interval": BY_CLUSTER,
            "rank_change": None if comparison.change is None else agreement_row(comparison.change.agreement),
            "caveat": note,
            "environment": environment_record(),
        },
    )
    inside, outside = (".".join(receipt.test) for receipt in first)
    return write_report(
        results,
        output / "report.html",
        title=f"{len(rows)} model{'s' if len(rows) != 1 else ''} at {scale} scale",
        inside=inside,
        outside=outside,
        masks=results,
        datasets={one.dataset.spec.name: one.dataset for one in sets},
    )


def start_of(row: str, receipt: Receipt) -> str:
    """What the encoder of a row started from, by its receipt."""
    entry = entry_of(row)
    start = receipt.origin.encoder_initialisation or UNKNOWN
    return start if entry is None else describe_start(entry, start)


def drawn_models(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best row of each kind of encoder on the second test: as many masks as a picture shows at legible size."""
    best: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["rank_out"]):
        entry = entry_of(row["model"])
        best.setdefault(entry.encoder if entry else row["model"], row["model"])
    return list(best.values())


def caveat(receipts: Mapping[str, Sequence[Receipt]], *, scale: str) -> str:
    """What every table and figure must say about itself."""
    origins = {name: pair[0].origin for name, pair in receipts.items()}
    recipe = next(iter(origins.values())).recipe
    parts = [f"{scale} scale, {recipe} recipe, one training run per row: no claim of differences"]
    if any(receipt.dataset.synthetic for pair in receipts.values() for receipt in pair):
        parts.append("SYNTHETIC frames: no statement about patients")
    if any(origin.scale == "small" for origin in origins.values()):
        parts.append("small encoders stand in for ResNet50 and ViT-B")
    substituted = sum(
        origin.random_start and (entry := entry_of(name)) is not None and entry.method != "none"
        for name, origin in origins.items()
    )
    if substituted:
        parts.append(
            f"{substituted} of {len(origins)} rows start at random for want of weights: pretraining is not compared"
        )
    return "; ".join(parts) + "."


def _draw_overlays(
    receipts: Mapping[str, Sequence[Receipt]], sets: Sequence[ComparedSet], *, results: Path, note: str, path: Path
) -> None:
    """The kept masks of some models (by label) on the first test frames of each set."""
    frames, truths, captions = [], [], []
    masks: dict[str, list[NDArray[np.bool_]]] = {label: [] for label in receipts}
    for place, one in enumerate(sets):
        for image in next(iter(receipts.values()))[place].images[:SAMPLES]:
            frame, truth = one.dataset.pair(one.dataset.by_id[image.id])
            shown, shown_truth = _shrink(frame, truth)
            frames.append(shown)
            truths.append(shown_truth)
            captions.append(f"{one.dataset.spec.title}\n{image.id[:14]}")
            for label, pair in receipts.items():
                file = results / pair[place].name / "masks" / one.masks / f"{image.id}.png"
                mask = read_mask(file, truth, image.id, pair[place]).astype(bool)
                masks[label].append(np.asarray(Image.fromarray(mask).resize(shown.size)))
    note = f"Line: truth. Filled: prediction. {note}"
    plotting.plot_overlays(frames, truths, masks, captions=captions, note=note, path=path)


def _shrink(frame: Image.Image, truth: NDArray[np.uint8]) -> tuple[Image.Image, NDArray[np.uint8]]:
    """At most 256 pixels a side, for figures."""
    factor = min(1.0, 256 / max(frame.size))
    size = (max(1, round(frame.width * factor)), max(1, round(frame.height * factor)))
    return frame.resize(size), np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))


def _comparison_table(
    rows: Sequence[dict[str, Any]], labels: dict[str, str], *, titles: Sequence[str], note: str
) -> Table:
    ranked = sorted(rows, key=lambda row: row["rank_out"])
    columns = [
        Column("model", "model", labels.__getitem__),
        *(
            Column(title, key, "{:.3f}".format)
            for title, key in (
                ("mDice in", "in_mdice"),
                ("mIoU in", "in_miou"),
                ("mDice out", "out_mdice"),
                ("mIoU out", "out_miou"),
            )
        ),
        Column("rank in", "rank_in"),
        Column("out", "rank_out"),
        Column("diff", "rank_change", "{:+d}".format),
    ]
    return Table(columns=columns, records=ranked, title=f"in: {titles[0]}   out: {titles[1]}", caption=note)
