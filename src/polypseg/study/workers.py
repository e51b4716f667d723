"""Working through a grid's tasks: each is claimed by a lease in the shared folder, so no two workers do the same one.

The lease is refreshed while its worker lives and expires when it dies; another worker then continues from the last
checkpoint. A worker that loses its lease stops at its next step, as if it had been interrupted.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import SoftFileLease, Timeout
from rich.console import Console

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import FolderInUseError, environment_record, explain_write_errors, read_json, write_json
from polypseg.study.schema import Grid
from polypseg.study.tasks import GridData, Task, describe_grid, describe_recipes, grid_tasks
from polypseg.training.run_folder import InterruptedRunError

LEASE = 120.0
"""Seconds without a sign of life after which a worker is taken to be dead."""
PAUSE = 5.0
"""Seconds between two looks for work while others hold all that is left."""
_SHORT_PAUSE = 1.0
"""The same among processes of one machine."""
_GRACE = 60.0
"""Seconds in which an interrupted process has to leave its checkpoint."""


def run_grid(grid: Grid, data: GridData, *, console: Console, workers: int = 1) -> None:
    """Do what is left of a grid, beside any number of other workers, and return when all of it is done.

    ``workers``: as for ``work_together``. Raises UsageError when the folder holds another grid, and whatever a task
    raises: the finished tasks stay.
    """
    tasks = grid_tasks(grid, data)
    record_grid(grid, data)
    work_together(grid, data, tasks, console=console, workers=workers)


def work_together(grid: Grid, data: GridData, tasks: Sequence[Task], *, console: Console, workers: int) -> None:
    """Do the ``tasks`` of a grid by so many processes of this machine, which share its cores; return when all are done.

    Each process but this one writes what it prints to ``worker-<number>.log`` in the grid's folder. What one of them
    fails at this one tries again, and raises.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // workers)
    with _coworkers(grid, data, count=workers - 1, threads=share, console=console):
        torch.set_num_threads(share)
        try:
            work_through(tasks, claims_folder(data), console=console, pause=PAUSE if workers == 1 else _SHORT_PAUSE)
        finally:
            torch.set_num_threads(threads)


def claims_folder(data: GridData) -> Path:
    """Where the leases of a grid's workers are."""
    return data.output / "claims"


@contextmanager
def _coworkers(grid: Grid, data: GridData, *, count: int, threads: int, console: Console) -> Iterator[None]:
    """``count`` more processes that do a grid's tasks during the block; they are interrupted where the block fails."""
    start = multiprocessing.get_context("spawn").Process  # a forked child would share OpenCV's and torch's threads
    logs = [data.output / f"worker-{number}.log" for number in range(2, count + 2)]
    processes = [start(target=_help, args=(grid, data, log, threads)) for log in logs]
    try:
        for process in processes:
            process.start()
        yield
    except BaseException:
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process, log in zip(processes, logs, strict=True):
            if process.pid is None:
                continue
            process.join(_GRACE)
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode not in (0, InterruptedRunError.exit_code, -signal.SIGINT):
                console.print(f"a worker ended with code {process.exitcode}: {log}", highlight=False, soft_wrap=True)


def _help(grid: Grid, data: GridData, log: Path, threads: int) -> None:
    """Be one of the other processes."""
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.set_num_threads(threads)
    try:
        work_through(grid_tasks(grid, data), claims_folder(data), console=Console(), pause=_SHORT_PAUSE)
    except (KeyboardInterrupt, InterruptedRunError):
        print("interrupted")
        sys.exit(InterruptedRunError.exit_code)
    except PolypSegError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


def work_through(
    tasks: Sequence[Task], claims: Path, *, console: Console, lease: float = LEASE, pause: float = PAUSE
) -> None:
    """Do each task that no other worker does, in order; return when all are done, by whomever.

    ``claims``: folder of the leases, shared by the workers, who must agree on ``lease`` in seconds.
    """
    while True:
        waiting = [task for task in tasks if not task.is_done()]
        if not waiting:
            console.print(f"all {len(tasks)} tasks are done", highlight=False)
            return
        if not _do_one(waiting, claims, done=len(tasks) - len(waiting), console=console, lease=lease):
            console.print(f"{len(waiting)} task(s) are with other workers; waiting", highlight=False)
            time.sleep(pause)


def record_grid(grid: Grid, data: GridData) -> None:
    """Write ``grid.json``, or raise UsageError unless the folder holds this grid, by these recipes, on these images."""
    path = data.output / "grid.json"
    record: dict[str, Any] = {
        "grid": describe_grid(grid),
        "recipes": describe_recipes(grid),
        "data": {
            "dataset": data.training.spec.name,
            "content_id": data.training.content_id,
            "split": data.split,
        },
    }
    if path.is_file():
        before = read_json(path)
        changed = [key for key in record if before.get(key) != record[key]]
        if changed:
            raise UsageError(f"{path} differs in {' and '.join(changed)}: choose another --output")
        return
    write_json(path, record | {"environment": environment_record()})


def _do_one(waiting: Sequence[Task], claims: Path, *, done: int, console: Console, lease: float) -> bool:
    """Do the first task that is ready and that nobody else holds; whether there was one."""
    for task in waiting:
        if not all(need.is_done() for need in task.needs):
            continue
        with _claim(task, claims, lease=lease) as claimed:
            if not claimed or task.is_done():
                continue
            console.print(f"[bold]{done} done, {len(waiting)} left: {task.name}[/bold]", highlight=False)
            try:
                task.run()
            except FolderInUseError:  # of a worker that lost its lease and has not stopped yet
                continue
            return True
    return False


@contextmanager
def _claim(task: Task, claims: Path, *, lease: float) -> Iterator[bool]:
    """Hold the task's lease for the block, if nobody else does; whether it is held."""
    with explain_write_errors(claims):
        claims.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", task.name)
    holder = SoftFileLease(claims / f"{name}.lease", lease_duration=lease, on_compromise=_stop_work, blocking=False)
    try:
        holder.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        holder.release()


def _stop_work(compromise: object) -> None:
    """Called by the lease's heartbeat when another worker has taken the task: stop as for Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
