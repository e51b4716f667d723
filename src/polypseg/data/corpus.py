"""The frames of a pretraining corpus: an extracted tree, the published zip or tar shards, each read by number.

A corpus has 100,000 frames and every loader process holds the store, so a store keeps names and positions in a few
buffers rather than in one Python object per frame, and reads by position, which forked processes can share safely.
"""

import hashlib
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from polypseg.data.sources import (
    IMAGE_SUFFIXES,
    FolderSource,
    PackedNames,
    PositionedFiles,
    ZipSource,
    archives_among,
    identity,
    inner_archives,
    is_image,
    open_source,
    tar_name,
    tell_of_archives,
)
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import atomic_path, cache_folder, read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "shards.json"
"""Written last by ``write_shards``: a folder with it is a complete set."""
INDEX = "index.npy"
"""(N, 3) int64, a row a frame: number of its shard, offset of its bytes in it, size."""
PARTIAL = "shards.partial"
"""Records of finished shards; a folder with it is an incomplete set."""
_BLOCK = 512  # of a tar file
Record = TypeVar("Record")


class FrameStore(Protocol):
    """Frames numbered from 0, in an order that depends on the content only."""

    path: Path

    def __len__(self) -> int:
        """Number of frames."""

    def name(self, index: int) -> str:
        """POSIX path inside the source; the parent folder is the class."""

    def read(self, index: int) -> bytes:
        """The bytes of the image file. Raises PolypSegError naming the file when they cannot be read."""

    @property
    def content_id(self) -> str:
        """16 hex digits that change with the frames, taken from names, sizes and checksums without reading images."""


def open_frames(path: Path, *, corpus_folder: str = ".*") -> FrameStore:
    """An extracted folder, a zip archive, or tar shards (a folder of them, or one file) as a FrameStore.

    Only images whose parent folder matches ``corpus_folder`` as a whole (a regular expression, any case) are frames.
    Raises UsageError for a path that is missing, has no such images or cannot be read frame by frame; PolypSegError
    for a damaged archive or an incomplete set of shards.
    """
    try:
        re.compile(corpus_folder)
    except re.error as error:
        raise UsageError(f"{corpus_folder!r} is no regular expression for a folder: {error}") from error
    if path.is_dir():
        return _open_folder(path, corpus_folder)
    source = open_source(path)
    if isinstance(source, ZipSource):
        frames = _not_empty(SourceFrames(source, corpus_folder=corpus_folder), corpus_folder)
        source.refuse_rare(frames.name(index) for index in range(len(frames)))
        return frames
    if not _is_plain_tar(path):
        raise UsageError(f"{path} is a compressed tar, which cannot be read frame by frame: extract it")
    return _not_empty(ShardFrames(path, corpus_folder=corpus_folder), corpus_folder)


def _open_folder(path: Path, corpus_folder: str) -> FrameStore:
    if (path / PARTIAL).exists():
        raise PolypSegError(f"{path} is an incomplete set of shards: run polypseg data shard with it again")
    if (path / MANIFEST).exists():
        return _not_empty(ShardFrames(path, corpus_folder=corpus_folder), corpus_folder)
    folder = SourceFrames(FolderSource(path), corpus_folder=corpus_folder)
    if not len(folder) and any(path.glob("*.tar")):
        names = FolderSource(path).names()
        tell_of_archives(path, [n for n in archives_among(names) if "/" in n or not n.endswith(".tar")])
        return _not_empty(ShardFrames(path, corpus_folder=corpus_folder), corpus_folder)
    return _not_empty(folder, corpus_folder)


def _not_empty(frames: FrameStore, corpus_folder: str) -> FrameStore:
    if not len(frames):
        where = "" if corpus_folder == ".*" else f" in folders named {corpus_folder!r} (a regular expression)"
        raise UsageError(
            f"no images in {frames.path}{where}: expected files ending in {', '.join(IMAGE_SUFFIXES[:6])} and the like"
            + (inner_archives(open_source(frames.path).names()) if corpus_folder == ".*" else "")
        )
    return frames


