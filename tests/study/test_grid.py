"""Grids: the cells that a file means, lengths and names of their runs, workers that share a folder, and the whole."""

import io
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from polypseg import zoo
from polypseg.cli.app import app
from polypseg.cli.console import run_app
from polypseg.data import open_dataset
from polypseg.data.corpus import FrameSubset, open_frames
from polypseg.data.polyps import SyntheticOptions
from polypseg.errors import UsageError
from polypseg.evaluation.receipt import find_receipts
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.recipe import find_recipe
from polypseg.study.cells import grid_cells
from polypseg.study.cost import plan_cost
from polypseg.study.schema import load_grid
from polypseg.study.tasks import EvaluateTask, FinetuneTask, GridData, PretrainTask, grid_tasks
from polypseg.study.workers import record_grid, run_grid, work_through

TINY = {
    "name": "tiny",
    "title": "A tiny grid",
    "architectures": [
        {"family": "resnet50", "encoder": "test_resnet", "decoder": "deeplabv3plus"},
        {"family": "vit_base", "encoder": "test_vit", "decoder": "dpt"},
    ],
    "corpora": {"toys": {"stands_for": "imagenet1k", "title": "colored noise"}},
    "pretraining": [
        {
            "method": "supervised",
            "families": ["resnet50"],
            "recipe": "pretrain_supervised_small",
            "steps": 3,
            "overrides": ["training.total_batch_size=8", "data.image_size=32", "supervised.classes=2"],
        },
    ],
    "starts": [
        {"method": "supervised", "corpus": "toys", "families": ["resnet50"]},
        {"method": "none", "corpus": "none", "families": ["resnet50", "vit_base"]},
    ],
    "image_sizes": [64],
    "seeds": [1, 2],
    "finetuning": {
        "recipe": "finetune_tiny",
        "overrides": ["training.max_steps=1", "training.total_batch_size=4", "model.decoder_channels=8"],
    },
    "evaluation": {"tests": ["negatives"]},
}


def write_grid(folder: Path, **changes) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Twenty frames of two classes, named as ImageNet names its files."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    for index in range(20):
        noise = rng.integers(0, 99, size=(40, 40, 3), dtype=np.uint8) + np.uint8(index % 2 * 100)
        Image.fromarray(noise).save(folder / f"n0000000{index % 2}_{index}.png")
    return folder


def synthetic():
    return open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=30, size=(64, 64)))


def test_bundled_grid_has_each_row_of_the_table_once_and_never_calls_a_sample_imagenet():
    grid = load_grid("twelve_small")
    cells = grid_cells(grid)
    assert sorted(cell.entry.model_id for cell in cells) == sorted(row.model_id for row in zoo.ZOO)
    assert len(grid.seeds) >= 2
    assert not [cell.name for cell in cells if "imagenet" in cell.name]


