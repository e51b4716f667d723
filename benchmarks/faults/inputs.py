"""Hostile and broken inputs: those that the tests build, counted one by one."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

from trial import ENDLESS, Kind

TESTS = Path(__file__).resolve().parents[2] / "tests"
KINDS = {
    "hostile model folders": ("no foreign code, one line of error", ["test_model_folders.py"], ""),
    "hostile text files": ("recipes, receipts and overrides: one line of error", ["test_hostile_text.py"], ""),
    "edited receipts": ("the changed field is named", ["test_receipts.py"], "changed or change_that or other_files"),
    "signatures": ("a forged or changed one is refused", ["test_signatures.py"], ""),
    "broken archives": ("named, or read as what was meant", ["test_sources.py"], "not content_id"),
    "coded and broken images": ("read right, or refused by name", ["test_images.py"], ""),
    "layouts of datasets": ("recognized, or refused with the tree expected", ["test_datasets.py"], "not real_data"),
    "videos": ("true times, nothing lost, nothing called broken that is whole", ["test_video.py"], ""),
    "bad servers": ("attempts, bytes and time are bounded", ["test_download.py", "test_offline.py"], ""),
    "second writers": ("refused by name in every command", ["test_single_writer.py"], ""),
}
"""Kind -> what counts as survived, test files, which of their tests (as pytest's -k)."""


def try_tests(kind: Kind, files: list[str], chosen: str, *, folder: Path) -> None:
    """Run tests in a process of their own; every one of them is a try."""
    report = folder / f"{kind.name.replace(' ', '-')}.xml"
    options = ["-q", "-p", "no:xdist", "-m", "not real_data", f"--junitxml={report}", f"--basetemp={folder / 'tests'}"]
    command = [sys.executable, "-m", "pytest", *options, *(["-k", chosen] if chosen else [])]
    command += [str(place) for name in files for place in TESTS.rglob(name)]
    try:
        subprocess.run(command, cwd=TESTS.parent, env=dict(os.environ), capture_output=True, timeout=3 * ENDLESS)
    except subprocess.TimeoutExpired:
        kind.count("did not end")
        return
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcomes = {child.tag: child for child in case}
        if "skipped" in outcomes:
            continue
        failed = outcomes.get("failure", outcomes.get("error"))
        kind.count(None if failed is None else f"{case.get('name')}: {failed.get('message', '').splitlines()[0]}")


def kinds(folder: Path) -> Iterator[tuple[Kind, Callable[[Kind], None]]]:
    """Every kind of this file and what tries it."""
    for name, (means, files, chosen) in KINDS.items():
        yield (
            Kind(name, means),
            lambda kind, files=files, chosen=chosen: try_tests(kind, files, chosen, folder=folder),
        )
