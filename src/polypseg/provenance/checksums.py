"""``SHA256SUMS``: what every file of a model folder must be, checked after each download.

Neither HTTP nor Xet downloads compare a checksum: a flipped byte of the same size would be cached and used. The format
is that of ``sha256sum``, so that ``sha256sum -c SHA256SUMS`` checks a folder without this package.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import LARGEST_JSON, file_sha256, read_bounded, write_text

MANIFEST = "SHA256SUMS"
NOT_LISTED = (MANIFEST, ".gitattributes")
"""The manifest itself, and the file that the Hub writes."""
LOADED = ("*.json", "*.safetensors")
"""Files of a model folder that loading it with transformers reads, except those of the next line."""
NOT_LOADED = ("*.fp16.safetensors", "results/*", "replay/*")
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What checking a model folder or repository found."""

    folder: Path
    revision: str | None
    """Commit of a Hub repository; None for a folder."""
    digests: dict[str, str]
    """File name -> SHA-256 as the manifest says."""
    problems: dict[str, str]
    """File name -> what is wrong with it; empty when all is well."""


def list_files(folder: Path) -> list[str]:
    """Names, relative and with /, of all files of a model folder that a manifest lists, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    hidden = re.compile(r"(^|/)\.(cache|git)/")
    return sorted(name for name in names if name not in NOT_LISTED and not hidden.search(name))


def write_manifest(folder: Path) -> Path:
    """Write the manifest of everything in ``folder`` and return its path."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in list_files(folder)]
    return write_text(folder / MANIFEST, "".join(lines))


def read_manifest(path: Path) -> dict[str, str]:
    """File name -> SHA-256. Raises PolypSegError for a missing or damaged manifest."""
    try:
        lines = read_bounded(path, largest=LARGEST_JSON).splitlines()
    except (OSError, ValueError) as error:
        raise PolypSegError(f"cannot read {path}: {error}") from error
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or not all(matches):
        raise PolypSegError(f"{path} is damaged: it is not a list of SHA-256 sums. Get the model again")
    return {match["name"]: match["digest"] for match in matches if match}


def find_mismatches(folder: Path, manifest: dict[str, str], *, only: set[str] | None = None) -> dict[str, str]:
    """Name -> what is wrong: ``missing``, or ``damaged`` where the content is not what the manifest says.

    ``only`` limits the check to some of the files. Names that leave the folder are wrong whatever they hold.
    """
    problems = {}
    for name, digest in manifest.items():
        if only is not None and name not in only:
            continue
        if ".." in Path(name).parts or Path(name).is_absolute():
            problems[name] = "outside the folder"
        elif not (folder / name).is_file():
            problems[name] = "missing"
        elif file_sha256(folder / name) != digest:
            problems[name] = "damaged"
    return problems


def find_problems(
    folder: Path, manifest: dict[str, str], *, wanted: Callable[[str], bool] | None = None
) -> dict[str, str]:
    """Name -> what is wrong: as ``find_mismatches``, or ``not in the manifest`` for a file that it does not list.

    ``wanted`` limits the check to the names for which it is true.
    """
    chosen = wanted or (lambda name: True)
    problems = find_mismatches(folder, manifest, only={name for name in manifest if chosen(name)})
    there = (name for name in list_files(folder) if chosen(name))
    return problems | {name: "not in the manifest" for name in there if name not in manifest}


def is_loaded(name: str, *, names: Sequence[str] = LOADED) -> bool:
    """Whether a file of this name is one of those that loading a model reads, given as patterns."""
    return any(fnmatch(name, p) for p in (*names, MANIFEST)) and not any(fnmatch(name, p) for p in NOT_LOADED)


def inspect_folder(folder: Path, *, revision: str | None, wanted: Callable[[str], bool] | None) -> Verification:
    """Compare the wanted files with the manifest: each that it lists must be there, and each that is there listed."""
    try:
        digests = read_manifest(folder / MANIFEST)
    except PolypSegError:
        return Verification(folder=folder, revision=revision, digests={}, problems={MANIFEST: "damaged"})
    problems = find_problems(folder, digests, wanted=wanted)
    return Verification(folder=folder, revision=revision, digests=digests, problems=problems)


def verify_folder(folder: Path) -> Verification:
    """Compare every file of a model folder with its manifest. Raises UsageError for a folder without one."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} has no {MANIFEST}: it was not written by `polypseg export`")
    return inspect_folder(folder, revision=None, wanted=None)


def check_folder(folder: Path, *, names: Sequence[str] = LOADED) -> None:
    """Raise PolypSegError where files of a model folder differ from its manifest; a folder without (a run's) passes.

    ``names``: patterns of the files that are about to be read.
    """
    if not (folder / MANIFEST).is_file():
        return
    problems = inspect_folder(folder, revision=None, wanted=partial(is_loaded, names=names)).problems
    if problems:
        listed = describe_problems(problems)
        raise PolypSegError(f"{folder} does not agree with its {MANIFEST}: {listed}. Export it or get it again")


def describe_problems(problems: dict[str, str]) -> str:
    """``config.json (missing), handler.py (damaged)``, for error messages."""
    return ", ".join(f"{name} ({what})" for name, what in problems.items())
