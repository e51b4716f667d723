"""The report's tables: what each shows on the page, and what of it goes into CSV and JSON."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import starmap
from typing import Any, NamedTuple

from polypseg import zoo
from polypseg.evaluation.receipt import FalseAlarms, Receipt, Test
from polypseg.report.analysis import SIDES, Analysis
from polypseg.report.receipts import Material, entry_of, part_words
from polypseg.report.wording import between, number, percent, rank, short_p
from polypseg.statistics import Interval, PairComparison
from polypseg.statistics.scores import METRICS
from polypseg.tables import Cell, Column, Table

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


def _model_column(material: Material, key: str = "model") -> Column:
    return Column("Model", key, lambda model: _model_cell(material, model), numeric=False, smallest_first=True)


def start_words(material: Material, model: str) -> str:
    """What the encoder of a row's weights started from, in a few words."""
    origin, entry = material.of(model)[0].origin, entry_of(model)
    run = origin.pretraining
    if origin.random_start:
        return "random" if entry is None or entry.method == "none" else "random, for want of weights"
    if run:
        method = zoo.METHODS.get(str(run.method), run.method)
        return f"{method or run.recipe}, {run.corpus or run.source}"
    if entry is None or not origin.full_size:
        return origin.encoder_initialisation or ""
    return f"{zoo.METHODS[entry.method]}, {zoo.CORPORA[entry.corpus]}"


# -- the tables --------------------------------------------------------------------------------------------------------


def comparison_table(analysis: Analysis) -> Table:
    """The paper's table: both tests' four metrics, the seeds' spread of Dice, ranks and their change."""
    material = analysis.material
    sides = [("in", material.inside), ("out", material.outside)]
    columns = [_model_column(material)]
    for where, test in sides:
        group = f"{'In' if where == 'in' else 'Out of'} distribution: {material.test_title(test)}"
        columns += _metric_columns(analysis, test, group=group)
    columns += [
        Column(
            title,
            "",
            partial(_rank_cell, where, ranges=analysis.claims),
            group="Rank by Dice",
            smallest_first=True,
        )
        for title, where in (("In", "inside"), ("Out", "outside"))
    ]
    columns.append(
        Column(
            "Change",
            "rank_change",
            _change_cell,
            group="Rank by Dice",
            hint="Positive: the model rises out of distribution",
        )
    )
    ranks = {row["model"]: row for row in analysis.change.rows()} if analysis.change else {}
    records = []
    for model in material.models:
        record: dict[str, Any] = {"model": model, "start": start_words(material, model)}
        for where, test in sides:
            record |= _metric_record(analysis, model, test, prefix=f"{where}_")
        records.append(record | {key: ranks[model][key] if model in ranks else None for key in _RANKS})
    return Table(
        name="comparison",
        caption=f"Mean over images, 95 % interval{SEEDS_NOTE}. Rank: 1 is best; below it its 95 % range over draws."
        if analysis.claims
        else "Mean over images, 95 % interval over images for this one trained network. Rank: 1 is best; with one "
        "training run a row its range is not known.",
        columns=columns,
        records=records,
    )


_RANKS = (
    "rank_inside", "rank_inside_low", "rank_inside_high", "rank_outside", "rank_outside_low", "rank_outside_high",
    "rank_change",
)  # fmt: skip


def _metric_columns(analysis: Analysis, test: Test, *, group: str) -> list[Column]:
    """The four means on a test, of records that name a model."""
    return [
        Column(
            title,
            "model",
            partial(metric_cell, analysis, test, metric),
            group=group,
        )
        for metric, title in METRIC_TITLES.items()
    ]


def metric_cell(analysis: Analysis, test: Test, metric: str, model: str) -> Cell:
    """A row's mean on a test with interval, for Dice the seeds' spread too; a dash where it was not tested."""
    mean = analysis.means.get((model, test, metric))
    if mean is None:
        return Cell("–")
    interval = between(mean["mean_low"], mean["mean_high"])
    spread = seeds_spread(analysis.seed_means[model, test, metric]) if metric == "dice" else ""
    return Cell(
        number(mean["mean"]), interval, spread, mean["mean"], **from_receipts(analysis.material.used(model, test))
    )


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


def _rank_cell(where: str, row: Mapping[str, Any], *, ranges: bool) -> Cell:
    place = row[f"rank_{where}"]
    if place is None:
        return Cell("–")
    return Cell(rank(place), f"{row[f'rank_{where}_low']}–{row[f'rank_{where}_high']}" if ranges else "", sort=place)


def _change_cell(change: float | None) -> Cell:
    if change is None:
        return Cell("–")
    arrow = "▲" if change > 0 else "▼" if change < 0 else ""
    return Cell(f"{arrow} {number(change, digits=0 if change % 1 == 0 else 1, signed=True)}".strip(), sort=change)


