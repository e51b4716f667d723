"""Disks that are full, read-only, or that lose what was not brought to them before the machine was reset."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainings import FINETUNED, fine_tune, resume
from trial import Kind, forked, last_words

from polypseg import files as artifacts


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of so many KiB at ``place``; False where this process may not mount one."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k"
    mounted = shutil.which("mount") is not None and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
    ).returncode  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True, capture_output=True)


def full_disk(kind: Kind, folder: Path, *, tries: int) -> None:
    """A fine-tuning on disks of rising sizes: one line of error, and continued to the same bits with more room."""
    folder.mkdir()
    whole, log = folder / "whole", folder / "log"
    if forked(lambda: fine_tune(whole), log):
        kind.count(f"the whole run failed: {last_words(log)}")
        return
    need = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    for number in range(tries):
        size = max(8, round(need * (number + 0.5) / tries))
        with small_disk(folder / f"disk{number}", size) as mounted:
            if not mounted:
                kind.not_tried = "this process may not mount a file system"
                return
            disk = folder / f"disk{number}" / "run"
            code = forked(lambda disk=disk: fine_tune(disk), log)
            words = last_words(log)
            if code != 1 or "the disk is full: free some space" not in words:
                kind.count(f"{size} KiB: exit code {code}: {words}")
                continue
            kept = folder / f"kept{number}"
            shutil.copytree(disk, kept)
        resume(kind, lambda kept=kept: fine_tune(kept), whole, kept, FINETUNED, log)


def refused_writes(kind: Kind, folder: Path, *, tries: int) -> None:
    """Files that the system refuses to bring to the disk or to rename, by one error each: one line that names them."""
    folder.mkdir()
    log = folder / "log"
    for number in range(tries):
        for code, name in ((errno.EROFS, "_sync"), (errno.ENOSPC, "_sync"), (errno.EACCES, "replace")):
            place = folder / f"{name}-{errno.errorcode[code]}-{number}"

            def fail(place: Path = place, code: int = code, name: str = name, after: int = 3 * number) -> None:
                calls: list[int] = []
                real = getattr(_owner(name), name)

                def refuse(*arguments: Any) -> None:
                    calls.append(1)
                    if len(calls) > after:
                        raise OSError(code, os.strerror(code))
                    real(*arguments)

                setattr(_owner(name), name, refuse)
                fine_tune(place)

            ended = forked(fail, log)
            words = last_words(log)
            half = [path.name for path in place.rglob("*") if path.name.endswith(artifacts.UNFINISHED)]
            good = ended == 1 and "cannot write" in words and not half
            kind.count(None if good else f"{place.name}: exit code {ended}: {half or words}")


def _owner(name: str) -> Any:
    return artifacts if name == "_sync" else os


def read_only(kind: Kind, folder: Path) -> None:
    """A file system that is read-only, and a file where a folder is needed: one line before any work."""
    folder.mkdir()
    log = folder / "log"
    (folder / "file").touch()
    code = forked(lambda: fine_tune(folder / "file"), log)
    kind.count(None if code == 2 and "is a file" in last_words(log) else f"exit code {code}: {last_words(log)}")
    with small_disk(folder / "disk", 64) as mounted:
        if not mounted:
            return
        subprocess.run(["mount", "-o", "remount,ro", str(folder / "disk")], check=True)
        code = forked(lambda: fine_tune(folder / "disk" / "run"), log)
        words = last_words(log)
        kind.count(None if code == 1 and "read-only: choose another" in words else f"exit code {code}: {words}")


class Reset:
    """Notes which files and names were brought to the disk; says what a machine that is reset would have lost."""

    def __init__(self) -> None:
        self.synced: set[tuple[int, int]] = set()
        self.renames = 0
        self.lost: list[str] = []
        self.waiting: dict[tuple[int, int], str] = {}
        fsync, replace = os.fsync, os.replace

        def note_sync(descriptor: int) -> None:
            fsync(descriptor)
            state = os.fstat(descriptor)
            self.synced.add((state.st_dev, state.st_ino))
            self.waiting.pop((state.st_dev, state.st_ino), None)

        def note_replace(source: Any, target: Any) -> None:
            source, target = Path(source), Path(target)
            if target.name == "replaced":  # the former folder, aside
                replace(source, target)
                return
            for place in [source, *source.rglob("*")]:
                if place.is_symlink():
                    continue
                state = place.stat()
                if (state.st_dev, state.st_ino) not in self.synced:
                    self.lost.append(f"{target.name}: {place.relative_to(source)} was not on the disk")
            replace(source, target)
            self.renames += 1
            state = target.parent.stat()
            self.waiting[(state.st_dev, state.st_ino)] = target.name

        os.fsync, os.replace = note_sync, note_replace  # type: ignore[assignment]


def reset_machine(kind: Kind, folder: Path) -> None:
    """Every rename of a whole fine-tuning: what it names is on the disk before, its own name before the run ends."""
    folder.mkdir()
    found = folder / "found"

    def watch() -> None:
        reset = Reset()
        fine_tune(folder / "run")
        lines = [str(reset.renames), *reset.lost, *(f"{name}: its name may be lost" for name in reset.waiting.values())]
        found.write_text("\n".join(lines))

    code = forked(watch, folder / "log")
    if code:
        kind.count(f"exit code {code}: {last_words(folder / 'log')}")
        return
    renames, *lost = found.read_text().splitlines()
    for problem in [*lost, *[None] * (int(renames) - len(lost))]:
        kind.count(problem)


def kinds(folder: Path, *, scale: float) -> Iterator[tuple[Kind, Callable[[Kind], None]]]:
    """Every kind of this file and what tries it; ``scale`` 1 is the whole campaign."""
    tries = max(2, round(8 * scale))
    yield (
        Kind("full disk", "a small file system under a run; one line, and the same bits once there is room"),
        lambda kind: full_disk(kind, folder / "full", tries=tries),
    )
    yield (
        Kind(
            "refused writes", "ENOSPC, EROFS and EACCES at the sync or rename of a file; one line, nothing half-written"
        ),
        lambda kind: refused_writes(kind, folder / "refused", tries=max(2, tries // 2)),
    )
    yield (
        Kind("read-only output", "a read-only file system, and a file in the folder's place; one line"),
        lambda kind: read_only(kind, folder / "read-only"),
    )
    yield (
        Kind("reset of the machine", "every rename of a run: content synced before it, its name after it"),
        lambda kind: reset_machine(kind, folder / "reset"),
    )
