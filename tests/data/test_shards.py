"""What a user may rely on from ``polypseg data shard``: standard files, the same bytes always, nothing half done."""

import errno
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.cli.app import app
from polypseg.cli.console import run_app
from polypseg.data import shards as shards_module
from polypseg.data.corpus import PARTIAL, FrameStore, ShardFrames, SourceFrames, open_frames
from polypseg.data.shards import ShardReport, member_names, verify_shards, write_shards
from polypseg.data.sources import FolderSource
from polypseg.errors import PolypSegError, UsageError


def encode(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24 + seed, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


FILES = {f"class-{n % 3}/{n:03d}.jpg": encode(n) for n in range(20)} | {"class-0/odd.v1.PNG": encode(5, "PNG")}
BROKEN = {"class-1/004.jpg": FILES["class-1/004.jpg"][:400], "class-2/zero.jpg": b""}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def corpus(tmp_path) -> FrameStore:
    return open_frames(write_files(tmp_path / "corpus", FILES))


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "out" / "shards"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file in the folder, hidden ones included."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.rglob("*")}


def members(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file, "r:") as archive:
            found += [(member, archive.extractfile(member).read()) for member in archive]
    return found


def refusal(action: Callable[[], object]) -> PolypSegError:
    with pytest.raises(PolypSegError) as raised:
        action()
    return raised.value


# -- form --------------------------------------------------------------------------------------------------------------


def test_shards_give_the_frames_of_the_folder(corpus, target):
    report = write_shards(corpus, target, images_per_shard=8)
    frames = open_frames(target)
    assert isinstance(frames, ShardFrames)
    assert [frames.read(i) for i in range(len(frames))] == [corpus.read(i) for i in range(len(corpus))]
    names = [corpus.name(i).replace("odd.v1.PNG", "odd_v1.png") for i in range(len(corpus))]
    assert [frames.name(i) for i in range(len(frames))] == names
    assert report == ShardReport(
        folder=target,
        frames=21,
        shards=3,
        bytes=sum(file.stat().st_size for file in target.glob("*.tar")),
        unreadable=(),
        written=3,
    )
    assert sorted(file.name for file in target.iterdir()) == [
        "index.npy",
        *(f"shard-00000{n}.tar" for n in range(3)),
        "shards.json",
    ]


def test_shards_keep_classes_apart_by_parent_folder(corpus, target):
    write_shards(corpus, target, images_per_shard=8)
    chosen = open_frames(target, corpus_folder="class-1")
    expected = open_frames(corpus.path, corpus_folder="class-1")
    assert [chosen.name(i) for i in range(len(chosen))] == [expected.name(i) for i in range(len(expected))]
    assert chosen.content_id != open_frames(target).content_id


def test_members_follow_webdatasets_rules_and_carry_nothing_of_the_machine(corpus, target):
    write_shards(corpus, target, images_per_shard=8)
    found = [member for member, _ in members(target)]
    assert len(found) == len(FILES)
    for member in found:
        assert re.fullmatch(r"[^.]+\.(jpg|png)", member.name), "the key ends at the first dot"
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o644 and member.isreg() and not member.pax_headers
    assert "class-0/odd_v1.png" in {member.name for member in found}


def test_member_names_are_unique_keys(tmp_path):
    names = ["a/1.jpg", "a/1.png", "a/x.y.jpg", "a/x_y.jpg", "a/x_y_.jpg", "a.b/1.JPEG", "a_b/1.tif"]
    frames = SourceFrames(FolderSource(write_files(tmp_path, dict.fromkeys(names, b""))))
    made = dict(zip((frames.name(i) for i in range(len(frames))), member_names(frames), strict=True))
    keys = [name.split(".")[0] for name in made.values()]
    assert len(set(keys)) == len(names)
    assert {Path(name).suffix.lower() for name in names} == {"." + name.split(".")[1] for name in made.values()}
    assert made["a/1.jpg"] == "a/1.jpg" and made["a/1.png"] == "a/1_.png"


def test_long_and_foreign_names_survive(tmp_path, target):
    names = ["k/" + "n" * 150 + ".jpg", "é/ü.jpg", "/".join(["deep" * 12] * 4) + "/1.jpg"]
    corpus = open_frames(write_files(tmp_path / "corpus", dict.fromkeys(names, encode(1))))
    write_shards(corpus, target)
    frames = open_frames(target)
    assert sorted(frames.name(i) for i in range(3)) == sorted(names)
    assert {frames.read(i) for i in range(3)} == {encode(1)}


def test_datasets_reads_the_shards_as_webdataset(corpus, target):
    """The Hub's own loader: one example an image, in order, under WebDataset's key."""
    datasets = pytest.importorskip("datasets")
    write_shards(corpus, target, images_per_shard=8)
    files = [str(file) for file in sorted(target.glob("*.tar"))][:2]
    loaded = datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
    rows = list(loaded.cast_column("jpg", datasets.Image(decode=False)))
    names = [name for name in sorted(FILES) if name.endswith("jpg")]
    assert [f"{row['__key__']}.jpg" for row in rows if row["jpg"]] == names[: len([r for r in rows if r["jpg"]])]
    assert all(row["jpg"]["bytes"] == FILES[f"{row['__key__']}.jpg"] for row in rows if row["jpg"])
    assert len(rows) == 16


# -- determinism -------------------------------------------------------------------------------------------------------


def test_shards_are_the_same_to_the_byte_when_written_again(corpus, target, tmp_path):
    write_shards(corpus, target, images_per_shard=8)
    write_shards(open_frames(corpus.path), tmp_path / "again", images_per_shard=8)
    assert snapshot(tmp_path / "again") == snapshot(target)


def test_shards_are_the_same_from_folder_and_zip(corpus, target, tmp_path):
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    write_shards(corpus, target)
    write_shards(open_frames(tmp_path / "corpus.zip"), tmp_path / "zipped")
    assert members(target)[3][1] == members(tmp_path / "zipped")[3][1]
    assert (target / "shard-000000.tar").read_bytes() == (tmp_path / "zipped" / "shard-000000.tar").read_bytes()


def test_a_second_call_writes_nothing(corpus, target):
    write_shards(corpus, target, images_per_shard=8)
    before = times(target)
    report = write_shards(corpus, target, images_per_shard=8)
    assert times(target) == before
    assert (report.written, report.frames, report.shards) == (0, 21, 3)


class Interrupted:
    """A corpus whose reading the user stops at a frame."""

    def __init__(self, frames: FrameStore, *, at: int):
        self.frames, self.at, self.path, self.content_id = frames, at, frames.path, frames.content_id

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        return self.frames.name(index)

    def read(self, index: int) -> bytes:
        if index == self.at:
            raise KeyboardInterrupt
        return self.frames.read(index)


@pytest.mark.parametrize("at", [0, 7, 8, 13, 20])
def test_interrupted_writing_goes_on_where_it_stopped(corpus, target, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(corpus, at=at), target, images_per_shard=8)
    finished = times(target)
    assert len(list(target.glob("*.tar"))) == at // 8
    assert not [name for name in finished if name.startswith(".")], "no temporary file stays"
    assert "run polypseg data shard" in str(refusal(lambda: open_frames(target)))
    report = write_shards(corpus, target, images_per_shard=8)
    assert report.written == 3 - at // 8
    assert {n: t for n, t in times(target).items() if n.endswith(".tar") and n in finished} == {
        n: t for n, t in finished.items() if n.endswith(".tar")
    }
    write_shards(corpus, tmp_path / "at once", images_per_shard=8)
    assert snapshot(target) == snapshot(tmp_path / "at once")


def test_interruption_before_the_manifest_is_an_incomplete_set(corpus, target, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards_module, "index_shards", stop)
        write_shards(corpus, target, images_per_shard=8)
    assert "incomplete" in str(refusal(lambda: open_frames(target)))
    assert write_shards(corpus, target, images_per_shard=8).written == 0
    assert len(open_frames(target)) == 21 and not (target / PARTIAL).exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def test_unreadable_frames_are_left_out_and_listed(tmp_path, target):
    corpus = open_frames(write_files(tmp_path / "corpus", FILES | BROKEN))
    report = write_shards(corpus, target, images_per_shard=8)
    assert report.unreadable == tuple(sorted(BROKEN))
    frames = open_frames(target)
    assert report.frames == len(frames) == 20
    good = [name for name in sorted(FILES) if name not in BROKEN and name.endswith(".jpg")]
    assert [n for n in (frames.name(i) for i in range(20)) if n.endswith(".jpg")] == good
    listed = [
        name for shard in json.loads((target / "shards.json").read_text())["shards"] for name in shard["unreadable"]
    ]
    assert listed == sorted(BROKEN)


def test_a_source_that_went_away_is_not_taken_for_damaged_frames(tmp_path, target):
    files = {f"{n:03d}.jpg": encode(n % 9) for n in range(40)}
    corpus = open_frames(write_files(tmp_path / "corpus", files))
    assert corpus.content_id
    shutil.rmtree(corpus.path)
    error = refusal(lambda: write_shards(corpus, target))
    assert "check the source" in str(error) and "000.jpg" in str(error)
    assert not list(target.glob("*.tar"))


def flip(file: Path, *, where: int) -> None:
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy"])
def test_verify_names_the_file_with_a_flipped_bit_and_the_remedy_works(corpus, target, name):
    write_shards(corpus, target, images_per_shard=8)
    intact = snapshot(target)
    assert verify_shards(target).frames == 21
    flip(target / name, where=len(intact[name]) // 2)
    error = refusal(lambda: verify_shards(target))
    assert type(error) is PolypSegError
    assert name in str(error) and "Delete them and run polypseg data shard again" in str(error)
    (target / name).unlink()
    report = write_shards(corpus, target, images_per_shard=8)
    assert report.written == (1 if name.endswith(".tar") else 0)
    assert snapshot(target) == intact
    assert verify_shards(target).shards == 3


def test_a_missing_or_short_shard_is_noticed_on_opening_and_written_again(corpus, target):
    write_shards(corpus, target, images_per_shard=8)
    intact = snapshot(target)
    for damage in (Path.unlink, lambda file: file.write_bytes(intact[file.name][:900])):
        damage(target / "shard-000002.tar")
        assert "shard-000002.tar is missing or cut off" in str(refusal(lambda: open_frames(target)))
        assert "shard-000002.tar" in str(refusal(lambda: verify_shards(target)))
        assert write_shards(corpus, target, images_per_shard=8).written == 1
        assert snapshot(target) == intact


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_index_is_refused(corpus, target, content):
    write_shards(corpus, target)
    (target / "index.npy").write_bytes(content)
    assert "index.npy" in str(refusal(lambda: open_frames(target)))


@pytest.mark.parametrize("content", ["", "{}", '{"shards": 3}', '{"shards": [{}]}'])
def test_a_damaged_manifest_is_refused(corpus, target, content):
    write_shards(corpus, target)
    (target / "shards.json").write_text(content)
    for action in (lambda: open_frames(target), lambda: verify_shards(target)):
        assert "shards.json" in str(refusal(action))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_write_shards_refuses_a_folder_with_other_content(corpus, target, tmp_path):
    write_shards(corpus, target, images_per_shard=8)
    before = snapshot(target)
    other = open_frames(write_files(tmp_path / "other", {"a/1.jpg": encode(1)}))
    for frames, size in ((corpus, 7), (other, 8)):
        error = refusal(lambda frames=frames, size=size: write_shards(frames, target, images_per_shard=size))
        assert type(error) is UsageError and "choose another folder" in str(error)
    assert snapshot(target) == before


def test_write_shards_never_touches_tar_files_of_others(corpus, target):
    target.mkdir(parents=True)
    with tarfile.open(target / "shard-000000.tar", "w"):
        pass
    before = snapshot(target)
    assert type(refusal(lambda: write_shards(corpus, target))) is UsageError
    assert snapshot(target) == before


def test_verify_shards_needs_a_manifest(tmp_path):
    assert type(refusal(lambda: verify_shards(tmp_path))) is UsageError


def test_a_full_disk_is_one_clear_error_and_leaves_only_finished_shards(corpus, target, monkeypatch):
    original, calls = tarfile.TarFile.addfile, []

    def full(self: tarfile.TarFile, *arguments: object) -> None:
        calls.append(1)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        error = refusal(lambda: write_shards(corpus, target, images_per_shard=8))
    assert "shard-000001.tar: the disk is full" in str(error)
    assert [file.name for file in target.glob("*.tar")] == ["shard-000000.tar"]
    assert not list(target.glob(".*"))
    assert write_shards(corpus, target, images_per_shard=8).written == 2


def test_a_read_only_folder_is_one_clear_error(corpus, target, monkeypatch):
    def read_only(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    error = refusal(lambda: write_shards(corpus, target))
    assert type(error) is PolypSegError and str(target) in str(error) and "read-only" in str(error)


def test_a_target_below_a_file_is_one_clear_error(corpus, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert str(tmp_path / "file") in str(refusal(lambda: write_shards(corpus, tmp_path / "file" / "shards")))


# -- command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def polypseg(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Run the command inside this process: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polypseg", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_app(app)
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


def test_command_writes_verifies_and_says_what_was_left_out(polypseg, tmp_path, target):
    source = write_files(tmp_path / "corpus", FILES | BROKEN)
    code, out, err = polypseg("data", "shard", source, "--output", target, "--images-per-shard", 8, "--verify")
    assert code == 0, err
    assert "20 images in 3 shards" in out and "3 written now, all checksums right" in out
    assert "2 unreadable images were left out, first class-1/004.jpg, class-2/zero.jpg" in out
    code, out, _ = polypseg("data", "shard", source, "--output", target, "--images-per-shard", 8)
    assert code == 0 and "0 written now" in out


def test_command_reports_a_flipped_bit_in_one_line(polypseg, corpus, target):
    write_shards(corpus, target)
    flip(target / "shard-000000.tar", where=1500)
    code, _, err = polypseg("data", "shard", corpus.path, "--output", target, "--verify")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and "shard-000000.tar" in lines[0]


@pytest.mark.parametrize("count", [0, -1])
def test_command_refuses_shards_without_images(polypseg, corpus, target, count):
    code, _, _ = polypseg("data", "shard", corpus.path, "--output", target, "--images-per-shard", count)
    assert code == 2 and not target.exists()


def test_command_calls_a_missing_source_a_usage_error(polypseg, tmp_path, target):
    code, _, err = polypseg("data", "shard", tmp_path / "nowhere", "--output", target)
    assert code == 2 and "does not exist" in err and not target.exists()


# -- real frames -------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_frames_are_the_same_from_shards(real_data, target):
    frames = open_frames(real_data / "HyperKvasir-frames", corpus_folder="impacted-stool")
    report = write_shards(frames, target, images_per_shard=50)
    shards = open_frames(target)
    assert report.unreadable == () and len(shards) == len(frames) == 131
    for index in range(len(frames)):
        assert shards.name(index) == frames.name(index)
        assert hashlib.sha256(shards.read(index)).digest() == hashlib.sha256(frames.read(index)).digest()
