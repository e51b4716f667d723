"""Frames that were decoded once and are read as pixels from then on, as many as a bound on the disk allows.

Decoding is most of what a view of a large JPEG costs. The pixels lie in one file that is mapped into memory: all
workers share what the system keeps of it.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from polypseg.data.corpus import FrameStore
from polypseg.data.images import decode_frame
from polypseg.errors import PolypSegError
from polypseg.files import atomic_path, cache_folder
from polypseg.training.augmentation import Image8

PLACES, PIXELS = "places.npy", "pixels.bin"
_GIGABYTE = 10**9


class DecodedFrames:
    """The first frames of a corpus as pixels; see ``keep_decoded``."""

    def __init__(self, folder: Path):
        self._places = np.load(folder / PLACES)  # (N, 3): start, height, width; start -1 for a frame that is not here
        pixels = folder / PIXELS
        self._pixels = np.memmap(pixels, dtype=np.uint8, mode="r") if pixels.stat().st_size else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        """Number of frames that are here."""
        return int((self._places[:, 0] >= 0).sum())

    def frame(self, index: int) -> Image8 | None:
        """RGB pixels (H, W, 3) of a frame, None for one that is not here. Read only."""
        start, height, width = map(int, self._places[index])
        if start < 0:
            return None
        return np.asarray(self._pixels[start : start + height * width * 3]).reshape(height, width, 3)


def keep_decoded(frames: FrameStore, *, gigabytes: float) -> DecodedFrames:
    """Decode the corpus's frames in their order until ``gigabytes`` (10^9 bytes) are full; a later call only maps them.

    Frames that cannot be read are left to the feed, which counts them. Raises PolypSegError where the disk is full.
    """
    folder = cache_folder() / "decoded" / f"{frames.content_id}-{gigabytes:g}"
    if not folder.is_dir():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _decode_into(temporary, frames, limit=gigabytes * _GIGABYTE)
    return DecodedFrames(folder)


def _decode_into(folder: Path, frames: FrameStore, *, limit: float) -> None:
    places, filled = np.full((len(frames), 3), -1, dtype=np.int64), 0
    with (folder / PIXELS).open("wb") as file:
        for index in tqdm(range(len(frames)), desc="decoding frames", unit="frame", leave=False, disable=None):
            try:
                pixels = np.asarray(decode_frame(frames.read(index), name=frames.name(index)))
            except PolypSegError:
                continue
            if filled + pixels.size > limit:
                break
            file.write(pixels.tobytes())
            places[index] = (filled, *pixels.shape[:2])
            filled += pixels.size
    np.save(folder / PLACES, places)
