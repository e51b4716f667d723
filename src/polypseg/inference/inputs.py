"""Which files an input names: images, videos, and every other file with the reason why it is neither."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

from polypseg.data.sources import IMAGE_SUFFIXES
from polypseg.errors import UsageError
from polypseg.files import printable

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".amv", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gxf", ".h264", ".h265", ".hevc", ".ivf",
    ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mov", ".mp4", ".mpe",
    ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rmvb", ".vob", ".webm", ".wmv", ".wtv",
    ".y4m",
)  # fmt: skip
"""Containers of FFmpeg that carry video. Files of any other suffix (.ts, .dat, none) are videos by their content."""
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognizes but does not decode itself."""
_SURE_FORMATS = ("AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""Formats recognized by their first bytes without mistake: a file of any name may be one of them."""
_STILL_BRANDS = (b"avif", b"avis", b"crx ", b"heic", b"heif", b"heim", b"heis", b"heix", b"hevc", b"mif1", b"msf1")
_SOUND_BRANDS = (b"M4A ", b"M4B ", b"M4P ")
_MAGIC = (
    (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), (0, b"FLV\x01"),
    (0, b"\0\0\x01\xba"), (0, b"\0\0\x01\xb3"), (0, b"\x06\x0e\x2b\x34"), (0, b"YUV4MPEG2 "), (0, b"DKIF"),
    (0, b".RMF"), (0, b"OggS"), (4, b"moov"), (4, b"mdat"), (4, b"wide"),
)  # fmt: skip
"""Offset and bytes by which a video container is known: Matroska, AVI, ASF, FLV, MPEG, MXF, Y4M, IVF, RM, Ogg, MOV."""
_TRANSPORT = ((0, 188), (4, 192), (0, 204))
"""Offset of the first sync byte and length of an MPEG transport stream's packets: .ts, .m2ts, with error correction."""
_LONGEST_NAME = 180
"""Bytes of a part of an output name: suffixes and temporary names must fit into the file system's 255."""


class Source(NamedTuple):
    """A file to segment."""

    path: Path
    name: PurePosixPath
    """In the output, without suffix."""
    is_video: bool


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What inputs name."""

    sources: tuple[Source, ...]
    """Images and videos, once each and in order."""
    passed_over: tuple[tuple[str, str], ...]
    """File or folder, reason: everything else that lies in the inputs."""


def read_inputs(inputs: Sequence[str], *, output: Path) -> Inputs:
    """What ``inputs`` (files, folders, globs) name; files inside ``output`` are left out.

    Names are relative to the input folder; of several inputs, to the folder that holds them all. Folders are entered
    through symbolic links too, each one once. A file that an input names itself is always a source, whatever it is.
    Raises UsageError for an input that does not exist or holds neither images nor videos.
    """
    if not inputs:
        raise UsageError("nothing to segment: give files, folders, globs or videos")
    listings = [_expand(text, output=output) for text in inputs]
    root = os.path.commonpath([listing.root for listing in listings])
    own = os.path.abspath(output)
    sources: dict[str, Source] = {}
    passed_over: dict[str, str] = {}
    for listing in listings:
        for path, is_video in listing.files:
            place = os.path.abspath(path)
            if not Path(place).is_relative_to(own):
                name = PurePosixPath(Path(place).relative_to(root).as_posix()).with_suffix("")
                sources.setdefault(place, Source(path, _output_name(name), is_video))
        for path, reason in listing.passed_over:
            passed_over.setdefault(printable(path.as_posix()), reason)
    if not sources:
        raise UsageError(
            f"nothing to segment: all of {printable(', '.join(inputs))} lies in the output folder {output}"
        )
    return Inputs(sources=tuple(sources.values()), passed_over=tuple(passed_over.items()))


@cache
def image_suffixes() -> tuple[str, ...]:
    """Suffixes of the formats that Pillow decodes."""
    Image.init()
    return tuple(sorted(suffix for suffix, name in Image.EXTENSION.items() if _decodes(name)))


def _decodes(name: str) -> bool:
    factory = Image.OPEN[name][0] if name in Image.OPEN else None
    stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    return factory is not None and not stub and name not in _NO_PICTURES


# Names -------------------------------------------------------------------------------------------------


def _output_name(name: PurePosixPath) -> PurePosixPath:
    """A name that every file system and text file takes, by which the parts of most names stay as they are."""
    return PurePosixPath(*(_output_part(part) for part in name.parts))


def _output_part(part: str) -> str:
    """Bytes that are no UTF-8 and control characters become %XX; long parts are cut and told apart by a digest."""
    text = re.sub(r"[\x00-\x1f\x7f\udc80-\udcff]", lambda found: f"%{ord(found[0]) & 0xFF:02X}", part)
    text = text.encode("utf-8", "replace").decode()  # other lone surrogates, which only Windows has
    data = text.encode()
    if len(data) <= _LONGEST_NAME:
        return text
    digest = hashlib.sha256(os.fsencode(part)).hexdigest()[:8]
    return f"{data[: _LONGEST_NAME - 9].decode('utf-8', 'ignore')}~{digest}"


# Files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """What an input names."""

    root: str
    """Absolute folder to which the names of its files are relative."""
    files: list[tuple[Path, bool]]
    """Path, whether it is a video."""
    passed_over: list[tuple[Path, str]]


def _expand(text: str, *, output: Path) -> _Listing:
    path = Path(text)
    try:
        if path.is_file():
            video = _kind(path) == "video"
            return _Listing(root=os.path.abspath(path.parent), files=[(path, video)], passed_over=[])
        is_folder = path.is_dir()
    except OSError as error:
        raise UsageError(f"{printable(text)} cannot be opened: {error.strerror}") from error
    walk = _Walk(output)
    if is_folder:
        root = path
        found = list(walk.below(path))
    elif has_magic(text):
        root, found = _fixed_part(path), []
        for match in sorted(Path(match) for match in glob(text, recursive=True)):
            found += walk.below(match) if match.is_dir() else [match]
    else:
        raise UsageError(f"{printable(text)} does not exist: give files, folders, globs or videos")
    files, others = [], walk.problems
    for file in sorted(set(found)):
        kind = "hidden" if file.name.startswith(".") else _kind(file)
        if kind in ("image", "video"):
            files.append((file, kind == "video"))
        else:
            others.append((file, _reason(file, kind)))
    if not files:
        kinds = f": it holds {len(others)} other file(s), such as {printable(others[0][0].name)}" if others else ""
        raise UsageError(f"{printable(text)} holds no image or video that can be read{kinds}")
    return _Listing(root=os.path.abspath(root), files=files, passed_over=sorted(others))


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first wildcard."""
    parts = list(pattern.parts)
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first]) if first else Path()


