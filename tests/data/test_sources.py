"""What a user may rely on from folders and archives: the same files, an identity of content, clear refusals."""

import io
import os
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from polypseg.data import open_dataset
from polypseg.data.corpus import open_frames
from polypseg.data.images import as_frame
from polypseg.data.sources import IMAGE_SUFFIXES, FolderSource, TarSource, ZipSource, open_source
from polypseg.errors import PolypSegError, UsageError

FILES = {f"Set/images/{name}.jpg": random.Random(name).randbytes(500) for name in ("2", "10", "1")}
FILES |= {f"Set/masks/{name}.JPG": random.Random(name * 2).randbytes(300) for name in ("2", "10", "1")}
FILES |= {"Set/metadata.csv": b"id\n1\n"}
LITTER = {
    "__MACOSX/Set/images/._1.jpg": b"resource fork",
    "Set/images/._1.jpg": b"resource fork",
    "Set/.DS_Store": b"finder",
    "Set/.cache/thumb.png": b"thumbnail",
}
FORMS = ("folder", "zip", "stored zip", "tar", "tar.gz", "tar.xz")


def build(path, form, files):
    """Write ``files`` (name -> bytes) in the given form at ``path`` plus the form's suffix; return where."""
    if form == "folder":
        for name, data in files.items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if form.endswith("zip"):
        path = path.with_name(path.name + ".zip")
        method = zipfile.ZIP_STORED if form == "stored zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.mkdir("Set")
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    path = path.with_name(f"{path.name}.{form}")
    with tarfile.open(path, "w:" + form.removeprefix("tar").removeprefix(".")) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_source_gives_the_same_names_and_bytes_in_every_form(tmp_path, form):
    source = open_source(build(tmp_path / "set", form, FILES))
    assert source.names() == sorted(FILES)
    assert {name: source.read(name) for name in source.names()} == FILES


@pytest.mark.parametrize("form", FORMS)
def test_source_ignores_hidden_files_and_macos_litter(tmp_path, form):
    clean = open_source(build(tmp_path / "clean", form, FILES))
    littered = open_source(build(tmp_path / "littered", form, FILES | LITTER))
    assert littered.names() == clean.names()
    assert littered.content_id() == clean.content_id()


def test_folder_source_works_inside_a_hidden_folder(tmp_path):
    """Only names inside the set count: ~/.cache/data is a fine place for it."""
    assert open_source(build(tmp_path / ".cache" / "set", "folder", FILES)).names() == sorted(FILES)


# Identity


def first_image_changed(files):
    name = next(iter(files))
    return files | {name: bytes([files[name][0] ^ 1]) + files[name][1:]}


@pytest.mark.parametrize("form", FORMS)
def test_content_id_does_not_depend_on_the_place(tmp_path, form):
    here = open_source(build(tmp_path / "here", form, FILES))
    there = open_source(build(tmp_path / "other" / "there", form, FILES))
    assert here.content_id() == there.content_id()
    assert len(here.content_id()) == 16
    int(here.content_id(), 16)


@pytest.mark.parametrize("form", FORMS)
def test_content_id_does_not_depend_on_the_order_in_the_archive(tmp_path, form):
    reordered = dict(reversed(FILES.items()))
    ids = {open_source(build(tmp_path / n, form, f)).content_id() for n, f in (("a", FILES), ("b", reordered))}
    assert len(ids) == 1


@pytest.mark.parametrize("form", FORMS)
def test_content_id_follows_a_single_bit(tmp_path, form):
    before = open_source(build(tmp_path / "a", form, FILES)).content_id()
    assert open_source(build(tmp_path / "b", form, first_image_changed(FILES))).content_id() != before


@pytest.mark.parametrize("form", FORMS)
def test_content_id_follows_names(tmp_path, form):
    """Renamed so that the order stays: only the name itself can tell."""
    before = open_source(build(tmp_path / "a", form, FILES)).content_id()
    renamed = {name.replace("images/2.", "images/3."): data for name, data in FILES.items()}
    assert open_source(build(tmp_path / "b", form, renamed)).content_id() != before


