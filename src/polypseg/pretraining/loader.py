"""The input pipeline of pretraining: frames become views on the fly; an unreadable one never stops a long run.

Views are functions of (seed, epoch, frame), so they do not depend on the number of processes or workers, and a resumed
run sees what an uninterrupted one would have seen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from polypseg.data.corpus import FrameStore
from polypseg.errors import PolypSegError
from polypseg.pretraining.decoded import DecodedFrames
from polypseg.pretraining.views import ViewSettings, is_jpeg, make_views
from polypseg.training.loader import (
    Example,
    GlobalBatches,
    keep_opencv_to_one_thread,
    leave_signals_to_the_main_process,
)

MOST_REPLACEMENTS = 100
"""Unreadable frames in a row after which the corpus is taken to be gone."""
SETTLED = 100
"""Frames after which a share of unreadable ones is taken at its word."""


class FrameFeed(Dataset[Example]):
    """Views of frames, indexed by (epoch, frame).

    An example has ``views`` (V, S, S, 3) uint8, ``unreadable`` () int64, the frame that could not be read and was
    replaced by the next readable one, else -1, with ``tokens`` also ``noise`` (tokens,) float32 in [0, 1), and with
    ``labels`` also ``label`` () int64, of the frame that was read.
    """

    def __init__(
        self,
        frames: FrameStore,
        settings: Sequence[ViewSettings],
        *,
        size: int,
        seed: int,
        tokens: int = 0,
        labels: NDArray[np.int64] | None = None,
        decoded: DecodedFrames | None = None,
    ):
        self.frames, self.settings = frames, tuple(settings)
        self.size, self.seed, self.tokens, self.labels = size, seed, tokens, labels
        self.decoded = decoded

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """The example of a frame in an epoch. Raises PolypSegError after 100 unreadable frames in a row."""
        epoch, index = key
        keep_opencv_to_one_thread()
        for attempt in range(MOST_REPLACEMENTS):
            rng = np.random.default_rng([self.seed, epoch, index])
            noise = rng.random(self.tokens, dtype=np.float32)
            used = (index + attempt) % len(self.frames)
            try:
                views = self._views(used, rng)
            except PolypSegError as error:
                last = error
                continue
            example = {
                "views": torch.from_numpy(views),
                "unreadable": torch.tensor(index if attempt else -1, dtype=torch.int64),
            }
            if self.tokens:
                example["noise"] = torch.from_numpy(noise)
            if self.labels is not None:
                example["label"] = torch.tensor(self.labels[used])
            return example
        raise PolypSegError(
            f"{MOST_REPLACEMENTS} frames in a row of {self.frames.path} cannot be read, "
            f"last {self.frames.name(used)}: {last}"
        ) from last

    def _views(self, index: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        levels = None if self.decoded is None else self.decoded.frame(index)
        if levels is not None:
            return make_views(levels, name=f"frame {index}", settings=self.settings, size=self.size, rng=rng)
        data = self.frames.read(index)
        # Only other formats are decoded by name, and shards have to look a name up.
        name = f"frame {index}" if is_jpeg(data) else self.frames.name(index)
        return make_views(data, name=name, settings=self.settings, size=self.size, rng=rng)


def frame_loader(feed: FrameFeed, batches: GlobalBatches, *, workers: int, pin_memory: bool) -> "DataLoader[Example]":
    """A loader whose order ``batches`` decides. Its workers live on between epochs, of which there are hundreds.

    It has a random generator of its own: otherwise opening it would move the global one, and a resumed run, which
    opens it once more, would draw other numbers.
    """
    keep_opencv_to_one_thread()
    return DataLoader(
        feed,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),
    )


class UnreadableFrames:
    """Which frames of a run could not be read: a few are left out, many stop it."""

    def __init__(self) -> None:
        self.indices: set[int] = set()

    def update(self, unreadable: Tensor) -> None:
        """Collect the ``unreadable`` (B,) of a batch; -1 stands for a frame that was read."""
        self.indices.update(index for index in unreadable.tolist() if index >= 0)

    def names(self, frames: FrameStore) -> list[str]:
        """Their names, in the order of the corpus."""
        return [frames.name(index) for index in sorted(self.indices)]

    def check(self, seen: int, frames: FrameStore, max_share: float) -> None:
        """Raise PolypSegError when more than ``max_share`` of the ``seen`` distinct frames are unreadable.

        Before 100 frames, or all of a smaller corpus, were seen, chance has its say: only more than half stop the run.
        """
        settled = seen >= min(SETTLED, len(frames))
        allowed = max_share if settled else max(max_share, 0.5)
        if len(self.indices) <= allowed * seen:
            return
        first = ", ".join(frames.name(index) for index in sorted(self.indices)[:3])
        raise PolypSegError(
            f"{len(self.indices)} of {seen} frames of {frames.path} cannot be read, first {first}: "
            "replace or remove the damaged files"
        )
