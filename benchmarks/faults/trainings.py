"""Trainings that are killed: at random moments, inside the writing of a file, between two renames; and resumed."""

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import test_grid as grids
import test_pretraining_run as pretraining
import test_training as finetuning
from accelerate import Accelerator
from rich.console import Console
from trial import Kind, difference, forked, kill, last_words, moments, start, wait

from polypseg import files as artifacts
from polypseg import zoo
from polypseg.recipe import load_recipe
from polypseg.study.schema import load_grid
from polypseg.study.tasks import GridData, grid_tasks
from polypseg.study.workers import record_grid, work_through
from polypseg.training.finetune import build_model, finetune
from polypseg.training.run_folder import claim_run

RUN_FILES = ("checkpoints/step-*/*.safetensors", "checkpoints/step-*/*.bin", "checkpoints/step-*/progress.json")
RUN_FILES += ("losses.csv",)
FINETUNED = (*RUN_FILES, "best/*.safetensors", "best/*.json")
GRID_FILES = ("runs/*/*/best/*.safetensors", "runs/*/*/best/config.json", "encoders/*/encoder/*.safetensors")
GRID_FILES += ("receipts/*/*.receipt.json", "receipts/*/masks/*/*.png")
LEASE = 5.0
OVERRIDES = ("model.encoder=test_resnet", "training.checkpoint_steps=2", "training.ema_decay=0.9")


def fine_tune(run_dir: Path, *, workers: int = 0) -> None:
    """A fine-tuning of a few seconds, begun or continued."""
    recipe = load_recipe("smoke", overrides=[*finetuning.TINY, *OVERRIDES])
    network = build_model(zoo.get("RN-NA-NA"), recipe)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=run_dir)
    finetune(network, finetuning.tiny_data(), recipe, accelerator, run_dir=run_dir, resume=True, workers=workers)


def pretrain(method: str, frames: Path, run_dir: Path, *, workers: int = 0) -> None:
    """A pretraining of a few seconds, begun or continued."""
    pretraining.run(method, frames, run_dir, "training.checkpoint_steps=2", resume=True, workers=workers)


def killed_and_resumed(
    kind: Kind, train: Callable[[Path], Any], folder: Path, files: tuple[str, ...], *, tries: int, seed: int
) -> None:
    """Kill a run at ``tries`` random moments, one try each, resume it, and compare it with a whole one."""
    folder.mkdir()
    whole = folder / "whole"
    forked(lambda: train(folder / "before"), folder / "log")  # caches are filled
    begun = time.monotonic()
    code = forked(lambda: train(whole), folder / "log")
    seconds = time.monotonic() - begun
    if code:
        kind.count(f"the whole run ended with {code}: {last_words(folder / 'log')}")
        return
    for number, moment in enumerate(moments(tries, seed=seed)):
        place = folder / f"cut{number}"
        after = moment * seconds
        while forked(lambda place=place: train(place), folder / "log", kill_after=after) != -signal.SIGKILL:
            place, after = place.with_name(f"{place.name}-again"), after * 0.8  # it had ended
        resume(kind, lambda place=place: train(place), whole, place, files, folder / "log")


def resume(kind: Kind, again: Callable[[], Any], whole: Path, place: Path, files: tuple[str, ...], log: Path) -> None:
    """Continue a killed run and count whether it ends as the whole one."""
    code = forked(again, log)
    kind.count(f"ended with {code}: {last_words(log)}" if code else difference(whole, place, files))


