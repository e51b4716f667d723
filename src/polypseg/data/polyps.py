"""Datasets of frames and polyp masks: found, indexed, paired by name, checked, and given as HF datasets."""

import hashlib
import os
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.data import images, synthetic
from polypseg.data.catalog import (
    ANY_IMAGE_FOLDER,
    ANY_MASK_FOLDER,
    ANY_MASK_STEM,
    CLIP_COLUMN,
    EXPECTED_TREE,
    MARKED_MASK_STEM,
    DatasetSpec,
    get_spec,
    is_synthetic,
)
from polypseg.data.corruptions import corrupt
from polypseg.data.sources import IMAGE_SUFFIXES, Source, archives_among, inner_archives, open_source, tell_of_archives
from polypseg.data.splits import Split, make_split
from polypseg.errors import PolypSegError, UsageError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One frame of a dataset, by the names of its files."""

    id: str
    image: str
    mask: str | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SyntheticOptions:
    """How much of a synthetic camera to draw."""

    count: int = 300
    """Frames."""
    seed: int = 0
    size: tuple[int, int] | None = (256, 256)
    """(height, width) in pixels; None for the camera's own sizes."""


class SyntheticSource:
    """Procedural frames as if they were files: ``images/00000.png`` and ``masks/00000.png``."""

    def __init__(self, camera: str, options: SyntheticOptions):
        self.path = Path(f"synthetic_{camera}")
        self.camera, self.options = camera, options

    def names(self) -> list[str]:
        return [f"{folder}/{i:05d}.png" for folder in ("images", "masks") for i in range(self.options.count)]

    def read(self, name: str) -> bytes:
        frame, mask = _DRAWN.pair(synthetic.CAMERAS[self.camera], self.options, int(PurePosixPath(name).stem))
        return frame if name.startswith("images") else mask

    def content_id(self) -> str:
        """Follows the options, the camera and the version of the code that draws."""
        key = f"{self.camera} {self.options} {synthetic.CAMERAS[self.camera]} version {synthetic.VERSION}"
        return hashlib.sha256(key.encode()).hexdigest()[:16]


class _DrawnFrames:
    """The frames that were drawn last, as PNG, up to a number of bytes: a study reads the same ones for every row."""

    def __init__(self, *, limit: int):
        self._limit, self._size = limit, 0
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)  # another thread's hold on it does not pass to a child
        self._kept: OrderedDict[tuple[synthetic.CameraStyle, SyntheticOptions, int], tuple[bytes, bytes]]
        self._kept = OrderedDict()

    def _renew_lock(self) -> None:
        self._lock = Lock()

    def pair(self, style: synthetic.CameraStyle, options: SyntheticOptions, index: int) -> tuple[bytes, bytes]:
        """Frame and mask, drawn unless they are kept."""
        key = (style, options, index)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        frame, mask = synthetic.synthesize_frame(style, seed=options.seed, index=index, size=options.size)
        made = images.encode_png(frame), images.encode_png(mask * np.uint8(255))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._size += sum(map(len, made))
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= sum(map(len, self._kept.popitem(last=False)[1]))
        return made


_DRAWN = _DrawnFrames(limit=2**27)


