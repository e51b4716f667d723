"""The work of a grid as tasks: pretrain an encoder, fine-tune a cell, evaluate it. Each knows when it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate.state import AcceleratorState

from polypseg.data.corpus import FrameStore, open_frames
from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.evaluation.suite import SuitePlan, run_suite
from polypseg.inference.model import default_device, load_model
from polypseg.inference.predictors import ModelPredictions
from polypseg.pretraining.export import export_encoder, write_run_report
from polypseg.pretraining.loop import build_method, pretrain
from polypseg.recipe import read_recipe
from polypseg.study.cells import Cell, Start, grid_cells
from polypseg.study.schema import EvaluationPlan, Grid
from polypseg.training.finetune import build_model, finetune, run_is_finished
from polypseg.training.run_folder import make_accelerator, sole_run
from polypseg.weights.loading import STARTER_ENCODER, describe_source
from polypseg.zoo import RANDOM

ENCODER_FILE = Path("encoder") / "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class GridData:
    """Where a grid's images are."""

    output: Path
    """The grid's folder, which all workers share."""
    training: PolypDataset
    split: str
    corpora: Mapping[str, Path] = field(default_factory=dict)
    """Name of the grid's corpus -> folder, archive or shards."""
    tests: Mapping[str, Path] = field(default_factory=dict)
    """Test dataset -> folder or archive; others are looked for in the data folder."""
    mask_values: Mapping[str, str] = field(default_factory=dict)
    """Test dataset -> which values of its masks are polyp, as ``open_dataset`` takes them."""
    negatives: Path | None = None
    """Folder of frames without polyps."""

    def frames(self, start: Start) -> FrameStore:
        """The frames that a start is pretrained on. Raises UsageError for a corpus without a place."""
        if start.corpus not in self.corpora:
            raise UsageError(f"where is the corpus {start.corpus}? give --frames {start.corpus}=PATH")
        return start.frames(open_frames(self.corpora[start.corpus]))


class Task(Protocol):
    """A piece of work that one worker does at a time."""

    @property
    def name(self) -> str:
        """Unique in the grid; also the name of its claim."""

    @property
    def needs(self) -> "tuple[Task, ...]":
        """Tasks that must be done before."""

    def is_done(self) -> bool:
        """Whether its result is there."""

    def run(self) -> None:
        """Do it, or continue what an interrupted worker left."""


