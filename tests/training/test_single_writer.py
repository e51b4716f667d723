"""Two real processes and one folder: the second is refused by name, and a dead one is in nobody's way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from polypseg.cli import evaluate as evaluate_commands
from polypseg.cli import predict as use_commands
from polypseg.cli import shift as shift_commands
from polypseg.cli import study as report_commands
from polypseg.data.corpus import open_frames
from polypseg.data.shards import write_shards
from polypseg.errors import UsageError
from polypseg.evaluation import suite
from polypseg.files import LOCK, FolderInUseError, processor_name, read_json, sole_writer, write_json
from polypseg.inference import segment_files, segment_tables
from polypseg.inference.operating_point import OperatingPoint
from polypseg.pretraining import loop as pretraining_run
from polypseg.recipe import load_recipe
from polypseg.study import compare as study
from polypseg.study.schema import scale_grid
from polypseg.training import finetune as training
from polypseg.training.run_folder import claim_run, sole_run

HOLD = """
import sys, time
from pathlib import Path
from polypseg.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

LIGHT = dict(os.environ)
"""Without torch a process starts in a tenth of the time."""


def start(folder: Path, seconds: float = 60) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=LIGHT)


def hold(folder: Path) -> "subprocess.Popen[str]":
    process = start(folder)
    assert process.stdout is not None and process.stdout.readline() == "held\n", process.communicate()
    return process