@dataclass(frozen=True)
class PolypDataset:
    """An opened dataset: its row of the table, its files, and one record per frame, sorted by file name."""

    spec: DatasetSpec
    source: Source
    records: tuple[Record, ...]
    mask_values: images.MaskValues | None = None
    """Which values or colors of the masks are polyp, where that is not gray above 127."""

    @cached_property
    def content_id(self) -> str:
        """Identity of the content and of its reading, by which caches are kept: 16 hex digits."""
        files = self.source.content_id()
        if self.mask_values is None:
            return files
        return hashlib.sha256(f"{files} polyp={self.mask_values}".encode()).hexdigest()[:16]

    @cached_property
    def by_id(self) -> dict[str, Record]:
        """id -> record."""
        return {record.id: record for record in self.records}

    @property
    def ids(self) -> list[str]:
        """All ids, sorted by file name as strings (the reference's order)."""
        return [record.id for record in self.records]

    def split(self, name: str = "reference") -> Split:
        """The parts of a named split as id lists. Raises UsageError when the dataset has no such split."""
        sequences = {r.id: r.groups[CLIP_COLUMN] for r in self.records if CLIP_COLUMN in r.groups}
        return make_split(self.spec.name, name, ids=self.ids, sequences=sequences)

    def part(self, split: str, part: str, *, limit: int | None = None) -> tuple[tuple[str, ...], str]:
        """The ids of a part of a split, with ``limit`` only the first ones, and what results call it.

        Raises UsageError for an unknown split or part, or an empty one.
        """
        parts = self.split(split)
        if part not in parts:
            raise UsageError(f"split {split!r} of {self.spec.title} has the parts {', '.join(parts)}, not {part!r}")
        ids = tuple(parts[part][:limit])
        if not ids:
            raise UsageError(f"part {part!r} of split {split!r} of {self.spec.title} is empty")
        return ids, part if len(ids) == len(parts[part]) else f"{part}-first{limit}"

    def frame(self, record: Record) -> Image.Image:
        """The decoded RGB frame. Raises PolypSegError naming the file when it is broken."""
        return images.decode_frame(self.source.read(record.image), name=self.locate(record.image))

    def mask(self, record: Record) -> NDArray[np.uint8]:
        """The mask (H, W) uint8 in {0, 1}. Raises PolypSegError for a broken, missing or color-coded mask."""
        return (self.gray_mask(record) > images.MASK_THRESHOLD).astype(np.uint8)

    def gray_mask(self, record: Record) -> NDArray[np.uint8]:
        """The mask (H, W) uint8 as stored, 0 to 255, or 0 and 255 by ``mask_values``; errors as ``mask``."""
        if record.mask is None:
            raise UsageError(f"{self.spec.title} has no masks")
        data = self.source.read(record.mask)
        return images.decode_gray_mask(data, name=self.locate(record.mask), values=self.mask_values)

    def pair(self, record: Record) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Frame and 0/1 mask, of equal size. Raises PolypSegError otherwise."""
        frame, gray = self.gray_pair(record)
        return frame, (gray > images.MASK_THRESHOLD).astype(np.uint8)

    def gray_pair(self, record: Record) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Frame and mask as stored, 0 to 255, of equal size. Raises PolypSegError otherwise."""
        frame, mask = self.frame(record), self.gray_mask(record)
        names = {"frame_name": self.locate(record.image), "mask_name": self.locate(record.mask or "")}
        images.check_same_size(frame, mask, **names)
        return frame, mask

    def locate(self, name: str) -> str:
        """A file's place for messages."""
        return str(self.source.path / name)

    def load(self, *, split: str = "reference", streaming: bool = False) -> Any:
        """The parts of a split as a ``DatasetDict`` (or ``IterableDatasetDict`` with ``streaming``).

        Columns: ``id``, ``image``, ``mask`` (0/1) and the dataset's groups. Raises PolypSegError for a broken file.
        """
        from polypseg.data.builder import build_splits

        return build_splits(self, split=split, streaming=streaming)


def index_records(spec: DatasetSpec, source: Source) -> tuple[Record, ...]:
    """Find frames and masks by folder and pair them by name, as published or as re-packs lay them out.

    Raises PolypSegError naming what has no partner, UsageError with the trees that are known where none fits.
    """
    everything = source.names()
    records = _index_names(spec, source, everything)
    if records:
        tell_of_archives(source.path, archives_among(everything))
    return records


