"""Frames that were decoded once and are read as pixels from then on, as many as a bound on the disk allows.

Decoding is most of what a view of a JPEG costs. A JPEG is kept at every reduction at which it would be decoded, a third
more than its pixels, so that views are those of the file. The pixels lie in one file that is mapped into memory: all
workers share what the system keeps of it.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from polypseg.data.corpus import FrameStore
from polypseg.errors import PolypSegError
from polypseg.files import atomic_path, cache_folder
from polypseg.pretraining.views import REDUCTIONS, Levels, decode_levels

PLACES, PIXELS = "places.npy", "pixels.bin"
_GIGABYTE = 10**9


class DecodedFrames:
    """The first frames of a corpus as pixels; see ``keep_decoded``."""

    def __init__(self, folder: Path):
        # (N, reductions, 3): start, height, width; start -1 for what is not here
        self._places = np.load(folder / PLACES)
        pixels = folder / PIXELS
        self._pixels = np.memmap(pixels, dtype=np.uint8, mode="r") if pixels.stat().st_size else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        """Number of frames that are here."""
        return int((self._places[:, 0, 0] >= 0).sum())

    def frame(self, index: int) -> Levels | None:
        """RGB pixels of a frame at its reductions, read only; None for one that is not here."""
        levels = {}
        for reduction, (start, height, width) in zip(REDUCTIONS, self._places[index].tolist(), strict=True):
            if start >= 0:
                pixels = np.asarray(self._pixels[start : start + height * width * 3])
                levels[reduction] = pixels.reshape(height, width, 3)
        return levels or None


def keep_decoded(frames: FrameStore, *, gigabytes: float) -> DecodedFrames:
    """Decode the corpus's frames in their order until ``gigabytes`` (10^9 bytes) are full; a later call only maps them.

    Frames that cannot be read are left to the feed, which counts them. Raises PolypSegError where the disk is full.
    """
    folder = cache_folder() / "decoded" / f"{frames.content_id}-{gigabytes:g}-reductions"
    if not folder.is_dir():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _decode_into(temporary, frames, limit=gigabytes * _GIGABYTE)
    return DecodedFrames(folder)


def _decode_into(folder: Path, frames: FrameStore, *, limit: float) -> None:
    places, filled = np.full((len(frames), len(REDUCTIONS), 3), -1, dtype=np.int64), 0
    with (folder / PIXELS).open("wb") as file:
        for index in tqdm(range(len(frames)), desc="decoding frames", unit="frame", leave=False, disable=None):
            try:
                levels = decode_levels(frames.read(index), name=frames.name(index))
            except PolypSegError:
                continue
            if filled + sum(pixels.size for pixels in levels.values()) > limit:
                break
            for number, reduction in enumerate(REDUCTIONS):
                if (pixels := levels.get(reduction)) is not None:
                    file.write(pixels.tobytes())
                    places[index, number] = (filled, *pixels.shape[:2])
                    filled += pixels.size
    np.save(folder / PLACES, places)
