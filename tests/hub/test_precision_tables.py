"""The tables of training in bf16 against float32 say what curves and receipts say."""

import shutil
from pathlib import Path

import pytest

from polypseg import zoo
from polypseg.errors import PolypSegError
from polypseg.evaluation.receipt import find_receipts
from polypseg.files import write_csv
from polypseg.hub.precision_tables import precision_text
from receipt_factory import DrawnDataset, write_receipt

CURVES = {"no.1": (0.40, 0.50), "bf16.1": (0.41, 0.52), "no.2": (0.30, 0.48), "bf16.2": (0.33, 0.48)}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, dice in CURVES.items():
        rows = [{"loss": 1 - value, "validation_dice": value} for value in dice]
        write_csv(tmp_path / "first_epochs" / f"RN-NA-NA.{name}.csv", rows)
        precision, seed = name.split(".")
        write_receipt(
            tmp_path / "small" / name, zoo.get("RN-IN-SL"), seed=int(seed), dataset=DrawnDataset("kvasir_seg", 10),
            split="reference", part="test", skill=1.0 + (precision == "bf16"), conventions=("paper",),
        )  # fmt: skip
    return tmp_path


def test_tables_hold_curves_scores_and_what_may_be_said(folder):
    lines = precision_text(folder).splitlines()
    assert "| RN-NA-NA | float32 | 2 | 0.700 | 0.520 | 0.300 | 0.480 |" in lines
    told = "Of one seed, the two precisions differ by at most 0.030 in validation Dice; of one precision, two seeds "
    assert f"{told}differ by up to 0.100." in lines
    means = {name: next(iter(find_receipts(folder / "small" / name).values())).mean_dice for name in CURVES}
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[2:4] == [
        ", ".join(f"{means[f'{precision}.{seed}']:.3f}" for seed in (1, 2)) for precision in ("no", "bf16")
    ]
    change = sum(means[f"bf16.{seed}"] - means[f"no.{seed}"] for seed in (1, 2)) / 2
    assert cells[4].startswith(f"{change:+.3f} [") and cells[5] in ("different", "undecided", "equivalent")


def test_a_seed_in_one_precision_alone_is_refused(folder):
    shutil.rmtree(folder / "small" / "no.2")
    with pytest.raises(PolypSegError, match="both precisions of the same seeds"):
        precision_text(folder)