def count_calls(call: str, *, die_at: int = 0) -> list[int]:
    """Note every call of ``rename`` or ``sync`` of artifacts in this process, which dies at one of them, from 1 on."""
    calls: list[int] = []
    owner, name = (os, "replace") if call == "rename" else (artifacts, "_sync")
    function = getattr(owner, name)

    def note(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    setattr(owner, name, note)
    return calls


def killed_in_writing(kind: Kind, call: str, folder: Path, *, tries: int) -> None:
    """Kill a fine-tuning at calls of ``rename`` or ``sync``, evenly over the run, and resume."""
    folder.mkdir()
    whole = folder / "whole"
    counted = folder / "count"

    def count() -> None:
        calls = count_calls(call)
        fine_tune(whole)
        counted.write_text(str(len(calls)))

    forked(lambda: fine_tune(folder / "before"), folder / "log")  # caches are filled
    code = forked(count, folder / "log")
    if code:
        kind.count(f"the whole run ended with {code}: {last_words(folder / 'log')}")
        return
    total = int(counted.read_text())
    for number in sorted({1 + round(part * (total - 1) / max(1, tries - 1)) for part in range(tries)}):
        place = folder / f"cut{number}"

        def die(place: Path = place, number: int = number) -> None:
            count_calls(call, die_at=number)
            fine_tune(place)

        code = forked(die, folder / "log")
        if code != -signal.SIGKILL:
            kind.count(f"{call} {number} of {total} did not happen again (exit code {code})")
            continue
        resume(kind, lambda place=place: fine_tune(place), whole, place, FINETUNED, folder / "log")


def grid_of(folder: Path, output: Path, toys: Path) -> tuple[Any, GridData]:
    """A grid of one pretraining, three trainings and their tests."""
    folder.mkdir(exist_ok=True)
    grid = load_grid(grids.write_grid(folder, seeds=[1]))
    return grid, GridData(
        output=output, training=grids.synthetic(), split="reference", corpora={"toys": toys}, negatives=toys
    )


def work_on_grid(folder: Path, output: Path, toys: Path) -> None:
    """One worker of a grid."""
    grid, data = grid_of(folder, output, toys)
    tasks = grid_tasks(grid, data)
    record_grid(grid, data)
    quiet = Console(file=io.StringIO())
    work_through(tasks, output / "claims", console=quiet, lease=LEASE, pause=0.2)


def killed_grid(kind: Kind, folder: Path, toys: Path, *, tries: int, seed: int) -> None:
    """Two workers on a grid, of which one or both are killed; then workers again until all is done."""
    folder.mkdir()
    whole, log = folder / "whole", folder / "log"
    begun = time.monotonic()
    if code := forked(lambda: work_on_grid(folder / "grid", whole, toys), log):
        kind.count(f"the whole grid ended with {code}: {last_words(log)}")
        return
    seconds = time.monotonic() - begun
    for number, moment in enumerate(moments(tries, seed=seed)):
        place = folder / f"cut{number}"
        workers = [start(lambda place=place: work_on_grid(folder / "grid", place, toys), log) for _ in range(2)]
        time.sleep(moment * seconds * 0.7)
        for worker in workers[: 1 + number % 2]:
            kill(worker)
        for worker in workers:
            wait(worker)
        resume(
            kind,
            lambda place=place: work_on_grid(folder / "grid", place, toys),
            whole,
            place,
            GRID_FILES,
            log,
        )


def data_workers(kind: Kind, folder: Path, frames: Path) -> None:
    """Two to four processes that load data, against none; and another number of them after a stop."""
    folder.mkdir()
    for name, train, files in (
        ("finetune", lambda place, workers: fine_tune(place, workers=workers), FINETUNED),
        ("mae", lambda place, workers: pretrain("mae", frames, place, workers=workers), RUN_FILES),
    ):
        whole, log = folder / name, folder / "log"
        forked(lambda train=train, whole=whole: train(whole, 0), log)
        for workers in (2, 3, 4):
            place = folder / f"{name}-{workers}"
            code = forked(lambda train=train, place=place, workers=workers: train(place, workers), log)
            kind.count(f"ended with {code}: {last_words(log)}" if code else difference(whole, place, files))
        place, after = folder / f"{name}-changed", 3.0
        forked(lambda train=train, place=place: train(place, 2), log, kill_after=after)
        resume(kind, lambda train=train, place=place: train(place, 0), whole, place, files, log)


class Processes:
    """What ``claim_run`` asks of an Accelerator, of a run of several processes."""

    is_main_process, mixed_precision = True, "no"

    def __init__(self, number: int) -> None:
        self.num_processes = number

    def wait_for_everyone(self) -> None: ...


def other_processes(kind: Kind, folder: Path) -> None:
    """A run that one process began and two would continue, and the other way round: refused by name."""
    folder.mkdir()
    for first, second in ((1, 2), (2, 1), (2, 4)):
        place, log = folder / f"{first}-{second}", folder / "log"
        (place / "checkpoints" / "step-00000001").mkdir(parents=True)
        begun, other = (cast(Accelerator, Processes(number)) for number in (first, second))
        claim_run(place, {"recipe": {}}, begun, resume=True)
        code = forked(lambda place=place, other=other: claim_run(place, {"recipe": {}}, other, resume=True), log)
        words = last_words(log)
        expected = code == 2 and f"was trained by {first} process(es), not {second}" in words
        kind.count(None if expected else f"exit code {code}: {words}")


def kinds(folder: Path, frames: Path, toys: Path, *, scale: float) -> Iterator[tuple[Kind, Callable[[Kind], None]]]:
    """Every kind of this file and what tries it; ``scale`` 1 is the whole campaign."""

    def times(count: int) -> int:
        return max(2, round(count * scale))

    yield (
        Kind(
            "SIGKILL in fine-tuning", "at random moments; resumed to the same weights, tables and optimizer bit by bit"
        ),
        lambda kind: killed_and_resumed(kind, fine_tune, folder / "finetune", FINETUNED, tries=times(20), seed=1),
    )
    for seed, method in enumerate(("moco_v3", "barlow_twins", "mae"), start=2):
        yield (
            Kind(f"SIGKILL in pretraining, {method}", "at random moments; resumed to the same bits"),
            lambda kind, method=method, seed=seed: killed_and_resumed(
                kind,
                lambda place: pretrain(method, frames, place),
                folder / method,
                RUN_FILES,
                tries=times(10),
                seed=seed,
            ),
        )
    yield (
        Kind("SIGKILL in a grid of two workers", "one or both at random moments; the same models, receipts and masks"),
        lambda kind: killed_grid(kind, folder / "grid", toys, tries=times(10), seed=9),
    )
    yield (
        Kind(
            "SIGKILL inside writing", "at the moment a file is brought to the disk, over the whole run; the same bits"
        ),
        lambda kind: killed_in_writing(kind, "sync", folder / "sync", tries=times(12)),
    )
    yield (
        Kind("SIGKILL at a rename", "of a checkpoint, model or table, and before the finished mark; the same bits"),
        lambda kind: killed_in_writing(kind, "rename", folder / "rename", tries=times(20)),
    )
    yield (
        Kind("data workers", "two, three and four against none, and another number after a kill; the same bits"),
        lambda kind: data_workers(kind, folder / "workers", frames),
    )
    yield (
        Kind("another number of processes", "between stop and resume; refused by name"),
        lambda kind: other_processes(kind, folder / "processes"),
    )
