"""What is left of a grid and what it will cost on this machine, from one timed training step of each kind of task."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polypseg.pretraining.loop import build_method
from polypseg.pretraining.supervised import Supervised
from polypseg.study.tasks import FinetuneTask, PretrainTask, Task
from polypseg.tables import Column, Table
from polypseg.training.finetune import build_model


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Tasks of one kind: how many are left, how long each is, and how fast this machine is at it."""

    kind: str
    tasks: int
    steps: int
    """Optimizer steps of each."""
    images: int
    """Images of each step; an image that two views are made of counts once."""
    seconds: float
    """Of a step: forward and backward on images of noise, without reading, augmentation and validation."""

    @property
    def hours(self) -> float:
        """For all of them, by one worker."""
        return self.tasks * self.steps * self.seconds / 3600


def plan_cost(waiting: Sequence[Task]) -> list[Cost]:
    """The cost of tasks that train, one row a kind. Takes a few seconds a kind: a step of each is timed."""
    kinds: dict[str, list[Task]] = {}
    for task in waiting:
        if isinstance(task, PretrainTask | FinetuneTask):
            kinds.setdefault(_kind(task), []).append(task)
    return [_cost(kind, tasks) for kind, tasks in kinds.items()]


def cost_table(costs: Sequence[Cost]) -> Table:
    """For the terminal: hours are those of one worker on this machine."""

    def two_digits(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    nothing = dict.fromkeys(("steps", "images", "seconds"))
    total = {"tasks": sum(cost.tasks for cost in costs), "hours": sum(cost.hours for cost in costs)}
    return Table(
        title="Planned cost, one worker",
        caption="Timed on noise: reading, augmentation, validation and evaluation come on top.",
        columns=[
            Column("task", "kind"),
            Column("left", "tasks"),
            Column("steps each", "steps"),
            Column("images a step", "images"),
            Column("s a step", "seconds", two_digits),
            Column("hours", "hours", two_digits),
        ],
        records=costs,
        total={"kind": "all training", **nothing, **total},
    )


def _kind(task: Task) -> str:
    if isinstance(task, PretrainTask):
        return f"pretrain {task.start.architecture.encoder} by {task.start.method}"
    assert isinstance(task, FinetuneTask)
    architecture = task.cell.architecture
    return f"finetune {architecture.encoder} + {architecture.decoder}, {task.recipe.data.image_size} px"


def _cost(kind: str, tasks: Sequence[Task]) -> Cost:
    first = tasks[0]
    if isinstance(first, PretrainTask):
        frames = first.data.frames(first.start)
        recipe = first.start.recipe(frames)
        training: Any = recipe.training
        per_epoch, step = len(frames) // training.total_batch_size, _pretraining_step(recipe)
    else:
        assert isinstance(first, FinetuneTask)
        settings = first.recipe
        training = settings.training
        images = len(first.data.training.split(first.data.split)["train"])
        per_epoch, step = images // training.total_batch_size, _finetuning_step(first, settings)
    steps = min(training.epochs * per_epoch, training.max_steps or training.epochs * per_epoch)
    return Cost(kind=kind, tasks=len(tasks), steps=steps, images=training.total_batch_size, seconds=_time(step))


def _pretraining_step(recipe: Any) -> Callable[[], None]:
    method = build_method(recipe).train()
    count, size = recipe.training.total_batch_size, recipe.data.image_size
    inputs = [torch.randn(count, len(recipe.views), 3, size, size)]
    if getattr(method, "patches", 0):
        inputs.append(torch.rand(count, method.patches))
    if isinstance(method, Supervised):
        inputs.append(torch.randint(method.head.out_features, (count,)))

    def step() -> None:
        method.start_step(0.0)
        method(*inputs).loss.backward()
        method.zero_grad()

    return step


def _finetuning_step(task: FinetuneTask, recipe: Any) -> Callable[[], None]:
    model = build_model(task.cell.entry, recipe).train()
    shape = (recipe.training.total_batch_size, recipe.data.image_size, recipe.data.image_size)
    pixels, labels = torch.randn(shape[0], 3, *shape[1:]), (torch.rand(shape) > 0.5).float()

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        model.zero_grad()

    return step


def _time(step: Callable[[], None]) -> float:
    """Seconds of the second call: the first one allocates."""
    step()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
