"""Where image files come from: an extracted folder or the published archive, read without extracting it."""

import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from polypseg.errors import PolypSegError, UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")


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

    def names(self) -> list[str]:
        files = (file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())
        return sorted(name for name in files if _is_data(name))

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
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

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None:
            try:
                self._archive = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise PolypSegError(
                    f"{self.path} is not a readable zip archive: {error}. Download it again."
                ) from error
        return self._archive

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_archive": None}  # an open archive does not travel between processes

    def names(self) -> list[str]:
        return sorted(i.filename for i in self._open().infolist() if not i.is_dir() and _is_data(i.filename))

    def read(self, name: str) -> bytes:
        try:
            return self._open().read(name)
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
            raise PolypSegError(f"cannot read {name} in {self.path}: {error}. Download the archive again.") from error

    def content_id(self) -> str:
        archive = self._open()
        return _digest(
            (name, f"{archive.getinfo(name).CRC:08x}-{archive.getinfo(name).file_size}")
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

    def names(self) -> list[str]:
        with self._open() as archive:
            return sorted(_plain(m.name) for m in archive.getmembers() if m.isfile() and _is_data(_plain(m.name)))

    def read(self, name: str) -> bytes:
        with self._open() as archive:
            for member in archive:
                if _plain(member.name) == name and member.isfile():
                    return _content(archive, member)
        raise PolypSegError(f"cannot read {name} in {self.path}: there is no such file")

    def content_id(self) -> str:
        digests = {}
        with self._open() as archive:
            for member in archive:
                name = _plain(member.name)
                if member.isfile() and _is_data(name) and name.lower().endswith(IMAGE_SUFFIXES):
                    digests[name] = hashlib.sha256(_content(archive, member)).hexdigest()
        return _digest(iter(sorted(digests.items())))


def _plain(name: str) -> str:
    """A member's name without the leading ``./`` that ``tar -C folder .`` writes."""
    return name.removeprefix("./")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = archive.extractfile(member)
    return file.read() if file else b""


def open_source(path: Path) -> Source:
    """A folder, a .zip or a .tar(.gz|.bz2|.xz) as a Source. Raises UsageError for anything else."""
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist: give an extracted folder or the published archive")
    suffix = path.suffix.lower()
    if zipfile.is_zipfile(path):
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
