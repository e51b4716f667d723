"""The input pipeline of training: frames decoded and resized once, kept as memory-mapped bytes, augmented on the fly.

Order and augmentation are functions of (seed, epoch, position), so they do not depend on the number of processes or
workers, and a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.files import atomic_path, cache_folder
from polypseg.training.augmentation import Normalization, PairedAugmentation

Example = dict[str, torch.Tensor]


class CachedPairs:
    """Frames (N, S, S, 3) and masks (N, S, S) as uint8 on disk, in the order of ``ids``; masks are soft, 0 to 255."""

    def __init__(self, folder: Path, ids: Sequence[str]):
        self.ids = list(ids)
        self.images: NDArray[np.uint8] = np.load(folder / "images.npy", mmap_mode="r")
        self.masks: NDArray[np.uint8] = np.load(folder / "masks.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def pair(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Frame (S, S, 3) and soft mask (S, S)."""
        return self.images[index], self.masks[index]


class JoinedPairs:
    """The pairs of several caches of one image size, one after the other."""

    def __init__(self, caches: Sequence[CachedPairs]):
        self.caches = tuple(caches)
        self.starts = np.cumsum([0, *(len(cache) for cache in caches)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pair(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Frame (S, S, 3) and soft mask (S, S)."""
        cache = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.caches[cache].pair(index - int(self.starts[cache]))


def cache_pairs(dataset: PolypDataset, ids: Sequence[str], *, image_size: int) -> CachedPairs:
    """Decode and resize (bicubic, antialiased: Pillow's, as in the reference) once; later calls only map the files.

    The cache follows the dataset's content. Raises PolypSegError naming a broken file or a full disk.
    """
    if not ids:
        raise UsageError(f"{dataset.spec.title}: this split is empty")
    key = hashlib.sha256("\n".join([dataset.content_id, str(image_size), *ids]).encode()).hexdigest()[:16]
    folder = cache_folder() / "feed" / f"{dataset.spec.name}-{image_size}-{key}"
    if not folder.is_dir():
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            _write_pairs(dataset, ids, image_size=image_size, folder=temporary)
    return CachedPairs(folder, ids)


def _write_pairs(dataset: PolypDataset, ids: Sequence[str], *, image_size: int, folder: Path) -> None:
    shape = (len(ids), image_size, image_size)
    frames = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(*shape, 3))
    masks = np.lib.format.open_memmap(folder / "masks.npy", mode="w+", dtype=np.uint8, shape=shape)
    for name in ("images.npy", "masks.npy"):
        _reserve(folder / name)
    for index, record_id in enumerate(
        tqdm(ids, desc=f"reading {dataset.spec.title}", unit="image", leave=False, disable=None)
    ):
        frame, mask = dataset.gray_pair(dataset.by_id[record_id])
        frames[index], masks[index] = resize_pair(frame, mask, size=image_size)
    frames.flush()
    masks.flush()


def resize_pair(
    frame: Image.Image, mask: NDArray[np.uint8], *, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An RGB frame and its gray mask (H, W) -> (S, S, 3) and (S, S): bicubic, antialiased, Pillow's."""
    side = (size, size)
    pictures = (
        frame.resize(side, Image.Resampling.BICUBIC),
        Image.fromarray(mask).resize(side, Image.Resampling.BICUBIC),
    )
    return np.asarray(pictures[0]), np.asarray(pictures[1])


def _reserve(path: Path) -> None:
    """Claim the disk blocks of a sparse file now: on a full disk, writing through a map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def to_example(pixels: NDArray[np.float32], mask: NDArray[np.float32]) -> Example:
    """(S, S, 3) and (S, S) -> ``pixel_values`` (3, S, S) and ``labels`` (S, S)."""
    return {
        "pixel_values": torch.from_numpy(pixels).permute(2, 0, 1),
        "labels": torch.from_numpy(mask),
    }


Key = tuple[int, ...]
"""(epoch, position), and the side in pixels where batches have sizes of their own."""


class TrainingFeed(Dataset[Example]):
    """Augmented examples; indexed by ``Key``, of the cache's size where it names no side."""

    def __init__(self, pairs: CachedPairs | JoinedPairs, augmentation: PairedAugmentation, *, seed: int):
        self.pairs, self.augmentation, self.seed = pairs, augmentation, seed

    def __getitem__(self, key: Key) -> Example:
        epoch, index, *sides = key
        keep_opencv_to_one_thread()
        rng = np.random.default_rng([self.seed, epoch, index])
        return to_example(
            *self.augmentation(*self.pairs.pair(index), rng, partner=self._draw_frame, side=(*sides, None)[0])
        )

    def _draw_frame(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        return self.pairs.pair(int(rng.integers(len(self.pairs))))[0]


class ValidationFeed(Dataset[Example]):
    """Examples as they are: normalized frames, masks in [0, 1]."""

    def __init__(self, pairs: CachedPairs, *, mean: list[float], std: list[float]):
        self.pairs, self.normalize = pairs, Normalization(mean=mean, std=std)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        return to_example(self.normalize(self.pairs.images[index]), self.pairs.masks[index].astype(np.float32) / 255)


class GlobalBatches(Sampler[list[Key]]):
    """This process's share of each global batch of one epoch, as keys.

    The global batches are the same for any number of processes; the last short one is dropped. ``sides``: one is drawn
    per batch.
    """

    def __init__(
        self,
        length: int,
        *,
        total_batch_size: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        sides: Sequence[int] | None = None,
    ):
        if total_batch_size % processes:
            raise UsageError(f"a total batch of {total_batch_size} cannot be shared by {processes} processes")
        if total_batch_size > length:
            raise UsageError(
                f"the total batch of {total_batch_size} is larger than the training split of {length} images: "
                "use --set training.total_batch_size=..."
            )
        self.length, self.total_batch_size, self.seed = length, total_batch_size, seed
        self.process, self.processes, self.sides = process, processes, sides
        self.epoch, self.first_step = 0, 0

    def start(self, *, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the step at which it begins after a resume."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.length // self.total_batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        share = self.total_batch_size // self.processes
        for step in range(self.first_step, len(self)):
            begin = step * self.total_batch_size + self.process * share
            side = self._side(step)
            yield [(self.epoch, int(index), *side) for index in order[begin : begin + share]]

    def _side(self, step: int) -> Key:
        """The side of a batch, or nothing where all are of one size."""
        if self.sides is None:
            return ()
        return (int(np.random.default_rng([self.seed, self.epoch, step, 1]).choice(self.sides)),)


def leave_signals_to_the_main_process(worker: int) -> None:
    """Start a loader's worker deaf to SIGINT and SIGTERM, which reach the whole process group.

    A worker that died of one would fail the main process before it has saved its checkpoint; it ends with its parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def keep_opencv_to_one_thread() -> None:
    """Take OpenCV's threads away: they would compete with torch's, and a forked worker would wait for them for ever."""
    cv2.setNumThreads(1)


def training_loader(
    feed: TrainingFeed, batches: GlobalBatches, *, workers: int, pin_memory: bool
) -> "DataLoader[Example]":
    """A loader whose order ``batches`` decides.

    It has a random generator of its own: otherwise opening it would move the global one, and a resumed run, which
    opens it once more, would draw other dropout masks.
    """
    keep_opencv_to_one_thread()
    return DataLoader(
        feed,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )
