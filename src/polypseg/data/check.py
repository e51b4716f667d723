"""Is a dataset what its table row says? Files, pairing, sizes, masks, duplicates inside and across splits."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from polypseg.artifacts import write_json, write_text
from polypseg.data.catalog import get_spec
from polypseg.data.images import describe_file
from polypseg.data.polyps import PolypDataset, chosen_values, index_records
from polypseg.data.sources import Source, open_source
from polypseg.data.splits import DESCRIPTIONS
from polypseg.errors import PolypSegError, UsageError

HASH_DISTANCE = 10
"""Bits of a 256-bit difference hash within which two frames may be near-duplicates."""
THUMBNAIL_DIFFERENCE = 4.0
"""Mean absolute difference, in grey levels, of 32x32 RGB thumbnails below which they are."""


@dataclass(kw_only=True)
class CheckReport:
    """What was found; ``problems`` make a dataset unusable as it is, the rest is to know."""

    name: str
    path: str
    content_id: str = ""
    images: int = 0
    expected_images: int | None = None
    problems: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    """"WIDTHxHEIGHT" -> frames."""
    forms: dict[str, int] = field(default_factory=dict)
    """How files are coded, in words -> files, frames and masks together."""
    empty_masks: list[str] = field(default_factory=list)
    polyp_share: dict[str, float] = field(default_factory=dict)
    """Least, mean and greatest share of a frame that its mask covers."""
    exact_duplicates: list[tuple[str, str]] = field(default_factory=list)
    near_duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of ids, exact duplicates included."""
    across_splits: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """Split -> near-duplicate pairs whose two images lie in different parts."""

    @property
    def ok(self) -> bool:
        """Whether the dataset can be used as it is."""
        return not self.problems

    def write(self, folder: Path) -> Path:
        """Write ``<name>.check.json`` and ``.md``; return the Markdown's path."""
        write_json(folder / f"{self.name}.check.json", asdict(self))
        return write_text(folder / f"{self.name}.check.md", self.to_markdown())

    def to_markdown(self) -> str:
        """The report for people."""
        expected = "" if self.expected_images is None else f" of {self.expected_images}"
        lines = [
            f"# {self.name}: {'usable' if self.ok else 'NOT usable as it is'}",
            "",
            f"- content id: {self.content_id}",
            f"- images: {self.images}{expected}, {len(self.sizes)} different sizes",
        ]
        if self.forms:
            lines.append(f"- files: {'; '.join(f'{count} {form}' for form, count in sorted(self.forms.items()))}")
        if self.polyp_share:
            low, mean, high = (100 * self.polyp_share[key] for key in ("least", "mean", "greatest"))
            lines.append(f"- polyp area: {low:.2f} to {high:.1f} % of the frame, mean {mean:.1f} %")
        lines += [
            f"- empty masks: {len(self.empty_masks)}",
            f"- exact duplicates: {len(self.exact_duplicates)} pairs",
            f"- near-duplicates: {len(self.near_duplicates)} pairs",
        ]
        for split, pairs in self.across_splits.items():
            lines.append(f"- split {split}: {len(pairs)} near-duplicate pairs lie in different parts")
        lines += _section("Problems", self.problems)
        lines += _section("Near-duplicates", [f"{a} ~ {b}" for a, b in self.near_duplicates])
        for split, pairs in self.across_splits.items():
            lines += _section(f"Across parts of split {split}", [f"{p['a']} ~ {p['b']} ({p['parts']})" for p in pairs])
        return "\n".join(lines) + "\n"


