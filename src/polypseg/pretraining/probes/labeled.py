"""Frames of known class, in groups that look alike: what encoders are compared on without fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from polypseg.data.corpus import open_frames
from polypseg.data.duplicates import Fingerprint, fingerprint, near_duplicates
from polypseg.data.images import decode_frame
from polypseg.errors import UsageError

FOLDS = 5
"""Parts into which labeled frames are divided for cross-validation."""
ALIKE_HASH, ALIKE_THUMBNAIL = 40, 12.0
"""Frames so alike stay in one fold. Wider than for near-duplicates, which miss most frames of one video: on HyperKvasir
frames the scores of an untrained encoder fall by a tenth."""


@dataclass(frozen=True, kw_only=True)
class LabeledFrames:
    """Frames of known class on which encoders are compared."""

    names: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,) index into ``classes``."""
    classes: tuple[str, ...]
    images: NDArray[np.uint8]
    """(N, S, S, 3) whole frames, resized."""
    groups: NDArray[np.int64]
    """(N,) frames that are alike (see ``ALIKE_HASH``), directly or through others, share a number."""
    content_id: str

    def __len__(self) -> int:
        return len(self.names)


def load_labeled(path: Path, *, image_size: int) -> LabeledFrames:
    """Frames of a folder, archive or shards with one sub-folder a class, resized whole (bicubic) to a square.

    Raises UsageError when there are fewer than two classes or a class has fewer distinct frames than there are folds,
    PolypSegError for a frame that cannot be decoded.
    """
    store = open_frames(path)
    names = tuple(store.name(i) for i in range(len(store)))
    classes, labels = classes_of(names, path)
    images = np.empty((len(names), image_size, image_size, 3), dtype=np.uint8)
    prints: dict[str, Fingerprint] = {}
    for i, name in enumerate(tqdm(names, desc=f"reading {path.name}", unit="frame", leave=False, disable=None)):
        frame = decode_frame(store.read(i), name=name)
        prints[name] = fingerprint(frame)
        images[i] = np.asarray(frame.resize((image_size, image_size), Image.Resampling.BICUBIC))
    frames = LabeledFrames(
        names=names,
        labels=labels,
        classes=classes,
        images=images,
        groups=_alike_groups(prints),
        content_id=store.content_id,
    )
    check_folds(frames, folds=FOLDS)
    return frames


def classes_of(names: Sequence[str], path: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Sorted class names and (N,) labels from the frames' parent folders."""
    parents = [PurePosixPath(name).parent.name for name in names]
    if "" in parents:
        raise UsageError(f"{names[parents.index('')]} in {path} lies in no class folder: one sub-folder a class")
    classes, labels = np.unique(parents, return_inverse=True)
    if len(classes) < 2:
        found = f"only the class {str(classes[0])!r}" if len(classes) else "no frames"
        raise UsageError(f"{path} has {found}: at least two sub-folders, one a class, are needed")
    return tuple(str(name) for name in classes), labels.astype(np.int64)


def _alike_groups(prints: dict[str, Fingerprint]) -> NDArray[np.int64]:
    """(N,) connected components of the pairs that are alike."""
    position = {name: i for i, name in enumerate(prints)}
    found = near_duplicates(prints, hash_distance=ALIKE_HASH, thumbnail_difference=ALIKE_THUMBNAIL)
    pairs = np.array([(position[a], position[b]) for a, b in found], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(prints), len(prints)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def check_folds(frames: LabeledFrames, *, folds: int) -> None:
    """Raise UsageError unless every class can be in every fold."""
    for index, name in enumerate(frames.classes):
        distinct = len(np.unique(frames.groups[frames.labels == index]))
        if distinct < folds:
            raise UsageError(f"class {name!r} has {distinct} distinct frames, fewer than the {folds} folds: add frames")


def majority_share(frames: LabeledFrames) -> float:
    """The accuracy of always naming the most frequent class."""
    return float(np.bincount(frames.labels).max() / len(frames))
