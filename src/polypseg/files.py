"""Files that a run leaves behind: written whole or not at all, with a record of how they came to be."""

import csv
import errno
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from polypseg.errors import PolypSegError, UsageError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
}
_FULL_DISKS = ("No space left", "os error 28", "PytorchStreamWriter", "inline_container.cc", "iostream error")
"""What safetensors and torch's writer of archives say, in errors of their own, where the disk took only a part."""
LARGEST_JSON = 2**28
"""Bytes; a passport of a hundred thousand frames has some thirty million."""
LOCK = ".lock"
"""File that the process which writes a folder holds locked; it is gone when the process ends well."""
UNFINISHED = ".unfinished"
"""Suffix of the hidden folder beside a file or folder in which its successor is made."""
_REPLACED = "replaced"
_JUST_MADE = 60.0
"""Seconds during which a new folder may not yet be locked by its maker."""
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "scikit-learn",
    "onnxruntime",
    "openvino",
)
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\udc80-\udcff]")
_ESCAPED = re.compile(r"\\x([01][0-9a-f]|7f|[89a-f][0-9a-f])")


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk while writing ``path`` into a PolypSegError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, error.strerror or str(error))
        raise PolypSegError(f"cannot write {printable(str(path))}: {remedy}") from error
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the disk's error in theirs
        if not any(words in str(error) for words in _FULL_DISKS):
            raise
        raise PolypSegError(f"cannot write {path}: {_REMEDIES[errno.ENOSPC]}") from error


@contextmanager
def atomic_path(path: Path, *, sync_name: bool = True) -> Iterator[Path]:
    """A temporary file or folder name beside ``path`` that is renamed to ``path`` only when the block succeeds.

    Whatever stood at ``path`` is replaced. The content is on the disk before the rename, and the rename before this
    returns: a machine that is reset leaves the old or the new. Without ``sync_name`` the system chooses when the rename
    reaches the disk, for files that are made again where they are missing. What killed processes left in the folder is
    removed. Raises PolypSegError for a full disk, a read-only file system or missing permission; nothing half-written
    stays behind.
    """
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _looked_through:
            remove_leftovers(path.parent)
            _looked_through.add(path.parent)
        prefix = f".{path.name[:50]}."  # names end at 255 bytes
        workspace = Path(tempfile.mkdtemp(prefix=prefix, suffix=UNFINISHED, dir=path.parent))
        try:
            with ExitStack() as held:
                with suppress(NotImplementedError):  # file systems without locks: nothing is removed there either
                    held.enter_context(FileLock(workspace / LOCK))
                yield workspace / path.name
                put_in_place(workspace / path.name, path, aside=workspace / _REPLACED, sync_name=sync_name)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


def put_in_place(new: Path, path: Path, *, aside: Path, sync_name: bool = True) -> None:
    """Bring ``new`` to the disk and rename it to ``path``.

    A folder cannot be replaced in one step: the old one goes ``aside``, and comes back on failure.
    """
    sync_tree(new)
    if not path.is_dir():
        os.replace(new, path)
    else:
        os.replace(path, aside)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(aside, path)
            raise
    if sync_name:
        sync_folder(path.parent)


def sync_tree(path: Path) -> None:
    """Bring a file, or all files and folders below a folder, to the disk: before it, a rename may outlive them."""
    if not path.is_dir():
        _sync(path)
        return
    for folder, _, files in os.walk(path):
        for name in files:
            if not (file := Path(folder, name)).is_symlink():
                _sync(file)
        sync_folder(Path(folder))


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can."""
    if os.name == "posix":
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder, and finish the replacement of one by another.

    Left alone is what a living process holds, and what does not look like ``atomic_path``'s own.
    """
    for workspace in folder.glob(f".*{UNFINISHED}"):
        with suppress(OSError, Timeout, NotImplementedError):
            if not (workspace / LOCK).exists() and time.time() - workspace.stat().st_mtime < _JUST_MADE:
                continue
            with FileLock(workspace / LOCK, blocking=False):
                made = [entry for entry in workspace.iterdir() if entry.name not in (LOCK, _REPLACED)]
                if (workspace / _REPLACED).exists() and made and not (path := folder / made[0].name).exists():
                    os.replace(made[0], path)  # it was killed between two renames: the new one is whole
                    sync_folder(folder)
                shutil.rmtree(workspace, ignore_errors=True)


_looked_through: set[Path] = set()  # folders in which this process has looked for leftovers


class FolderInUseError(UsageError):
    """Another process is writing the folder."""


_held: set[tuple[int, Path]] = set()  # (thread, lock)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into ``folder`` for the block; the folder is made where it is not there.

    May be nested within one thread. The system frees the lock of a process that dies, however it does; what it left
    unfinished in the folder is removed. Raises FolderInUseError at once when another process holds the folder,
    UsageError when it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose a folder for the results")
    with _hold(folder / LOCK, written=folder):
        yield


@contextmanager
def sole_writer_of(path: Path) -> Iterator[None]:
    """``sole_writer`` of one file, beside others in its folder."""
    with _hold(path.with_name(f".{path.name}{LOCK}"), written=path):
        yield


@contextmanager
def _hold(path: Path, *, written: Path) -> Iterator[None]:
    """Hold the lock ``path`` of what is ``written`` for the block."""
    folder = path.parent
    holder = (threading.get_ident(), path.resolve())
    if holder in _held:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = FileLock(path, blocking=False)
    with explain_write_errors(written):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise FolderInUseError(
                f"{written} is being written by another process{_writer(path)}: wait until it ends, or choose another "
                "folder"
            ) from None
        except NotImplementedError as error:
            raise PolypSegError(
                f"cannot write {written}: its file system cannot lock files, and two writers would spoil each other's "
                "work: choose a folder on another"
            ) from error
    _held.add(holder)
    try:
        with explain_write_errors(written):
            path.write_text(f"{os.getpid()}\n", encoding="ascii")
            remove_leftovers(folder)
        yield
    finally:
        _held.discard(holder)
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened it meanwhile finds it gone and is refused
        lock.release()
        with suppress(OSError):
            for place in made:
                place.rmdir()  # where nothing was written


def _writer(path: Path) -> str:
    with suppress(OSError, ValueError):
        return f" (number {int(path.read_text(encoding='ascii'))})"
    return ""


def write_text(path: Path, text: str) -> Path:
    """Write ``text`` to ``path`` in one step and return the path.

    UTF-8; bytes of file names that are none are written as ``\\udce9``, which JSON reads back.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write ``content`` as indented JSON in one step; NaN is refused."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``csv_text`` of rows in one step and return the path."""
    return write_text(path, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows that share their keys as CSV with a header; texts as ``to_cell`` gives them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: to_cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def to_cell(value: Any) -> Any:
    """A value as a CSV cell that no spreadsheet takes for a formula: a text such as ``=1+1`` gets an apostrophe before.

    Numbers, and texts of numbers, stay. ``from_cell`` undoes it.
    """
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value) or value == "-":
        return value
    return f"'{value}"


def from_cell(text: str) -> str:
    """The text that ``to_cell`` wrote."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def printable(text: str) -> str:
    """``text`` in one line of valid Unicode: control characters and bytes that are no UTF-8 as ``\\xNN``.

    File names may hold both. ``original_name`` finds the name again.
    """
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


def original_name(text: str) -> str:
    """The file name from which ``printable`` made a text."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16) | (0xDC00 if int(found[1], 16) > 0x7F else 0)), text)


def read_bounded(path: Path, *, largest: int) -> str:
    """The UTF-8 text of a file. Raises ValueError where it has more than ``largest`` bytes or is no text."""
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than the {largest} bytes that are read")
    return data.decode("utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises PolypSegError when it is missing, damaged or larger than any that we write."""
    try:
        return json.loads(read_bounded(path, largest=LARGEST_JSON))
    except (OSError, ValueError, RecursionError) as error:  # Python refuses numbers of 4300 digits, and deep nesting
        raise PolypSegError(f"cannot read {path}: {error}. Delete it and run the command again.") from error


@cache
def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` for local changes; None outside one.

    As it was when it was first asked: later changes are not in the process that runs.
    """
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if inside.returncode:
            return None  # installed into somebody else's repository
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    from polypseg import __version__

    versions = {"polypseg": __version__}  # whichever distribution brought it
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def environment_record() -> dict[str, Any]:
    """What must be known to repeat a run: versions, git revision, platform, threads, command and time (UTC)."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "versions": dict(_versions(PACKAGES)),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "command": [_without_place(word) for word in sys.argv],
    }


_INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
"""Flag of /proc/cpuinfo -> name."""


def processor_name() -> str:
    """The processor's name, cores and instructions that decide speed, as far as the system tells them."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    known = set(facts.get("flags", "").split())
    told = [f"{os.cpu_count()} cores", *(title for flag, title in _INSTRUCTIONS.items() if flag in known)]
    return f"{facts['model name']} ({', '.join(told)})"


def _without_place(word: str) -> str:
    """An argument without the private part of an absolute path: records travel to cards and reports."""
    path = Path(word)
    return printable(str(Path(*path.parts[-2:])) if path.is_absolute() else word)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits, read in pieces. Raises PolypSegError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PolypSegError(f"cannot read {path}: {error.strerror}") from error


def cache_folder() -> Path:
    """Where decoded data is cached: $POLYPSEG_CACHE, else ``polypseg`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("POLYPSEG_CACHE") or Path(base) / "polypseg")


SAMPLE_FRAMES = Path(__file__).parent / "sample_frames"
"""Three real frames that come with the package; ATTRIBUTION.md beside them says where they are from."""


def bundled_folder(name: str) -> Path:
    """A folder of hub_configs, which comes with the package: in the wheel, else in the checkout."""
    packaged = Path(__file__).parent / "_hub_configs" / name
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "hub_configs" / name