def _index_names(spec: DatasetSpec, source: Source, everything: list[str]) -> tuple[Record, ...]:
    names = [n for n in everything if n.lower().endswith(IMAGE_SUFFIXES)]
    if spec.mask_folder is None:
        by_stem = _by_key(_in_folder(names, spec.image_folder), r"(?P<id>.+)", path=source.path)
        return tuple(_with_groups(spec, Record(id=_stem(n), image=n)) for n in _by_file_name(list(by_stem.values())))
    first_problem: PolypSegError | None = None
    for frames, masks, stem in _layouts(spec, names):
        if not frames or not masks:
            continue
        try:
            records = _paired(spec, source, frames, masks, stem)
        except PolypSegError as error:
            first_problem = first_problem or error
        else:
            return _with_the_rest(spec, source, names, used={*frames, *masks}, stem=stem) or records
    if first_problem is not None:
        raise first_problem
    found = sorted({PurePosixPath(n).parent.as_posix() for n in names})
    where = f"Images are in {_some(found)}" if found else "It holds no image at all"
    raise UsageError(
        f"no images in {source.path} with masks beside them{inner_archives(everything)}. {where}; expected was a "
        f"folder {spec.image_folder!r} with images and a folder {spec.mask_folder!r} with masks (regular expressions), "
        f"or {EXPECTED_TREE}"
    )


def _layouts(spec: DatasetSpec, names: list[str]) -> Iterator[tuple[list[str], list[str], str]]:
    """Frames, masks and the masks' stem by each layout that is known, the published one first."""
    assert spec.mask_folder is not None
    ways = ((spec.image_folder, spec.mask_folder, spec.mask_stem), (ANY_IMAGE_FOLDER, ANY_MASK_FOLDER, ANY_MASK_STEM))
    for inside in (_in_folder, _below_folder):
        for image_folder, mask_folder, stem in ways if inside is _in_folder else ways[1:]:
            masks = inside(names, mask_folder)
            taken = set(masks)
            yield [n for n in inside(names, image_folder) if n not in taken], masks, stem
    for stem in (spec.mask_stem, MARKED_MASK_STEM):
        frames = [n for n in names if re.fullmatch(spec.image_stem, _stem(n))]
        masks = [n for n in names if re.fullmatch(stem, _stem(n)) and not _matches_whole(stem, _stem(n))]
        taken = set(masks)
        yield [n for n in frames if n not in taken], masks, stem


def _with_the_rest(
    spec: DatasetSpec, source: Source, names: list[str], *, used: set[str], stem: str
) -> tuple[Record, ...]:
    """The records of the widest layout where one that pairs leaves images out; none where it leaves nothing out.

    Left out are files below its folders, and images and masks in folders of other names. Raises PolypSegError naming
    one where the widest layout does not pair.
    """
    assert spec.mask_folder is not None
    folders = {PurePosixPath(name).parent for name in used}
    named = [n for n in names if re.fullmatch(spec.image_stem, _stem(n)) or re.fullmatch(spec.mask_stem, _stem(n))]
    below = [n for n in named if n not in used and not folders.isdisjoint(list(PurePosixPath(n).parents)[1:])]
    masks = _below_folder(names, f"(?:{spec.mask_folder})|(?:{ANY_MASK_FOLDER})")
    taken = set(masks)
    frames = [n for n in _below_folder(names, f"(?:{spec.image_folder})|(?:{ANY_IMAGE_FOLDER})") if n not in taken]
    if not below and (used.issuperset(frames) or used.issuperset(masks)):
        return ()
    problem: PolypSegError | None = None
    for mask_stem in (stem, ANY_MASK_STEM):
        try:
            records = _paired(spec, source, frames, masks, mask_stem)
        except PolypSegError as error:
            problem = problem or error
        else:
            lost = [n for n in below if n not in taken and n not in frames]
            if lost:
                raise PolypSegError(f"{source.path}: {len(lost)} image(s) are in no pair, first {lost[0]}: remove them")
            return records
    assert problem is not None
    raise problem


def _matches_whole(pattern: str, stem: str) -> bool:
    """Whether the id that the pattern finds is the stem itself: nothing then tells a mask from an image."""
    match = re.fullmatch(pattern, stem)
    return match is not None and match["id"] == stem


