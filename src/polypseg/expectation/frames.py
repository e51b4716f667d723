"""The frames that an estimate or a calibration is made from: distinct, in an order that names do not change."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from polypseg.data.catalog import CLIP_COLUMN, DATASETS
from polypseg.data.images import decode_frame
from polypseg.data.polyps import open_dataset
from polypseg.errors import UsageError
from polypseg.files import printable
from polypseg.inference.inputs import Source, read_inputs
from polypseg.inference.video import Video

_T = TypeVar("_T")
LOOKED_AT = 5000
"""Files whose content is compared; of more, so many are taken evenly."""
LIMIT = 200
"""Frames that an estimate looks at."""


@dataclass(frozen=True, kw_only=True)
class GivenFrame:
    """A distinct frame."""

    name: str
    group: str
    """Clip or video; the frame's own content where none is known."""
    image: Image.Image
    digest: str
    """SHA-256 of the decoded pixels."""


@dataclass(frozen=True, kw_only=True)
class GivenFrames:
    """Distinct frames, ordered by their content."""

    frames: tuple[GivenFrame, ...]
    given: int
    """Files, or frames of videos, that were there to be chosen from."""
    repeats: int
    """Frames left out because another has equal pixels."""


def read_frames(inputs: Sequence[str], *, output: Path, limit: int = LIMIT) -> GivenFrames:
    """At most ``limit`` distinct frames of files, folders, globs, videos, or of a dataset ``NAME[.SPLIT.PART]``.

    The choice depends on the frames' contents alone: neither names, order nor repeats change it. Raises UsageError for
    inputs that are not there, PolypSegError for a frame that cannot be decoded.
    """
    if len(inputs) == 1 and inputs[0].split(".")[0] in DATASETS and not Path(inputs[0]).exists():
        return _choose(list(_dataset_files(inputs[0])), limit=limit)
    sources = read_inputs(inputs, output=output).sources
    videos = [source for source in sources if source.is_video]
    found = _choose(list(_image_files([source for source in sources if not source.is_video])), limit=limit)
    if not videos:
        return found
    frames = [*found.frames, *(frame for video in videos for frame in _video_frames(video, most=limit // len(videos)))]
    distinct = {frame.digest: frame for frame in sorted(frames, key=lambda frame: frame.name)}
    given = found.given + len(frames) - len(found.frames)
    kept = tuple(distinct[digest] for digest in sorted(distinct))[:limit]
    return GivenFrames(frames=kept, given=given, repeats=found.repeats + len(frames) - len(distinct))


@dataclass(frozen=True, kw_only=True)
class _File:
    name: str
    group: str
    data: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def _image_files(sources: Sequence[Source]) -> Iterator[_File]:
    for source in _evenly(sources):
        try:
            data = source.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{printable(str(source.path))} cannot be read: {error.strerror}") from error
        yield _File(name=printable(str(source.name)), group="", data=data)


def _dataset_files(name: str) -> Iterator[_File]:
    dataset, *rest = name.split(".")
    if len(rest) not in (0, 2):
        raise UsageError(f"{name!r}: give DATASET or DATASET.SPLIT.PART, such as kvasir_seg.reference.test")
    opened = open_dataset(dataset, allow_partial=True)
    ids, _ = opened.part(*(rest or ("full", "full")))
    for record in _evenly([opened.by_id[record_id] for record_id in ids]):
        yield _File(name=record.id, group=record.groups.get(CLIP_COLUMN, ""), data=opened.source.read(record.image))


def _evenly(items: Sequence[_T]) -> list[_T]:
    places = dict.fromkeys(np.linspace(0, len(items) - 1, min(LOOKED_AT, len(items))).round().astype(int).tolist())
    return [items[place] for place in places]


def _choose(files: Sequence[_File], *, limit: int) -> GivenFrames:
    """The first of the distinct files in the order of their content's digest, decoded."""
    by_content = {file.digest: file for file in sorted(files, key=lambda file: file.name, reverse=True)}
    kept: dict[str, GivenFrame] = {}
    repeats = len(files) - len(by_content)
    for digest in sorted(by_content):
        if len(kept) == limit:
            break
        file = by_content[digest]
        frame = _frame(file.name, decode_frame(file.data, name=file.name), group=file.group)
        repeats += frame.digest in kept
        kept.setdefault(frame.digest, frame)
    return GivenFrames(frames=tuple(kept[digest] for digest in sorted(kept)), given=len(files), repeats=repeats)


def _video_frames(source: Source, *, most: int) -> Iterator[GivenFrame]:
    name = printable(str(source.name))
    with Video.open(source.path) as video:
        for index, _ in video.frames(every=max(1, video.announced // max(1, most))):
            image = video.image()
            if image is not None:
                yield _frame(f"{name}_frame{index:06d}", image, group=name)
        if not video.read:
            raise UsageError(f"{printable(str(source.path))} is {video.problem}")


def picture_digest(image: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels: equal for repeats whatever their files are."""
    return hashlib.sha256(f"{image.size}".encode() + np.asarray(image).tobytes()).hexdigest()


def _frame(name: str, image: Image.Image, *, group: str) -> GivenFrame:
    digest = picture_digest(image)
    return GivenFrame(name=name, group=group or digest, image=image, digest=digest)