def _test_of(record: Mapping[str, Any]) -> Test:
    """The test that a record of a table names."""
    return record["dataset"], record["split"], record["part"]


def _test_column(material: Material) -> Column:
    def cell(record: Mapping[str, Any]) -> Cell:
        test = _test_of(record)
        title = material.used(record["model"], test)[0].dataset.title
        return Cell(title, part_words(test), sort=material.test_title(test))

    return Column("Test", "", cell, numeric=False, smallest_first=True)


def tests_table(analysis: Analysis, tests: Iterable[Test]) -> Table:
    """Every test of ``tests``, one row a model."""
    material = analysis.material
    records = [
        {**dict(zip(("dataset", "split", "part"), test, strict=True)), "model": model}
        | _metric_record(analysis, model, test)
        for test in tests
        for model in material.models
        if material.used(model, test)
    ]

    def of_record(metric: str, record: Mapping[str, Any]) -> Cell:
        return metric_cell(analysis, _test_of(record), metric, record["model"])

    def images(record: Mapping[str, Any]) -> Cell:
        used = material.used(record["model"], _test_of(record))
        count = len(used[0].images)
        return Cell(str(count), _units(used[0]), _seen_note(used), sort=count)

    return Table(
        name="tests",
        caption=f"Mean over images, 95 % interval{SEEDS_NOTE}. Seen: images that the model saw in training, or whose "
        "near-duplicate or clip it saw; such a score is not one of generalization.",
        columns=[
            _test_column(material),
            _model_column(material),
            Column("Images", "", images),
            *(Column(title, "", partial(of_record, metric)) for metric, title in METRIC_TITLES.items()),
        ],
        records=records,
    )


def _seen_note(used: Sequence[Receipt]) -> str:
    """``108 seen``, the most of any seed; empty where the model saw none, or where that is not known."""
    most = max(receipt.seen_images or 0 for receipt in used)
    return f"{most} seen" if most else ""


def alarm_table(material: Material) -> Table:
    """What is predicted on frames without polyp, of every test that has some."""
    records = []
    for test in material.tests:
        for model in material.models:
            if used := _with_alarms(material, model, test):
                names = dict(zip(("dataset", "split", "part"), test, strict=True))
                digests = " ".join(r.file_sha256 for r in used)
                records.append(
                    {
                        **names,
                        "model": model,
                        "seeds": len(used),
                        **_alarm_facts([r.false_alarms for r in used if r.false_alarms]),
                        "receipts": digests,
                    }
                )
    areas = sorted({record["minimal_area_pixels"] for record in records})

    def frames(record: Mapping[str, Any]) -> Cell:
        seen = _seen_note(_with_alarms(material, record["model"], _test_of(record)))
        return Cell(str(record["frames"]), "", seen, sort=record["frames"])

    def alarms(record: Mapping[str, Any]) -> Cell:
        source = from_receipts(_with_alarms(material, record["model"], _test_of(record)))
        between_runs = f"{record['least_run']:.1f}–{record['greatest_run']:.1f}" if record["seeds"] > 1 else ""
        bounds = f"[{record['low']:.1f}, {record['high']:.1f}]"
        return Cell(f"{record['per_100_frames']:.1f}", bounds, between_runs, record["per_100_frames"], **source)

    def area(record: Mapping[str, Any]) -> Cell:
        source = from_receipts(_with_alarms(material, record["model"], _test_of(record)))
        return Cell(f"{100 * record['predicted_share']:.1f} %", sort=record["predicted_share"], **source)

    return Table(
        name="alarms",
        caption="Of 100 frames without polyp, those in which a connected region of at least "
        f"{' or '.join(map(str, areas))} pixel{'s' if areas != [1] else ''} is predicted: mean of the training runs, "
        "the lowest and the highest bound of their 95 % Wilson intervals, the least and the greatest run. Area: "
        "predicted share of a frame.",
        columns=[
            _test_column(material),
            _model_column(material),
            Column("Frames", "", frames),
            Column("False alarms", "", alarms, smallest_first=True),
            Column("Area", "", area, smallest_first=True),
        ],
        records=records,
    )


