"""What pretraining may rely on from a corpus: the same frames in every form, little memory, clear refusals."""

import gc
import io
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from polypseg.data import corpus as frames_module
from polypseg.data.corpus import FrameStore, PositionedFiles, ShardFrames, open_frames, scan_tar
from polypseg.errors import PolypSegError, UsageError

FILES = {f"corpus/{kind}/{n}.jpg": random.Random(f"{kind}{n}").randbytes(700 + n) for kind in "ba" for n in (2, 10, 1)}
FILES |= {"corpus/a/top.PNG": b"png" * 200}
LITTER = {
    "__MACOSX/a/._1.jpg": b"fork",
    "corpus/a/._1.jpg": b"fork",
    "corpus/.cache/1.jpg": b"thumb",
    "readme.md": b"#",
}
FORMS = ("folder", "zip", "stored zip", "shards", "tar")


def add_to_tar(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def build(path: Path, form: str, files: dict[str, bytes]) -> Path:
    """Write ``files`` in the given form; shards are made by hand, two files each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "folder":
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif form.endswith("zip"):
        method = zipfile.ZIP_STORED if form == "stored zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in reversed(files.items()):
                archive.writestr(name, data)
    elif form == "tar":
        with tarfile.open(path, "w") as archive:
            for name, data in sorted(files.items()):
                add_to_tar(archive, name, data)
    else:
        path.mkdir()
        names = sorted(files)
        for number in range(0, len(names), 2):
            build(path / f"{number:03d}.tar", "tar", {name: files[name] for name in names[number : number + 2]})
    return path


def contents(frames: FrameStore) -> list[tuple[str, bytes]]:
    return [(frames.name(index), frames.read(index)) for index in range(len(frames))]


def refusal(action) -> PolypSegError:
    with pytest.raises(PolypSegError) as raised:
        action()
    return raised.value


@pytest.mark.parametrize("form", FORMS)
def test_frames_are_the_same_in_every_form_sorted_and_without_litter(tmp_path, form):
    frames = open_frames(build(tmp_path / "corpus", form, FILES | LITTER))
    assert contents(frames) == sorted(FILES.items())
    assert frames.path == tmp_path / "corpus"


@pytest.mark.parametrize("form", FORMS)
def test_frames_can_be_read_in_any_order_and_again(tmp_path, form):
    frames, expected = open_frames(build(tmp_path / "corpus", form, FILES)), sorted(FILES.items())
    for index in (5, 0, 6, 0, 3, 5):
        assert (frames.name(index), frames.read(index)) == expected[index]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("pattern", "kinds"), [("a", "a"), ("A|b", "ab"), ("[b-z]", "b"), (".*", "ab")])
def test_corpus_folder_chooses_by_the_whole_parent_folder(tmp_path, form, pattern, kinds):
    frames = open_frames(build(tmp_path / "corpus", form, FILES), corpus_folder=pattern)
    assert contents(frames) == sorted((n, d) for n, d in FILES.items() if n.split("/")[1] in kinds)


@pytest.mark.parametrize("form", FORMS)
def test_frames_survive_pickling_without_open_files(tmp_path, form):
    """Worker processes may receive the store by pickle, also after it was read from."""
    frames = open_frames(build(tmp_path / "corpus", form, FILES))
    frames.read(0)
    copy = pickle.loads(pickle.dumps(frames))
    assert type(copy) is type(frames) and contents(copy) == contents(frames)
    assert copy.content_id == frames.content_id


def read_often(frames: FrameStore, seed: int) -> None:
    expected, order = sorted(FILES.items()), random.Random(seed)
    for _ in range(3000):
        index = order.randrange(len(frames))
        assert frames.read(index) == expected[index][1]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.parametrize("form", ["zip", "stored zip", "shards"])
def test_forked_processes_do_not_disturb_each_other(tmp_path, form):
    """They inherit the open archive; reading through a shared file position would mix up their bytes."""
    frames = open_frames(build(tmp_path / "corpus", form, FILES))
    frames.read(0)
    workers = [multiprocessing.get_context("fork").Process(target=read_often, args=(frames, s)) for s in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_content_id_depends_on_names_and_sizes_but_not_on_the_place(tmp_path, form):
    def identity(place: str, files: dict[str, bytes]) -> str:
        (tmp_path / place).mkdir()
        return open_frames(build(tmp_path / place / "corpus", form, files)).content_id

    before = identity("one", FILES)
    assert len(before) == 16 and int(before, 16) >= 0
    assert identity("two", FILES) == before
    first, *rest = sorted(FILES)
    longer = FILES | {first: FILES[first] + b"x" * 600}
    fewer = {name: FILES[name] for name in rest}
    assert len({before, identity("three", longer), identity("four", fewer)}) == 3


@pytest.mark.parametrize("form", ["folder", "zip", "stored zip"])
def test_content_id_follows_a_renamed_frame(tmp_path, form):
    renamed = {name.replace("b/2.", "b/3."): data for name, data in FILES.items()}
    one, two = (open_frames(build(tmp_path / str(n), form, f)) for n, f in enumerate((FILES, renamed)))
    assert one.content_id != two.content_id


def test_content_id_of_a_zip_follows_a_single_bit(tmp_path):
    name = next(iter(FILES))
    changed = FILES | {name: bytes([FILES[name][0] ^ 1]) + FILES[name][1:]}
    one, two = (open_frames(build(tmp_path / str(n), "zip", f)) for n, f in enumerate((FILES, changed)))
    assert one.content_id != two.content_id


@pytest.mark.parametrize("form", FORMS)
def test_content_id_reads_no_image(tmp_path, form, monkeypatch):
    path = build(tmp_path / "corpus", form, FILES)
    for kind in ("SourceFrames", "FolderSource", "ZipSource", "ShardFrames"):
        monkeypatch.setattr(getattr(frames_module, kind), "read", lambda *_: pytest.fail("read an image"))
    assert open_frames(path).content_id


# -- shards of others --------------------------------------------------------------------------------------------------


def test_shards_of_others_may_hold_more_than_images(tmp_path):
    """WebDataset puts labels beside images; other tools write ./ names, folders, links and long names."""
    long = "class/" + "x" * 180 + "é.jpg"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        folder = tmp_path / str(kind)
        folder.mkdir()
        with tarfile.open(folder / "b.tar", "w", format=kind) as archive:
            for name, data in (("./z/2.jpg", b"two"), ("./z/2.cls", b"7" * 1500), (long, b"long"), ("z/1.jpeg", b"1")):
                add_to_tar(archive, name, data)
            link = tarfile.TarInfo("z/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "2.jpg"
            archive.addfile(link)
            directory = tarfile.TarInfo("z/folder.jpg")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            add_to_tar(archive, "z/0.webp.png", b"last")
        build(folder / "a.tar", "tar", {"z/9.jpg": b"first"})
        expected = [("z/9.jpg", b"first"), ("z/2.jpg", b"two"), (long, b"long"), ("z/1.jpeg", b"1")]
        assert contents(open_frames(folder)) == [*expected, ("z/0.webp.png", b"last")]


def test_shards_of_others_are_scanned_once(tmp_path, monkeypatch):
    path = build(tmp_path / "corpus", "shards", FILES)
    expected = contents(open_frames(path))
    with monkeypatch.context() as patch:
        patch.setattr(frames_module, "index_shards", lambda *_, **__: pytest.fail("scanned again"))
        frames = open_frames(path)
    assert contents(frames) == expected
    build(path / "999.tar", "tar", {"more/1.jpg": b"new"})
    assert contents(open_frames(path)) == [*expected, ("more/1.jpg", b"new")]


def test_shards_beside_extracted_images_are_not_taken_for_the_corpus(tmp_path):
    path = build(tmp_path / "corpus", "folder", FILES)
    build(path / "left-over.tar", "tar", {"a/1.jpg": b"other"})
    assert contents(open_frames(path)) == sorted(FILES.items())


def test_index_of_shards_is_mapped_not_held(tmp_path):
    frames = open_frames(build(tmp_path / "corpus", "shards", FILES))
    assert isinstance(frames, ShardFrames)
    assert isinstance(frames._index, np.memmap)
    assert len(pickle.dumps(frames)) < 2000


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_open_frames_calls_a_missing_path_a_usage_error(tmp_path):
    error = refusal(lambda: open_frames(tmp_path / "nowhere"))
    assert type(error) is UsageError and f"{tmp_path / 'nowhere'} does not exist" in str(error)


@pytest.mark.parametrize("form", FORMS)
def test_open_frames_calls_a_source_without_images_a_usage_error(tmp_path, form):
    path = build(tmp_path / "corpus", form, {"notes/readme.md": b"#", "notes/a.json": b"{}"})
    error = refusal(lambda: open_frames(path))
    assert type(error) is UsageError and f"no images in {path}" in str(error)


@pytest.mark.parametrize("form", FORMS)
def test_open_frames_names_the_pattern_that_matches_no_folder(tmp_path, form):
    path = build(tmp_path / "corpus", form, FILES)
    error = refusal(lambda: open_frames(path, corpus_folder="polyps"))
    assert type(error) is UsageError and "'polyps'" in str(error)


def test_open_frames_refuses_a_pattern_that_is_none(tmp_path):
    path = build(tmp_path / "corpus", "folder", FILES)
    error = refusal(lambda: open_frames(path, corpus_folder="a("))
    assert type(error) is UsageError and "'a('" in str(error)


def test_open_frames_refuses_a_compressed_tar(tmp_path):
    with tarfile.open(tmp_path / "corpus.tar.gz", "w:gz") as archive:
        add_to_tar(archive, "a/1.jpg", b"1")
    error = refusal(lambda: open_frames(tmp_path / "corpus.tar.gz"))
    assert type(error) is UsageError and "extract it" in str(error)


def test_open_frames_refuses_an_encrypted_zip(tmp_path):
    path = build(tmp_path / "corpus.zip", "stored zip", {"a/1.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag in the directory
    path.write_bytes(data)
    error = refusal(lambda: open_frames(path))
    assert type(error) is UsageError and "a/1.jpg" in str(error) and "encrypted" in str(error)


def test_folder_names_the_frame_that_vanished(tmp_path):
    frames = open_frames(build(tmp_path / "corpus", "folder", FILES))
    (tmp_path / "corpus" / frames.name(3)).unlink()
    assert frames.name(3) in str(refusal(lambda: frames.read(3)))
    assert frames.name(3) in str(refusal(lambda: frames.content_id))
    assert frames.read(2)


@pytest.mark.parametrize(("form", "where"), [("zip", 3), ("stored zip", 100), ("stored zip", 0)])
def test_zip_names_the_frame_whose_bytes_are_damaged(tmp_path, form, where):
    path = build(tmp_path / "corpus.zip", form, {"a/1.jpg": b"polyp" * 100, "a/2.jpg": b"colon" * 100})
    data = bytearray(path.read_bytes())
    data[data.index(b"a/1.jpg") + len(b"a/1.jpg") + where] ^= 0xFF
    path.write_bytes(data)
    frames = open_frames(path)
    error = refusal(lambda: frames.read(0))
    assert "a/1.jpg" in str(error) and str(path) in str(error)
    assert frames.read(1) == b"colon" * 100


def test_zip_with_a_damaged_header_is_refused(tmp_path):
    path = build(tmp_path / "corpus.zip", "stored zip", {"a/1.jpg": b"polyp" * 100})
    path.write_bytes(b"XX" + path.read_bytes()[2:])
    assert "a/1.jpg" in str(refusal(lambda: open_frames(path).read(0)))


@pytest.mark.parametrize("form", ["zip", "shards"])
def test_archives_that_vanish_or_shrink_are_a_clear_error(tmp_path, form):
    path = build(tmp_path / "corpus", form, FILES)
    frames = open_frames(path)
    file = path if form == "zip" else path / "000.tar"
    os.truncate(file, 20)
    error = str(refusal(lambda: frames.read(0)))
    assert str(file) in error and ("corpus/a/1.jpg" if form == "zip" else "frame 0") in error
    file.unlink()
    assert str(file) in str(refusal(lambda: pickle.loads(pickle.dumps(frames)).read(0)))
    assert str(path) in str(refusal(lambda: open_frames(file)))


def test_shard_that_is_cut_off_is_refused_at_once(tmp_path):
    path = build(tmp_path / "corpus", "shards", FILES)
    os.truncate(path / "002.tar", 700)
    assert str(path / "002.tar") in str(refusal(lambda: open_frames(path)))


def test_shard_with_a_damaged_header_is_refused(tmp_path):
    """tarfile would take it for the end of the archive and drop the rest in silence."""
    path = build(tmp_path / "corpus.tar", "tar", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(b"corpus/a/2.jpg")] ^= 0xFF
    path.write_bytes(data)
    assert "not a readable tar" in str(refusal(lambda: list(scan_tar(path))))


def test_incomplete_shards_are_refused(tmp_path):
    path = build(tmp_path / "corpus", "shards", FILES)
    (path / frames_module.PARTIAL).mkdir()
    assert "polypseg data shard" in str(refusal(lambda: open_frames(path)))


# -- resources ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be counted on this system")
def test_a_process_holds_few_open_files(tmp_path):
    for number in range(100):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    gc.collect()  # stores of other tests close their files now, not while this one counts
    files, before = PositionedFiles(), len(os.listdir("/proc/self/fd"))
    for number in [*range(100), *range(100)]:
        assert files.read(tmp_path / str(number), offset=3, size=2) == bytes([number]) * 2
    assert len(os.listdir("/proc/self/fd")) - before == PositionedFiles.limit
    del files
    assert len(os.listdir("/proc/self/fd")) == before


MEASURE = """
import resource, sys
from pathlib import Path
from polypseg.data.corpus import open_frames

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

for path in sys.argv[1:]:
    frames = open_frames(Path(path))
    for index in range(20):
        frames.read(index)
    before = resident()
    for _ in range(20):
        for index in range(len(frames)):
            frames.read(index)
    print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory cannot be measured on this system")
def test_memory_does_not_grow_with_the_frames_read(tmp_path):
    """200 MB are read from each form; observed growth 0, where keeping each frame once would need 10 MB."""
    files = {f"a/{n:03d}.jpg": random.Random(n).randbytes(100_000) for n in range(100)}
    paths = [build(tmp_path / form, form, files) for form in FORMS]
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    grown = dict(zip(FORMS, map(int, done.stdout.split()), strict=True))
    assert max(grown.values()) < 3_000_000, grown
