"""The campaign of faults: a killed process is known as one, a difference is found, and lost tries are counted."""

import importlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from polypseg.errors import UsageError
from polypseg.files import UNFINISHED

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("trial")


def test_every_kind_can_be_tried(trial, monkeypatch, tmp_path):
    for folder in ("study", "pretraining", "training"):
        monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "tests" / folder))
    campaign = [importlib.import_module(name) for name in ("trainings", "disks", "inputs")]
    trainings, disks, inputs = campaign
    kinds = [
        *trainings.kinds(tmp_path, tmp_path, tmp_path, scale=1.0),
        *disks.kinds(tmp_path, scale=1.0),
        *inputs.kinds(tmp_path),
    ]
    names = [kind.name for kind, _ in kinds]
    assert len(set(names)) == len(names) and set(names) >= {row["name"] for row in kept_rows()}
    for _, files, _ in inputs.KINDS.values():
        assert all(len([*inputs.TESTS.rglob(name)]) == 1 for name in files), files


def kept_rows() -> list[dict[str, Any]]:
    return json.loads((FOLDER.parents[1] / "docs" / "reliability.json").read_text())["kinds"]


def refuse() -> None:
    raise UsageError("no")


def test_processes_end_as_they_did(trial, tmp_path):
    log = tmp_path / "log"
    assert trial.forked(lambda: None, log) == 0
    assert trial.forked(refuse, log) == 2 and trial.last_words(log) == "error: no"
    assert trial.forked(lambda: 1 / 0, log) == trial.BROKEN
    assert trial.forked(lambda: time.sleep(60), log, kill_after=0.05) == -signal.SIGKILL


def test_moments_cover_the_run_and_are_the_same_again(trial):
    chosen = trial.moments(10, seed=3)
    assert sorted(int(moment * 10) for moment in chosen) == list(range(10)) and chosen == trial.moments(10, seed=3)


def write_run(folder: Path, *, weight: float, rate: float) -> Path:
    (folder / "best").mkdir(parents=True)
    save_file({"w": torch.full((2,), weight)}, folder / "best" / "model.safetensors")
    (folder / "progress.json").write_text(json.dumps({"epoch": 1, "images_per_second": rate}))
    return folder


def test_a_difference_or_a_leftover_is_found(trial, tmp_path):
    patterns = ("best/*.safetensors", "progress.json")
    whole, equal, other = (
        write_run(tmp_path / name, weight=weight, rate=rate)
        for name, weight, rate in (("whole", 1.0, 5.0), ("equal", 1.0, 7.0), ("other", 1.0 + 2**-23, 5.0))
    )
    assert trial.difference(whole, equal, patterns) is None
    assert trial.difference(whole, other, patterns) == "best/model.safetensors differs"
    assert trial.difference(whole, equal, ("losses.csv",)) == "losses.csv: 0 instead of 0 files"
    (equal / "best" / f".config.json.x{UNFINISHED}").mkdir()
    assert trial.difference(whole, equal, patterns).startswith("left behind: best/.config.json.x")


def test_the_table_counts_and_lists_what_was_lost(trial):
    kind, other = trial.Kind("kills", "at random"), trial.Kind("disks", "small ones", not_tried="no right to mount")
    for problem in (None, "differs", None):
        kind.count(problem)
    text = importlib.import_module("table").to_markdown([kind, other])
    assert "| kills | at random. | 3 | 2 | 1 | 0 |" in text and "- kills: differs" in text
    assert "| disks | small ones. Not tried: no right to mount. | 0 | – | – | 0 |" in text
    assert "| **all** | | **3** | **2** | **1** | **0** |" in text
