"""The report's tables, each as cells for the page and as plain records for CSV and JSON."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from polypseg import zoo
from polypseg.evaluation.receipt import FalseAlarms, Receipt, Test
from polypseg.report.analysis import SIDES, Analysis
from polypseg.report.receipts import Material, entry_of, part_words
from polypseg.report.wording import between, number, percent, rank, short_p
from polypseg.statistics import Interval
from polypseg.statistics.scores import METRICS
from polypseg.zoo import RANDOM

METRIC_TITLES = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
CALIBRATION = {
    "ece_inside": "ECE inside",
    "brier_inside": "Brier inside",
    "ece_outside": "ECE outside",
    "brier_outside": "Brier outside",
}
SEEDS_NOTE = ", below Dice also the least and the greatest mean of the training runs"
_SHORT = 12
"""Hex digits shown of a digest."""


@dataclass(frozen=True)
class Column:
    """A column's heading."""

    title: str
    group: str = ""
    """Heading above neighbouring columns of the same group."""
    numeric: bool = True
    smallest_first: bool = False
    """Whether the first click sorts upwards."""
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, what it is sorted by, and where it comes from."""

    text: str
    note: str = ""
    """Second line: an interval."""
    more: str = ""
    """Third line."""
    sort: float | str | None = None
    href: str = ""
    title: str = ""


@dataclass(frozen=True)
class Row:
    """One row; ``id`` is its anchor."""

    cells: Sequence[Cell]
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page and, by its records, a file."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    records: Sequence[dict[str, Any]] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns with the columns each spans; [] where there are none."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(name for name, _ in spans) else []


def slug(*words: str) -> str:
    """An anchor made of words."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


# -- where a number comes from -----------------------------------------------------------------------------------------


def receipt_line(receipt: Receipt) -> str:
    """File, digest, revision and versions of a receipt, in a line."""
    environment = receipt.environment
    versions = environment.versions
    revision = (environment.git_revision or "no revision")[:_SHORT]
    seed = "" if receipt.seed is None else f"seed {receipt.seed}, "
    tools = ", ".join(f"{name} {versions[name]}" for name in ("polypseg", "torch") if name in versions)
    return f"{receipt.path.name}: {seed}sha256 {receipt.file_sha256[:_SHORT]}, git {revision}, {tools}"


