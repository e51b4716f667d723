"""Memory that is freed and asked for again is not faulted in anew once a process keeps it; threads can share it."""

import ctypes
import subprocess
import sys

import pytest

from polypseg.inference.memory import keep_freed_memory, share_one_arena

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


HEAP = """
import ctypes
from polypseg.inference.memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(3 * 2**30)))  # no page of it is touched
end = libc.sbrk(0)
libc.free(block)
print(block.value < end, libc.sbrk(0) == end)
"""

ARENAS = """
import ctypes, sys
from threading import Barrier, Thread
from polypseg.inference.memory import share_one_arena
shared = share_one_arena() if sys.argv[1] == "shared" else False
together = Barrier(4)
def work():
    held = bytearray(2000)
    together.wait(), together.wait()
threads = [Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
together.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file), libc.fclose(file)
together.wait()
print(shared)
"""

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


@glibc
@pytest.mark.slow
def test_blocks_that_are_freed_and_asked_for_again_are_seldom_mapped_anew():
    usual, (kept, count) = faults("usual"), faults("kept")
    assert usual[0] == "False" and kept == "True"
    assert count < usual[1] / 2


@glibc
def test_more_than_2_gib_that_are_freed_at_once_are_kept_too():
    done = subprocess.run([sys.executable, "-c", HEAP], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"]


@glibc
@pytest.mark.parametrize("way", ["usual", "shared"])
def test_threads_take_memory_from_one_heap(tmp_path, way):
    listed = tmp_path / "arenas.xml"
    subprocess.run([sys.executable, "-c", ARENAS, way, str(listed)], check=True)
    arenas = listed.read_text().count("<heap nr=")
    assert arenas == 1 if way == "shared" else arenas > 1


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory.__wrapped__() is False and share_one_arena.__wrapped__() is False
