"""What the C library does with memory that is freed: kept by a training, shared by the threads of a short command.

glibc maps every block of more than 32 MiB anew. A step of ResNet50 on 48 images of 224 px frees and asks for some
hundred such blocks, and the system clears each of their pages again: a sixth of the step on CPU. And it gives each
thread an arena of its own, from which the others cannot take what is free: a sixth of the memory of a first mask.
"""

import ctypes
import sys
from collections.abc import Mapping
from functools import cache

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Of glibc's mallopt: free bytes at the heap's end that are given back, blocks that are mapped alone, arenas."""
_NEVER = -1
"""As a threshold to trim at. The largest int stops at 2 GiB, which one step of ViT-B frees."""


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees until it ends; whether the system's C library can do so.

    No result changes. The memory that the process holds stays at its peak, which fragments: some 20 % more for a
    training step.
    """
    return _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER})


@cache
def share_one_arena() -> bool:
    """Let all threads that start from now on take memory from one heap; whether the system's C library can do so."""
    return _set({_ARENA_MAX: 1})


def _set(parameters: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library, such as musl
        return False
    return all(mallopt(name, value) for name, value in parameters.items())
