"""Scripts use the cores that there are unless told otherwise: the launcher's default of one thread is none of that."""

import os
from pathlib import Path

import pytest
import torch

from polypseg.training.run_folder import threads_are_launch_default, use_cores


def launcher(folder: Path, *, command: str, environment: str = "PATH=/bin") -> Path:
    """A process as /proc shows it."""
    folder.mkdir(exist_ok=True)
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (folder / "environ").write_bytes(environment.replace(" ", "\0").encode())
    return folder


@pytest.fixture
def launched(monkeypatch):
    """The variables that `accelerate launch` gives a script."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


LAUNCH = "python /bin/accelerate launch training_scripts/finetune.py --model RN-NA-NA"


@pytest.mark.parametrize(
    ("command", "environment", "default"),
    [
        (LAUNCH, "PATH=/bin", True),
        (LAUNCH, "PATH=/bin OMP_NUM_THREADS=1", False),
        (LAUNCH.replace("launch", "launch --num_cpu_threads_per_process 1"), "PATH=/bin", False),
        (LAUNCH.replace("launch", "launch --num-cpu-threads-per-process=1"), "PATH=/bin", False),
        ("bash job.sh", "PATH=/bin", False),
    ],
)
def test_one_thread_is_the_launchers_default_only_where_nobody_asked_for_it(
    launched, tmp_path, command, environment, default
):
    assert threads_are_launch_default(launcher(tmp_path, command=command, environment=environment)) == default


def test_without_the_launcher_or_its_process_nothing_is_changed(monkeypatch, tmp_path, launched):
    assert not threads_are_launch_default(tmp_path / "none")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert not threads_are_launch_default(launcher(tmp_path, command=LAUNCH))


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("polypseg.training.run_folder.threads_are_launch_default", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    try:
        assert use_cores(local_processes=2) == 2 and torch.get_num_threads() == 2
        assert use_cores(local_processes=8) == 1
        monkeypatch.setattr("polypseg.training.run_folder.threads_are_launch_default", lambda: False)
        torch.set_num_threads(3)
        assert use_cores(local_processes=1) == 3
    finally:
        torch.set_num_threads(before)
