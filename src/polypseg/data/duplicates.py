"""Fingerprints of frames, and the pairs of frames that are nearly the same."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_DISTANCE = 10
"""Bits of a 256-bit difference hash within which two frames may be near-duplicates."""
THUMBNAIL_DIFFERENCE = 4.0
"""Mean absolute difference, in gray levels, of 32x32 RGB thumbnails below which they are."""
_ROUNDING = 1e-3
"""Gray levels by which the means of two thumbnails may be off."""


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a frame for comparing it with others."""

    digest: str
    """sha256 of the decoded pixels."""
    bits: NDArray[np.bool_]
    """(256,) difference hash."""
    thumbnail: NDArray[np.uint8]
    """(32, 32, 3), 0 to 255."""


def fingerprint(frame: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB frame."""
    return Fingerprint(
        digest=hashlib.sha256(np.asarray(frame).tobytes()).hexdigest(),
        bits=difference_hash(frame),
        thumbnail=np.asarray(frame.resize((32, 32), Image.Resampling.BOX)),
    )


def difference_hash(frame: Image.Image) -> NDArray[np.bool_]:
    """256 bits: whether each cell of a 16x17 gray thumbnail (bilinear, antialiased) is brighter than its left one."""
    gray = np.asarray(frame.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
    return (gray[:, 1:] > gray[:, :-1]).ravel()


def near_duplicates(
    prints: dict[str, Fingerprint],
    *,
    hash_distance: int = HASH_DISTANCE,
    thumbnail_difference: float = THUMBNAIL_DIFFERENCE,
) -> list[tuple[str, str]]:
    """Pairs of ids whose hashes differ in at most ``hash_distance`` of 256 bits and whose thumbnails hardly differ.

    Pairs are in the order of ``prints``. Two thumbnails differ by at least as much as their means do, so each frame is
    compared only with those of about its brightness: 100,000 frames take seconds, and memory grows with their number.
    """
    ids = list(prints)
    if len(ids) < 2:
        return []
    thumbnails = [prints[name].thumbnail.reshape(-1) for name in ids]
    found = [
        (first, second)
        for first, second in _alike_hashes(
            np.packbits(np.stack([prints[name].bits for name in ids]), axis=1),
            np.array([thumbnail.mean(dtype=np.float64) for thumbnail in thumbnails]),
            hash_distance=hash_distance,
            reach=thumbnail_difference + _ROUNDING,
        )
        if _mean_difference(thumbnails[first], thumbnails[second]) < thumbnail_difference
    ]
    return [(ids[first], ids[second]) for first, second in sorted(found)]


def _alike_hashes(
    packed: NDArray[np.uint8], brightness: NDArray[np.float64], *, hash_distance: int, reach: float
) -> Iterator[tuple[int, int]]:
    """Numbers (smaller, larger) of the frames whose hashes (N, 32) and brightness (N,) are within reach.

    Frames are sorted by brightness. Hashes lie as four columns of 64 bits, of which as few as can are looked at first:
    hashes of different frames differ in about half of their bits, so one or two columns rule nearly every pair out.
    """
    order = np.argsort(brightness, kind="stable")
    words = np.ascontiguousarray(np.ascontiguousarray(packed).view(np.uint64)[order].T)  # (4, N)
    ends = np.searchsorted(brightness[order], brightness[order] + reach, side="right")
    columns = min(hash_distance // 32 + 1, 3)  # 192 bits, which 8-bit counts hold
    for place, end in enumerate(ends.tolist()):
        near = np.bitwise_count(words[0, place + 1 : end] ^ words[0, place])
        for column in words[1:columns]:
            near += np.bitwise_count(column[place + 1 : end] ^ column[place])
        close = place + 1 + np.flatnonzero(near <= hash_distance)
        if not len(close):
            continue
        distance = np.bitwise_count(words[:, close] ^ words[:, place, None]).sum(axis=0, dtype=np.int64)
        for other in close[distance <= hash_distance].tolist():
            first, second = int(order[place]), int(order[other])
            yield min(first, second), max(first, second)


def _mean_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two thumbnails (3072,), in gray levels."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean())