def _paired(
    spec: DatasetSpec, source: Source, frames: list[str], masks: list[str], mask_stem: str
) -> tuple[Record, ...]:
    """One record per frame, in the order of file names. Raises PolypSegError naming what has no partner."""
    frames, masks = _one_form(frames), _one_form(masks)
    image_of = _by_key(frames, r"(?P<id>.+)", path=source.path)
    mask_of = _by_key(masks, mask_stem, path=source.path, images=image_of.keys())
    for have, lack, kinds in ((image_of, mask_of, ("image", "mask")), (mask_of, image_of, ("mask", "image"))):
        alone = [name for key, name in have.items() if key not in lack]
        if alone:
            raise PolypSegError(
                f"{source.path}: {len(alone)} {kinds[0]}(s) have no {kinds[1]}, first {alone[0]}: add the {kinds[1]} "
                f"or remove the {kinds[0]}"
            )
    return tuple(
        _with_groups(spec, Record(id=_stem(n), image=n, mask=mask_of[_normal(_stem(n))])) for n in _by_file_name(frames)
    )


def _some(folders: list[str]) -> str:
    return ", ".join(folders[:4]) + (f" and {len(folders) - 4} more" if len(folders) > 4 else "")


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _normal(text: str) -> str:
    """Composed characters: macOS and some archives write an ``é`` as two, which looks the same."""
    return unicodedata.normalize("NFC", text)


def _by_key(names: list[str], pattern: str, *, path: Path, images: Collection[str] = ()) -> dict[str, str]:
    """Key of each file, found by ``pattern`` in its stem -> its name. Raises PolypSegError for a repeated key.

    ``images``: the keys of the images, where these are masks. Masks named as their images keep their whole names.
    """
    whole = [_normal(_stem(name)) for name in names]
    equal = len(whole) == len(images) and set(whole) == set(images)
    found: dict[str, str] = {}
    for name, stem in zip(names, whole, strict=True):
        match = re.fullmatch(pattern, stem)
        key = match["id"] if match else stem
        if equal or (stem in images and key not in images):
            key = stem
        if key in found:
            raise PolypSegError(
                f"{path}: {found[key]} and {name} have the same name: rename or remove one of them, or give "
                "only one of the folders"
            )
        found[key] = name
    return found


def _in_folder(names: list[str], pattern: str) -> list[str]:
    return [n for n in names if re.fullmatch(pattern, PurePosixPath(n).parent.name, re.IGNORECASE)]


def _below_folder(names: list[str], pattern: str) -> list[str]:
    """Files of which any folder above matches: ``images/train/1.png``."""
    return [n for n in names if any(re.fullmatch(pattern, p, re.IGNORECASE) for p in PurePosixPath(n).parts[:-1])]


def _one_form(names: list[str]) -> list[str]:
    """CVC-ClinicDB is also published with PNG and TIF side by side, equal in pixels: keep the PNGs."""
    png = [n for n in names if n.lower().endswith(".png")]
    tif = {PurePosixPath(n).stem for n in names if n.lower().endswith((".tif", ".tiff"))}
    return png if png and tif == {PurePosixPath(n).stem for n in png} else names


def _by_file_name(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (PurePosixPath(name).name, name))


def _with_groups(spec: DatasetSpec, record: Record) -> Record:
    try:
        groups = {name: group(record.id, record.image) for name, group in spec.groups.items()}
    except ValueError as error:
        raise PolypSegError(f"{record.image} is not named as in {spec.title}: {error}") from error
    return Record(id=record.id, image=record.image, mask=record.mask, groups=groups)


