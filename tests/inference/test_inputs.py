"""Which files an input names: through links, by suffix and by content, of any name; and what it does not name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from polypseg.data.images import encode_png
from polypseg.errors import UsageError
from polypseg.files import from_cell, original_name, printable, to_cell, write_csv
from polypseg.inference.inputs import VIDEO_SUFFIXES, image_suffixes, read_inputs
from polypseg.inference.pipeline import in_background

PNG = encode_png(Image.new("RGB", (8, 6), "red"))
posix = pytest.mark.skipif(os.name == "nt", reason="names are bytes, and links are free, on POSIX only")


def put(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def put_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PNG)
    return path


def names(*inputs: Path | str) -> list[str]:
    found = read_inputs([str(item) for item in inputs], output=Path("nowhere"))
    return [source.name.as_posix() for source in found.sources]


def reasons(folder: Path) -> dict[str, str]:
    found = read_inputs([str(folder)], output=Path("nowhere"))
    return {Path(file).name: reason for file, reason in found.passed_over}


# -- folders --------------------------------------------------------------------------------------------


@posix
def test_linked_folders_are_entered_and_circles_end(tmp_path):
    put_image(tmp_path / "elsewhere" / "day" / "a.png")
    put_image(tmp_path / "in" / "own.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "in" / "around")
    os.symlink(tmp_path / "in" / "self", tmp_path / "in" / "self")
    assert names(tmp_path / "in") == ["linked/day/a", "own"]
    assert "another name" in reasons(tmp_path / "in")["around"]
    assert reasons(tmp_path / "in")["self"] == "a link to a file that is not there"


@posix
def test_folder_and_link_to_it_are_read_once_under_its_own_name(tmp_path):
    put_image(tmp_path / "real" / "a.png")
    os.symlink("real", tmp_path / "a_link")
    assert names(tmp_path) == ["real/a"]


@posix
def test_output_is_left_out_also_behind_a_link(tmp_path):
    put_image(tmp_path / "out" / "masks" / "a.png")
    put_image(tmp_path / "in" / "a.png")
    os.symlink(tmp_path / "out", tmp_path / "in" / "results")
    found = read_inputs([str(tmp_path / "in")], output=tmp_path / "out")
    assert [source.name.as_posix() for source in found.sources] == ["a"]


@posix
@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root may open everything")
def test_folder_that_may_not_be_opened_is_listed(tmp_path):
    put_image(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    try:
        assert "Permission denied" in reasons(tmp_path)["closed"]
    finally:
        (tmp_path / "closed").chmod(0o700)


# -- kinds ----------------------------------------------------------------------------------------------


def test_every_other_file_is_listed_with_a_reason(tmp_path):
    put_image(tmp_path / "a.png")
    put(tmp_path / "notes.txt", b"text")
    put(tmp_path / "Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(600))
    put(tmp_path / "none")
    put_image(tmp_path / ".hidden.png")
    put(tmp_path / "plot.eps", b"%!PS-Adobe-3.0 EPSF-3.0")
    assert reasons(tmp_path) == {
        "notes.txt": "no image or video that can be read (.txt)",
        "Thumbs.db": "no image or video that can be read (.db)",
        "none": "no image or video that can be read (no suffix)",
        "plot.eps": "no image or video that can be read (.eps)",
        ".hidden.png": "a hidden file",
    }


def test_suffixes_are_those_that_pillow_and_ffmpeg_read():
    assert {".gif", ".jp2", ".tga", ".pgm", ".avif", ".jpe", ".jfif", ".webp", ".tiff"} <= set(image_suffixes())
    assert not {".eps", ".ps", ".mpg", ".h5", ".pdf", ".wmf"} & set(image_suffixes())
    assert not set(image_suffixes()) & set(VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    ("name", "data", "is_video"),
    [
        ("a.MTS", b"", True),
        ("b.dat", b"\0\0\x01\xba" + bytes(100), True),
        ("c.ts", (b"\x47" + bytes(187)) * 4, True),
        ("d", (bytes(4) + b"\x47" + bytes(187)) * 4, True),
        ("e.bin", b"\0\0\0\x18ftypisom" + bytes(100), True),
        ("f.JPG", b"", False),
        ("g.img", PNG, False),
        ("h", b"\0\0\0\x18ftypheic" + bytes(100), False),
    ],
)
def test_kind_is_told_by_suffix_or_content(tmp_path, name, data, is_video):
    put(tmp_path / name, data)
    (source,) = read_inputs([str(tmp_path)], output=Path("nowhere")).sources
    assert source.is_video is is_video


@pytest.mark.parametrize(("name", "data"), [("a.ts", b"let x = 1;"), ("b.m4a", b"\0\0\0\x18ftypM4A " + bytes(50))])
def test_files_that_only_look_like_videos_are_passed_over(tmp_path, name, data):
    put_image(tmp_path / "x.png")
    put(tmp_path / name, data)
    assert list(reasons(tmp_path)) == [name]


def test_gif_is_a_video_only_if_it_moves(tmp_path):
    frames = [Image.new("RGB", (8, 6), (80 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    put(tmp_path / "broken.gif", b"GIF89a")
    found = read_inputs([str(tmp_path)], output=Path("nowhere")).sources
    assert {s.path.name: s.is_video for s in found} == {"broken.gif": False, "moves.gif": True, "still.gif": False}


def test_folder_without_images_says_what_it_holds(tmp_path):
    put(tmp_path / "notes.txt", b"text")
    with pytest.raises(UsageError, match=r"holds no image or video that can be read: it holds 1 other .* notes\.txt"):
        names(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be opened: File name too long|does not exist"):
        names(tmp_path / ("x" * 300))


# -- names ----------------------------------------------------------------------------------------------


@posix
def test_names_of_any_bytes_and_length_become_names_that_can_be_written(tmp_path):
    put_image(tmp_path / os.fsdecode(b"caf\xe9.png"))
    put_image(tmp_path / "two\nlines.png")
    long = [put_image(tmp_path / f"{'x' * 240}{n}.png").stem for n in range(2)]
    made = names(tmp_path)
    assert "caf%E9" in made and "two%0Alines" in made and len(set(made)) == 4
    cut = [name for name in made if name.startswith("x")]
    assert len(cut) == len(long) == 2 and {len(name.encode()) for name in cut} == {180}


@pytest.mark.parametrize("name", ["plain", os.fsdecode(b"caf\xe9"), "two\nlines", "del\x7f", "é"])
def test_printed_names_lead_back_to_the_file(name):
    text = printable(name)
    assert original_name(text) == name and text.isprintable()
    text.encode()


@pytest.mark.parametrize("text", ["=1+2", "+x", "-a", "@x", "'=1", "''=1", "'plain", "plain", "-0.5", "'-0.5", "-", ""])
def test_formulas_are_harmless_in_tables_and_come_back(tmp_path, text):
    cell = to_cell(text)
    assert from_cell(cell) == text and to_cell(-1) == -1
    assert cell[:1] not in ("=", "+", "-", "@") or text in ("-0.5", "-")
    assert "'=" in write_csv(tmp_path / "x.csv", [{"name": "=1+2"}]).read_text()


# -- the pipeline ---------------------------------------------------------------------------------------


def test_background_keeps_the_order_and_raises_after_the_last_item():
    def items():
        yield from range(20)
        raise KeyError("end")

    got = []
    with pytest.raises(KeyError, match="end"):
        for item in in_background(in_background(items(), depth=2), depth=3):
            got.append(item)
    assert got == list(range(20))


def test_background_stops_when_nobody_reads_on_and_closes_its_source():
    taken, closed = [], []

    def items():
        try:
            for n in range(10_000):
                taken.append(n)
                yield n
        finally:
            closed.append(True)

    reader = in_background(in_background(items(), depth=2), depth=2)
    assert next(reader) == 0
    reader.close()
    assert closed == [True] and len(taken) < 12


def test_background_runs_ahead_by_its_depth_only():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield n

    reader = in_background(items(), depth=3)
    next(reader)
    assert len(taken) <= 5
    reader.close()


def test_reading_images_needs_no_opencv(tmp_path):
    put_image(tmp_path / "a.png")
    code = (
        "import sys; from pathlib import Path; from polypseg.inference import inputs, pipeline, video; "
        "inputs.read_inputs([sys.argv[1]], output=Path('x')); print('cv2' in sys.modules)"
    )
    environment = dict(os.environ)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == "False", done.stderr