def _with_alarms(material: Material, model: str, test: Test) -> list[Receipt]:
    return [r for r in material.used(model, test) if r.false_alarms is not None]


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

    def cell(gap: Any, value: Interval | None) -> Cell:
        used = [*material.used(gap.model, material.inside), *material.used(gap.model, material.outside)]
        return Cell("–") if value is None else _interval_cell(value, **from_receipts(used))

    return Table(
        name="gaps",
        caption="Mean Dice, 95 % interval. Loss: in − out of distribution, the tests’ images drawn independently; "
        "relative: as a share of the mean in distribution.",
        columns=[
            _model_column(material),
            Column("In", "", lambda gap: cell(gap, gap.inside)),
            Column("Out", "", lambda gap: cell(gap, gap.outside)),
            Column("Loss", "", lambda gap: cell(gap, gap.gap), smallest_first=True),
            Column("Relative loss", "", lambda gap: cell(gap, gap.relative), smallest_first=True),
        ],
        records=analysis.gaps,
        fields=lambda gap: gap.row(),
    )


def contrast_table(analysis: Analysis) -> Table:
    """Differences between groups of rows, with the noise floor of the training runs."""

    def fields(contrast: Any) -> dict[str, Any]:
        record = contrast.row() | {"seeds": analysis.seeds}
        for which in SIDES:
            floor = analysis.floor(which, *map(len, contrast.groups))
            record |= {f"{which}_runs": floor, f"{which}_shown": analysis.is_shown(getattr(contrast, which))}
        return record

    def name(contrast: Any) -> Cell:
        one, other = map(len, contrast.groups)
        return Cell(
            contrast.name.replace(" - ", " − "),
            f"{one} and {other} models",
            sort=contrast.name,
            title=_sides(analysis.material, contrast.groups),
        )

    def value(which: str, contrast: Any) -> Cell:
        floor = analysis.floor(which, *map(len, contrast.groups))
        runs = "runs not measured" if floor is None else f"runs ± {number(floor)}"
        return _interval_cell(getattr(contrast, which), signed=True, more=runs)

    return Table(
        name="contrasts",
        caption="Mean Dice of the first group minus the second’s, and of their losses, with 95 % intervals over images "
        "and training runs. Runs: noise floor, the difference that groups of this size stay within in 95 of 100 cases "
        "although nothing but the training run differs."
        + ("" if analysis.claims else " One training run a row: no claim."),
        columns=[
            Column("Contrast", "", name, numeric=False, smallest_first=True),
            *(
                Column(title, "", partial(value, which))
                for title, which in zip(("In", "Out", "Loss"), SIDES, strict=True)
            ),
        ],
        records=analysis.contrasts,
        fields=fields,
    )