def is_frame(name: str, *, corpus_folder: str = ".*") -> bool:
    """Whether a name inside a source is an image, not hidden, and in a folder of the corpus."""
    folder = PurePosixPath(name).parent.name
    return is_image(name) and (corpus_folder == ".*" or bool(re.fullmatch(corpus_folder, folder, re.IGNORECASE)))


class FrameSubset:
    """Some frames of a store: a seeded sample that larger samples of the same seed contain.

    Raises UsageError for a share outside (0, 1].
    """

    def __init__(self, frames: FrameStore, *, share: float, seed: int = 0):
        if not 0 < share <= 1:
            raise UsageError(f"a share of {frames.path} must be above 0 and at most 1, not {share}")
        order = np.random.default_rng(seed).permutation(len(frames))
        self.path, self._frames = frames.path, frames
        self._chosen = np.sort(order[: max(1, round(share * len(frames)))])

    def __len__(self) -> int:
        return len(self._chosen)

    def name(self, index: int) -> str:
        """As of the whole store."""
        return self._frames.name(int(self._chosen[index]))

    def read(self, index: int) -> bytes:
        """As of the whole store."""
        return self._frames.read(int(self._chosen[index]))

    @cached_property
    def content_id(self) -> str:
        """Of the store's content and the choice; the store's own where all frames are chosen."""
        if len(self) == len(self._frames):
            return self._frames.content_id
        return identity([self._frames.content_id, *map(str, self._chosen)])


class SourceFrames:
    """The images of a folder or zip archive, sorted by name: those of its names that are frames."""

    def __init__(self, source: FolderSource | ZipSource, *, corpus_folder: str = ".*"):
        self.path, self._source = source.path, source
        names = source.names()
        self._names = PackedNames(name for name in names if is_frame(name, corpus_folder=corpus_folder))
        if len(self._names):
            tell_of_archives(self.path, archives_among(names))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return self._source.read(self.name(index))

    @cached_property
    def content_id(self) -> str:
        """From names and sizes, and of a zip archive its checksums."""
        return identity(f"{name}\0{self._source.stamp(name)}" for name in self._names)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What the bytes of a set of shards follow from."""

    format: int
    source: str
    """``content_id`` of the frames."""
    images_per_shard: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard."""

    name: str
    sha256: str
    bytes: int
    frames: int
    unreadable: tuple[str, ...]
    """Names of frames that were left out."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete set of shards."""

    plan: ShardPlan
    frames: int
    index_sha256: str
    shards: tuple[Shard, ...]


def read_record(kind: type[Record], path: Path) -> Record:
    """A dataclass from its JSON file. Raises PolypSegError when the file is missing or damaged."""
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        raise PolypSegError(f"{path} is damaged: delete its folder and run polypseg data shard again") from error