def _section(title: str, items: list[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {item}" for item in items)] if items else []


def check_dataset(name: str, path: Path, *, mask_values: str | None = None) -> CheckReport:
    """Read everything once and report. A broken file is a problem in the report, not an exception.

    ``mask_values`` as for ``open_dataset``. Raises UsageError only when the name or the values are no such thing or
    the path is no folder or archive.
    """
    spec, source = get_spec(name), open_source(path)
    report = CheckReport(name=name, path=str(path), expected_images=spec.count)
    values = chosen_values(spec, mask_values)
    try:
        records = index_records(spec, source)
    except PolypSegError as error:
        report.problems.append(str(error))
        return report
    watched = _DescribedSource(source, report.forms)
    dataset = PolypDataset(spec=spec, source=watched, records=records, mask_values=values)
    report.content_id, report.images = dataset.content_id, len(dataset.records)
    if spec.count not in (None, report.images):
        report.problems.append(
            f"{report.images} images instead of {spec.count}: the set is incomplete or has extra files"
        )
    prints = _read_all(dataset, report)
    with_mask = [record.id for record in dataset.records if record.mask is not None]
    if values is not None and with_mask and len(report.empty_masks) == len(with_mask):
        report.problems.append(f"no mask holds a pixel of the values {values}: name those that are polyp")
    report.near_duplicates = near_duplicates(prints)
    report.exact_duplicates = [(a, b) for a, b in report.near_duplicates if prints[a].digest == prints[b].digest]
    for split in DESCRIPTIONS:
        if split != "full":
            _compare_with_split(dataset, split, report)
    return report


class _DescribedSource:
    """A source that notes how each file that is read is coded."""

    def __init__(self, source: Source, forms: dict[str, int]):
        self.path, self.source, self.forms = source.path, source, forms

    def names(self) -> list[str]:
        return self.source.names()

    def content_id(self) -> str:
        return self.source.content_id()

    def read(self, name: str) -> bytes:
        data = self.source.read(name)
        with suppress(PolypSegError):  # its decoding says what is wrong
            form = describe_file(data, name=name)
            self.forms[form] = self.forms.get(form, 0) + 1
        return data


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a frame for comparing it with others."""

    digest: str
    """sha256 of the decoded pixels."""
    bits: NDArray[np.bool_]
    """(256,) difference hash."""
    thumbnail: NDArray[np.float32]
    """(32, 32, 3), 0 to 255."""


def fingerprint(frame: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB frame."""
    return Fingerprint(
        digest=hashlib.sha256(np.asarray(frame).tobytes()).hexdigest(),
        bits=difference_hash(frame),
        thumbnail=np.asarray(frame.resize((32, 32), Image.Resampling.BOX), dtype=np.float32),
    )


def difference_hash(frame: Image.Image) -> NDArray[np.bool_]:
    """256 bits: whether each cell of a 16x17 grey thumbnail (bilinear, antialiased) is brighter than its left one."""
    grey = np.asarray(frame.convert("L").resize((17, 16), Image.Resampling.BILINEAR))
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def _read_all(dataset: PolypDataset, report: CheckReport) -> dict[str, Fingerprint]:
    """Decode every frame and mask; note what is wrong and what they are like."""
    prints, shares = {}, []
    for record in tqdm(dataset.records, desc=f"checking {dataset.spec.title}", unit="image", leave=False, disable=None):
        try:
            if record.mask is None:
                frame = dataset.frame(record)
            else:
                frame, mask = dataset.pair(record)
                shares.append(float(mask.mean()))
                if not mask.any():
                    report.empty_masks.append(record.id)
        except PolypSegError as error:
            report.problems.append(str(error))
            continue
        size = f"{frame.width}x{frame.height}"
        report.sizes[size] = report.sizes.get(size, 0) + 1
        prints[record.id] = fingerprint(frame)
    if shares:
        report.polyp_share = {
            "least": min(shares),
            "mean": sum(shares) / len(shares),
            "greatest": max(shares),
        }
    return prints


def near_duplicates(
    prints: dict[str, Fingerprint],
    *,
    hash_distance: int = HASH_DISTANCE,
    thumbnail_difference: float = THUMBNAIL_DIFFERENCE,
) -> list[tuple[str, str]]:
    """Pairs of ids whose hashes differ in at most 10 of 256 bits and whose thumbnails hardly differ.

    Compares block by block, so memory stays small; time grows with the square of the number of frames.
    """
    ids = list(prints)
    if not ids:
        return []
    packed = np.packbits(np.stack([prints[i].bits for i in ids]), axis=1)  # (N, 32)
    pairs = []
    for index in range(len(ids) - 1):
        distance = np.bitwise_count(packed[index + 1 :] ^ packed[index]).sum(axis=1)
        for other in index + 1 + np.flatnonzero(distance <= hash_distance):
            a, b = prints[ids[index]], prints[ids[other]]
            if float(np.abs(a.thumbnail - b.thumbnail).mean()) < thumbnail_difference:
                pairs.append((ids[index], ids[other]))
    return pairs


def _compare_with_split(dataset: PolypDataset, split: str, report: CheckReport) -> None:
    try:
        parts = dataset.split(split)
    except UsageError:
        return  # the dataset has no such split
    report.across_splits[split] = _straddling(report.near_duplicates, parts)


def _straddling(pairs: Iterable[tuple[str, str]], parts: dict[str, list[str]]) -> list[dict[str, Any]]:
    part_of = {record_id: part for part, ids in parts.items() for record_id in ids}
    return [
        {"a": a, "b": b, "parts": f"{part_of[a]}/{part_of[b]}"}
        for a, b in pairs
        if a in part_of and b in part_of and part_of[a] != part_of[b]
    ]