def _sides(material: Material, groups: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    return " against ".join(", ".join(material.label(model) for model in side) for side in groups)


class _Pair(NamedTuple):
    """Two models' difference in both tests, and whether their order turns."""

    inside: PairComparison
    outside: PairComparison
    flip: Mapping[str, Any]


def pair_table(analysis: Analysis) -> Table:
    """All pairs of models: differences with Holm-adjusted p in both tests, and whether their order turns.

    Empty with one training run a row: an interval and a p over images would take another run for another model.
    """
    if analysis.change is None or not analysis.claims:
        return Table(name="pairs", columns=[], records=[])
    label = analysis.material.label

    def name(pair: _Pair) -> Cell:
        one, other = label(pair.inside.a), label(pair.inside.b)
        return Cell(f"{one} − {other}", sort=one + other)

    def turned(pair: _Pair) -> Cell:
        share = pair.flip["flip_probability"]
        return Cell(percent(share), "turned" if pair.flip["flipped"] else "", sort=share)

    def fields(pair: _Pair) -> dict[str, Any]:
        sides = {
            f"{key}_{where}": value
            for where, c in (("in", pair.inside), ("out", pair.outside))
            for key, value in c.row().items()
        }
        intervals = pair.inside.difference.cells("inside") | pair.outside.difference.cells("outside")
        return {**pair.flip, **intervals, **{k: v for k, v in sides.items() if not k.startswith(("a_", "b_"))}}

    def differences(title: str, where: str) -> list[Column]:
        return [
            Column("Difference", where, lambda c: _interval_cell(c.difference, signed=True), group=title),
            Column("p (Holm)", where, lambda c: _p_cell(c.p_holm, c.reading), group=title, smallest_first=True),
        ]

    margin = analysis.comparisons[0][0].margin
    return Table(
        name="pairs",
        caption="Difference of mean Dice with 95 % interval over images and training runs, what it says, and p of the "
        f"sign-flip test over clusters, adjusted (Holm) for all pairs of a test; equivalent: the interval lies within "
        f"± {margin}. {_floor_words(analysis)}. Order turns: share of draws, and p that the two are not in opposite "
        "orders, adjusted for all pairs.",
        columns=[
            Column("Pair", "", name, numeric=False, smallest_first=True),
            *differences("In distribution", "inside"),
            *differences("Out of distribution", "outside"),
            Column("Share", "", turned, group="Order turns"),
            Column(
                "p (Holm)", "flip", lambda flip: _p_cell(flip["p_flip_holm"]), group="Order turns", smallest_first=True
            ),
        ],
        records=list(starmap(_Pair, zip(*analysis.comparisons, analysis.change.pairs, strict=True))),
        fields=fields,
    )


def _floor_words(analysis: Analysis) -> str:
    floors = [analysis.floor(which, 1, 1) for which in ("inside", "outside")]
    return f"Training runs alone make a pair differ by up to {number(floors[0])} in and {number(floors[1])} out"


def calibration_table(analysis: Analysis) -> Table:
    """Calibration errors as the receipts state them, mean over seeds."""
    material = analysis.material
    tests = [test for test in (material.inside, material.outside) if test in material.tests]
    with_table = {r.row for r in material.receipts if r.test in tests and r.has_calibration}

    def used(model: str, test: Test) -> list[Receipt]:
        return [r for r in material.used(model, test) if r.has_calibration]

    def mean(model: str, test: Test, output: str) -> float | None:
        means = [r.scores["calibration"][output].mean for r in used(model, test)]
        values = [mean for mean in means if mean is not None]
        return sum(values) / len(values) if values and len(values) == len(means) else None

    def column(test: Test, output: str) -> Column:
        def cell(record: Mapping[str, Any]) -> Cell:
            value = record[f"{test[0]}.{output}"]
            return Cell(number(value), sort=value, **from_receipts(used(record["model"], test)))

        return Column(CALIBRATION[output], "", cell, group=material.test_title(test), smallest_first=True)

    return Table(
        name="calibration",
        caption="Expected calibration error (10 bins) and Brier score over the pixels inside and outside the true "
        "polyp, mean over seeds; 0 is best.",
        columns=[_model_column(material), *(column(test, output) for test in tests for output in CALIBRATION)],
        records=[
            {"model": model, **{f"{test[0]}.{key}": mean(model, test, key) for test in tests for key in CALIBRATION}}
            for model in material.models
            if model in with_table
        ],
    )


def receipt_table(material: Material) -> Table:
    """The appendix: every receipt."""
    records, first = [], dict[str, Receipt]()
    for model in material.models:
        for receipt in material.of(model):
            records.append(receipt)
            first.setdefault(_receipt_anchor(receipt), receipt)

    def fields(receipt: Receipt) -> dict[str, Any]:
        environment = receipt.environment
        return {
            "model": material.label(receipt.row),
            "test": material.test_title(receipt.test),
            "seed": receipt.seed,
            "images": len(receipt.images),
            "file": receipt.path.name,
            "folder": receipt.name,
            "receipt_sha256": receipt.file_sha256,
            "weights_sha256": receipt.model_sha256,
            "content_id": receipt.dataset.content_id,
            "git_revision": environment.git_revision,
            **environment.versions,
        }

    def model_cell(receipt: Receipt) -> Cell:
        label = material.label(receipt.row)
        seed = "" if receipt.seed is None else f"seed {receipt.seed}"
        return Cell(label, seed, sort=label, href="#" + slug("model", receipt.row))

    def test_cell(receipt: Receipt) -> Cell:
        title = material.test_title(receipt.test)
        return Cell(title, f"n = {len(receipt.images)}, content {receipt.dataset.content_id}", sort=title)

    def computed_with(receipt: Receipt) -> Cell:
        environment = receipt.environment
        versions = environment.versions
        return Cell(
            str(environment.git_revision or "none")[:_SHORT],
            f"polypseg {versions.get('polypseg', '?')}, torch {versions.get('torch', '?')}",
            title=", ".join(f"{name} {version}" for name, version in versions.items()),
        )

    shown: dict[str, Callable[[Receipt], Cell]] = {
        "Model": model_cell,
        "Test": test_cell,
        "Receipt": lambda receipt: Cell(receipt.name, receipt.path.name, sort=receipt.path.name),
        "Its sha256": lambda receipt: Cell(
            receipt.file_sha256[:_SHORT], sort=receipt.file_sha256, title=receipt.file_sha256
        ),
        "Weights’ sha256": lambda receipt: Cell(
            (receipt.model_sha256 or "not recorded")[:_SHORT], title=receipt.model_sha256 or ""
        ),
        "Computed with": computed_with,
    }
    return Table(
        name="receipts",
        caption="Digests are the first 12 of 64 hex digits; the whole ones are in the tooltip and in receipts.csv.",
        columns=[Column(title, "", cell, numeric=False, smallest_first=True) for title, cell in shown.items()],
        records=records,
        anchor=lambda receipt: _receipt_anchor(receipt) if first[_receipt_anchor(receipt)] is receipt else "",
        fields=fields,
    )


def _receipt_anchor(receipt: Receipt) -> str:
    return slug("receipt", receipt.row, *receipt.test)