class ShardFrames:
    """The images of tar shards (WebDataset's layout), in the order of the shards and of each one's members.

    ``write_shards`` leaves an index; shards of others are scanned once and their index is cached.
    """

    def __init__(self, path: Path, *, corpus_folder: str = ".*"):
        self.path, self._files = path, PositionedFiles()
        manifest = read_record(Manifest, path / MANIFEST) if (path / MANIFEST).exists() else None
        self.shards = [path / PurePosixPath(s.name).name for s in manifest.shards] if manifest else _found_shards(path)
        self._index_file = path / INDEX
        if manifest is None or corpus_folder != ".*":
            self._index_file = _cached_index(self.shards, corpus_folder)
        self._checksums = [shard.sha256 for shard in manifest.shards] if manifest else []
        self._index = self._map_index()
        self._check_sizes()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._index = self._map_index()

    def _map_index(self) -> NDArray[np.int64]:
        try:
            index: NDArray[np.int64] = np.load(self._index_file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise PolypSegError(f"cannot read {self._index_file}: {error}. Make it again.") from error
        if index.dtype != np.int64 or index.ndim != 2 or index.shape[1] != 3:
            raise PolypSegError(f"{self._index_file} is no index of shards: delete it and run the command again")
        return index

    def _check_sizes(self) -> None:
        """Every shard is there and as long as its index says; costs no reading."""
        ends = np.zeros(len(self.shards), dtype=np.int64)
        np.maximum.at(ends, self._index[:, 0], self._index[:, 1] + self._index[:, 2])
        for shard, end in zip(self.shards, ends.tolist(), strict=True):
            if not shard.is_file() or shard.stat().st_size < end:
                raise PolypSegError(f"{shard} is missing or cut off: copy or make it again")

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> bytes:
        number, offset, size = self._index[index].tolist()
        try:
            return self._files.read(self.shards[number], offset=offset, size=size)
        except PolypSegError as error:
            raise PolypSegError(f"cannot read frame {index} of {self.path}: {error}") from error

    def name(self, index: int) -> str:
        """From the member's header, which stands between the end of the frame before and this one."""
        number, offset, _ = self._index[index].tolist()
        begin = 0
        if index and self._index[index - 1, 0] == number:
            _, before, size = self._index[index - 1].tolist()
            begin = before + -(-size // _BLOCK) * _BLOCK
        for name, start, _ in scan_tar(self.shards[number], begin=begin):
            if start == offset:
                return name
        raise PolypSegError(f"{self.shards[number]} has changed since it was indexed: make it again")

    @cached_property
    def content_id(self) -> str:
        """From the index and, for shards of ours, their checksums."""
        index = hashlib.sha256(np.ascontiguousarray(self._index).tobytes()).hexdigest()
        return identity([index, *(shard.name for shard in self.shards), *self._checksums])


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.ReadError:
        return False


def _found_shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.tar")) if path.is_dir() else [path]


def _cached_index(shards: Sequence[Path], corpus_folder: str) -> Path:
    """The index file of shards that have none: scanned once, found again by the files' names, sizes and times.

    Images that are links are told of each time.
    """
    try:
        states = [(shard.name, shard.stat()) for shard in shards]
    except OSError as error:
        raise PolypSegError(f"cannot read {error.filename}: {error.strerror}") from error
    lines = (f"{name}\0{state.st_size}\0{state.st_mtime_ns}" for name, state in states)
    file = cache_folder() / "shards" / f"{identity([corpus_folder, *lines])}.npy"
    list_of_links = file.with_suffix(".links")
    if not (file.exists() and list_of_links.exists()):
        found: list[str] = []
        index = index_shards(shards, corpus_folder=corpus_folder, on_left_out=found.append)
        with atomic_path(file) as temporary:
            np.save(temporary, index)
        write_json(list_of_links, found)
    links = read_json(list_of_links)
    if links:
        log.warning(
            "%d image(s) of %s are links and are left out, first %s: extract the archive to have them read",
            *(len(links), shards[0].parent, links[0]),
        )
    return file


def index_shards(
    shards: Sequence[Path], *, corpus_folder: str = ".*", on_left_out: Callable[[str], object] | None = None
) -> NDArray[np.int64]:
    """(N, 3) index of the images in tar files, from their headers; ``on_left_out`` is told of images that are links.

    Raises PolypSegError for a damaged file.
    """

    def tell(name: str) -> None:
        if on_left_out and is_frame(name, corpus_folder=corpus_folder):
            on_left_out(name)

    rows = [
        (number, offset, size)
        for number, shard in enumerate(tqdm(shards, desc="indexing shards", unit="shard", leave=False, disable=None))
        for name, offset, size in scan_tar(shard, on_left_out=tell)
        if is_frame(name, corpus_folder=corpus_folder)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def scan_tar(
    path: Path, *, begin: int = 0, on_left_out: Callable[[str], object] | None = None
) -> Iterator[tuple[str, int, int]]:
    """Name, offset of the bytes and size of each file in an uncompressed tar, from the header at ``begin`` on.

    ``on_left_out`` is told of links and of what else has no bytes of its own there. Raises PolypSegError when the tar
    is damaged or cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(begin)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while member := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # else it would keep every header
                    name = tar_name(member.name)
                    if member.isreg() and not member.issparse():
                        yield name, member.offset_data, member.size
                    elif not member.isdir() and on_left_out:
                        on_left_out(name)
                file.seek(archive.offset)
                if any(file.read(_BLOCK)):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise PolypSegError(f"{path} is not a readable tar file: {error}. Copy or make it again.") from error
