"""What every long run shares: its folder and record, checkpoints that are whole or absent, stopping and resuming."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from tqdm import tqdm

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import (
    atomic_path,
    environment_record,
    explain_write_errors,
    processor_name,
    put_in_place,
    read_json,
    sole_writer,
    write_json,
)
from polypseg.inference.memory import keep_freed_memory
from polypseg.inference.model import cpu_has_bf16


class InterruptedRunError(PolypSegError):
    """A run was asked to stop and has saved a checkpoint; exit code 130 as for any Ctrl-C."""

    exit_code = 130


def make_accelerator(precision: str, *, run_dir: Path) -> Accelerator:
    """An Accelerator in the recipe's precision, or in float32 where that is not to be had; it logs to TensorBoard.

    A run that is in ``run_dir`` goes on in the precision in which it began. Uses the cores that there are unless it was
    told otherwise, and says how many threads compute; see ``use_cores``.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    threads = use_cores(local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if state.is_main_process:
        _say_once(f"{state.num_processes} process(es) on {state.device.type}, {threads} thread(s) each")
    if state.device.type == "cpu":
        keep_freed_memory()
    asked = _begun_in(run_dir) or precision
    usable = usable_precision(asked, device=state.device.type)
    if usable != asked:
        faster = "; --set training.precision=bf16 is faster for ResNet50 and ViT-B" if cpu_has_bf16() else ""
        state.print(f"this {state.device.type} has no {asked} arithmetic: computing in float32{faster}")
    return Accelerator(mixed_precision=usable, log_with="tensorboard", project_dir=run_dir)


def use_cores(*, local_processes: int) -> int:
    """Share this machine's cores among its processes where nobody chose a number; return the threads of this process.

    `accelerate launch` starts a script with OMP_NUM_THREADS=1 when it is not told a number, which leaves all cores but
    one idle. OMP_NUM_THREADS and --num_cpu_threads_per_process are kept.
    """
    if threads_are_launch_default():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
    return torch.get_num_threads()


def threads_are_launch_default(parent: Path | None = None) -> bool:
    """Whether OMP_NUM_THREADS=1 is the launcher's own default, by its environment and command line.

    ``parent``: folder of the launcher's process, by default this process's parent. False where it cannot be read.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    folder = parent or Path("/proc", str(os.getppid()))
    try:
        variables, words = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
    except OSError:
        return False
    told = any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables)
    options = [word.replace(b"-", b"_").split(b"=")[0] for word in words]
    return any(b"accelerate" in word for word in words) and not told and b"__num_cpu_threads_per_process" not in options


@cache
def _say_once(text: str) -> None:
    print(text, flush=True)


def usable_precision(precision: str, *, device: str) -> str:
    """``precision`` if the device computes in it, else "no".

    fp16 needs a GPU, and bf16 on a CPU without bf16 arithmetic is some ten times slower than float32.
    """
    if device != "cpu" or precision == "no":
        return precision
    return precision if precision == "bf16" and cpu_has_bf16() else "no"


def _begun_in(run_dir: Path) -> str | None:
    """The precision in which the run of a folder computes; None where there is no run."""
    path = run_dir / "run.json"
    return read_json(path).get("environment", {}).get("precision") if path.is_file() else None


def check_processes(accelerator: Accelerator, *, expected: int | None) -> None:
    """Raise UsageError unless ``expected`` processes run: `accelerate launch --cpu --num_processes 2` starts one."""
    if expected is not None and accelerator.num_processes != expected:
        raise UsageError(
            f"{accelerator.num_processes} process(es) run instead of {expected}: on CPU start them with "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )


@contextmanager
def sole_run(run_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """``sole_writer`` of a run's folder for all processes of the run: where one is refused, all of them are."""
    refused: list[PolypSegError | None] = [None]
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                stack.enter_context(sole_writer(run_dir))
            except PolypSegError as error:
                refused = [error]
        if accelerator.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


def claim_run(run_dir: Path, record: Mapping[str, Any], accelerator: Accelerator, *, resume: bool) -> bool:
    """Write ``run_dir/run.json``, or check that it holds just this run; return whether a run is to be continued.

    Raises UsageError when there is a run already and ``resume`` is not set, when it is another one, or when it was
    trained by another number of processes: its random states and the order of its sums are theirs.
    """
    path = run_dir / "run.json"
    continues = path.is_file()
    accelerator.wait_for_everyone()  # all have looked before one of them writes
    if continues:
        before = read_json(path)
        if not resume:
            raise UsageError(f"{run_dir} already holds a run: continue it with --resume or choose another --output")
        changed = [key for key in record if before.get(key) != json.loads(json.dumps(record[key]))]
        if changed:
            raise UsageError(f"{run_dir} holds a run with another {', '.join(changed)}: choose another --output")
        begun_by = before.get("environment", {}).get("processes", accelerator.num_processes)
        if begun_by != accelerator.num_processes and newest_checkpoint(run_dir):
            raise UsageError(
                f"{run_dir} was trained by {begun_by} process(es), not {accelerator.num_processes}: continue it with "
                "as many (accelerate launch --num_processes), or choose another --output"
            )
    elif accelerator.is_main_process:
        environment = environment_record() | {
            "precision": accelerator.mixed_precision,
            "hardware": _hardware(accelerator),
        }
        environment |= {"processes": accelerator.num_processes}
        write_json(path, {**record, "environment": environment})
    if accelerator.is_main_process:
        for leftover in (run_dir / "checkpoints").glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    return continues


def _hardware(accelerator: Accelerator) -> str:
    """What one process computes on, by name."""
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the newest checkpoint, or None."""
    return max((run_dir / "checkpoints").glob("step-*"), default=None)


def save_checkpoint(
    accelerator: Accelerator, run_dir: Path, *, step: int, progress: Callable[[], Mapping[str, Any]]
) -> None:
    """Save accelerate's state and ``progress.json`` as ``checkpoints/step-<step>``, then drop the older checkpoint.

    The folder appears only when it is complete. Raises PolypSegError for a full disk.
    """

    def write(folder: Path) -> None:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            write_json(folder / "progress.json", progress())

    accelerator.wait_for_everyone()
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    if accelerator.num_processes == 1:
        with atomic_path(path) as temporary:
            write(temporary)
    else:  # each process writes its random state: they need one agreed folder
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with explain_write_errors(path):
                write(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(path, ignore_errors=True)
            with explain_write_errors(path):
                put_in_place(temporary, path, aside=path.with_name(f".{path.name}.replaced"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for older in path.parent.glob("step-*"):
            if older != path:
                shutil.rmtree(older)


def step_bar(accelerator: Accelerator, *, total: int, done: int) -> "tqdm[Any]":
    """A progress bar over optimizer steps, on one process only; refreshed rarely where it goes into a log file."""
    return tqdm(
        total=total,
        initial=done,
        unit="step",
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not accelerator.is_local_main_process,
    )


@dataclass
class StopFlag:
    """Whether somebody asked the run to stop."""

    requested: bool = False

    def anywhere(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them must call this."""
        asked = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(asked, reduction="sum"))


@contextmanager
def stop_requests() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts at once."""
    flag = StopFlag()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        flag.requested = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
