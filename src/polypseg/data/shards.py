"""Tar shards of a corpus in WebDataset's layout: a hundred large files instead of 100,000 small ones.

Each image is decoded before it goes in, so a run that reads the shards meets no damaged file. Shard k holds the frames
k * n to (k + 1) * n - 1 of the source without the unreadable ones, and its bytes depend on nothing else: writing can
stop anywhere and go on later.
"""

import io
import itertools
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from polypseg.data.corpus import (
    INDEX,
    MANIFEST,
    PARTIAL,
    FrameStore,
    Manifest,
    Shard,
    ShardPlan,
    index_shards,
    read_record,
)
from polypseg.data.images import decode_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import atomic_path, explain_write_errors, file_sha256, sole_writer, write_json

FORMAT = 1
_PLAN = "plan.json"
_AT_ONCE = 32  # frames read and decoded side by side; bounds memory
_MANY = 10  # unreadable frames of one shard which, if they are more than half, mean that the source has gone


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """A complete set of shards."""

    folder: Path
    frames: int
    shards: int
    bytes: int
    unreadable: tuple[str, ...]
    """Names in the source of frames that were left out."""
    written: int
    """Shards that this call wrote; the others were there."""


def write_shards(frames: FrameStore, folder: Path, *, images_per_shard: int = 1000) -> ShardReport:
    """Write ``folder/shard-000000.tar`` and so on, an index and a manifest; a second call completes what is missing.

    Raises UsageError when the folder holds something else, PolypSegError for a full disk, a read-only folder or a
    source most of which cannot be read.
    """
    plan = ShardPlan(format=FORMAT, source=frames.content_id, images_per_shard=images_per_shard)
    with sole_writer(folder):
        records = _finished(folder, plan)
        starts = range(0, len(frames), images_per_shard)
        missing = [n for n in range(len(starts)) if not _is_there(folder, records.get(_shard_name(n)))]
        if missing or not _is_complete(folder):
            write_json(folder / PARTIAL / _PLAN, asdict(plan))
            _write_missing(frames, folder, records, missing=missing, images_per_shard=images_per_shard)
            _complete(folder, plan, [records[_shard_name(n)] for n in range(len(starts))])
        return _report(folder, written=len(missing))


def verify_shards(folder: Path) -> ShardReport:
    """Read a complete set again and compare checksums. Raises PolypSegError naming the damaged files and the remedy."""
    if not (folder / MANIFEST).exists():
        raise UsageError(f"{folder} has no {MANIFEST}: only complete sets of `polypseg data shard` can be verified")
    manifest = read_record(Manifest, folder / MANIFEST)
    expected = {shard.name: shard.sha256 for shard in manifest.shards} | {INDEX: manifest.index_sha256}
    damaged = [
        name
        for name, digest in tqdm(expected.items(), desc="verifying shards", unit="file", leave=False, disable=None)
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]
    if damaged:
        raise PolypSegError(
            f"{len(damaged)} of {len(expected)} files in {folder} are damaged or missing: {', '.join(damaged[:5])}. "
            "Delete them and run polypseg data shard again; it writes only what is missing"
        )
    return _report(folder, written=0)


def _report(folder: Path, *, written: int) -> ShardReport:
    shards = read_record(Manifest, folder / MANIFEST).shards
    return ShardReport(
        folder=folder,
        frames=sum(shard.frames for shard in shards),
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        unreadable=tuple(itertools.chain.from_iterable(shard.unreadable for shard in shards)),
        written=written,
    )


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _finished(folder: Path, plan: ShardPlan) -> dict[str, Shard]:
    """Records of the shards that an earlier call with the same plan finished. Raises UsageError for other content."""
    manifest = read_record(Manifest, folder / MANIFEST) if (folder / MANIFEST).exists() else None
    started = [read_record(ShardPlan, file) for file in [folder / PARTIAL / _PLAN] if file.exists()]
    plans = started + ([manifest.plan] if manifest else [])
    if not plans and any(folder.glob("*.tar")):
        raise UsageError(f"{folder} holds tar files of something else: choose another folder")
    if any(other != plan for other in plans):
        raise UsageError(f"{folder} holds shards of other frames or of another size: choose another folder")
    records = [read_record(Shard, file) for file in sorted((folder / PARTIAL).glob("shard-*.json"))]
    return {shard.name: shard for shard in [*(manifest.shards if manifest else ()), *records]}


