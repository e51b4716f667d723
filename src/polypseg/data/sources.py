"""Where image files come from: an extracted folder or the published archive, read without extracting it.

Names are text everywhere: bytes that are no UTF-8 are written as ``\\xe9``, and backslashes of archives packed on
Windows as slashes. Sizes that an archive declares are checked before anything of it is unpacked.
"""

import contextlib
import hashlib
import logging
import os
import posixpath
import re
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from polypseg.errors import PolypSegError, UsageError

log = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp",
    ".jpe", ".jfif", ".mpo", ".apng", ".dib", ".webp", ".gif", ".avif", ".avifs",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".tga", ".icb", ".vda", ".vst", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm",
    ".pcx", ".dcx", ".sgi", ".rgb", ".rgba", ".bw", ".ras", ".psd", ".qoi", ".dds", ".im", ".msp", ".xbm", ".xpm",
    ".ico", ".cur", ".icns", ".blp", ".fli", ".flc", ".ftc", ".ftu", ".gbr", ".iim", ".pcd", ".pxr",
)
# fmt: on
"""Endings of the files that are read: what Pillow reads and shows as one picture of known colors."""
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
MAX_FILE_BYTES = 1 << 29
"""Largest file read: the pixels of the largest image, in 16 bits and three channels, need less."""
_LONGEST_CHAIN = 40  # links that lead to links, as in Linux
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, length of the name, length of the extra field
_BY_POSITION, _ENCRYPTED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), -1  # methods of compression
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100
"""An archive that unpacks to more bytes than this, and than so many times its own size, holds no photographs."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Source(Protocol):
    """A set of named files. Names are POSIX paths relative to the folder or archive."""

    path: Path

    def names(self) -> list[str]:
        """All file names, sorted as strings."""

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises PolypSegError when it cannot be read."""

    def content_id(self) -> str:
        """A hash that changes when, and only when, an image file's name or content changes (16 hex digits)."""


def _is_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not any(part.startswith((".", "__MACOSX")) for part in parts if part != "..")


