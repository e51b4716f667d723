"""What is prepared for ten minutes of one GPU, on the CPU with a few steps: every step runs and leaves its results."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from polypseg.cli.app import app as polypseg
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.data.catalog import get_spec
from polypseg.data.splits import pinned_split
from polypseg.evaluation.receipt import check_receipt
from polypseg.study import gpu_check
from polypseg.training import finetune as training
from polypseg.training.run_folder import InterruptedRunError, newest_checkpoint
from processes import run

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = pinned_split("kvasir_seg", "reference")
TINY = gpu_check.Effort(
    overrides=(
        "data.image_size=64",
        "model.encoder=test_resnet",
        "model.decoder_channels=16",
        "training.epochs=12",
        "training.total_batch_size=4",
        "training.precision=no",
    ),
    batch=4,
    predictions=2,
)


@pytest.fixture(autouse=True)
def own_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Synthetic frames in the places of some of Kvasir-SEG's and of CVC-ClinicDB's."""
    folder = tmp_path_factory.mktemp("packed")
    own = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=14, size=(64, 64)))
    ids = {
        "kvasir_seg": [*PARTS["train"][:8], *PARTS["validation"][:3], *PARTS["test"][:3]],
        "cvc_clinicdb": [str(number) for number in range(1, 4)],
    }
    for name, numbers in ids.items():
        spec = get_spec(name)
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for record_id, record in zip(numbers, own.records, strict=False):
                archive.writestr(f"{spec.image_folder}/{record_id}.png", own.source.read(record.image))
                archive.writestr(f"{spec.mask_folder}/{record_id}.png", own.source.read(record.mask))
    return folder


def predictions_of(output):
    return {path.parent.name: path.stem for path in sorted(output.glob("predictions/RN-NA-NA/*/*.png"), reverse=True)}


