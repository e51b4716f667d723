"""What this machine could do at best, on the threads that a benchmark has: matrix products and copies.

OMP_NUM_THREADS=1 python benchmarks/ceilings.py
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from polypseg.cli.console import run_script
from polypseg.inference.runtimes import has_bf16

SIDE = 2048
"""Of the multiplied matrices."""
COPIED = 256 * 2**20
"""Bytes: more than the caches of a core hold."""


def fastest(work: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def products_a_second(kind: torch.dtype) -> float:
    """GFLOP/s of the product of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE).to(kind) for _ in range(2))
    return 2 * SIDE**3 / fastest(lambda: a @ b) / 1e9


def copied_a_second() -> float:
    """GB/s that are read and written by a copy."""
    source = np.ones(COPIED, dtype=np.uint8)
    target = np.empty_like(source)
    return 2 * COPIED / fastest(lambda: np.copyto(target, source)) / 1e9


def ceilings() -> dict[str, Any]:
    """For the record; bf16 where the CPU computes with it."""
    found = {"threads": torch.get_num_threads(), "fp32_gflops": products_a_second(torch.float32)}
    if has_bf16():
        found["bf16_gflops"] = products_a_second(torch.bfloat16)
    return found | {"copy_gb_s": copied_a_second()}


def told(found: dict[str, Any]) -> str:
    """The ceilings in one line."""
    parts = [f"{found['fp32_gflops']:.0f} GFLOP/s in fp32"]
    if "bf16_gflops" in found:
        parts.append(f"{found['bf16_gflops']:.0f} in bf16")
    return f"matrix products at {', '.join(parts)}; copies at {found['copy_gb_s']:.0f} GB/s"


def main() -> None:
    """Measure the ceilings of this machine."""
    print(told(ceilings()))


if __name__ == "__main__":
    run_script(main)