@dataclass(frozen=True, kw_only=True)
class PretrainTask:
    """Pretrain the encoder of a start and leave it in ``encoders/<start>/encoder``."""

    start: Start
    data: GridData

    @property
    def name(self) -> str:
        return f"pretrain {self.start.name}"

    @property
    def needs(self) -> tuple[Task, ...]:
        return ()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.data.output / "encoders" / self.start.name

    @property
    def encoder(self) -> Path:
        """The finished encoder."""
        return self.folder / ENCODER_FILE

    def is_done(self) -> bool:
        return self.encoder.is_file()

    def run(self) -> None:
        frames = self.data.frames(self.start)
        recipe = self.start.recipe(frames)
        AcceleratorState._reset_state()
        accelerator = make_accelerator(recipe.training.precision, run_dir=self.folder)
        method = build_method(recipe)
        with sole_run(self.folder, accelerator):
            progress = pretrain(method, frames, recipe, accelerator, run_dir=self.folder, resume=True)
            write_run_report(method, recipe, progress, frames, folder=self.folder / "report", labelled=None)
            export_encoder(
                method, recipe, progress, frames, folder=self.folder / ENCODER_FILE.parent, corpus=self.start.corpus
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """Train one cell with one seed; the model is then in ``runs/<cell>/seed-<seed>/best``."""

    grid: Grid
    cell: Cell
    seed: int
    data: GridData

    @property
    def name(self) -> str:
        return f"finetune {self.cell.name} seed {self.seed}"

    @property
    def needs(self) -> tuple[Task, ...]:
        start = self.cell.start(self.grid, self.seed)
        made_here = start is not None and start.plan.recipe is not None
        return (PretrainTask(start=start, data=self.data),) if start is not None and made_here else ()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.data.output / "runs" / self.cell.name / f"seed-{self.seed}"

    def encoder_weights(self) -> str:
        """What the encoder starts from, as ``load_encoder_weights`` takes it."""
        start = self.cell.start(self.grid, self.seed)
        if start is None:
            return RANDOM
        return start.plan.weights or str(PretrainTask(start=start, data=self.data).encoder)

    def is_done(self) -> bool:
        if not all(need.is_done() for need in self.needs):
            return False
        recipe = self.cell.recipe(self.grid, self.seed)
        start = describe_source(self.encoder_weights(), encoder=recipe.model.encoder or STARTER_ENCODER)
        return run_is_finished(self.folder, recipe, start=start)

    def run(self) -> None:
        recipe = self.cell.recipe(self.grid, self.seed)
        AcceleratorState._reset_state()
        accelerator = make_accelerator(recipe.training.precision, run_dir=self.folder)
        model = build_model(self.cell.entry, recipe, encoder_weights=self.encoder_weights())
        finetune(
            model, self.data.training, recipe, accelerator, run_dir=self.folder, split=self.data.split, resume=True
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Test one trained cell; receipts and masks are then in ``receipts/<cell>.seed-<seed>``."""

    trained: FinetuneTask
    how: EvaluationPlan

    @property
    def name(self) -> str:
        return f"evaluate {self.trained.cell.name} seed {self.trained.seed}"

    @property
    def needs(self) -> tuple[Task, ...]:
        return (self.trained,)

    @property
    def label(self) -> str:
        """The model's name in results."""
        return f"{self.trained.cell.name}.seed-{self.trained.seed}"

    def plan(self) -> SuitePlan:
        """What is tested."""
        data = self.trained.data
        return SuitePlan(
            output=data.output / "receipts",
            only=self.how.tests,
            conventions=self.how.conventions,
            sources=data.tests,
            mask_values=data.mask_values,
            negatives=data.negatives,
            rule="report",
            allow_partial=self.how.allow_partial,
            save_masks=True,
        )

    def is_done(self) -> bool:
        summary = self.plan().output / self.label / "suite.json"  # written last
        return self.trained.is_done() and summary.is_file()

    def run(self) -> None:
        folder = self.trained.folder / "best"
        model, processor = load_model(str(folder))
        source = ModelPredictions(name=self.label, model=model, processor=processor, device=default_device())
        run_suite(source, self.plan(), model_folder=folder)


def grid_tasks(grid: Grid, data: GridData) -> list[Task]:
    """All tasks, in an order in which one worker can do them.

    Raises UsageError for a corpus without a place and an unknown test.
    """
    trained = [
        FinetuneTask(grid=grid, cell=cell, seed=seed, data=data) for seed in grid.seeds for cell in grid_cells(grid)
    ]
    before: dict[str, Task] = {need.name: need for task in trained for need in task.needs}
    for need in before.values():
        if isinstance(need, PretrainTask):
            need.start.recipe(data.frames(need.start))
    tasks = [*before.values()]
    for task in trained:
        tasks.append(task)
        if grid.evaluation is not None:
            evaluation = EvaluateTask(trained=task, how=grid.evaluation)
            evaluation.plan().tests()  # an unknown test fails before any work
            tasks.append(evaluation)
    return tasks


def describe_grid(grid: Grid) -> dict[str, Any]:
    """What the grid's record says of its training; how it is tested may change without training anew."""
    return grid.model_dump(mode="json", exclude={"evaluation"}) | {"cells": [cell.name for cell in grid_cells(grid)]}


def describe_recipes(grid: Grid) -> dict[str, Any]:
    """The grid's recipes as their files have them, by name: what was made by other values must not be mixed in."""
    names = [grid.finetuning.recipe, *(plan.recipe for plan in grid.pretraining if plan.recipe is not None)]
    return {name: read_recipe(name)[0] for name in sorted(set(names))}