def test_grid_crosses_decoders_shares_sizes(tmp_path):
    both = [{"family": "resnet50", "encoder": "test_resnet", "decoder": d} for d in ("deeplabv3plus", "dpt")]
    starts = [
        {"method": m, "corpus": c, "families": ["resnet50"]} for m, c in (("supervised", "toys"), ("none", "none"))
    ]
    grid = load_grid(write_grid(tmp_path, architectures=both, starts=starts, shares=[0.5, 1.0], image_sizes=[64, 96]))
    cells = grid_cells(grid)
    # A random start has no share of a corpus: 2 decoders x 2 sizes x (2 shares + 1).
    assert len(cells) == 12
    names = {cell.name for cell in cells}
    assert "test_resnet_dpt.supervised_toys-share0.5-64px" in names
    assert "test_resnet_deeplabv3plus.random-96px" in names
    other = next(cell for cell in cells if cell.name == "test_resnet_dpt.random-96px")
    recipe = other.recipe(grid, 7)
    assert (recipe.model.decoder, recipe.data.image_size, recipe.seed) == ("dpt", 96, 7)
    # Cells that differ in decoder or size only share the encoder.
    assert len({cell.start(grid, seed).name for cell in cells for seed in (1, 2) if cell.start(grid, seed)}) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"starts": [{"method": "mae", "corpus": "toys", "families": ["vit_base"]}]}, "how mae is run for vit_base"),
        ({"starts": [{"method": "supervised", "corpus": "toy", "families": ["resnet50"]}]}, "no such corpus"),
        ({"starts": [{"method": "none", "corpus": "none", "families": ["swin"]}]}, "family 'swin'"),
        ({"shares": [0.0]}, "shares must be above 0"),
        ({"corpora": {"toys": {"stands_for": "imagenet", "title": "x"}}}, "unknown corpus 'imagenet'"),
        ({"color": 3}, "color"),
        ({"rows": ["RN-NA-NA"]}, "either 'starts' or 'rows'"),
        ({"starts": [], "rows": ["RN-NA-NA"]}, "'rows' take none"),
        ({"image_sizes": []}, "'starts' need 'image_sizes'"),
        ({"comparison": {"in_distribution": "kvasir_seg", "out_of_distribution": "etis_larib"}}, "needs 'rows'"),
        ({"stand_ins": {"resnet": "resnet18"}}, "unknown encoder 'resnet'"),
    ],
)
def test_load_grid_names_what_is_wrong(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        load_grid(write_grid(tmp_path, **changes))


def test_grid_cells_refuse_a_start_that_is_no_row(tmp_path):
    grid = load_grid(write_grid(tmp_path, corpora={"toys": {"stands_for": "hyperkvasir", "title": "x"}}))
    with pytest.raises(UsageError, match="no row for resnet50 with supervised on hyperkvasir"):
        grid_cells(grid)


def test_start_trains_equally_long_on_every_corpus(tmp_path, toys):
    grid = load_grid(write_grid(tmp_path))
    start = next(start for cell in grid_cells(grid) if (start := cell.start(grid, 1)))
    frames = open_frames(toys)
    for share, per_epoch in ((1.0, 2), (0.5, 1)):
        recipe = start.recipe(FrameSubset(frames, share=share))
        assert recipe.training.max_steps == 3
        assert recipe.training.epochs == -(-3 // per_epoch)
        assert recipe.optimiser.warmup_epochs == pytest.approx(0.3 / per_epoch)
    with pytest.raises(UsageError, match="fewer than a batch"):
        start.recipe(FrameSubset(frames, share=0.1))


def test_frame_subset_is_contained_in_larger_ones_and_known_by_its_content(toys):
    frames = open_frames(toys)
    quarter, half, whole = (FrameSubset(frames, share=share) for share in (0.25, 0.5, 1.0))
    names = [{subset.name(i) for i in range(len(subset))} for subset in (quarter, half, whole)]
    assert [len(n) for n in names] == [5, 10, 20]
    assert names[0] < names[1] < names[2]
    assert half.read(3) == (toys / half.name(3)).read_bytes()
    assert whole.content_id == frames.content_id
    assert len({quarter.content_id, half.content_id, frames.content_id}) == 3
    with pytest.raises(UsageError, match="share"):
        FrameSubset(frames, share=1.5)


# -- workers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chore:
    """A task that leaves a file and a line in a log that all workers share."""

    number: int
    folder: Path
    needed: "Chore | None" = None
    seconds: float = 0.02

    @property
    def name(self) -> str:
        return f"chore {self.number}"

    @property
    def needs(self):
        return () if self.needed is None else (self.needed,)

    def is_done(self) -> bool:
        return (self.folder / str(self.number)).exists()

    def run(self) -> None:
        with (self.folder / "log").open("a") as log:
            log.write(f"{self.number}\n")
        assert all(need.is_done() for need in self.needs)
        time.sleep(self.seconds)
        (self.folder / str(self.number)).touch()


def work(tasks, claims):
    work_through(tasks, claims, console=Console(file=io.StringIO()), lease=5, pause=0.05)


def test_workers_share_the_tasks_and_do_none_twice(tmp_path):
    first = Chore(number=0, folder=tmp_path, seconds=0.3)
    tasks = [first, *(Chore(number=n, folder=tmp_path, needed=first if n % 2 else None) for n in range(1, 25))]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(tasks, tmp_path / "claims")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(25))


@pytest.mark.slow
def test_killed_workers_task_is_done_by_another(tmp_path):
    slow = Chore(number=0, folder=tmp_path, seconds=600)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    victim = spawn.Process(target=work, args=([slow], tmp_path / "claims"))
    victim.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    work([Chore(number=0, folder=tmp_path)], tmp_path / "claims")
    assert (tmp_path / "log").read_text().split() == ["0", "0"]
    assert slow.is_done()


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grid_trains_every_cell_and_a_second_call_trains_none(tmp_path, toys):
    grid = load_grid(write_grid(tmp_path))
    data = GridData(
        output=tmp_path / "out", training=synthetic(), split="reference", corpora={"toys": toys}, negatives=toys
    )
    quiet = Console(file=io.StringIO())
    run_grid(grid, data, console=quiet)
    tasks = grid_tasks(grid, data)
    assert [type(task) for task in tasks] == [PretrainTask] + 6 * [FinetuneTask, EvaluateTask]
    assert all(task.is_done() for task in tasks)
    model = PolypSegForSemanticSegmentation.from_pretrained(tasks[1].folder / "best")
    origin = model.config.weights_origin
    assert origin["model_id"] == "test_resnet_deeplabv3plus.supervised_toys"
    assert origin["row"] == "resnet50_deeplabv3plus.supervised_imagenet1k"
    assert (origin["pretraining"]["steps"], origin["pretraining"]["corpus"]) == (3, "toys")
    receipts = find_receipts(tmp_path / "out" / "receipts")
    assert len(receipts) == 6 and {len(receipt.images) for receipt in receipts.values()} == {20}
    assert {receipt.model.row for receipt in receipts.values()} == {cell.entry.model_id for cell in grid_cells(grid)}
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    run_grid(grid, data, console=quiet)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    record = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert record["grid"]["cells"][0] == "test_resnet_deeplabv3plus.supervised_toys"
    with pytest.raises(UsageError, match=r"grid\.json differs in grid: "):
        run_grid(load_grid(write_grid(tmp_path, seeds=[3])), data, console=quiet)


def test_grid_whose_recipe_was_edited_is_refused_in_the_old_folder(tmp_path, toys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(find_recipe("pretrain_supervised_small").read_text())
    grid = load_grid(write_grid(tmp_path, pretraining=[TINY["pretraining"][0] | {"recipe": str(recipe)}]))
    data = GridData(output=tmp_path / "out", training=synthetic(), split="reference", corpora={"toys": toys})
    record_grid(grid, data)
    record_grid(grid, data)
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 7"))
    with pytest.raises(UsageError, match=r"grid\.json differs in recipes: choose another --output"):
        record_grid(grid, data)


def test_plan_cost_counts_what_is_left_without_training(tmp_path, toys):
    grid = load_grid(write_grid(tmp_path))
    data = GridData(output=tmp_path / "out", training=synthetic(), split="reference", corpora={"toys": toys})
    costs = {cost.kind: cost for cost in plan_cost(grid_tasks(grid, data))}
    assert {kind: (cost.tasks, cost.steps, cost.images) for kind, cost in costs.items()} == {
        "pretrain test_resnet by supervised": (1, 3, 8),
        "finetune test_resnet + deeplabv3plus, 64 px": (4, 1, 4),
        "finetune test_vit + dpt, 64 px": (2, 1, 4),
    }
    assert all(cost.hours == pytest.approx(cost.tasks * cost.steps * cost.seconds / 3600) for cost in costs.values())
    assert not (tmp_path / "out").exists()


def test_processes_of_one_launch_are_refused_by_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """Its workers are processes of their own: as ranks of one run each would wait for the others' part of a step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["study", "--grid", str(write_grid(tmp_path)), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["polypseg", *command, "--frames", f"toys={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        run_app(app)
    told = capsys.readouterr()
    assert caught.value.code == 2 and not told.out and not (tmp_path / "out").exists()
    (line,) = told.err.splitlines()
    assert line.startswith("error: a grid's worker is one process") and "accelerate launch" in line


def test_grid_without_the_place_of_a_corpus_fails_before_any_work(tmp_path):
    data = GridData(output=tmp_path / "out", training=synthetic(), split="reference")
    with pytest.raises(UsageError, match="--frames toys=PATH"):
        run_grid(load_grid(write_grid(tmp_path)), data, console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