def test_a_row_is_trained_predicts_both_tests_and_is_continued(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROWS", ("RN-NA-NA",))
    saved, save = [], training._Run.save_checkpoint
    monkeypatch.setattr(training._Run, "save_checkpoint", lambda run: (saved.append(run.progress.epoch), save(run)))
    for _ in range(2):  # a finished row only predicts again
        path = gpu_check.check(packed, tmp_path, steps=[gpu_check.Step.ROWS], effort=TINY)
        (row,) = json.loads(path.read_text())["rows"]
        assert row["finished"] and not row["interrupted"]
        assert (row["epochs"], row["steps"], len(row["images_per_second"])) == (12, 24, 12)
    assert saved == [10, 12]
    assert predictions_of(tmp_path) == {"kvasir_seg": PARTS["test"][0], "cvc_clinicdb": "1"}


def test_a_row_that_is_stopped_predicts_by_its_best_model_and_goes_on(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROWS", ("RN-NA-NA", "VT-NA-NA"))
    asked = iter([False] * 6 + [True])
    monkeypatch.setattr("polypseg.training.run_folder.StopFlag.anywhere", lambda self, accelerator: next(asked, False))
    with pytest.raises(InterruptedRunError, match="RN-NA-NA was stopped after 3 epochs: the same call goes on"):
        gpu_check.check(packed, tmp_path, steps=[gpu_check.Step.ROWS], effort=TINY)
    (row,) = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert row["interrupted"] and not row["finished"] and row["epochs"] == 3
    assert set(predictions_of(tmp_path)) == {"kvasir_seg", "cvc_clinicdb"}
    assert newest_checkpoint(tmp_path / "runs" / "RN-NA-NA").name == "step-00000007"
    assert gpu_check.train_row("RN-NA-NA", packed, tmp_path, effort=TINY)["finished"]


def test_without_a_model_there_is_nothing_to_predict_by(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("polypseg.training.run_folder.StopFlag.anywhere", lambda self, accelerator: True)
    with pytest.raises(InterruptedRunError, match="interrupted at step 1"):
        gpu_check.train_row("RN-NA-NA", packed, tmp_path, effort=TINY)
    assert not (tmp_path / "predictions").exists()


def test_predictions_are_scored_at_home(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROWS", ("RN-NA-NA",))
    gpu_check.check(packed, tmp_path, steps=[gpu_check.Step.ROWS], effort=TINY)
    predictions, source = tmp_path / "predictions" / "RN-NA-NA" / "kvasir_seg", packed / "kvasir_seg.zip"
    call = ["evaluate", "--predictions", predictions, "--dataset", "kvasir_seg", "--source", source, "--part", "test"]
    call += ["--split", "reference", "--allow-partial", "--limit", 2, "--name", "RN-NA-NA", "--output", tmp_path]
    done = CliRunner().invoke(polypseg, list(map(str, call)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (receipt,) = tmp_path.rglob("*.receipt.json")
    assert check_receipt(receipt) == []


def test_devices_are_compared(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROWS", ("RN-NA-NA",))
    path = gpu_check.check(packed, tmp_path, steps=[gpu_check.Step.DEVICES], effort=TINY)
    found = {case["case"]: case for case in json.loads(path.read_text())["devices"]}
    on_gpu = torch.cuda.is_available()
    assert list(found)[:2] == ["float32", "float16" if on_gpu else "bfloat16"]
    assert ("SyncBatchNorm, one process" in found) == on_gpu
    assert found["float32"]["gradient_difference"] < 1e-3
    assert found["fused AdamW"]["weight_difference"] < 1e-6


@pytest.mark.parametrize(
    ("memory", "tried"),
    [
        (1500, [(256, True), (512, True), (1024, True), (2048, False)]),
        (100, [(256, False), (128, False), (64, True)]),
        (9999, [(256, True), (512, True), (1024, True), (2048, True), (4096, True)]),
        (0, [(2**power, False) for power in range(8, 0, -1)]),
    ],
)
def test_the_largest_batch_is_found_from_above_and_below(packed, tmp_path, monkeypatch, memory, tried):
    def pretrain(method, frames, recipe, accelerator, *, run_dir, workers):
        batch = recipe.training.total_batch_size
        assert len(frames) >= 2 * batch and frames.read(len(frames) - 1)
        assert all("/images/" in frames.name(index) for index in (0, len(frames) - 1))
        (run_dir / "checkpoints").mkdir(parents=True)
        if batch > memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        (run_dir / "cost.json").write_text('{"images_per_second": 7.0}')

    monkeypatch.setattr(gpu_check, "pretrain", pretrain)
    monkeypatch.setattr(gpu_check, "build_method", lambda recipe: None)
    found = list(gpu_check.try_batches("pretrain_mae_vit_base", packed, tmp_path))
    assert [(one["batch"], one["fits"]) for one in found] == tried
    assert all(("images_per_second" in one) == one["fits"] for one in found)
    assert not list((tmp_path / "pretraining").glob("*"))


@pytest.mark.slow
def test_pretraining_at_full_size_makes_its_two_steps(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RECIPES", ("pretrain_mae_vit_base",))
    path = gpu_check.check(packed, tmp_path, steps=[gpu_check.Step.PRETRAINING], effort=gpu_check.SMALL)
    (found,) = json.loads(path.read_text())["pretraining"]
    (cost,) = found["tried"]
    assert cost["batch"] == 2 and cost["fits"] and cost["images_per_second"] > 0 and cost["peak_memory_bytes"] > 1e9


def test_an_unknown_step_is_refused(packed, tmp_path):
    script = [sys.executable, REPOSITORY / "training_scripts" / "gpu_check.py", "run", packed]
    done = run([*script, "--output", tmp_path / "out", "--step", "row"], capture_output=True)
    assert done.returncode == 2 and "'row' is not one of" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.real_data
@pytest.mark.slow
def test_packed_copies_are_small_and_complete(real_data, tmp_path):
    sources = {"kvasir_seg": real_data / "Kvasir-SEG", "cvc_clinicdb": real_data / "CVC-ClinicDB"}
    written = gpu_check.pack(sources, tmp_path)
    assert sum(path.stat().st_size for path in written) < gpu_check.LARGEST
    assert [len(gpu_check.open_packed(tmp_path, name).records) for name in gpu_check.PACKED] == [1000, 612]
