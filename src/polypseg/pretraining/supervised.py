"""Supervised pretraining: classification of labeled images, the baseline of the self-supervised methods."""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from polypseg.data.corpus import FrameStore
from polypseg.errors import UsageError
from polypseg.pretraining.encoders import PretrainingOutput, feature_width
from polypseg.pretraining.probes.labeled import classes_of


class Supervised(nn.Module):
    """Encoder and one linear layer onto the classes."""

    views = 1

    def __init__(self, encoder: nn.Module, *, classes: int, label_smoothing: float = 0.0):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(feature_width(encoder), classes)
        self.label_smoothing = label_smoothing

    def start_step(self, share_done: float) -> None:
        """Nothing moves between steps."""

    def forward(self, views: Tensor, labels: Tensor) -> PretrainingOutput:
        """views (N, 1, 3, H, W), labels (N,) int64 -> cross-entropy, and the encoder's features (N, D)."""
        features = self.encoder(views[:, 0])
        loss = F.cross_entropy(self.head(features), labels, label_smoothing=self.label_smoothing)
        return PretrainingOutput(loss=loss, embedding=features.detach())

    def represent(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> features (B, D) for k-NN and probes."""
        return self.encoder(images)  # type: ignore[no-any-return]


def read_labels(frames: FrameStore, *, classes: int) -> NDArray[np.int64]:
    """(N,) class of each frame, 0 to ``classes`` - 1: by its folder, or by ImageNet's file names (``n01443537_...``).

    Raises UsageError when the frames are not of just so many classes, or a frame shows none.
    """
    names = [frames.name(index) for index in range(len(frames))]
    found, labels = classes_of(_with_synset_folders(names), frames.path)
    if len(found) != classes:
        raise UsageError(
            f"{frames.path} has {len(found)} classes, not {classes}: --set supervised.classes={len(found)}"
        )
    return labels


def _with_synset_folders(names: Sequence[str]) -> list[str]:
    """Frames that lie in no folder, in the folder of the WordNet id that their name starts with, as ImageNet's do."""
    return [
        name if len(PurePosixPath(name).parts) > 1 or "_" not in name else f"{name.split('_', maxsplit=1)[0]}/{name}"
        for name in names
    ]