def find_source(spec: DatasetSpec, *, data_dir: Path | None = None) -> Path:
    """Where a dataset lies in the data folder: ``data_dir``, $POLYPSEG_DATA or ./data. Raises UsageError if nowhere."""
    root = data_dir or Path(os.environ.get("POLYPSEG_DATA") or "data")
    for location in spec.locations:
        if (root / location).exists():
            return root / location
    if not spec.locations:
        raise UsageError(f"dataset {spec.name!r} has no usual place: give its path")
    remedy = f"run `polypseg data get {spec.name}`" if spec.url else spec.request
    raise UsageError(
        f"{spec.title} is not in {root} (looked for {', '.join(spec.locations)}). Give its path, set POLYPSEG_DATA, or "
        f"{remedy}"
    )


def open_dataset(
    name: str,
    *,
    source: Path | None = None,
    data_dir: Path | None = None,
    allow_partial: bool = False,
    mask_values: str | None = None,
    synthetic_options: SyntheticOptions | None = None,
) -> PolypDataset:
    """Open a dataset of the table from a folder or archive; without ``source`` it is looked for in the data folder.

    ``mask_values``: which values or colors of the masks are polyp, as ``images.MaskValues.parse`` reads them; without
    it what the table says of the set, else gray above 127.
    Raises UsageError for an unknown name, a missing source or, unless ``allow_partial``, a count that is not the
    published one; PolypSegError for files without partner.
    """
    spec = get_spec(name)
    if is_synthetic(spec):
        if source is not None:
            raise UsageError(f"{spec.title} are drawn, not read: leave out the source {source}")
        options = synthetic_options or SyntheticOptions()
        found: Source = SyntheticSource(name.removeprefix("synthetic_"), options)
    else:
        found = open_source(Path(source) if source else find_source(spec, data_dir=data_dir))
    records = index_records(spec, found)
    if not records:
        raise UsageError(f"no images in {found.path}: {spec.title} was expected there{inner_archives(found.names())}")
    if spec.count is not None and len(records) != spec.count and not allow_partial:
        raise UsageError(
            f"{found.path} holds {len(records)} images but {spec.title} has {spec.count}: complete it, or say that a "
            "part is meant (--allow-partial)"
        )
    return PolypDataset(spec=spec, source=found, records=records, mask_values=chosen_values(spec, mask_values))


def chosen_values(spec: DatasetSpec, text: str | None) -> images.MaskValues | None:
    """The values that are asked for, else what the table says. Raises UsageError where there are no masks to read."""
    if text is not None and (spec.mask_folder is None or is_synthetic(spec)):
        raise UsageError(f"mask values do not apply to {spec.title}: it has no mask files to read")
    chosen = spec.mask_values if text is None else text
    return None if chosen is None else images.MaskValues.parse(chosen)


def load_polyps(name: str, *, split: str = "reference", streaming: bool = False, **where: Any) -> Any:
    """A dataset as HF ``DatasetDict``: ``load_polyps("kvasir_seg", source="kvasir-seg.zip")["train"][0]``.

    ``where`` are the arguments of ``open_dataset``. Examples are ``{"id", "image", "mask"}`` plus the set's groups.
    """
    return open_dataset(name, **where).load(split=split, streaming=streaming)


@dataclass(frozen=True, eq=False)
class CorruptedDataset(PolypDataset):
    """A dataset whose frames are corrupted on reading; the masks stay."""

    kind: str = ""
    severity: int = 0

    def frame(self, record: Record) -> Image.Image:
        """The frame under the corruption; errors as of the dataset."""
        clean = np.asarray(super().frame(record))
        return Image.fromarray(corrupt(clean, self.kind, severity=self.severity, key=record.id))

    def pair(self, record: Record) -> tuple[Image.Image, NDArray[np.uint8]]:
        """The corrupted frame and the 0/1 mask."""
        return self.frame(record), self.mask(record)


def corrupt_dataset(dataset: PolypDataset, kind: str, *, severity: int) -> CorruptedDataset:
    """The same images under one kind of corruption (see ``corruptions.py``)."""
    return CorruptedDataset(
        spec=dataset.spec,
        source=dataset.source,
        records=dataset.records,
        mask_values=dataset.mask_values,
        kind=kind,
        severity=severity,
    )