def is_image(name: str) -> bool:
    """Whether a name is that of an image and not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and _is_data(name)


def identity(lines: Iterable[str]) -> str:
    """16 hex digits of a SHA-256 over lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def printable_name(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 become ``\\xe9``, which every file and screen takes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_below(folder: Path, *, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """What is no folder in a folder and below it, linked folders included, each real folder once; in no order.

    Links are followed only after all that lies in the folder itself, so that a loop of links ends and files keep their
    own names. Links to nothing, pipes and the like are among the files: whoever reads them says so. Raises
    PolypSegError for a folder that cannot be read, unless ``on_error`` takes the error.
    """

    def fail(error: OSError) -> None:
        raise PolypSegError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for place, folders, files in os.walk(start, onerror=on_error or fail):
                state = os.stat(place)
                if (state.st_dev, state.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((state.st_dev, state.st_ino))
                links += (Path(place, name) for name in folders if os.path.islink(os.path.join(place, name)))
                yield from (Path(place, name) for name in files)
        waiting = sorted(links)


def kind_of_file(path: Path) -> str:
    """What something that is no file is, in words."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which does not exist"
    mode = path.stat().st_mode
    return next((words for test, words in _KINDS if test(mode)), "something else")


def archives_among(names: Iterable[str]) -> list[str]:
    """The archives among names."""
    return [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES) and _is_data(name)]


def tell_of_archives(path: Path, archives: Sequence[str]) -> None:
    """Warn of archives that lie beside images: what is in them is not read."""
    if archives:
        more = f" and {len(archives) - 1} more" if len(archives) > 1 else ""
        log.warning(
            "%s holds the archive %s%s, which is not read: extract it if it belongs to the set", path, archives[0], more
        )


def inner_archives(names: Iterable[str]) -> str:
    """A sentence on archives among the names, to be added where no image was found; empty if there is none."""
    inner = archives_among(names)
    return f". It holds the archive {inner[0]}: extract that and give what comes out" if inner else ""


def _refuse_bomb(path: Path, unpacked: int) -> None:
    packed = path.stat().st_size
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        raise PolypSegError(
            f"{path} has {packed:,} bytes and unpacks to {unpacked:,} or more, which no photographs do: it is damaged "
            "or a trap. If you trust it, extract it and give the folder"
        )


def _refuse_large(size: int, *, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise PolypSegError(f"{name} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} of any image: remove it")


class PackedNames:
    """Many names in two buffers."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = b"".join(encoded)
        self._ends = array("q", accumulate(map(len, encoded), initial=0))  # a numpy array gives its numbers slowly

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._text[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class PositionedFiles:
    """Reading of files at a position. A process holds at most 64 of them open, and none travels by pickle.

    Reads do not move a file's own position, so processes that inherit an open file do not disturb each other.
    """

    limit = 64

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        for number in self._open.values():
            with contextlib.suppress(OSError):
                os.close(number)

    def read(self, path: Path, *, offset: int, size: int) -> bytes:
        """``size`` bytes of the file. Raises PolypSegError when it cannot be opened or ends too early."""
        try:
            with self._lock:
                number = self._file(path)
                whole = offset + size <= os.fstat(number).st_size  # else a damaged index could ask for all memory
                data = _read_at(number, size, offset) if whole else b""
        except OSError as error:
            raise PolypSegError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != size:
            raise PolypSegError(f"{path} ends too early: it was cut off or has changed; make or download it again")
        return data

    def _file(self, path: Path) -> int:
        number = self._open.pop(path, None)
        if number is None:
            if len(self._open) >= self.limit:
                os.close(self._open.popitem(last=False)[1])
            number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open[path] = number
        return number


def _read_at(number: int, size: int, offset: int) -> bytes:
    """Bytes of an open file at a position; where a system cannot do that in one step, it cannot fork either."""
    if hasattr(os, "pread"):
        return os.pread(number, size, offset)
    os.lseek(number, offset, os.SEEK_SET)
    return os.read(number, size)


class FolderSource:
    """An extracted folder."""

    def __init__(self, path: Path):
        self.path = path
        self._renamed: dict[str, Path] = {}
        self._told: set[Path] = set()

    def _tell_of(self, file: Path) -> None:
        """Warn, once, of a link to nothing that may have stood for a folder of images."""
        if file.is_symlink() and not file.exists() and _is_data(file.name) and file not in self._told:
            self._told.add(file)
            log.warning("%s is a link to %s, which does not exist: it is left out", file, file.readlink())

    def names(self) -> list[str]:
        found: dict[str, Path] = {}
        for file in files_below(self.path):
            if not is_image(file.name) and not file.is_file():
                self._tell_of(file)
                continue
            name = printable_name(file.relative_to(self.path).as_posix())
            if name in found:
                raise PolypSegError(f"{self.path} holds two files of the name {name}: rename one of them")
            found[name] = file
            if name != file.relative_to(self.path).as_posix():
                self._renamed[name] = file
        return sorted(name for name in found if _is_data(name))

    def file(self, name: str) -> Path:
        """Where a file lies."""
        if "\\x" in name and name not in self._renamed:
            self.names()
        return self._renamed.get(name, self.path / name)

    def read(self, name: str) -> bytes:
        file = self.file(name)
        try:
            if os.path.lexists(file) and not file.is_file():
                raise PolypSegError(f"cannot read {self.path / name}: it is {kind_of_file(file)}")
            _refuse_large(file.stat().st_size, name=str(self.path / name))
            return file.read_bytes()
        except OSError as error:
            raise PolypSegError(f"cannot read {self.path / name}: {error.strerror}") from error

    def stamp(self, name: str) -> str:
        """A file's size: what tells of its content without reading it."""
        file = self.file(name)
        try:
            return str((file.stat() if file.exists() else file.lstat()).st_size)  # of a link to nothing its own
        except OSError as error:
            raise PolypSegError(f"cannot read {error.filename}: {error.strerror}") from error

    def content_id(self) -> str:
        images = (name for name in self.names() if is_image(name))
        return identity(f"{name}\0{hashlib.sha256(self.read(name)).hexdigest()}" for name in images)


class ZipSource:
    """A zip archive; its central directory carries a checksum of every file, so identity costs no reading.

    The directory is read once and kept in a few buffers: ``zipfile`` would keep an object per file, and share one file
    position among forked processes.
    """

    def __init__(self, path: Path):
        self.path, self._files = path, PositionedFiles()

    @cached_property
    def _directory(self) -> tuple[PackedNames, NDArray[np.int64]]:
        """Names, sorted; (N, 5): where a file's header is, packed size, size, checksum, method of compression."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise PolypSegError(f"{self.path} is not a readable zip archive: {error}. Download it again.") from error
        _refuse_bomb(self.path, sum(info.file_size for info in infos))
        members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = _with_slashes(info.filename)
            if name in members and members[name].filename != info.filename:
                raise PolypSegError(f"{self.path} holds two files of the name {name}: rename one of them")
            members[name] = info
        names = sorted(name for name in members if not name.endswith("/"))
        rows = [
            (m.header_offset, m.compress_size, m.file_size, m.CRC, _ENCRYPTED if m.flag_bits & 1 else m.compress_type)
            for m in map(members.__getitem__, names)
        ]
        try:
            return PackedNames(names), np.array(rows, dtype=np.int64).reshape(-1, 5)
        except OverflowError as error:
            raise PolypSegError(f"{self.path} is not a readable zip archive: {error}. Download it again.") from error

    def names(self) -> list[str]:
        return [name for name in self._directory[0] if _is_data(name)]

    def _row(self, name: str) -> list[int]:
        names, rows = self._directory
        place = bisect_left(names, name)
        if place == len(names) or names[place] != name:
            raise PolypSegError(
                f"cannot read {name} in {self.path}: there is no such file. Download the archive again."
            )
        row: list[int] = rows[place].tolist()
        return row

    def refuse_rare(self, names: Iterable[str]) -> None:
        """Raise UsageError for a file that is not read by position, PolypSegError for one of too many bytes."""
        for name in names:
            _, _, size, _, method = self._row(name)
            _refuse_large(size, name=f"{name} in {self.path}")
            if method not in _BY_POSITION:
                raise UsageError(f"{name} in {self.path} is encrypted or compressed in a rare way: extract it")

    def read(self, name: str) -> bytes:
        header, packed, size, checksum, method = self._row(name)
        _refuse_large(size, name=f"{name} in {self.path}")
        if method not in _BY_POSITION:
            return self._read_rare(name, header=header)
        try:
            start = self._files.read(self.path, offset=header, size=_LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(start)
            offset = header + _LOCAL_HEADER.size + name_length + extra_length
            data = self._files.read(self.path, offset=offset, size=packed)
        except PolypSegError as error:
            raise PolypSegError(f"cannot read {name}: {error}") from error
        if method == zipfile.ZIP_DEFLATED:
            data = _inflate(data, size=size)
        if signature != b"PK\3\4" or len(data) != size or zlib.crc32(data) != checksum:
            raise PolypSegError(f"cannot read {name} in {self.path}: damaged. Download the archive again.")
        return data

    def _read_rare(self, name: str, *, header: int) -> bytes:
        """Of a method of compression that ``zipfile`` knows."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(next(info for info in archive.infolist() if info.header_offset == header))
        except (StopIteration, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise PolypSegError(f"cannot read {name} in {self.path}: {error}. Download the archive again.") from error

    def stamp(self, name: str) -> str:
        """A file's checksum and size in the directory."""
        _, _, size, checksum, _ = self._row(name)
        return f"{checksum:08x}-{size}"

    def content_id(self) -> str:
        return identity(f"{name}\0{self.stamp(name)}" for name in self.names() if is_image(name))


def _inflate(data: bytes, *, size: int) -> bytes:
    """Inflated bytes, at most one more than declared; empty when damaged. The caller's checks find both."""
    try:
        return zlib.decompressobj(wbits=-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error:
        return b""


class TarSource:
    """A tar archive, plain or compressed. Compressed ones are read forward, so prefer an extracted folder for them."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path) as archive:
                yield archive
        except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
            raise PolypSegError(f"{self.path} is not a readable tar archive: {error}. Download it again.") from error

    def _members(self, archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
        """Plain name and header of each file, the sizes checked before anything is unpacked.

        Links come last, with the header of the file that they lead to; those that lead to none, with their own.
        """
        unpacked = 0
        links = []
        for member in archive:
            unpacked += max(0, member.size)
            _refuse_bomb(self.path, unpacked)
            if member.isfile():
                yield tar_name(member.name), member
            elif not member.isdir():
                links.append(member)
        if not links:
            return
        places = {_place(member.name): member for member in archive.getmembers()}
        folders = {parent for place in places for parent in PurePosixPath(place).parents}
        for link in links:
            target = _linked_file(link, places)
            unpacked += max(0, target.size)
            _refuse_bomb(self.path, unpacked)
            if target.isfile() or is_image(tar_name(link.name)):
                yield tar_name(link.name), target
            elif not target.isdir() and PurePosixPath(_target_of(target)) not in folders:
                log.warning(
                    "%s in %s is a link to %s, which is not in it: it is left out", link.name, self.path, link.linkname
                )

    def names(self) -> list[str]:
        with self._open() as archive:
            return sorted(name for name, _ in self._members(archive) if _is_data(name))

    def read(self, name: str) -> bytes:
        with self._open() as archive:
            for found, member in self._members(archive):
                if found == name:
                    return self._content(archive, member, name=name)
        raise PolypSegError(f"cannot read {name} in {self.path}: there is no such file")

    def content_id(self) -> str:
        digests = {}
        with self._open() as archive:
            for name, member in self._members(archive):
                if is_image(name):
                    digests[name] = hashlib.sha256(self._content(archive, member, name=name)).hexdigest()
        return identity(f"{name}\0{digest}" for name, digest in sorted(digests.items()))

    def _content(self, archive: tarfile.TarFile, member: tarfile.TarInfo, *, name: str) -> bytes:
        if not member.isfile():
            what = f"a link to {member.linkname}, which is not in it" if member.linkname else "a pipe or device"
            raise PolypSegError(f"cannot read {name} in {self.path}: it is {what}")
        _refuse_large(member.size, name=f"{name} in {self.path}")
        file: IO[bytes] | None = archive.extractfile(member)
        return file.read() if file else b""


def _place(name: str) -> str:
    """Where a member lies in its archive, without `./`; links lead to such places."""
    return posixpath.normpath(_with_slashes(name)).lstrip("/")


def _target_of(link: tarfile.TarInfo) -> str:
    """The place to which a link leads: from its own folder, or for a hard link from the top."""
    return _place(
        link.linkname if link.islnk() else posixpath.join(posixpath.dirname(_with_slashes(link.name)), link.linkname)
    )


def _linked_file(link: tarfile.TarInfo, places: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """What a link leads to, over other links; the last one where the way ends outside the archive or in a circle."""
    for _ in range(_LONGEST_CHAIN):
        if not (link.islnk() or link.issym()) or _target_of(link) not in places:
            break
        link = places[_target_of(link)]
    return link


def tar_name(name: str) -> str:
    """A member's name as text, without the leading ``./`` that ``tar -C folder .`` writes."""
    return printable_name(_with_slashes(name).removeprefix("./"))


def _with_slashes(name: str) -> str:
    """A member's name whose folders are separated by slashes, as packed on Windows or elsewhere.

    Beside slashes, a backslash that begins ``\\xe9`` belongs to the name.
    """
    return re.sub(r"\\(?!x[0-9a-f]{2})", "/", name) if "/" in name else name.replace("\\", "/")


def _begins_as_tar(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(262)[257:] == b"ustar"
    except OSError as error:
        raise PolypSegError(f"cannot read {path}: {error.strerror}") from error


def open_source(path: Path) -> Source:
    """A folder, a .zip or a .tar(.gz|.bz2|.xz) as a Source. Raises UsageError for anything else."""
    if path.is_dir():
        return FolderSource(path)
    if not os.path.lexists(path):
        raise UsageError(f"{path} does not exist: give an extracted folder or the published archive")
    if not path.is_file():
        raise UsageError(f"{path} is {kind_of_file(path)}: give an extracted folder or the published archive")
    suffix = path.suffix.lower()
    if not _begins_as_tar(path) and zipfile.is_zipfile(path):  # a zip inside a tar looks like one itself
        return ZipSource(path)
    if suffix == ".rar":
        raise UsageError(f"{path} is a RAR archive, which needs a tool of its own: extract it and give the folder")
    try:
        if tarfile.is_tarfile(path):
            return TarSource(path)
    except (EOFError, zlib.error):
        pass  # a compressed file that ends too early
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz"):
        raise PolypSegError(f"{path} is not a readable archive (cut off?): download it again")
    raise UsageError(f"{path} is neither a folder nor a zip or tar archive")
