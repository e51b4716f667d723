"""What docs/results.md says of full-size rows: of those in training, and of those that are trained to their end.

A folder holds ``ROW.EPOCHS/``, the ``epochs.csv`` of a run up to there and the receipts of its best model by
validation, and for a finished row ``ROW/``, what ``polypseg robustness`` and ``polypseg shift attribute`` wrote of it;
its receipts and its ``epochs.csv`` lie with the other models' results, under its id. Either may hold its curve, as
training_scripts/plot_results.py draws it; ``ROW.EPOCHS/`` may hold the run's ``run.json``, for what it was computed on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polypseg import zoo
from polypseg.errors import PolypSegError
from polypseg.evaluation.receipt import Receipt, find_receipts, read_score_set
from polypseg.evaluation.receipt_reading import read_results, size_of
from polypseg.files import read_json
from polypseg.hub.card_facts import compute_facts, read_epochs, run_recipe, training_hours, training_speed
from polypseg.hub.starter_tables import SCORES, robustness_table, scores_and_alarms, shift_table
from polypseg.recipe import Recipe
from polypseg.statistics.generalization import generalization_gaps
from polypseg.tables import Column, Table, with_bounds

ROBUSTNESS, ATTRIBUTION, CURVE = "robustness.json", "attribution.json", "learning_curve.png"
INSIDE, OUTSIDE = "kvasir_seg", "cvc_clinicdb"
"""The tests whose difference is the row's loss."""


def in_training_text(folder: Path) -> str:
    """Rows not trained to their end as Markdown: a line for each test of each ``ROW.EPOCHS``, speeds, then curves."""
    records: list[dict[str, Any]] = []
    courses: list[str] = []
    for kept in sorted(folder.glob("*.*"), key=lambda path: (path.stem, int(path.suffix[1:]))):
        epochs = read_epochs(kept / "epochs.csv")
        dice = max(float(row["validation_dice"]) for row in epochs)
        for receipt in sorted(find_receipts(kept).values(), key=lambda receipt: receipt.n):
            recipe = _recipe_of(receipt, finished=False)
            told = f"{kept.stem} after {len(epochs)} of {recipe.training.epochs} epochs"
            records.append({"row": told, "validation": dice, "test": receipt.dataset.title, "size": size_of(receipt)})
            records[-1] |= receipt.stated
        courses += [*_speed(kept, epochs), *_curve(kept)]
    columns = [
        Column("unfinished", "row"),
        Column("best validation Dice", "validation", "{:.3f}".format),
        Column("tested on", "test"),
        Column("n", "size"),
        *SCORES,
    ]
    return "\n\n".join([Table(columns=columns, records=records).markdown(), *courses])


def _speed(kept: Path, epochs: Sequence[Mapping[str, str]]) -> list[str]:
    """How fast a run was, on what, and how long the rest of it would take, if its record is kept."""
    if not (kept / "run.json").is_file():
        return []
    recipe, hardware = run_recipe(kept), compute_facts(kept).hardware
    left = recipe.training.epochs - len(epochs)
    rest = f"{left} remain, at this speed {_hours(epochs, recipe) / len(epochs) * left:.0f} hours more"
    return [f"{kept.stem} on {hardware}: {len(epochs)} epochs {_cost_words(epochs, recipe)}; {rest}."]


def _curve(kept: Path) -> list[str]:
    """The picture of a run's course, if there is one."""
    title = f"Loss and validation Dice of {kept.stem} by epoch"
    return [f"![{title}]({kept.parent.name}/{kept.name}/{CURVE})"] if (kept / CURVE).is_file() else []


def _recipe_of(receipt: Receipt, *, finished: bool) -> Recipe:
    """The recipe of a receipt's row. Raises PolypSegError for one that has ended, or has not, against what is asked."""
    origin = None if receipt.model is None else receipt.model.weights_origin
    recipe = None if origin is None else origin.bundled_recipe
    if recipe is None or origin is None or bool(origin.finished) != finished:
        asked = "trained to its end" if finished else "in training"
        raise PolypSegError(f"{receipt.path} is not of a row {asked}: remove it")
    return recipe