@pytest.mark.parametrize("form", FORMS)
def test_content_id_follows_swapped_content(tmp_path, form):
    """Same names, same set of contents: only the assignment differs."""
    before = open_source(build(tmp_path / "a", form, FILES)).content_id()
    one, two = "Set/images/1.jpg", "Set/images/2.jpg"
    swapped = FILES | {one: FILES[two], two: FILES[one]}
    assert open_source(build(tmp_path / "b", form, swapped)).content_id() != before


@pytest.mark.parametrize("form", FORMS)
def test_content_id_follows_a_removed_file(tmp_path, form):
    before = open_source(build(tmp_path / "a", form, FILES)).content_id()
    fewer = {name: data for name, data in FILES.items() if name != "Set/masks/1.JPG"}
    assert open_source(build(tmp_path / "b", form, fewer)).content_id() != before


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_content_id_does_not_follow_the_clock(tmp_path, form):
    path = build(tmp_path / "set", form, FILES)
    before = open_source(path).content_id()
    for file in [path, *path.rglob("*")]:
        os.utime(file, (1_000_000_000, 1_000_000_000))
    assert open_source(path).content_id() == before


@pytest.mark.parametrize("form", ["folder", "stored zip"])
def test_content_id_sees_a_change_that_keeps_size_and_time(tmp_path, form):
    """What a cache keyed by size and modification time would miss."""
    path = build(tmp_path / "set", form, FILES)
    file = path / "Set/images/2.jpg" if form == "folder" else path
    before, status = open_source(path).content_id(), file.stat()
    build(tmp_path / "set", form, first_image_changed(FILES))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert open_source(path).content_id() != before


# Pickling


@pytest.mark.parametrize("form", ["folder", "zip", "tar.gz"])
def test_source_still_reads_after_pickling(tmp_path, form):
    """Workers receive datasets by pickle, also after the archive was opened."""
    source = open_source(build(tmp_path / "set", form, FILES))
    source.read("Set/images/1.jpg")
    copy = pickle.loads(pickle.dumps(source))
    assert type(copy) is type(source)
    assert {name: copy.read(name) for name in copy.names()} == FILES
    assert copy.content_id() == source.content_id()


# Refusals


def refusal(action):
    """The error that ``action`` raises."""
    with pytest.raises(PolypSegError) as raised:
        action()
    return raised.value


def test_open_source_calls_a_missing_path_a_usage_error(tmp_path):
    error = refusal(lambda: open_source(tmp_path / "nowhere"))
    assert type(error) is UsageError
    assert f"{tmp_path / 'nowhere'} does not exist" in str(error)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("pipe", "a named pipe"), ("link", "a link to nowhere, which does not exist"), ("device", "a device")],
)
def test_a_path_that_is_no_file_is_called_what_it_is(tmp_path, kind, words):
    """A pipe was waited for without end; a link to nothing "does not exist"."""
    path = tmp_path / "set.zip"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if kind == "link" else "/dev/null")
    for attempt in (lambda: open_source(path), lambda: open_frames(path), lambda: as_frame(path)):
        with pytest.raises(UsageError, match=rf"{path}:? (it )?is {words}"):
            attempt()


def test_open_source_says_what_to_do_with_rar(tmp_path):
    (tmp_path / "set.rar").write_bytes(b"Rar!\x1a\x07\x00")
    error = refusal(lambda: open_source(tmp_path / "set.rar"))
    assert type(error) is UsageError
    assert "set.rar is a RAR archive" in str(error)
    assert "extract it and give the folder" in str(error)


def test_open_source_calls_another_file_a_usage_error(tmp_path):
    (tmp_path / "notes.txt").write_text("not an archive")
    error = refusal(lambda: open_source(tmp_path / "notes.txt"))
    assert type(error) is UsageError
    assert "notes.txt is neither a folder nor a zip or tar archive" in str(error)


@pytest.mark.parametrize("share", [0, 0.2, 0.9])
def test_open_source_calls_a_cut_zip_damaged(tmp_path, share):
    """The request was right, the file is not: exit code 1, not 2."""
    path = build(tmp_path / "set", "zip", FILES)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    error = refusal(lambda: open_source(path))
    assert type(error) is PolypSegError
    assert str(path) in str(error)
    assert "download it again" in str(error)