def from_receipts(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """``href`` and ``title`` of a cell that is computed from these receipts."""
    if not receipts:
        return {}
    first = receipts[0]
    return {
        "href": "#" + slug("receipt", first.row, *first.test),
        "title": "\n".join(["From:", *(receipt_line(receipt) for receipt in receipts)]),
    }


def _model_cell(material: Material, model: str) -> Cell:
    return Cell(
        material.label(model),
        note=start_words(material, model),
        sort=material.label(model),
        href="#" + slug("model", model),
    )


def start_words(material: Material, model: str) -> str:
    """What the encoder of a row's weights started from, in a few words."""
    origin, entry = material.of(model)[0].weights_origin, entry_of(model)
    start, run = str(origin.get("encoder_initialisation", "")), origin.get("pretraining")
    if start == RANDOM:
        return "random" if entry is None or entry.method == "none" else "random, for want of weights"
    if run:
        method = zoo.METHODS.get(str(run.get("method")), run.get("method"))
        return f"{method or run.get('recipe')}, {run.get('corpus') or run.get('source')}"
    if entry is None or origin.get("scale") != "full":
        return start
    return f"{zoo.METHODS[entry.method]}, {zoo.CORPORA[entry.corpus]}"


# -- the tables --------------------------------------------------------------------------------------------------------


def comparison_table(analysis: Analysis) -> Table:
    """The paper's table: both tests' four metrics, the seeds' spread of Dice, ranks and their change."""
    material = analysis.material
    sides = [("in", material.inside), ("out", material.outside)]
    columns = [Column("Model", numeric=False, smallest_first=True)]
    for where, test in sides:
        group = f"{'In' if where == 'in' else 'Out of'} distribution: {material.test_title(test)}"
        columns += [Column(title, group) for title in METRIC_TITLES.values()]
    columns += [
        Column("In", "Rank by Dice", smallest_first=True),
        Column("Out", "Rank by Dice", smallest_first=True),
        Column("Change", "Rank by Dice", hint="Positive: the model rises out of distribution"),
    ]
    ranks = {row["model"]: row for row in analysis.change.rows()} if analysis.change else {}
    rows, records = [], []
    for model in material.models:
        cells = [_model_cell(material, model)]
        record: dict[str, Any] = {"model": model, "start": start_words(material, model)}
        for where, test in sides:
            cells += metric_cells(analysis, model, test)
            record |= _metric_record(analysis, model, test, prefix=f"{where}_")
        cells += _rank_cells(ranks.get(model), ranges=analysis.claims)
        record |= {key: ranks[model][key] if model in ranks else None for key in _RANKS}
        rows.append(Row(cells))
        records.append(record)
    return Table(
        name="comparison",
        caption=f"Mean over images, 95 % interval{SEEDS_NOTE}. Rank: 1 is best; below it its 95 % range over draws."
        if analysis.claims
        else "Mean over images, 95 % interval over images for this one trained network. Rank: 1 is best; with one "
        "training run a row its range is not known.",
        columns=columns,
        rows=rows,
        records=records,
    )


_RANKS = (
    "rank_inside", "rank_inside_low", "rank_inside_high", "rank_outside", "rank_outside_low", "rank_outside_high",
    "rank_change",
)  # fmt: skip


def metric_cells(analysis: Analysis, model: str, test: Test) -> list[Cell]:
    """A row's four means on a test with interval, for Dice the seeds' spread too; dashes where it was not tested."""
    source = from_receipts(analysis.material.used(model, test))
    cells = []
    for metric in METRICS:
        mean = analysis.means.get((model, test, metric))
        if mean is None:
            cells.append(Cell("–"))
            continue
        interval = between(mean["mean_low"], mean["mean_high"])
        spread = seeds_spread(analysis.seed_means[model, test, metric]) if metric == "dice" else ""
        cells.append(Cell(number(mean["mean"]), interval, spread, mean["mean"], **source))
    return cells


def seeds_spread(means: Sequence[float]) -> str:
    """The least and the greatest mean of several training runs; empty for one."""
    return f"{number(min(means))}–{number(max(means))}" if len(means) > 1 else ""


def _metric_record(analysis: Analysis, model: str, test: Test, *, prefix: str = "") -> dict[str, Any]:
    record: dict[str, Any] = {}
    facts = analysis.means.get((model, test, "dice"), {})
    for key in ("images", "clusters", "seeds", "effective_size"):
        record[f"{prefix}{key}"] = facts.get(key)
    for metric in METRICS:
        mean = analysis.means.get((model, test, metric), {})
        for key, name in (("mean", ""), ("mean_low", "_low"), ("mean_high", "_high")):
            record[f"{prefix}{metric}{name}"] = mean.get(key)
    means = analysis.seed_means.get((model, test, "dice"), ())
    record[f"{prefix}dice_of_seeds"] = " ".join(repr(mean) for mean in means)
    record[f"{prefix}receipts"] = " ".join(r.file_sha256 for r in analysis.material.used(model, test))
    return record


def _rank_cells(row: dict[str, Any] | None, *, ranges: bool) -> list[Cell]:
    if row is None:
        return [Cell("–")] * 3
    cells = [
        Cell(
            rank(row[f"rank_{where}"]),
            f"{row[f'rank_{where}_low']}–{row[f'rank_{where}_high']}" if ranges else "",
            sort=row[f"rank_{where}"],
        )
        for where in ("inside", "outside")
    ]
    change = row["rank_change"]
    arrow = "▲" if change > 0 else "▼" if change < 0 else ""
    return [
        *cells,
        Cell(f"{arrow} {number(change, digits=0 if change % 1 == 0 else 1, signed=True)}".strip(), sort=change),
    ]


def tests_table(analysis: Analysis, tests: Iterable[Test]) -> Table:
    """Every test of ``tests``, one row a model."""
    material = analysis.material
    rows, records = [], []
    for test in tests:
        for model in material.models:
            used = material.used(model, test)
            if used:
                images = len(used[0].images)
                cells = [
                    Cell(used[0].dataset.title, part_words(test), sort=material.test_title(test)),
                    _model_cell(material, model),
                    Cell(str(images), _units(used[0]), _seen_note(used), sort=images),
                    *metric_cells(analysis, model, test),
                ]
                rows.append(Row(cells))
                names = dict(zip(("dataset", "split", "part"), test, strict=True))
                records.append({**names, "model": model, **_metric_record(analysis, model, test)})
    return Table(
        name="tests",
        caption=f"Mean over images, 95 % interval{SEEDS_NOTE}. Seen: images that the model saw in training, or whose "
        "near-duplicate or clip it saw; such a score is not one of generalisation.",
        columns=[
            Column("Test", numeric=False, smallest_first=True),
            Column("Model", numeric=False, smallest_first=True),
            Column("Images"),
            *(Column(title) for title in METRIC_TITLES.values()),
        ],
        rows=rows,
        records=records,
    )


def _seen_note(used: Sequence[Receipt]) -> str:
    """``108 seen``, the most of any seed; empty where the model saw none, or where that is not known."""
    most = max(receipt.seen_images or 0 for receipt in used)
    return f"{most} seen" if most else ""


def alarm_table(material: Material) -> Table:
    """What is predicted on frames without polyp, of every test that has some."""
    rows, records = [], []
    for test in material.tests:
        for model in material.models:
            used = [r for r in material.used(model, test) if r.false_alarms is not None]
            if not used:
                continue
            facts, source = _alarm_facts([r.false_alarms for r in used if r.false_alarms]), from_receipts(used)
            between_runs = f"{facts['least_run']:.1f}–{facts['greatest_run']:.1f}" if len(used) > 1 else ""
            bounds = f"[{facts['low']:.1f}, {facts['high']:.1f}]"
            cells = [
                Cell(used[0].dataset.title, part_words(test), sort=material.test_title(test)),
                _model_cell(material, model),
                Cell(str(facts["frames"]), "", _seen_note(used), sort=facts["frames"]),
                Cell(f"{facts['per_100_frames']:.1f}", bounds, between_runs, facts["per_100_frames"], **source),
                Cell(f"{100 * facts['predicted_share']:.1f} %", sort=facts["predicted_share"], **source),
            ]
            rows.append(Row(cells))
            names = dict(zip(("dataset", "split", "part"), test, strict=True))
            digests = " ".join(r.file_sha256 for r in used)
            records.append({**names, "model": model, "seeds": len(used), **facts, "receipts": digests})
    areas = sorted({record["minimal_area_pixels"] for record in records})
    return Table(
        name="alarms",
        caption="Of 100 frames without polyp, those in which a connected region of at least "
        f"{' or '.join(map(str, areas))} pixel{'s' if areas != [1] else ''} is predicted: mean of the training runs, "
        "the lowest and the highest bound of their 95 % Wilson intervals, the least and the greatest run. Area: "
        "predicted share of a frame.",
        columns=[
            Column("Test", numeric=False, smallest_first=True),
            Column("Model", numeric=False, smallest_first=True),
            Column("Frames"),
            Column("False alarms", smallest_first=True),
            Column("Area", smallest_first=True),
        ],
        rows=rows,
        records=records,
    )


def _alarm_facts(facts: Sequence[FalseAlarms]) -> dict[str, Any]:
    """False alarms of one model's training runs on a test."""
    rates = [fact.per_100_frames for fact in facts]
    runs = [rate.mean for rate in rates]
    return {
        "minimal_area_pixels": facts[0].minimal_area_pixels,
        "frames": facts[0].frames,
        "per_100_frames": sum(runs) / len(runs),
        "low": min(rate.low for rate in rates),
        "high": max(rate.high for rate in rates),
        "least_run": min(runs),
        "greatest_run": max(runs),
        "predicted_share": sum(fact.predicted_share.mean for fact in facts) / len(facts),
    }


def _units(receipt: Receipt) -> str:
    return f"{receipt.clusters.clusters} clips" if receipt.clusters.by == "clip" else ""


def _interval_cell(value: Interval, *, signed: bool = False, **more: Any) -> Cell:
    return Cell(
        number(value.estimate, signed=signed),
        between(value.low, value.high, signed=signed),
        sort=value.estimate,
        **more,
    )


def _p_cell(p: float, reading: str = "") -> Cell:
    return Cell(short_p(p), reading, sort=p)


def gap_table(analysis: Analysis) -> Table:
    """What each model loses out of distribution."""
    material = analysis.material
    rows = []
    for gap in analysis.gaps:
        source = from_receipts(
            [*material.used(gap.model, material.inside), *material.used(gap.model, material.outside)]
        )
        relative = Cell("–") if gap.relative is None else _interval_cell(gap.relative, **source)
        values = [_interval_cell(value, **source) for value in (gap.inside, gap.outside, gap.gap)]
        rows.append(Row([_model_cell(material, gap.model), *values, relative]))
    return Table(
        name="gaps",
        caption="Mean Dice, 95 % interval. Loss: in − out of distribution, the tests’ images drawn independently; "
        "relative: as a share of the mean in distribution.",
        columns=[
            Column("Model", numeric=False, smallest_first=True),
            Column("In"),
            Column("Out"),
            Column("Loss", smallest_first=True),
            Column("Relative loss", smallest_first=True),
        ],
        rows=rows,
        records=[gap.row() for gap in analysis.gaps],
    )


def contrast_table(analysis: Analysis) -> Table:
    """Differences between groups of rows, with the noise floor of the training runs."""
    rows, records = [], []
    for c in analysis.contrasts:
        sides = tuple(map(len, c.groups))
        cells = [
            Cell(
                c.name.replace(" - ", " − "),
                f"{sides[0]} and {sides[1]} models",
                sort=c.name,
                title=_sides(analysis.material, c.groups),
            )
        ]
        record = c.row() | {"seeds": analysis.seeds}
        for which in SIDES:
            value, floor = getattr(c, which), analysis.floor(which, *sides)
            record |= {f"{which}_runs": floor, f"{which}_shown": analysis.is_shown(value)}
            runs = "runs not measured" if floor is None else f"runs ± {number(floor)}"
            cells.append(_interval_cell(value, signed=True, more=runs))
        rows.append(Row(cells))
        records.append(record)
    return Table(
        name="contrasts",
        caption="Mean Dice of the first group minus the second’s, and of their losses, with 95 % intervals over images "
        "and training runs. Runs: noise floor, the difference that groups of this size stay within in 95 of 100 cases "
        "although nothing but the training run differs."
        + ("" if analysis.claims else " One training run a row: no claim."),
        columns=[Column("Contrast", numeric=False, smallest_first=True), Column("In"), Column("Out"), Column("Loss")],
        rows=rows,
        records=records,
    )


def _sides(material: Material, groups: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    return " against ".join(", ".join(material.label(model) for model in side) for side in groups)


def pair_table(analysis: Analysis) -> Table:
    """All pairs of models: differences with Holm-adjusted p in both tests, and whether their order turns.

    Empty with one training run a row: an interval and a p over images would take another run for another model.
    """
    if analysis.change is None or not analysis.claims:
        return Table(name="pairs", caption="", columns=[], rows=[])
    label = analysis.material.label
    rows, records = [], []
    for one, other, pair in zip(*analysis.comparisons, analysis.change.pairs, strict=True):
        rows.append(
            Row(
                [
                    Cell(f"{label(one.a)} − {label(one.b)}", sort=label(one.a) + label(one.b)),
                    _interval_cell(one.difference, signed=True),
                    _p_cell(one.p_holm, one.reading),
                    _interval_cell(other.difference, signed=True),
                    _p_cell(other.p_holm, other.reading),
                    Cell(
                        percent(pair["flip_probability"]),
                        "turned" if pair["flipped"] else "",
                        sort=pair["flip_probability"],
                    ),
                    _p_cell(pair["p_flip_holm"]),
                ]
            )
        )
        sides = {
            f"{key}_{where}": value for where, c in (("in", one), ("out", other)) for key, value in c.row().items()
        }
        intervals = one.difference.cells("inside") | other.difference.cells("outside")
        records.append({**pair, **intervals, **{k: v for k, v in sides.items() if not k.startswith(("a_", "b_"))}})
    margin = analysis.comparisons[0][0].margin
    return Table(
        name="pairs",
        caption="Difference of mean Dice with 95 % interval over images and training runs, what it says, and p of the "
        f"sign-flip test over clusters, adjusted (Holm) for all pairs of a test; equivalent: the interval lies within "
        f"± {margin}. {_floor_words(analysis)}. Order turns: share of draws, and p that the two are not in opposite "
        "orders, adjusted for all pairs.",
        columns=[
            Column("Pair", numeric=False, smallest_first=True),
            Column("Difference", "In distribution"),
            Column("p (Holm)", "In distribution", smallest_first=True),
            Column("Difference", "Out of distribution"),
            Column("p (Holm)", "Out of distribution", smallest_first=True),
            Column("Share", "Order turns"),
            Column("p (Holm)", "Order turns", smallest_first=True),
        ],
        rows=rows,
        records=records,
    )


def _floor_words(analysis: Analysis) -> str:
    floors = [analysis.floor(which, 1, 1) for which in ("inside", "outside")]
    return f"Training runs alone make a pair differ by up to {number(floors[0])} in and {number(floors[1])} out"


def calibration_table(analysis: Analysis) -> Table:
    """Calibration errors as the receipts state them, mean over seeds."""
    material = analysis.material
    rows, records = [], []
    tests = [test for test in (material.inside, material.outside) if test in material.tests]
    with_table = {r.row for r in material.receipts if r.test in tests and r.has_calibration}
    for model in (m for m in material.models if m in with_table):
        cells, record = [_model_cell(material, model)], dict[str, Any](model=model)
        for test in tests:
            used = [r for r in material.used(model, test) if r.has_calibration]
            for output in CALIBRATION:
                means = [r.scores["calibration"][output].mean for r in used]
                values = [mean for mean in means if mean is not None]
                value = sum(values) / len(values) if values and len(values) == len(means) else None
                cells.append(Cell(number(value), sort=value, **from_receipts(used)))
                record[f"{test[0]}.{output}"] = value
        rows.append(Row(cells))
        records.append(record)
    return Table(
        name="calibration",
        caption="Expected calibration error (10 bins) and Brier score over the pixels inside and outside the true "
        "polyp, mean over seeds; 0 is best.",
        columns=[
            Column("Model", numeric=False, smallest_first=True),
            *(
                Column(t, material.test_title(test), smallest_first=True)
                for test in tests
                for t in CALIBRATION.values()
            ),
        ],
        rows=rows,
        records=records,
    )


def receipt_table(material: Material) -> Table:
    """The appendix: every receipt."""
    rows, records, anchors = [], [], set[str]()
    for model in material.models:
        for receipt in material.of(model):
            anchor = slug("receipt", model, *receipt.test)
            environment = receipt.environment
            versions = environment.versions
            facts: dict[str, Any] = {
                "model": material.label(model),
                "test": material.test_title(receipt.test),
                "seed": receipt.seed,
                "images": len(receipt.images),
                "file": receipt.path.name,
                "folder": receipt.name,
                "receipt_sha256": receipt.file_sha256,
                "weights_sha256": receipt.model_sha256,
                "content_id": receipt.dataset.content_id,
                "git_revision": environment.git_revision,
                **versions,
            }
            cells = [
                Cell(
                    facts["model"],
                    "" if receipt.seed is None else f"seed {receipt.seed}",
                    sort=facts["model"],
                    href="#" + slug("model", model),
                ),
                Cell(facts["test"], f"n = {facts['images']}, content {facts['content_id']}", sort=facts["test"]),
                Cell(receipt.name, facts["file"], sort=facts["file"]),
                Cell(receipt.file_sha256[:_SHORT], sort=receipt.file_sha256, title=receipt.file_sha256),
                Cell((receipt.model_sha256 or "not recorded")[:_SHORT], title=receipt.model_sha256 or ""),
                Cell(
                    (environment.git_revision or "none")[:_SHORT],
                    f"polypseg {versions.get('polypseg', '?')}, torch {versions.get('torch', '?')}",
                    title=", ".join(f"{name} {version}" for name, version in versions.items()),
                ),
            ]
            rows.append(Row(cells, id="" if anchor in anchors else anchor))
            anchors.add(anchor)
            records.append(facts)
    return Table(
        name="receipts",
        caption="Digests are the first 12 of 64 hex digits; the whole ones are in the tooltip and in receipts.csv.",
        columns=[
            Column("Model", numeric=False, smallest_first=True),
            Column("Test", numeric=False, smallest_first=True),
            Column("Receipt", numeric=False, smallest_first=True),
            *(
                Column(t, numeric=False, smallest_first=True)
                for t in ("Its sha256", "Weights’ sha256", "Computed with")
            ),
        ],
        rows=rows,
        records=records,
    )
