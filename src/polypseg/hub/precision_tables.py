"""Training in bf16 against float32 on CPU, from kept curves and receipts, as Markdown.

A folder holds ``first_epochs/ROW.PRECISION.SEED.csv``, the ``epochs.csv`` of runs that began alike, and
``small/PRECISION.SEED/``, the receipts of small models that were trained to their end; PRECISION is ``bf16`` or ``no``.
"""

from collections.abc import Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from polypseg.errors import PolypSegError
from polypseg.evaluation.receipt import Receipt, find_receipts, read_score_set
from polypseg.evaluation.receipt_reading import size_of
from polypseg.hub.card_facts import read_epochs
from polypseg.statistics import compare_models
from polypseg.statistics.comparisons import MARGIN
from polypseg.tables import Column, Table, with_bounds

NAMES = {"no": "float32", "bf16": "bf16"}
"""Precision as recipes call it -> as people do."""


def precision_text(folder: Path) -> str:
    """Both tables. Raises PolypSegError for a folder that does not hold both precisions of the same seeds."""
    return f"{first_epochs(folder / 'first_epochs')}\n{small_models(folder / 'small')}"


def first_epochs(folder: Path) -> str:
    """The first epochs of runs that differ in precision, or in seed, alone."""
    curves: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        row, precision, seed = path.stem.rsplit(".", 2)
        curves[row, NAMES[precision], seed] = list(read_epochs(path))
    epochs = min((len(rows) for rows in curves.values()), default=0)
    records: list[dict[str, Any]] = [
        {"row": row, "precision": precision, "seed": seed}
        | {f"loss {k}": float(rows[k]["loss"]) for k in range(epochs)}
        | {f"dice {k}": float(rows[k]["validation_dice"]) for k in range(epochs)}
        for (row, precision, seed), rows in curves.items()
    ]
    columns = [Column(name, name) for name in ("row", "precision", "seed")]
    columns += [Column(f"loss of epoch {k + 1}", f"loss {k}", "{:.3f}".format) for k in range(epochs)]
    columns += [Column(f"validation Dice after {k + 1}", f"dice {k}", "{:.3f}".format) for k in range(epochs)]
    apart = {same: [0.0] for same in ("seed", "precision")}
    for one, other in combinations(records, 2):
        for same, differs in (("seed", "precision"), ("precision", "seed")):
            if one["row"] == other["row"] and one[same] == other[same] and one[differs] != other[differs]:
                apart[same] += [abs(one[f"dice {k}"] - other[f"dice {k}"]) for k in range(epochs)]
    by_precision, by_seed = max(apart["seed"]), max(apart["precision"])
    told = (
        f"Of one seed, the two precisions differ by at most {by_precision:.3f} in validation Dice; "
        f"of one precision, two seeds differ by up to {by_seed:.3f}.\n"
    )
    return f"{Table(columns=columns, records=records).markdown()}\n\n{told}"


def small_models(folder: Path) -> str:
    """Test scores of models trained to their end in both precisions, a run for each seed."""
    found: dict[str, dict[str, dict[str, Receipt]]] = {}
    for run in sorted(folder.iterdir()):
        precision, seed = run.name.split(".")
        for receipt in find_receipts(run).values():
            found.setdefault(receipt.dataset.title, {}).setdefault(NAMES[precision], {})[seed] = receipt
    records = []
    for title, by_precision in sorted(found.items(), reverse=True):
        seeds = [sorted(receipts) for receipts in by_precision.values()]
        if set(by_precision) != set(NAMES.values()) or any(one != other for one, other in pairwise(seeds)):
            raise PolypSegError(f"{folder} needs both precisions of the same seeds on {title}, not {seeds}")
        scores = read_score_set({name: list(by_precision[name].values()) for name in ("bf16", "float32")})
        (compared,) = compare_models(scores)
        difference = compared.difference
        records.append(
            {
                "test": title,
                "size": size_of(next(iter(by_precision["bf16"].values()))),
                "difference": with_bounds(difference.estimate, difference.low, difference.high, sign="+"),
                "reading": compared.reading,
            }
            | {name: _by_seed(receipts) for name, receipts in by_precision.items()}
        )
    columns = [
        Column("tested on", "test"),
        Column("n", "size"),
        Column("mDice by seed, float32", "float32"),
        Column("mDice by seed, bf16", "bf16"),
        Column("bf16 - float32", "difference"),
        Column(f"at a margin of {MARGIN:g}", "reading"),
    ]
    return Table(columns=columns, records=records).markdown()


def _by_seed(receipts: Mapping[str, Receipt]) -> str:
    return ", ".join(f"{receipt.mean_dice:.3f}" for receipt in receipts.values())
