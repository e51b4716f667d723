"""The work of a grid as tasks: pretrain an encoder, fine-tune a cell, test it. Each knows when it is done."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from accelerate.state import AcceleratorState
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.data.corpus import FrameStore, open_frames
from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import CONVENTION, Receipt, read_receipt, receipt_path
from polypseg.evaluation.suite import SuitePlan, run_suite
from polypseg.files import file_sha256
from polypseg.inference.model import default_device, load_model
from polypseg.inference.predictors import ModelPredictions
from polypseg.provenance.passport import SplitManifest, check_seen, kept_manifest, name_partial
from polypseg.recipe import Recipe, read_recipe
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
    elsewhere: PolypDataset | None = None
    """The second set of a grid's comparison."""
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
        # Late: a study without pretraining, such as the demo, need not wait for scikit-learn.
        from polypseg.pretraining.export import export_encoder, write_run_report
        from polypseg.pretraining.loop import build_method, pretrain

        frames = self.data.frames(self.start)
        recipe = self.start.recipe(frames)
        AcceleratorState._reset_state()
        accelerator = make_accelerator(recipe.training.precision, run_dir=self.folder)
        method = build_method(recipe)
        with sole_run(self.folder, accelerator):
            progress = pretrain(method, frames, recipe, accelerator, run_dir=self.folder, resume=True)
            write_run_report(method, recipe, progress, frames, folder=self.folder / "report", labeled=None)
            export_encoder(
                method, recipe, progress, frames, folder=self.folder / ENCODER_FILE.parent, corpus=self.start.corpus
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """Train one cell with one seed; the model is then in ``runs/<cell>/seed-<seed>/best``.

    Where the grid names no seeds, in ``runs/<cell>/best``.
    """

    grid: Grid
    cell: Cell
    seed: int | None
    data: GridData

    @property
    def name(self) -> str:
        return f"finetune {self.cell.name}" + ("" if self.seed is None else f" seed {self.seed}")

    @property
    def label(self) -> str:
        """The model's name in results."""
        return self.cell.name if self.seed is None else f"{self.cell.name}.seed-{self.seed}"

    @property
    def needs(self) -> tuple[Task, ...]:
        start = self.cell.start(self.grid, self.seed)
        made_here = start is not None and start.plan.recipe is not None
        return (PretrainTask(start=start, data=self.data),) if start is not None and made_here else ()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        cell = self.data.output / "runs" / self.cell.name
        return cell if self.seed is None else cell / f"seed-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """What it is trained by."""
        return self.cell.recipe(self.grid, self.seed)

    def encoder_weights(self) -> str:
        """What the encoder starts from, as ``load_encoder_weights`` takes it."""
        start = self.cell.start(self.grid, self.seed)
        if start is None:
            return self.cell.weights or RANDOM
        return start.plan.weights or str(PretrainTask(start=start, data=self.data).encoder)

    def start_record(self) -> str:
        """What the run's record says of that start. Raises UsageError where the weights are not at hand."""
        return describe_source(self.encoder_weights(), encoder=self.recipe.model.encoder or STARTER_ENCODER)

    def is_done(self) -> bool:
        if not (self.folder / "run.json").is_file() or not all(need.is_done() for need in self.needs):
            return False
        data = self.data
        return run_is_finished(
            self.folder, self.recipe, start=self.start_record(), dataset=data.training, split=data.split
        )

    def run(self) -> None:
        recipe = self.recipe
        AcceleratorState._reset_state()
        accelerator = make_accelerator(recipe.training.precision, run_dir=self.folder)
        model = build_model(self.cell.entry, recipe, encoder_weights=self.encoder_weights())
        finetune(
            model, self.data.training, recipe, accelerator, run_dir=self.folder, split=self.data.split, resume=True
        )

    def trained_model(self) -> ModelPredictions:
        """The model that it left, as a source of predictions under its label."""
        model, processor = load_model(str(self.folder / "best"))
        return ModelPredictions(name=self.label, model=model, processor=processor, device=default_device())


@dataclass(frozen=True, kw_only=True)
class EvaluateTask:
    """Test one trained cell; receipts and masks are then in ``receipts/<cell>.seed-<seed>``."""

    trained: FinetuneTask
    how: EvaluationPlan

    @property
    def name(self) -> str:
        return self.trained.name.replace("finetune", "evaluate", 1)

    @property
    def needs(self) -> tuple[Task, ...]:
        return (self.trained,)

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
        summary = self.plan().output / self.trained.label / "suite.json"  # written last
        return summary.is_file() and self.trained.is_done()

    def run(self) -> None:
        run_suite(self.trained.trained_model(), self.plan(), model_folder=self.trained.folder / "best")


@dataclass(frozen=True, kw_only=True)
class ComparisonTest:
    """Images on which the models of a comparison are tested."""

    dataset: PolypDataset
    split: str
    part: str
    limit: int | None
    masks: str
    """Folder of the predicted masks in a row's results."""

    @cached_property
    def images(self) -> SplitManifest:
        """Read once; the part's name says where it is not the whole."""
        manifest = kept_manifest(self.dataset, split=self.split, part=self.part, limit=self.limit)
        return name_partial(manifest, self.dataset)


@dataclass(frozen=True, kw_only=True)
class CompareTask:
    """Test one trained row at home and elsewhere; receipts and masks are then in ``results/<row>``."""

    trained: FinetuneTask
    tests: tuple[ComparisonTest, ComparisonTest]

    @property
    def name(self) -> str:
        return self.trained.name.replace("finetune", "test", 1)

    @property
    def needs(self) -> tuple[Task, ...]:
        return (self.trained,)

    @property
    def results(self) -> Path:
        """Where the receipts of all rows are."""
        return self.trained.data.output / "results"

    def receipts(self) -> list[Receipt]:
        """Of both tests, when they are done."""
        return [read_receipt(self._path(test)) for test in self.tests]

    def is_done(self) -> bool:
        return self.trained.is_done() and all(map(self._is_current, self.tests))

    def run(self) -> None:
        source = self.trained.trained_model()
        for test in self.tests:
            if self._is_current(test):
                continue
            images, seen = check_seen(self.trained.folder / "best", test.images, rule="report")
            result = score_predictions(
                source,
                test.dataset,
                conventions=(CONVENTION,),
                manifest=images,
                seen=seen,
                masks=self._masks(test),
            )
            result.write(self.results)

    def _path(self, test: ComparisonTest) -> Path:
        return receipt_path(self.results, self.trained.label, test.images, at_operating_point=False)

    def _masks(self, test: ComparisonTest) -> Path:
        return self.results / self.trained.label / "masks" / test.masks

    def _is_current(self, test: ComparisonTest) -> bool:
        """Whether a receipt and masks exist of just these weights on just these images."""
        path = self._path(test)
        if not path.is_file():
            return False
        receipt = read_receipt(path)
        same_weights = receipt.model_sha256 == file_sha256(self.trained.folder / "best" / SAFE_WEIGHTS_NAME)
        kept = all((self._masks(test) / f"{image.id}.png").is_file() for image in test.images.images)
        return same_weights and kept and receipt.dataset.manifest == test.images.digest


def comparison_tests(grid: Grid, data: GridData) -> tuple[ComparisonTest, ComparisonTest]:
    """The in- and the out-of-distribution test. Raises UsageError for a split without the parts that a study needs."""
    assert grid.comparison is not None and data.elsewhere is not None
    parts = data.training.split(data.split)
    if not {"train", "validation", "test"} <= set(parts):
        raise UsageError(
            f"split {data.split!r} has the parts {', '.join(parts)}: a study needs train, validation and test"
        )
    inside, outside, limit = data.training, data.elsewhere, grid.comparison.limit
    apart = "" if outside.spec.name != inside.spec.name else "_elsewhere"  # two folders of one's own
    return (
        ComparisonTest(dataset=inside, split=data.split, part="test", limit=limit, masks=inside.spec.name),
        ComparisonTest(dataset=outside, split="full", part="full", limit=limit, masks=outside.spec.name + apart),
    )


def grid_tasks(grid: Grid, data: GridData) -> list[Task]:
    """All tasks, in an order in which one worker can do them.

    Raises UsageError for a corpus without a place, an unknown test, and several processes of one launch.
    """
    _refuse_launch(grid, output=data.output)
    seeds: tuple[int | None, ...] = grid.seeds or (None,)
    trained = [FinetuneTask(grid=grid, cell=cell, seed=seed, data=data) for seed in seeds for cell in grid_cells(grid)]
    tests = comparison_tests(grid, data) if grid.comparison else None
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
        if tests is not None:
            tasks.append(CompareTask(trained=task, tests=tests))
    return tasks


def _refuse_launch(grid: Grid, *, output: Path) -> None:
    """Raise UsageError for several processes of one `accelerate launch`: a worker does other tasks than its fellows."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    if grid.comparison is None:
        raise UsageError(
            "a grid's worker is one process: run `polypseg study --grid` once for each core or machine, without "
            "`accelerate launch`"
        )
    raise UsageError(
        "a study runs in one process. At full scale on real frames, train rows in several with `accelerate launch "
        f"training_scripts/finetune.py --output {output}/runs/<model id>` and the study's dataset, split, "
        "--set and weights; the study then continues from them"
    )


def describe_grid(grid: Grid) -> dict[str, Any]:
    """What the grid's record says of its training; how it is tested may change without training anew."""
    return grid.model_dump(mode="json", exclude={"evaluation"}) | {"cells": [cell.name for cell in grid_cells(grid)]}


def describe_recipes(grid: Grid) -> dict[str, Any]:
    """The grid's recipes as their files have them, by name: what was made by other values must not be mixed in."""
    names = [grid.finetuning.recipe, *(plan.recipe for plan in grid.pretraining if plan.recipe is not None)]
    return {name: read_recipe(name)[0] for name in sorted(set(names))}
