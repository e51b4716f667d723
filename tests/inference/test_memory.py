"""Memory that is freed and asked for again is not faulted in anew once a process keeps it."""

import ctypes
import subprocess
import sys

import pytest

from polypseg.inference.memory import keep_freed_memory

COUNT = """
import resource, sys, torch
from polypseg.inference.memory import keep_freed_memory
def step():
    layers = [torch.ones(2**24)]  # 64 MiB
    for _ in range(3):
        layers.append(layers[-1] + 1)
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
step()
before = page_faults()
for _ in range(4):
    step()
print(kept, page_faults() - before)
"""


def faults(way: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", COUNT, way], check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_blocks_that_are_freed_and_asked_for_again_are_seldom_mapped_anew():
    usual, (kept, count) = faults("usual"), faults("kept")
    assert usual[0] == "False" and kept == "True"
    assert count < usual[1] / 2


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory.__wrapped__() is False
