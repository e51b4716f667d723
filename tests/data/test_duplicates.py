"""Near-duplicates: the quick search finds exactly the pairs that comparing each with each does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from polypseg.data.duplicates import HASH_DISTANCE, THUMBNAIL_DIFFERENCE, Fingerprint, near_duplicates


def each_with_each(
    prints: dict[str, Fingerprint], *, hash_distance: int, thumbnail_difference: float
) -> list[tuple[str, str]]:
    """The definition, frame by frame."""
    ids = list(prints)
    return [
        (a, b)
        for k, a in enumerate(ids)
        for b in ids[k + 1 :]
        if np.count_nonzero(prints[a].bits != prints[b].bits) <= hash_distance
        and np.abs(prints[a].thumbnail.astype(np.float32) - prints[b].thumbnail).mean() < thumbnail_difference
    ]


def made_prints(
    rng: np.random.Generator, *, families: int, size: int, flips: int, noise: int
) -> dict[str, Fingerprint]:
    """Families of frames alike: bits flipped, and gray levels moved, by up to so much."""
    prints = {}
    for family in range(families):
        bits = rng.random(256) < rng.choice([0.0, 0.5])  # dark frames have no brighter neighbors
        thumbnail = rng.integers(0, 256, (32, 32, 3))
        for member in range(size):
            turned = bits.copy()
            turned[rng.permutation(256)[: rng.integers(0, flips + 1)]] ^= True
            moved = np.clip(thumbnail + rng.integers(0, noise + 1) * rng.choice([-1, 1]), 0, 255)
            prints[f"{member}-{family}"] = Fingerprint(digest="", bits=turned, thumbnail=moved.astype(np.uint8))
    names: NDArray[np.str_] = rng.permutation(list(prints))
    return {str(name): prints[str(name)] for name in names}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    families=st.integers(1, 5),
    size=st.integers(1, 6),
    flips=st.sampled_from([0, 6, 20, 60]),
    noise=st.sampled_from([0, 3, 8, 20]),
    limits=st.sampled_from([(HASH_DISTANCE, THUMBNAIL_DIFFERENCE), (40, 12.0), (0, 1.0), (120, 4.0), (256, 300.0)]),
)
def test_pairs_are_those_of_each_with_each(seed, families, size, flips, noise, limits):
    prints = made_prints(np.random.default_rng(seed), families=families, size=size, flips=flips, noise=noise)
    named = {"hash_distance": limits[0], "thumbnail_difference": limits[1]}
    assert near_duplicates(prints, **named) == each_with_each(prints, **named)


@pytest.mark.parametrize("shift", [3, 4, 5])
def test_thumbnails_a_whole_limit_apart_are_not_alike(shift):
    """All gray levels moved alike: the mean of the frames moves by as much, to the limit itself."""
    bits, gray = np.zeros(256, dtype=bool), np.full((32, 32, 3), 100, dtype=np.uint8)
    prints = {"a": Fingerprint("", bits, gray), "b": Fingerprint("", bits, gray + np.uint8(shift))}
    assert near_duplicates(prints) == ([("a", "b")] if shift < THUMBNAIL_DIFFERENCE else [])


def test_no_frame_and_one_frame_have_no_pairs():
    assert near_duplicates({}) == []
    assert near_duplicates({"a": Fingerprint("", np.zeros(256, dtype=bool), np.zeros((32, 32, 3), np.uint8))}) == []
