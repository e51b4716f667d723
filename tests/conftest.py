"""Shared fixtures: where the real datasets are, and processes that behave the same on every machine."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest

SLOW = 10
"""Tests that a slow one weighs."""
REPOSITORY = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("POLYPSEG_DATA", REPOSITORY.parent / "shared" / "data"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, which take file by file, long files first: the last ones then end at about one time."""
    if not hasattr(config, "workerinput"):
        return
    weights: dict[Path, int] = {}
    for item in items:
        weights[item.path] = weights.get(item.path, 0) + (SLOW if item.get_closest_marker("slow") else 1)
    items.sort(key=lambda item: (-weights[item.path], item.path))  # stable: a file's tests keep their order


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of public datasets; skips the test where it is absent."""
    if not (REAL_DATA / "Kvasir-SEG").is_dir():
        pytest.skip(f"no public datasets under {REAL_DATA}: set POLYPSEG_DATA to the folder that holds Kvasir-SEG")
    return REAL_DATA


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test session keeps its caches to itself, so that no result depends on an earlier run."""
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path_factory.getbasetemp() / "polypseg-cache"))


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests write need not outlive the machine; test_artifacts.py tests that everything else does."""
    monkeypatch.setattr("polypseg.files._sync", lambda path: None)
