"""The tables on README and docs about the shipped model, from receipts and records."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polypseg.data.catalog import title_of
from polypseg.evaluation.receipt import Receipt, find_receipts
from polypseg.evaluation.receipt_reading import alarm_words, cell_of, size_of, tested_on
from polypseg.files import read_json
from polypseg.hub.card_facts import read_epochs, training_hours
from polypseg.recipe import Recipe, changes_from_bundled, load_recipe, read_recipe
from polypseg.tables import Column, Table, with_bounds

SCORES = tuple(
    Column(title, key, cell_of)
    for title, key in (("mDice", "dice"), ("mIoU", "iou"), ("mPrecision", "precision"), ("mRecall", "recall"))
)
_SHOWN_SEVERITIES = (1, 3, 5)
_STATED_SEVERITY = 3


def starter_table(results: Path) -> str:
    """The shipped model's scores as Markdown, from its receipts in ``results``.

    A row per test at probability 0.5 and the false alarms; then the same at the model's own operating point.
    """
    receipts = find_receipts(results).values()
    parts = [scores_and_alarms([receipt for receipt in receipts if receipt.operating_point is None])]
    if pointed := [receipt for receipt in receipts if receipt.operating_point is not None]:
        point = pointed[0].operating_point or {}
        asked = f"regions that exceed {point['minimum_peak']:.2f} somewhere" if point.get("minimum_peak") else "regions"
        if point["minimum_share"]:
            asked += f" of at least {100 * point['minimum_share']:g} % of the frame"
        parts.append(
            f"At its own operating point, chosen on validation frames (`--operating-point model`: probability above "
            f"{point['threshold']:.2f} at temperature {point['temperature']:.2f}, {asked}):"
        )
        parts.append(scores_and_alarms(pointed))
    return "\n\n".join(parts)


def scores_and_alarms(receipts: Sequence[Receipt]) -> str:
    """A row per test, the one in distribution first, then the false alarms."""
    records, alarms = [], []
    for receipt in sorted(receipts, key=lambda receipt: (receipt.dataset.name != "kvasir_seg", receipt.n)):
        alarm = receipt.false_alarms
        if receipt.without_polyps and alarm is not None:
            of = f"{alarm.frames} polyp-free HyperKvasir frames that it has not seen"
            alarms.append(f"False alarms on {of}: {alarm_words(alarm)}.")
            continue
        records.append({"test": tested_on(receipt), "size": size_of(receipt), **receipt.stated})
    columns = [
        Column("tested on", "test"),
        Column("n", "size"),
        *SCORES,
    ]
    return "\n".join([Table(columns=columns, records=records).markdown(), *(["", *alarms] if alarms else [])])


def runs_table(folder: Path) -> str:
    """The training runs of the shipped model as Markdown: a row per ``STAGE.RECIPE.epochs.csv`` of a folder.

    Hours are of training without validation.
    """
    records = []
    for file in sorted(folder.glob("*.epochs.csv")):
        _, name, _ = file.name.split(".", maxsplit=2)
        epochs = read_epochs(file)
        hours = training_hours(epochs, load_recipe(name)) or 0
        records.append({"recipe": name, "epochs": len(epochs), "hours": hours, "dice": _dice_by_epoch(epochs)})
    columns = [
        Column("recipe", "recipe", "`{}`".format),
        Column("epochs", "epochs"),
        Column("hours of training", "hours", "{:.1f}".format),
        _DICE_BY_EPOCH,
    ]
    return Table(columns=columns, records=records).markdown()


_DICE_BY_EPOCH = Column("validation Dice after each epoch", "dice")


def _dice_by_epoch(epochs: Sequence[Mapping[str, str]]) -> str:
    return " ".join(f"{float(row['validation_dice']):.3f}".removeprefix("0") for row in epochs)


def search_table(folder: Path) -> str:
    """Short runs that try one change each as Markdown: a row per ``NAME.recipe.yaml`` with its ``NAME.epochs.csv``.

    The first by name is the one that the others change.
    """
    records: list[dict[str, Any]] = []
    common: list[str] = []
    for file in sorted(folder.glob("*.recipe.yaml")):
        recipe = Recipe.model_validate(read_recipe(file)[0])
        changes = changes_from_bundled(recipe)
        common = common or changes
        own = [change for change in changes if change not in common]
        epochs = read_epochs(folder / file.name.replace(".recipe.yaml", ".epochs.csv"))
        changed = ", ".join(f"`{change}`" for change in own) or "–"
        records.append({"changes": changed, "dice": _dice_by_epoch(epochs)})
    columns = [Column("changed", "changes"), _DICE_BY_EPOCH]
    told = ", ".join(f"`{change}`" for change in common)
    return f"All by the recipe `starter` with {told}:\n\n{Table(columns=columns, records=records).markdown()}"


def averages_table(file: Path) -> str:
    """What training_scripts/average_stages.py judged, as Markdown."""
    dice, share = "{:.4f}".format, "{:.1%}".format
    columns = [
        Column("share of the fourth stage", "share", "{:g}".format),
        Column("validation Dice", "clean", dice),
        Column("shrunk", "shrunk", dice),
        Column("corrupted", "corrupted", dice),
        Column("mean", "score", dice),
        Column("frames with a false alarm at 0.5", "alarms", share),
        Column("at its own point", "alarms_at_point", share),
    ]
    return Table(columns=columns, records=read_json(file)).markdown()


def robustness_table(file: Path) -> str:
    """What ``polypseg robustness`` wrote as Markdown: a row per corruption, the costliest first."""
    found = read_json(file)
    rows = {(row["corruption"], row["severity"]): row for row in found["rows"]}
    records = [
        {
            "corruption": kind.replace("_", " "),
            **{str(severity): rows[kind, severity]["dice_mean"] for severity in _SHOWN_SEVERITIES},
            **{
                key: rows[kind, _STATED_SEVERITY][key]
                for key in ("drop_mean", "drop_low", "drop_high", "relative_drop")
            },
        }
        for kind in found["strengths"]
    ]
    records.sort(key=lambda record: -record["drop_mean"])
    columns = [
        Column("corruption", "corruption"),
        *(Column(f"mDice at severity {severity}", str(severity), "{:.3f}".format) for severity in _SHOWN_SEVERITIES),
        Column(
            f"loss at {_STATED_SEVERITY}, 95 % interval",
            "",
            lambda row: with_bounds(row["drop_mean"], row["drop_low"], row["drop_high"]),
        ),
        Column("as a fraction", "relative_drop", "{:.0%}".format),
    ]
    tested, clean = found["dataset"], found["clean"]
    title = (
        f"{title_of(tested['name'])}, {tested['split']} {tested['part']} part, n = {tested['n']}; clean "
        f"{with_bounds(clean['mean'], clean['low'], clean['high'])}; over all kinds and severities "
        f"{found['mean_relative_drop']:.0%} of it is lost:"
    )
    return f"{title}\n\n{Table(columns=columns, records=records).markdown()}"


def shift_table(file: Path) -> str:
    """What ``polypseg shift attribute`` wrote as Markdown: a row per factor, the costliest first."""
    found = read_json(file)
    columns = [
        Column("frames re-rendered in", "factor"),
        Column(
            "cost in mean Dice, 95 % interval",
            "",
            lambda row: with_bounds(row["cost"], row["cost_low"], row["cost_high"], sign="+"),
        ),
        Column("p (Holm)", "p_holm", "{:.3f}".format),
        Column("of its shift covered", "covered", lambda share: "–" if share is None else f"{share:.0%}"),
    ]
    inside, outside, drop = (found[name] for name in ("inside", "outside", "drop"))
    title = (
        f"{found['titles'][0]} (n = {found['n'][0]}, mean Dice {inside['estimate']:.3f}) toward {found['titles'][1]} "
        f"(n = {found['n'][1]}, {outside['estimate']:.3f}); the difference is "
        f"{with_bounds(drop['estimate'], drop['low'], drop['high'], sign='+')}:"
    )
    return f"{title}\n\n{Table(columns=columns, records=found['factors']).markdown()}"


def exports_table(folder: Path) -> str:
    """What benchmarks/export_table.py wrote to ``exports.MODEL.json`` of a folder as Markdown, a table per model."""
    columns = [
        Column("runtime", "description"),
        Column("precision", "precision"),
        Column("MB", "megabytes", "{:.1f}".format),
        Column("times as fast", "latency_ratio", "{:.1f}".format),
        Column("mDice", "dice", "{:.4f}".format),
        Column("change", "dice_change", "{:+.4f}".format),
        Column("largest of an image", "largest_change", "{:.3f}".format),
    ]
    tables = []
    for file in sorted(folder.glob("exports.*.json")):
        found = read_json(file)
        table = Table(columns=columns, records=found["rows"]).markdown()
        model, tested = file.name.split(".")[1], found["title"].partition(" on ")[2]
        tables.append(f"{model} on {tested}; torch takes {found['torch_milliseconds']:.0f} ms a frame:\n\n{table}")
    return "\n\n".join(tables)


def flicker_table(path: Path) -> str:
    """What benchmarks/flicker.py wrote, as Markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    columns = [
        Column("masks", "masks", str),
        Column("mDice", "dice", str),
        Column("mean of clips", "dice_by_clip", str),
        Column("flicker index", "flicker", str),
        Column("where the annotation stays", "false_flicker", str),
        Column("1 - IoU of neighbors", "change", str),
    ]
    of = f"{records[0]['frames']} frames of {records[0]['clips']} clips"
    return f"CVC-ClinicDB, {of}:\n\n{Table(columns=columns, records=records).markdown()}"
