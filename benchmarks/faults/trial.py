"""What every kind of fault shares: processes that are killed, runs that are compared, rows of the table."""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from polypseg.errors import PolypSegError
from polypseg.files import UNFINISHED

ENDLESS = 600.0
"""Seconds after which a process counts as one that never ends."""
BROKEN = 70
"""Exit code of a process that ended by another error than ours."""
_LONGEST = 300  # characters of a description


@dataclass
class Kind:
    """A row of the table: one kind of fault and what became of it."""

    name: str
    means: str
    """How it was tried and what counts as survived."""
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """What went wrong, one text per try that was lost."""
    seconds: float = 0.0
    revision: str = "unknown"
    """Of the code that was tried."""
    not_tried: str = ""
    """Why there was nothing to try on this machine."""

    def count(self, problem: str | None) -> None:
        """Add one try."""
        self.tried += 1
        print(f"  {self.name} {self.tried}: {problem or 'survived'}", flush=True)
        if problem:
            self.lost.append(problem[:_LONGEST])


def forked(work: Callable[[], Any], log: Path, *, kill_after: float | None = None) -> int:
    """Do ``work`` in a process of its own, killed by SIGKILL after so many seconds; its exit code, -9 if it was killed.

    The modules are loaded already, so that a run takes seconds. What it prints goes to ``log``.
    """
    return wait(start(work, log), kill_after=kill_after)


def start(work: Callable[[], Any], log: Path) -> int:
    """Begin ``work`` in a process of its own and return its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = BROKEN
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.setpgid(0, 0)
        AcceleratorState._reset_state(reset_partial_state=True)
        work()
        code = 0
    except PolypSegError as error:
        print(f"error: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(process: int, *, kill_after: float | None = None) -> int:
    """The exit code of a process, which is killed with all its children after so many seconds."""
    begun = time.monotonic()
    limit = ENDLESS if kill_after is None else kill_after
    while time.monotonic() - begun < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    kill(process)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int) -> None:
    """SIGKILL to a process and its children."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(process, signal.SIGKILL)


def moments(count: int, *, seed: int) -> list[float]:
    """Random fractions of a run's time, one in each of ``count`` equal parts, shuffled."""
    chosen = random.Random(seed)
    fractions = [(number + chosen.random()) / count for number in range(count)]
    chosen.shuffle(fractions)
    return fractions


def same(path: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, or the same JSON or bytes."""
    if not (path.is_file() and other.is_file()):
        return False
    if path.suffix == ".safetensors":
        return equal(load_file(path), load_file(other))
    if path.suffix in (".bin", ".pt"):
        return equal(*(torch.load(place, weights_only=True, map_location="cpu") for place in (path, other)))
    if path.suffix == ".json":
        return equal(*(without_moment(json.loads(place.read_text(encoding="utf-8"))) for place in (path, other)))
    return path.read_bytes() == other.read_bytes()


def equal(a: Any, b: Any) -> bool:
    """Equality of nested tensors, bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def without_moment(content: Any) -> Any:
    """JSON without what depends on when and how fast it was made."""
    if isinstance(content, dict):
        left_out = ("environment", "images_per_second", "digest")
        return {key: without_moment(value) for key, value in content.items() if key not in left_out}
    return [without_moment(value) for value in content] if isinstance(content, list) else content


def difference(whole: Path, folder: Path, patterns: Iterable[str]) -> str | None:
    """What is different or left behind in ``folder``, compared with an uninterrupted run; None if nothing."""
    for pattern in patterns:
        names = {path.relative_to(whole) for path in whole.glob(pattern)}
        found = {path.relative_to(folder) for path in folder.glob(pattern)}
        if names != found or not names:
            return f"{pattern}: {len(found)} instead of {len(names)} files"
        for name in sorted(names):
            if not same(whole / name, folder / name):
                return f"{name} differs"
    left = [path for path in folder.rglob(".*") if path.name.endswith(UNFINISHED) or path.name.startswith(".step-")]
    return f"left behind: {left[0].relative_to(folder)}" if left else None


def last_words(log: Path) -> str:
    """The last line that a process wrote."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1] if lines else "nothing was written"