def attempt(folder: Path) -> str:
    """What another process is told that wants to write there; empty when it may."""
    process = start(folder, seconds=0)
    return process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that another process holds."""
    folder = tmp_path_factory.mktemp("results") / "mine_files"
    process = hold(folder)
    yield folder
    process.kill()
    process.communicate()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
        Image.new("L", (40, 40), 255).save(tmp_path / "data" / part / "a.png")
    return tmp_path / "data"


def segment(output: Path, frame: Path) -> Any:
    segmenter: Any = SimpleNamespace(
        name="model", fingerprint=lambda: "0" * 64, point=lambda threshold: OperatingPoint(), expectation=None
    )
    return segment_files.segment_files(segmenter, [str(frame)], output)


def finetune(output: Path) -> Any:
    nothing: Any = None
    return training.finetune(nothing, nothing, nothing, Accelerator(cpu=True), run_dir=output)


def pretrain(output: Path) -> Any:
    nothing: Any = None
    return pretraining_run.pretrain(nothing, nothing, nothing, Accelerator(cpu=True), run_dir=output)


def run_study(output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("open_dataset", "grid_tasks"):
        monkeypatch.setattr(study, name, lambda *a, **k: [])
    return study.run_study(scale_grid("smoke"), output=output)


def evaluate(output: Path, pairs: Path) -> None:
    evaluate_commands.evaluate(
        dataset="folder", predictions=pairs / "masks", source=[str(pairs)], name=output.name, output=output.parent
    )


def run_suite(output: Path) -> Any:
    source: Any = SimpleNamespace(name=output.name)
    return suite.run_suite(source, suite.SuitePlan(output=output.parent))


def robustness(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polypseg.inference.open_model.open_model", lambda *a, **k: SimpleNamespace(name=output.name))
    use_commands.robustness(model="m", dataset="synthetic_a", output=output.parent)


def attribute_shift(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polypseg.inference.open_model.open_model", lambda *a, **k: SimpleNamespace(name=output.name))
    shift_commands.attribute(model="m", a="synthetic_a", b="synthetic_b", output=output.parent)


class TestSecondWriter:
    def refused(self, held: Path, work: Any) -> None:
        with pytest.raises(FolderInUseError, match=rf"{held} is being written by another process \(number \d+\)"):
            work()

    def test_segment(self, held, pairs):
        self.refused(held, lambda: segment(held, pairs / "images" / "a.png"))

    def test_finetune(self, held):
        self.refused(held, lambda: finetune(held))

    def test_pretrain(self, held):
        self.refused(held, lambda: pretrain(held))

    def test_study(self, held, monkeypatch):
        self.refused(held, lambda: run_study(held, monkeypatch))

    def test_evaluate(self, held, pairs):
        self.refused(held, lambda: evaluate(held, pairs))

    def test_suite(self, held):
        self.refused(held, lambda: run_suite(held))

    def test_shards(self, held, pairs):
        self.refused(held, lambda: write_shards(open_frames(pairs / "images"), held))

    def test_robustness(self, held, monkeypatch):
        self.refused(held, lambda: robustness(held, monkeypatch))

    def test_shift_measure(self, held):
        self.refused(held, lambda: shift_commands.measure(a="synthetic_a", b="synthetic_b", output=held))

    def test_shift_attribute(self, held, monkeypatch):
        self.refused(held, lambda: attribute_shift(held, monkeypatch))

    def test_report(self, held, tmp_path):
        page = held.with_name("mine.html")
        self.refused(held, lambda: report_commands.report(tmp_path, output=page))
        assert not page.exists()

    def test_nothing_was_written(self, held):
        assert [path.name for path in held.iterdir()] == [LOCK]


class TestFirstWriter:
    """The folder is held while the work goes on, and left without a trace of the lock."""

    def test_segment(self, pairs, tmp_path, monkeypatch):
        told = []

        def look(*args: Any, **kwargs: Any) -> Any:
            told.append(attempt(tmp_path / "out"))
            raise KeyboardInterrupt

        monkeypatch.setattr(segment_tables.Tables, "read", look)
        with pytest.raises(KeyboardInterrupt):
            segment(tmp_path / "out", pairs / "images" / "a.png")
        assert "is being written by another process" in told[0] and str(os.getpid()) in told[0]
        assert attempt(tmp_path / "out") == "" and not (tmp_path / "out" / LOCK).exists()

    @pytest.mark.parametrize(("module", "call"), [(training, finetune), (pretraining_run, pretrain)])
    def test_training(self, module, call, tmp_path, monkeypatch):
        told = []

        class Run:
            def __init__(self, *args: Any, **kwargs: Any): ...

            def start(self, *, resume: bool) -> None:
                told.append(attempt(tmp_path / "run"))
                raise KeyboardInterrupt

        monkeypatch.setattr(module, "_Run", Run)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "run")
        assert "is being written by another process" in told[0]
        assert attempt(tmp_path / "run") == ""

    def test_evaluate(self, pairs, tmp_path):
        evaluate(tmp_path / "results" / "masks", pairs)
        assert not (tmp_path / "results" / "masks" / LOCK).exists()
        assert list((tmp_path / "results" / "masks").glob("*.receipt.json"))


def test_a_killed_writer_blocks_nobody(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with sole_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_children_of_a_dead_writer_do_not_hold_its_lock(tmp_path):
    """Data workers are forked and may outlive their parent for seconds."""
    fork = "    import os\n    if os.fork() == 0:\n        time.sleep(60)\n"
    program = HOLD.replace("    print", f"{fork}    print", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), "60"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=LIGHT,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + 20
        while attempt(tmp_path):  # the child lets go in the first moment that it is given a core
            assert time.monotonic() < deadline, "the child of a dead writer holds its lock"
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_lock_may_be_nested_and_leaves_nothing(tmp_path):
    folder = tmp_path / "above" / "new"
    with sole_writer(folder), sole_run(folder, Accelerator(cpu=True)):
        assert "is being written" in attempt(folder)
    assert not folder.parent.exists(), "empty folders that it made are removed"
    folder = tmp_path / "file"
    folder.write_text("text")
    with pytest.raises(UsageError, match="is a file: choose a folder"), sole_writer(folder):
        pass


def test_a_run_is_continued_by_as_many_processes_as_began_it(tmp_path):
    class Processes:
        is_main_process, mixed_precision, device = True, "no", torch.device("cpu")

        def __init__(self, number: int):
            self.num_processes = number

        def wait_for_everyone(self) -> None: ...

    one, two = (cast(Accelerator, Processes(number)) for number in (1, 2))
    assert claim_run(tmp_path, {"recipe": {}}, two, resume=True) is False
    assert read_json(tmp_path / "run.json")["environment"]["hardware"] == processor_name()
    assert claim_run(tmp_path, {"recipe": {}}, one, resume=True) is True, "nothing is trained yet"
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert claim_run(tmp_path, {"recipe": {}}, two, resume=True) is True
    with pytest.raises(UsageError, match=r"was trained by 2 process\(es\), not 1: continue it with as many"):
        claim_run(tmp_path, {"recipe": {}}, one, resume=True)


class TestFinishedRun:
    """A kill between the last checkpoint and the mark: the run is not finished, and is continued to its mark."""

    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        recipe = load_recipe("smoke")
        origin = {"encoder_initialisation": "random"}
        write_json(
            tmp_path / "run.json", {"recipe": recipe.model_dump(mode="json"), "model": {"weights_origin": origin}}
        )
        write_json(tmp_path / "checkpoints" / "step-00000060" / "progress.json", {"epoch": recipe.training.epochs})
        write_json(tmp_path / "best" / "config.json", {"weights_origin": {"finished": True}})
        return tmp_path

    def test_is_finished_with_its_mark(self, run_dir):
        assert training.run_is_finished(run_dir, load_recipe("smoke"), start="random")

    @pytest.mark.parametrize("config", [{"weights_origin": {"finished": False}}, {"weights_origin": None}, {}])
    def test_is_not_finished_without(self, run_dir, config):
        write_json(run_dir / "best" / "config.json", config)
        assert not training.run_is_finished(run_dir, load_recipe("smoke"), start="random")

    def test_is_not_finished_without_a_model(self, run_dir):
        (run_dir / "best" / "config.json").unlink()
        assert not training.run_is_finished(run_dir, load_recipe("smoke"), start="random")


def test_validation_of_outputs_that_are_not_finite_is_not_a_dice_of_zero():
    logits = torch.tensor([[[1.0, float("nan")]]])
    assert np.isnan(training._dice_sum(logits, torch.ones(1, 1, 2)).numpy()).all()
