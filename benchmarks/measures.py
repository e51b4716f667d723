"""Measuring one image: what the paper's convention needs, and what every convention needs, against all measures before.

OMP_NUM_THREADS=1 python benchmarks/measures.py

The way before is tests/frozen_measures.py, to which the tests hold the measures equal to 1e-9.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import cv2
import numpy as np
from typer import Option

from polypseg.cli.console import run_script
from polypseg.evaluation.conventions import CONVENTIONS, needed_measures
from polypseg.evaluation.image_metrics import measure_image
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

FROZEN = Path(__file__).resolve().parents[1] / "tests" / "frozen_measures.py"


def frozen_measures() -> ModuleType:
    """The measures as they were."""
    spec = importlib.util.spec_from_file_location("frozen_measures", FROZEN)
    assert spec is not None and spec.loader is not None
    module = sys.modules["frozen_measures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*, images: int = 8, repeats: int = 5) -> list[Row]:
    """Maps of 530x572 pixels, soft and noisy, against round polyps of about a seventh of the frame."""
    cv2.setNumThreads(1)
    rng, (height, width) = np.random.default_rng(0), (530, 572)
    y, x = np.mgrid[:height, :width]
    cases = []
    for _ in range(images):
        top, left, radius = rng.uniform(180, 350), rng.uniform(180, 390), rng.uniform(90, 140)
        mask = np.hypot(y - top, x - left) < radius
        logits = (radius - np.hypot(y - top - 9, x - left + 7)) / 8 + rng.normal(0, 0.5, mask.shape)
        cases.append(((1 / (1 + np.exp(-logits))).astype(np.float32), mask))
    plain = frozen_measures()

    def run(names: tuple[str, ...]) -> None:
        for p, mask in cases:
            measure_image(p, mask, measures=needed_measures(names))

    ways = {
        BASELINE: lambda: [plain.measure_image(p, mask) for p, mask in cases],
        "paper": lambda: run(("paper",)),
        "every convention": lambda: run(tuple(CONVENTIONS)),
    }
    return side_by_side(f"measures of {images} images of {height}x{width}", ways, repeats=repeats)


def main(
    images: Annotated[int, Option(help="Images a repeat.")] = 8,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Time the measures of an image against those before."""
    neighbors = Neighbors()
    print(show(rows(images=images, repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
