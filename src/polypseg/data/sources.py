"""Where image files come from: an extracted folder or the published archive, read without extracting it.

Names are text everywhere: bytes that are no UTF-8 are written as ``\\xe9``, and backslashes of archives packed on
Windows as slashes. Sizes that an archive declares are checked before anything of it is unpacked.
"""

import hashlib
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from polypseg.errors import PolypSegError, UsageError

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
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100
"""An archive that unpacks to more bytes than this, and than so many times its own size, holds no photographs."""


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
    return not any(part.startswith((".", "__MACOSX")) for part in parts)


def printable_name(name: str) -> str:
    """A file's name as text: bytes of it that are no UTF-8 become ``\\xe9``, which every file and screen takes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def files_below(folder: Path, *, on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """The files in a folder and below it, linked folders included, each real folder once; in no order.

    Links are followed only after all that lies in the folder itself, so that a loop of links ends and files keep their
    own names. Raises PolypSegError for a folder that cannot be read, unless ``on_error`` takes the error.
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
                yield from (Path(place, name) for name in files if os.path.isfile(os.path.join(place, name)))
        waiting = sorted(links)


def inner_archives(names: list[str]) -> str:
    """A sentence on archives among the names, to be added where no image was found; empty if there is none."""
    inner = [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)]
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


def _digest(entries: Iterator[tuple[str, str]]) -> str:
    """Hash of (name, content hash) pairs in the given order."""
    digest = hashlib.sha256()
    for name, content in entries:
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()[:16]


class FolderSource:
    """An extracted folder."""

    def __init__(self, path: Path):
        self.path = path
        self._renamed: dict[str, Path] = {}

    def names(self) -> list[str]:
        found: dict[str, Path] = {}
        for file in files_below(self.path):
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
            _refuse_large(file.stat().st_size, name=str(self.path / name))
            return file.read_bytes()
        except OSError as error:
            raise PolypSegError(f"cannot read {self.path / name}: {error.strerror}") from error

    def content_id(self) -> str:
        return _digest(
            (name, hashlib.sha256(self.read(name)).hexdigest())
            for name in self.names()
            if name.lower().endswith(IMAGE_SUFFIXES)
        )


class ZipSource:
    """A zip archive; its central directory carries a checksum of every file, so identity costs no reading."""

    def __init__(self, path: Path):
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise PolypSegError(
                    f"{self.path} is not a readable zip archive: {error}. Download it again."
                ) from error
            infos = archive.infolist()
            _refuse_bomb(self.path, sum(info.file_size for info in infos))
            windows = not any("/" in info.filename for info in infos)  # then backslashes separate folders
            for info in infos:
                name = info.filename.replace("\\", "/") if windows else info.filename
                if not name.endswith("/"):
                    self._members[name] = info
            self._archive = archive
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        # An open archive does not travel between processes.
        return {"path": self.path, "_archive": None, "_members": {}}

    def names(self) -> list[str]:
        self._open()
        return sorted(name for name in self._members if _is_data(name))

    def member(self, name: str) -> zipfile.ZipInfo:
        """The archive's entry of a file. Raises PolypSegError where there is none, or one of too many bytes."""
        self._open()
        if name not in self._members:
            raise PolypSegError(
                f"cannot read {name} in {self.path}: there is no such file. Download the archive again."
            )
        _refuse_large(self._members[name].file_size, name=f"{name} in {self.path}")
        return self._members[name]

    def read(self, name: str) -> bytes:
        member = self.member(name)
        try:
            return self._open().read(member)
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise PolypSegError(f"cannot read {name} in {self.path}: {error}. Download the archive again.") from error

    def content_id(self) -> str:
        self._open()
        return _digest(
            (name, f"{self._members[name].CRC:08x}-{self._members[name].file_size}")
            for name in self.names()
            if name.lower().endswith(IMAGE_SUFFIXES)
        )


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
        """Plain name and header of each file, the sizes checked before anything is unpacked."""
        unpacked = 0
        for member in archive:
            unpacked += max(0, member.size)
            _refuse_bomb(self.path, unpacked)
            if member.isfile():
                yield _plain(member.name), member

    def names(self) -> list[str]:
        with self._open() as archive:
            return sorted(name for name, _ in self._members(archive) if _is_data(name))

    def read(self, name: str) -> bytes:
        with self._open() as archive:
            for found, member in self._members(archive):
                if found == name:
                    _refuse_large(member.size, name=f"{name} in {self.path}")
                    return _content(archive, member)
        raise PolypSegError(f"cannot read {name} in {self.path}: there is no such file")

    def content_id(self) -> str:
        digests = {}
        with self._open() as archive:
            for name, member in self._members(archive):
                if _is_data(name) and name.lower().endswith(IMAGE_SUFFIXES):
                    _refuse_large(member.size, name=f"{name} in {self.path}")
                    digests[name] = hashlib.sha256(_content(archive, member)).hexdigest()
        return _digest(iter(sorted(digests.items())))


def _plain(name: str) -> str:
    """A member's name as text, without the leading ``./`` that ``tar -C folder .`` writes."""
    return printable_name(name.removeprefix("./"))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = archive.extractfile(member)
    return file.read() if file else b""


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
    if not path.exists():
        raise UsageError(f"{path} does not exist: give an extracted folder or the published archive")
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
