"""Is a dataset what its table row says? Files, pairing, sizes, masks, duplicates inside and across splits."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polypseg.data.catalog import get_spec
from polypseg.data.duplicates import Fingerprint, fingerprint, near_duplicates
from polypseg.data.images import describe_file
from polypseg.data.polyps import PolypDataset, chosen_values, index_records
from polypseg.data.sources import Source, open_source
from polypseg.data.splits import DESCRIPTIONS
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import write_json, write_text


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
    report.images = len(dataset.records)
    try:
        report.content_id = dataset.content_id
    except PolypSegError as error:  # a file that cannot be read
        report.problems.append(str(error))
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
            if str(error) not in report.problems:
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