def finished_text(folder: Path, *, results: Path, small: Path) -> str:
    """A section for each ``ROW`` that is trained to its end, as Markdown.

    ``results``: folder of all models' results. ``small``: gaps.json of the small study, for the contrast with it.
    """
    rows = [entry for entry in zoo.ZOO if (folder / entry.short_name).is_dir()]
    receipts = {entry.model_id: read_results(results / entry.model_id) for entry in rows}
    sections = []
    for entry in rows:
        kept, own = folder / entry.short_name, receipts[entry.model_id]
        sections += [
            f"### {entry.short_name}",
            _run_words(read_epochs(results / entry.model_id / "epochs.csv"), recipe=_recipe_of(own[0], finished=True)),
            *_curve(kept),
            scores_and_alarms(own),
            f"Under corruptions: {robustness_table(kept / ROBUSTNESS)}",
            f"What another hospital costs it: {shift_table(kept / ATTRIBUTION)}",
        ]
    if not rows:
        return "None yet."
    return "\n\n".join([*sections, _contrast(receipts, read_json(small))])


def _run_words(epochs: Sequence[Mapping[str, str]], *, recipe: Recipe) -> str:
    """Length, speed and validation of a run in a sentence."""
    dice = [float(row["validation_dice"]) for row in epochs]
    best = max(range(len(dice)), key=dice.__getitem__)
    return (
        f"{len(epochs)} epochs by the recipe `{recipe.name}` {_cost_words(epochs, recipe)}; "
        f"validation Dice {dice[best]:.3f} after epoch {best + 1}, whose weights are kept, {dice[-1]:.3f} in the end."
    )


def _cost_words(epochs: Sequence[Mapping[str, str]], recipe: Recipe) -> str:
    """How long a run took, and how fast it was."""
    speed = f"{training_speed(epochs):.1f} images/s in the median of the epochs"
    return f"in {_hours(epochs, recipe):.1f} hours of training without validation, {speed}"


def _hours(epochs: Sequence[Mapping[str, str]], recipe: Recipe) -> float:
    hours = training_hours(epochs, recipe)
    assert hours is not None, "of a run with epochs"
    return hours


def _contrast(receipts: Mapping[str, Sequence[Receipt]], small: Sequence[Mapping[str, Any]]) -> str:
    """Full-size rows beside the same rows of the small study: mean Dice on both tests, loss, and rank of the small."""
    by_test = [
        {name: [one for one in own if one.dataset.name == test] for name, own in receipts.items()}
        for test in (INSIDE, OUTSIDE)
    ]
    gaps = {gap.model: gap.row() for gap in generalization_gaps(*map(read_score_set, by_test))}
    of_small = {row["model"]: row for row in small}
    records = []
    for name in receipts:
        ranks = [1 + sum(row[side] > of_small[name][side] for row in small) for side in ("inside", "outside")]
        rank = f"{ranks[0]} in, {ranks[1]} out of distribution, of {len(small)}"
        for size, row, told in (("full", gaps[name], "–"), ("small study", of_small[name], rank)):
            records.append({**row, "row": zoo.get(name).short_name, "size": size, "rank": told})
    columns = [
        Column("row", "row"),
        Column("size", "size"),
        _interval_column("mDice on Kvasir-SEG", "inside"),
        _interval_column("mDice on CVC-ClinicDB", "outside"),
        _interval_column("loss", "gap"),
        _interval_column("as a fraction", "relative_gap"),
        Column("rank by mDice", "rank"),
    ]
    title = "Beside [the small study](study/README.md), of smaller encoders, smaller frames and shorter trainings:"
    return f"{title}\n\n{Table(columns=columns, records=records).markdown()}"


def _interval_column(title: str, key: str) -> Column:
    return Column(title, "", lambda row: with_bounds(row[key], row[f"{key}_low"], row[f"{key}_high"]))