def test_zip_source_names_the_file_whose_bytes_are_damaged(tmp_path):
    path = build(tmp_path / "set", "stored zip", FILES)
    data = bytearray(path.read_bytes())
    data[data.index(FILES["Set/images/10.jpg"]) + 100] ^= 0xFF
    path.write_bytes(data)
    source = open_source(path)
    error = refusal(lambda: source.read("Set/images/10.jpg"))
    assert type(error) is PolypSegError
    assert "Set/images/10.jpg" in str(error)
    assert str(path) in str(error)
    assert source.read("Set/images/1.jpg") == FILES["Set/images/1.jpg"]


def test_tar_source_calls_a_cut_archive_damaged(tmp_path):
    path = build(tmp_path / "set", "tar.gz", FILES)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    error = refusal(lambda: open_source(path).names())
    assert type(error) is PolypSegError
    assert str(path) in str(error)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_source_names_a_file_that_is_not_there(tmp_path, form):
    source = open_source(build(tmp_path / "set", form, FILES))
    assert "Set/images/99.jpg" in str(refusal(lambda: source.read("Set/images/99.jpg")))


def test_zip_source_that_vanished_is_a_clear_error(tmp_path):
    path = build(tmp_path / "set", "zip", FILES)
    source = open_source(path)
    path.unlink()
    assert str(path) in str(refusal(source.names))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips_of_rare_methods_are_read_and_are_no_corpus(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    source = open_source(tmp_path / "set.zip")
    assert {name: source.read(name) for name in source.names()} == FILES
    assert source.content_id() == open_source(build(tmp_path / "plain", "zip", FILES)).content_id()
    with pytest.raises(UsageError, match=r"Set/images/1\.jpg in .*set\.zip is encrypted or compressed in a rare way"):
        open_frames(tmp_path / "set.zip")


@pytest.mark.parametrize(("size", "words"), [(2**32 - 2, "ends too early"), (2**63, "is not a readable zip archive")])
def test_a_directory_that_promises_more_than_the_file_has_is_damaged(tmp_path, size, words):
    """The packed size and the place of a file are what its archive says: neither may cost memory or end in a trace."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", b"1")
        (member,) = archive.infolist()
        member.compress_size, member.header_offset = (size, 0) if size < 2**32 else (1, size)
    with pytest.raises(PolypSegError, match=rf"set\.zip {words}"):
        open_source(tmp_path / "set.zip").read("a.png")


def test_an_encrypted_file_in_a_zip_is_named(tmp_path):
    path = build(tmp_path / "set", "stored zip", {"a.png": b"1"})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1  # the flag in the directory
    path.write_bytes(data)
    assert "cannot read a.png" in str(refusal(lambda: open_source(path).read("a.png")))


def test_open_source_chooses_by_content_of_the_file(tmp_path):
    """Archives come without suffix from some download tools."""
    assert isinstance(open_source(build(tmp_path / "d", "folder", FILES)), FolderSource)
    for form, kind in (("zip", ZipSource), ("tar.gz", TarSource)):
        bare = build(tmp_path / "a", form, FILES).rename(tmp_path / f"bare {form}"[:-4])
        assert isinstance(open_source(Path(bare)), kind)


# Faults that were found once and must not come back


def test_zip_source_names_the_compressed_file_that_is_damaged(tmp_path):
    """The published archives are deflated, so this is what a flipped bit usually hits."""
    text = {"Set/images/1.jpg": b"a polyp " * 500}
    path = build(tmp_path / "set", "zip", text)
    data = bytearray(path.read_bytes())
    start = data.index(b"Set/images/1.jpg") + len("Set/images/1.jpg")
    data[start] = 0xFF
    path.write_bytes(data)
    error = refusal(lambda: open_source(path).read("Set/images/1.jpg"))
    assert "Set/images/1.jpg" in str(error)


def test_open_source_calls_a_very_short_tar_gz_damaged(tmp_path):
    path = build(tmp_path / "set", "tar.gz", FILES)
    path.write_bytes(path.read_bytes()[:40])
    assert str(path) in str(refusal(lambda: open_source(path)))


def test_tar_source_names_a_file_that_is_not_there(tmp_path):
    source = open_source(build(tmp_path / "set", "tar", FILES))
    assert "Set/images/99.jpg" in str(refusal(lambda: source.read("Set/images/99.jpg")))


@pytest.mark.parametrize(("name", "words"), [("SET.RAR", "RAR archive"), ("SET.ZIP", "download it again")])
def test_open_source_knows_suffixes_in_capitals(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"cut off")
    assert words in str(refusal(lambda: open_source(tmp_path / name)))


def test_tar_source_gives_plain_names_for_dot_slash_members(tmp_path):
    dotted = {f"./{name}": data for name, data in FILES.items()}
    plain = open_source(build(tmp_path / "plain", "tar.gz", FILES))
    source = open_source(build(tmp_path / "dotted", "tar.gz", dotted))
    assert source.names() == plain.names()
    assert source.content_id() == plain.content_id()


# Names and links as people have them


def test_linked_folders_are_entered_once_and_loops_end(tmp_path):
    """A set whose folders were links had "no images"."""
    real = build(tmp_path / "real", "folder", FILES)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "Set").symlink_to(real / "Set")
    (linked / "again").symlink_to(linked)
    (linked / "nowhere").symlink_to(tmp_path / "absent")
    assert FolderSource(linked).names() == sorted(FILES)
    assert FolderSource(linked).content_id() == FolderSource(real).content_id()


def test_files_keep_their_own_names_beside_links_to_them(tmp_path):
    folder = build(tmp_path / "set", "folder", FILES)
    (folder / "A link").symlink_to(folder / "Set")
    assert FolderSource(folder).names() == sorted(FILES)


def linked_tar(path, links, kind=tarfile.LNKTYPE):
    """FILES, and links: name -> what it leads to."""
    with tarfile.open(build(path, "tar", FILES), "a") as archive:
        for name, target in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return Path(archive.name)


def test_links_inside_a_tar_are_followed(tmp_path, caplog):
    """As ``cp -l`` and tar make them: four of six pairs were found."""
    first = "Set/images/1.jpg"
    hard = linked_tar(tmp_path / "hard", {"Set/images/4.jpg": first, "Set/masks/4.JPG": "Set/masks/1.JPG"})
    soft = linked_tar(
        tmp_path / "soft", {"Set/images/4.jpg": "./5.jpg", "Set/images/5.jpg": "../images/1.jpg"}, tarfile.SYMTYPE
    )
    for path, names in (
        (hard, ("Set/images/4.jpg", "Set/masks/4.JPG")),
        (soft, ("Set/images/4.jpg", "Set/images/5.jpg")),
    ):
        source = open_source(path)
        assert source.names() == sorted([*FILES, *names])
        assert source.read(names[0]) == FILES[first]
        folder = tmp_path / f"{path.stem} extracted"
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
        assert source.content_id() == FolderSource(folder).content_id()
        caplog.clear()
        assert len(open_frames(path)) == len(open_frames(path)) == 6
        told = "are links and are left out, first Set/images/4.jpg"
        assert caplog.text.count(told) == 2, "the second time the index is a cached one"


@pytest.mark.parametrize("target", ["../../outside.jpg", "/etc/hostname", "circle.jpg", "nowhere.jpg"])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_that_leave_a_tar_are_named(tmp_path, target, kind):
    source = open_source(linked_tar(tmp_path / "set", {"circle.jpg": target}, kind))
    assert "circle.jpg" in source.names()
    for attempt in (lambda: source.read("circle.jpg"), source.content_id):
        with pytest.raises(
            PolypSegError, match=rf"cannot read circle\.jpg in .*: it is a link to {target}, which is not"
        ):
            attempt()


def test_links_of_a_tar_count_as_what_they_unpack_to(tmp_path, monkeypatch):
    links = {f"{n}.jpg": "Set/images/1.jpg" for n in range(300)}
    path = linked_tar(tmp_path / "set", links)
    monkeypatch.setattr("polypseg.data.sources._BOMB_BYTES", 100_000)
    monkeypatch.setattr("polypseg.data.sources._BOMB_RATIO", 0.5)
    with pytest.raises(PolypSegError, match="unpacks to"):
        open_source(path).content_id()


def test_images_that_are_no_files_are_named(tmp_path, caplog):
    """Links to nothing and pipes vanished from data sets without a word."""
    folder = build(tmp_path / "set", "folder", FILES)
    (folder / "Set/images/9.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(folder / "Set/images/8.jpg")
    (folder / "Set/more").symlink_to(tmp_path / "gone")
    source = FolderSource(folder)
    assert source.names() == sorted([*FILES, "Set/images/9.jpg", "Set/images/8.jpg"])
    assert caplog.text.count(f"Set/more is a link to {tmp_path / 'gone'}, which does not exist") == 1
    source.names()
    assert caplog.text.count("Set/more") == 1
    with pytest.raises(
        PolypSegError, match=r"cannot read .*9\.jpg: it is a link to .*gone\.jpg, which does not exist$"
    ):
        source.read("Set/images/9.jpg")
    with pytest.raises(PolypSegError, match=r"cannot read .*8\.jpg: it is a named pipe$"):
        source.read("Set/images/8.jpg")
    frames = open_frames(folder)
    assert len(frames) == 8 and frames.content_id, "one bad file does not end a whole corpus"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    folder = build(tmp_path / "set", "folder", FILES)
    (folder / "Set" / "masks").chmod(0)
    with pytest.raises(PolypSegError, match=r"cannot read the folder .*masks"):
        FolderSource(folder).names()


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_names_that_are_no_utf8_become_text(tmp_path, form):
    name = os.fsdecode(b"images/p\xe9.png")
    try:
        source = open_source(build(tmp_path / "set", form, {name: b"pixels"}))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert source.names() == ["images/p\\xe9.png"]
    assert source.read("images/p\\xe9.png") == b"pixels"
    assert pickle.loads(pickle.dumps(open_source(source.path))).read("images/p\\xe9.png") == b"pixels"
    int(source.content_id(), 16)


def pack_as_named(path, form, members):
    """An archive whose members have exactly these names: (name, bytes) pairs."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                info = zipfile.ZipInfo("x")
                info.filename = name
                archive.writestr(info, data)
    else:
        build(path.with_suffix(""), "tar", dict(members))
    return path


def backslashed(files):
    return [(name.replace("/", "\\"), data) for name, data in files.items()]


BESIDE = {
    "alone": [],
    "a folder with a slash": [("Set/", b"")],
    "a text with a slash": [("docs/readme.txt", b"read me")],
    "an image with both": [("Set/images\\3.jpg", FILES["Set/images/1.jpg"])],
}


@pytest.mark.parametrize(
    ("form", "beside"),
    [("zip", beside) for beside in BESIDE]
    + [("tar", beside) for beside in BESIDE if not beside.startswith("a folder")],  # a tar marks folders otherwise
)
def test_archives_packed_with_backslashes_are_read_as_folders(tmp_path, form, beside):
    """Each name is understood by itself: one with a slash beside them, and a set had "no images"."""
    path = pack_as_named(tmp_path / f"set.{form}", form, backslashed(FILES) + BESIDE[beside])
    more = {name.replace("\\", "/"): data for name, data in BESIDE[beside] if not name.endswith("/")}
    source = open_source(path)
    assert source.names() == sorted(FILES | more)
    assert {name: source.read(name) for name in source.names()} == FILES | more
    assert source.content_id() == open_source(build(tmp_path / "other", form, FILES | more)).content_id()
    frames = open_frames(path)
    assert {frames.name(i): frames.read(i) for i in range(len(frames))} == {
        name: data for name, data in (FILES | more).items() if name.lower().endswith(".jpg")
    }


def test_backslashes_of_bytes_that_are_no_utf8_belong_to_the_name(tmp_path):
    members = [("images/p\\xe9.png", b"1"), ("images\\q.png", b"2")]
    for form in ("zip", "tar"):
        source = open_source(pack_as_named(tmp_path / f"set.{form}", form, members))
        assert source.names() == ["images/p\\xe9.png", "images/q.png"]


def test_two_names_that_are_one_with_slashes_are_refused(tmp_path):
    path = pack_as_named(tmp_path / "set.zip", "zip", [("images\\1.png", b"1"), ("images/1.png", b"2")])
    with pytest.raises(PolypSegError, match=r"holds two files of the name images/1\.png"):
        open_source(path).names()


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_names_that_begin_above_the_archive_are_read(tmp_path, form):
    """They are extracted nowhere, so they are harmless; the set had "no images"."""
    path = pack_as_named(tmp_path / f"set.{form}", form, [(f"../{name}", data) for name, data in FILES.items()])
    source = open_source(path)
    assert source.names() == sorted(f"../{name}" for name in FILES)
    assert source.read("../Set/images/1.jpg") == FILES["Set/images/1.jpg"]


@pytest.mark.parametrize("form", ["zip", "tar", "folder"])
def test_an_archive_inside_is_named_where_no_image_is_found(tmp_path, form):
    inner = build(tmp_path / "inner", "zip", FILES).read_bytes()
    place = build(tmp_path / "outer", form, {"download/good.zip": inner})
    for attempt in (lambda: open_frames(place), lambda: open_dataset("folder", source=place)):
        with pytest.raises(UsageError, match=r"no images in .*archive download/good\.zip: extract that"):
            attempt()


@pytest.mark.parametrize("form", ["zip", "tar", "folder"])
def test_an_archive_beside_images_is_mentioned(tmp_path, form, caplog):
    """Half of a set may lie in it."""
    place = build(tmp_path / "outer", form, FILES | {"Set/part2.zip": b"PK", "Set/part3.tar.gz": b""})
    if form != "tar":
        open_frames(place)
        assert "outer" in caplog.text and "holds the archive Set/part2.zip and 1 more, which is not read" in caplog.text
    caplog.clear()
    with pytest.raises(PolypSegError, match="truncated"):
        open_dataset("folder", source=place).pair(open_dataset("folder", source=place).records[0])
    assert "holds the archive Set/part2.zip and 1 more, which is not read" in caplog.text


def test_archives_beside_shards_are_mentioned(tmp_path, caplog):
    build(tmp_path / "shards" / "a", "tar", FILES)
    (tmp_path / "shards" / "b.zip").write_bytes(b"PK")
    assert len(open_frames(tmp_path / "shards")) == 6
    assert "holds the archive b.zip, which is not read" in caplog.text


# Sizes are checked before anything is unpacked


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch, form):
    path = build(tmp_path / "bomb", form, {"a.png": bytes(3_000_000)})
    monkeypatch.setattr("polypseg.data.sources._BOMB_BYTES", 2_000_000)
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", None)
    source = open_source(path)
    for attempt in (source.names, source.content_id, lambda: source.read("a.png")):
        with pytest.raises(PolypSegError, match=r"bomb\.\S+ has [\d,]+ bytes and unpacks to 3,\d+.* extract it"):
            attempt()


@pytest.mark.parametrize("form", FORMS)
def test_files_larger_than_any_image_are_refused(tmp_path, monkeypatch, form):
    source = open_source(build(tmp_path / "set", form, {"a.png": bytes(2000)}))
    monkeypatch.setattr("polypseg.data.sources.MAX_FILE_BYTES", 1999)
    with pytest.raises(PolypSegError, match=r"a\.png.* has 2,000 bytes, more than the 1,999 of any image"):
        source.read("a.png")


def test_a_zip_that_holds_more_than_it_declares_is_damaged(tmp_path):
    path = build(tmp_path / "set", "zip", {"a.png": bytes(100_000)})
    data = path.read_bytes().replace((100_000).to_bytes(4, "little"), (500).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(PolypSegError, match=r"cannot read a\.png"):
        open_frames(path).read(0)


# Every format of Pillow is read, or left out for a reason


def test_every_ending_that_pillow_opens_is_known_or_left_out_for_a_reason():
    from PIL import Image

    Image.init()
    drawings = {".eps", ".ps", ".emf", ".wmf", ".pdf"}  # no pixels until somebody draws them
    containers = {".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".fit", ".fits"}  # Pillow only names these
    opens = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert opens - set(IMAGE_SUFFIXES) <= drawings | containers
