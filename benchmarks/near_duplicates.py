"""The search for near-duplicates against the loop that compared each frame with all later ones.

OMP_NUM_THREADS=1 python benchmarks/near_duplicates.py --frames 10000

Frames are made up: random hashes, and thumbnails as bright as endoscopic ones (mean 100, standard deviation 25).
"""

from typing import Annotated

import numpy as np
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data.duplicates import HASH_DISTANCE, THUMBNAIL_DIFFERENCE, Fingerprint, near_duplicates
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side


def made_up(frames: int) -> dict[str, Fingerprint]:
    """As many fingerprints, a hundredth of them near-duplicates of another."""
    rng = np.random.default_rng(0)
    prints: dict[str, Fingerprint] = {}
    for number in range(frames):
        if number % 100 == 99:
            original = prints[str(number - 50)]
            bits = original.bits.copy()
            bits[rng.permutation(256)[:5]] ^= True
            prints[str(number)] = Fingerprint("", bits, original.thumbnail)
        else:
            gray = np.uint8(np.clip(rng.normal(100, 25), 0, 255))
            prints[str(number)] = Fingerprint("", rng.random(256) < 0.5, np.full((32, 32, 3), gray))
    return prints


def before(prints: dict[str, Fingerprint]) -> list[tuple[str, str]]:
    """As it was: block by block of (N, 32) bytes, time by the square of the number."""
    ids = list(prints)
    packed = np.packbits(np.stack([prints[i].bits for i in ids]), axis=1)
    pairs = []
    for index in range(len(ids) - 1):
        distance = np.bitwise_count(packed[index + 1 :] ^ packed[index]).sum(axis=1)
        for other in index + 1 + np.flatnonzero(distance <= HASH_DISTANCE):
            a, b = (prints[ids[k]].thumbnail.astype(np.float32) for k in (index, other))
            if float(np.abs(a - b).mean()) < THUMBNAIL_DIFFERENCE:
                pairs.append((ids[index], ids[other]))
    return pairs


def rows(*, frames: int = 5000, repeats: int = 5) -> list[Row]:
    """The search, of ``frames`` frames; both ways must find the same pairs."""
    prints = made_up(frames)
    assert before(prints) == near_duplicates(prints)
    ways = {BASELINE: lambda: before(prints), "near_duplicates": lambda: near_duplicates(prints)}
    return side_by_side(f"near-duplicates of {frames:,} frames", ways, repeats=repeats)


def main(
    frames: Annotated[int, Option(help="Frames.")] = 5000,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Time the search for near-duplicates against the loop before it."""
    neighbors = Neighbors()
    print(show(rows(frames=frames, repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