def _is_there(folder: Path, record: Shard | None) -> bool:
    file = folder / record.name if record else None
    return bool(file and record and file.is_file() and file.stat().st_size == record.bytes)


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and (folder / INDEX).exists() and not (folder / PARTIAL).exists()


def _write_missing(
    frames: FrameStore, folder: Path, records: dict[str, Shard], *, missing: list[int], images_per_shard: int
) -> None:
    """Write the missing shards and record each in ``records`` and on disk."""
    names = member_names(frames) if missing else []
    done = len(frames) - sum(min(images_per_shard, len(frames) - n * images_per_shard) for n in missing)
    with tqdm(total=len(frames), initial=done, desc="writing shards", unit="image", leave=False, disable=None) as bar:
        for number in missing:
            begin = number * images_per_shard
            span = range(begin, min(begin + images_per_shard, len(frames)))
            record = _write_shard(frames, folder / _shard_name(number), span=span, names=names, bar=bar)
            records[record.name] = record
            write_json(folder / PARTIAL / f"{record.name}.json", asdict(record))


def member_names(frames: FrameStore) -> list[str]:
    """Names inside the shards, one a frame: WebDataset takes what precedes the first dot for the example's key.

    So other dots become underscores, and frames that would then share a key get more of them.
    """
    taken, names = set(), []
    for index in range(len(frames)):
        path = PurePosixPath(frames.name(index).lstrip("/"))
        key = str(path.with_suffix("")).replace(".", "_")
        while key in taken:
            key += "_"
        taken.add(key)
        names.append(key + path.suffix.lower())
    return names


def _write_shard(frames: FrameStore, path: Path, *, span: range, names: list[str], bar: "tqdm[Any]") -> Shard:
    """One shard, whole or not at all."""
    unreadable: list[str] = []
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for index, data in _readable(frames, span):
                bar.update()
                if data is None:
                    unreadable.append(frames.name(index))
                    _check_source(frames, unreadable, span)
                    continue
                archive.addfile(_member(names[index], len(data)), io.BytesIO(data))
        return Shard(
            name=path.name,
            sha256=file_sha256(temporary),
            bytes=temporary.stat().st_size,
            frames=len(span) - len(unreadable),
            unreadable=tuple(unreadable),
        )


def _check_source(frames: FrameStore, unreadable: list[str], span: range) -> None:
    if len(unreadable) > max(_MANY, len(span) / 2):
        raise PolypSegError(
            f"most of the frames {span.start} to {span.stop - 1} of {frames.path} cannot be read, first "
            f"{unreadable[0]}: check the source"
        )


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A header that holds nothing of this machine or moment: TarInfo's owner, mode and time are fixed."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _readable(frames: FrameStore, span: range) -> Iterator[tuple[int, bytes | None]]:
    """Each frame's bytes in order, None where they cannot be read and fully decoded; in threads, as Pillow allows."""

    def read(index: int) -> tuple[int, bytes | None]:
        try:
            data = frames.read(index)
            decode_frame(data, name=frames.name(index))
        except PolypSegError:
            return index, None
        return index, data

    with ThreadPoolExecutor() as pool:
        for begin in range(span.start, span.stop, _AT_ONCE):
            yield from pool.map(read, range(begin, min(begin + _AT_ONCE, span.stop)))


def _complete(folder: Path, plan: ShardPlan, shards: list[Shard]) -> None:
    """Index and manifest of finished shards; the manifest makes the set complete."""
    index = index_shards([folder / shard.name for shard in shards])
    counts = np.bincount(index[:, 0], minlength=len(shards)).tolist()
    for shard, count in zip(shards, counts, strict=True):
        if count != shard.frames:
            raise PolypSegError(f"{folder / shard.name} has changed: delete it and run polypseg data shard again")
    with atomic_path(folder / INDEX) as temporary:
        np.save(temporary, index)
        digest = file_sha256(temporary)
    manifest = Manifest(plan=plan, frames=len(index), index_sha256=digest, shards=tuple(shards))
    write_json(folder / MANIFEST, asdict(manifest))
    with explain_write_errors(folder / PARTIAL):
        shutil.rmtree(folder / PARTIAL)