class _Walk:
    """The files below folders; linked folders are entered, and none twice, so that circles of links end."""

    def __init__(self, output: Path):
        self.problems: list[tuple[Path, str]] = []
        self._seen = {identity for identity in [_identity(output)] if identity}

    def below(self, folder: Path) -> Iterator[Path]:
        """Every file, in no particular order. Real folders come before linked ones, so that files keep their names."""
        waiting: list[Path] = [folder]
        linked: list[Path] = []
        while waiting or linked:
            place = waiting.pop() if waiting else linked.pop(0)
            identity = _identity(place)
            if identity is None or identity in self._seen:
                if place.is_symlink() and identity:
                    self.problems.append((place, "a link to a folder that is read under another name"))
                continue
            self._seen.add(identity)
            try:
                entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            except OSError as error:
                self.problems.append((place, f"a folder that cannot be opened: {error.strerror}"))
                continue
            for entry in entries:
                path = place / entry.name
                if not _is_folder(entry):
                    yield path
                elif entry.is_symlink():
                    linked.append(path)
                else:
                    waiting.append(path)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino


def _kind(file: Path) -> str:
    """``image``, ``video``, ``other``, or why the file cannot be looked at."""
    try:
        if not file.is_file():
            return "broken link" if file.is_symlink() and not file.exists() else "special"
        suffix = file.suffix.lower()
        if suffix == ".gif":
            return "video" if _is_animated(file) else "image"
        if suffix in VIDEO_SUFFIXES:
            return "video"
        known = suffix in IMAGE_SUFFIXES or suffix in image_suffixes()  # the usual ones first: Pillow loads all formats
        return "image" if known else _kind_by_content(file)
    except OSError as error:
        return error.strerror or "unreadable"


def _reason(file: Path, kind: str) -> str:
    words = {
        "hidden": "a hidden file",
        "broken link": "a link to a file that is not there",
        "special": "no regular file",
        "other": f"no image or video that can be read ({file.suffix.lower() or 'no suffix'})",
    }
    return printable(words.get(kind, f"cannot be opened: {kind}"))


def _is_animated(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return bool(getattr(image, "is_animated", False))
    except (UnidentifiedImageError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        return False  # the decoder says what is wrong with it


def _kind_by_content(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(1024)
    if start[4:8] == b"ftyp":
        return "other" if start[8:12] in _SOUND_BRANDS else "image" if start[8:12] in _STILL_BRANDS else "video"
    if any(start[offset : offset + len(magic)] == magic for offset, magic in _MAGIC):
        return "video"
    if any(len(start) >= 4 * size and set(start[at : at + 4 * size : size]) == {0x47} for at, size in _TRANSPORT):
        return "video"
    try:
        with Image.open(file, formats=_SURE_FORMATS):
            return "image"
    except UnidentifiedImageError:
        return "other"
    except Exception:  # a damaged file of one of these formats: the decoder says what is wrong with it
        return "image"
