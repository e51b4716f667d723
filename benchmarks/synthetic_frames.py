"""Reading synthetic frames again, as every row of a study does, against drawing them anew.

OMP_NUM_THREADS=1 python benchmarks/synthetic_frames.py
"""

from functools import lru_cache
from typing import Annotated

import cv2
import numpy as np
from numpy.typing import NDArray
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data import images
from polypseg.data.polyps import PolypDataset, SyntheticOptions, open_dataset
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side


@lru_cache(maxsize=4)
def drawn(options: SyntheticOptions, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """As it was: the last four frames are kept."""
    return synthesize_frame(CAMERAS["a"], seed=options.seed, index=index, size=options.size)


def before(options: SyntheticOptions) -> None:
    """Read each frame and its mask, then, a batch later, its mask once more to score it."""
    for start in range(0, options.count, 8):
        batch = range(start, min(start + 8, options.count))
        for index in batch:
            for pixels in drawn(options, index):
                images.encode_png(pixels)
        for index in batch:
            images.encode_png(drawn(options, index)[1] * np.uint8(255))


def read(dataset: PolypDataset) -> None:
    """The same reading from the dataset."""
    for start in range(0, len(dataset.records), 8):
        batch = dataset.records[start : start + 8]
        for record in batch:
            dataset.source.read(record.image)
            dataset.source.read(str(record.mask))
        for record in batch:
            dataset.source.read(str(record.mask))


def rows(*, frames: int = 64, repeats: int = 5) -> list[Row]:
    """``frames`` frames of 256x256, read for the second time and later."""
    cv2.setNumThreads(1)
    options = SyntheticOptions(count=frames)
    dataset = open_dataset("synthetic_a", synthetic_options=options)
    ways = {BASELINE: lambda: before(options), "kept": lambda: read(dataset)}
    return side_by_side(f"reading {frames} synthetic frames again", ways, repeats=repeats)


def main(
    frames: Annotated[int, Option(help="Frames.")] = 64,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Time reading synthetic frames again."""
    neighbors = Neighbors()
    print(show(rows(frames=frames, repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
