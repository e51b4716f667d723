"""What a user may rely on when a dataset is opened and loaded: right pairs, fresh content, clear refusals."""

import dataclasses
import io
import os
import pickle
import zipfile

import datasets
import numpy as np
import pytest
import tifffile
from PIL import Image

from polypseg.data import builder, polyps
from polypseg.data.polyps import SyntheticOptions, load_polyps, open_dataset
from polypseg.data.splits import pinned_split
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError

HEIGHT, WIDTH = 16, 96


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache for each test: an example prepared by another test must not answer for this one."""
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def frame_pixels(code):
    """A frame of one gray, from which ``code`` (1 to 11) can be read again, also after JPEG."""
    return np.full((HEIGHT, WIDTH, 3), 20 * code, dtype=np.uint8)


def polyp_mask(code):
    """0/1 mask with ``code`` blocks of 8x8, which JPEG keeps exactly."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[:8, : 8 * code] = 1
    return mask


def encode(pixels, suffix):
    buffer = io.BytesIO()
    if suffix in (".tif", ".tiff"):
        tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig")
    else:
        Image.fromarray(pixels).save(buffer, {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP"}[suffix])
    return buffer.getvalue()


def frame_file(code, suffix):
    return encode(frame_pixels(code), suffix)


def mask_file(code, suffix):
    return encode(polyp_mask(code) * np.uint8(255), suffix)


def write_folder(path, files):
    for name, data in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def generic(codes, suffix=".png"):
    """Files of an images/ and masks/ folder: frame ``str(code)`` shows ``code``."""
    files = {f"images/{code}{suffix}": frame_file(code, suffix) for code in codes}
    return files | {f"masks/{code}{suffix}": mask_file(code, suffix) for code in codes}


# One function per layout of the catalog: files, and ids with the code that each shows.


def kvasir_layout():
    """In a top folder, as published; the masks are stored in another order than the images."""
    parts = pinned_split("kvasir_seg", "reference")
    ids = sorted([*parts["train"][:3], *parts["validation"][:2], *parts["test"][:2]])
    codes = {name: code for code, name in enumerate(ids, start=1)}
    files = {f"Kvasir-SEG/images/{name}.jpg": frame_file(code, ".jpg") for name, code in codes.items()}
    masks = {f"Kvasir-SEG/masks/{name}.jpg": mask_file(code, ".jpg") for name, code in codes.items()}
    boxes = {"Kvasir-SEG/kavsir_bboxes.json": b"{}"}
    return boxes | files | dict(reversed(masks.items())), codes


CLINICDB_CODES = {"1": 1, "10": 2, "2": 3, "26": 4, "612": 5}
CLIPS = {"1": "1", "10": "1", "2": "1", "26": "2", "612": "29"}


def clinicdb_layout(suffix, top=""):
    files = {f"{top}Original/{n}{suffix}": frame_file(c, suffix) for n, c in CLINICDB_CODES.items()}
    return files | {f"{top}Ground Truth/{n}{suffix}": mask_file(c, suffix) for n, c in CLINICDB_CODES.items()}


def clinicdb_side_by_side():
    return clinicdb_layout(".png", "CVC-ClinicDB/PNG/") | clinicdb_layout(".tif", "CVC-ClinicDB/TIF/")


def polypgen_layout():
    """Sorted by name, ``100_b_mask`` comes before ``100_mask`` but ``100`` before ``100_b``."""
    codes = {"100": 1, "100_b": 2, "C3_EndoCV2021_00161": 3, "EndoCV2021_C5_50000168": 4}
    center = {"100": "3", "100_b": "3", "C3_EndoCV2021_00161": "3", "EndoCV2021_C5_50000168": "5"}
    files = {}
    for name, code in codes.items():
        top, c = f"PolypGen2021/data_C{center[name]}", center[name]
        files[f"{top}/images_C{c}/{name}.jpg"] = frame_file(code, ".jpg")
        files[f"{top}/masks_C{c}/{name}_mask.jpg"] = mask_file(code, ".jpg")
        files[f"{top}/bbox_image_C{c}/{name}_mask_bbox.jpg"] = frame_file(9, ".jpg")
    sequence = {"PolypGen2021/sequenceData/positive/seq1/images_seq1/7.jpg": frame_file(9, ".jpg")}
    return files | sequence, codes, {name: f"C{c}" for name, c in center.items()}


def etis_layout():
    """By position, images 1, 10, 2 would meet the masks 10, p1, p2."""
    codes = {"1": 1, "10": 2, "2": 3}
    masks = {"p1": 1, "10": 2, "p2": 3}
    files = {f"ETIS-LaribPolypDB/Original/{name}.tif": frame_file(c, ".tif") for name, c in codes.items()}
    return files | {f"ETIS-LaribPolypDB/Ground Truth/{m}.tif": mask_file(c, ".tif") for m, c in masks.items()}, codes


def folder_layout():
    """``a_b_mask`` sorts before ``a_mask`` but ``a`` before ``a_b``; suffixes differ too."""
    codes = {"a": 1, "a_b": 2, "c": 3}
    files = {f"Images/{name}.jpg": frame_file(code, ".jpg") for name, code in codes.items()}
    files |= {f"Masks/{name}_mask.png": mask_file(code, ".png") for name, code in codes.items()}
    return files | {"notes/overview.png": frame_file(9, ".png")}, codes


LAYOUTS = {
    "kvasir_seg": ("kvasir_seg", *kvasir_layout(), {}),
    "clinicdb png": ("cvc_clinicdb", clinicdb_layout(".png"), CLINICDB_CODES, {"sequence_id": CLIPS}),
    "clinicdb tif": ("cvc_clinicdb", clinicdb_layout(".tif"), CLINICDB_CODES, {"sequence_id": CLIPS}),
    "clinicdb both": ("cvc_clinicdb", clinicdb_side_by_side(), CLINICDB_CODES, {"sequence_id": CLIPS}),
    "polypgen": ("polypgen", *polypgen_layout()[:2], {"centre": polypgen_layout()[2]}),
    "etis_larib": ("etis_larib", *etis_layout(), {}),
    "folder": ("folder", *folder_layout(), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_open_dataset_finds_every_pair_of_a_layout(tmp_path, layout, form):
    name, files, codes, groups = LAYOUTS[layout]
    write = write_folder if form == "folder" else write_zip
    opened = open_dataset(name, source=write(tmp_path / "set.zip", files), allow_partial=True)
    assert opened.ids == list(codes)
    for record in opened.records:
        frame, mask = opened.pair(record)
        assert round(np.asarray(frame).mean() / 20) == codes[record.id]
        assert mask.tolist() == polyp_mask(codes[record.id]).tolist(), f"{record.id} got another's mask"
        assert record.groups == {column: values[record.id] for column, values in groups.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_gives_columns_and_pairs_of_a_layout(tmp_path, layout):
    name, files, codes, groups = LAYOUTS[layout]
    opened = open_dataset(name, source=write_folder(tmp_path / "set", files), allow_partial=True)
    loaded = opened.load(split="full")
    assert isinstance(loaded, datasets.DatasetDict)
    assert loaded["full"].column_names == ["id", "image", "mask", *groups]
    assert loaded["full"]["id"] == list(codes)
    for example in loaded["full"]:
        code = codes[example["id"]]
        assert example["image"].mode == "RGB"
        assert round(np.asarray(example["image"]).mean() / 20) == code
        assert np.asarray(example["mask"]).tolist() == polyp_mask(code).tolist()
        assert np.asarray(example["mask"]).dtype == np.uint8
        assert all(example[column] == values[example["id"]] for column, values in groups.items())


def test_clinicdb_side_by_side_reads_the_png_form(tmp_path):
    """Both forms hold the same 612 frames; counting both would double every image."""
    source = write_folder(tmp_path / "set", clinicdb_side_by_side())
    opened = open_dataset("cvc_clinicdb", source=source, allow_partial=True)
    assert len(opened.records) == len(CLINICDB_CODES)
    assert all(r.image.endswith(".png") and r.mask.endswith(".png") for r in opened.records)


def test_clinicdb_forms_load_to_equal_pixels(tmp_path):
    rng = np.random.default_rng(0)
    frames = {str(i): rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8) for i in (1, 2)}
    loaded = []
    for suffix in (".png", ".tif"):
        files = {f"Original/{i}{suffix}": encode(pixels, suffix) for i, pixels in frames.items()}
        files |= {f"Ground Truth/{i}{suffix}": mask_file(3, suffix) for i in frames}
        source = write_folder(tmp_path / suffix, files)
        loaded.append(open_dataset("cvc_clinicdb", source=source, allow_partial=True).load(split="full")["full"])
    for png, tif in zip(*loaded, strict=True):
        assert np.array_equal(np.asarray(png["image"]), frames[png["id"]])
        assert np.array_equal(np.asarray(tif["image"]), frames[tif["id"]])


def test_hyperkvasir_labelled_has_the_class_and_no_mask(tmp_path):
    files = {
        "labeled-images/lower-gi-tract/anatomical-landmarks/cecum/b.jpg": frame_file(1, ".jpg"),
        "labeled-images/lower-gi-tract/pathological-findings/polyps/a.jpg": frame_file(2, ".jpg"),
        "labeled-images/image-labels.csv": b"Video file,Organ\n",
    }
    source = write_zip(tmp_path / "hyper.zip", files)
    opened = open_dataset("hyperkvasir_labelled", source=source, allow_partial=True)
    full = opened.load(split="full")["full"]
    assert full.column_names == ["id", "image", "class"]
    assert [(e["id"], e["class"]) for e in full] == [("a", "polyps"), ("b", "cecum")]
    with pytest.raises(UsageError, match="HyperKvasir labeled images has no masks"):
        opened.mask(opened.records[0])


def test_open_dataset_sorts_names_as_strings(tmp_path):
    """The reference's splits are drawn from this order; a numeric one gives other parts."""
    source = write_folder(tmp_path / "set", generic([2, 10, 1]))
    assert open_dataset("folder", source=source).ids == ["1", "10", "2"]


def test_open_dataset_accepts_a_path_as_text(tmp_path):
    assert open_dataset("folder", source=str(write_folder(tmp_path / "set", generic([1])))).ids == ["1"]


def test_opened_dataset_survives_pickling(tmp_path):
    opened = open_dataset("folder", source=write_zip(tmp_path / "set.zip", generic([1, 2])))
    opened.pair(opened.records[0])
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.pair(copy.records[1])[1].tolist() == polyp_mask(2).tolist()
    assert copy.content_id == opened.content_id


# Refusals


def refusal(action):
    """The error that ``action`` raises."""
    with pytest.raises(PolypSegError) as raised:
        action()
    return raised.value


def test_open_dataset_names_the_image_without_mask(tmp_path):
    files = generic([1, 2])
    del files["masks/2.png"]
    source = write_folder(tmp_path / "set", files)
    error = refusal(lambda: open_dataset("folder", source=source))
    assert type(error) is PolypSegError
    assert f"{source}: 1 image(s) have no mask, first images/2.png" in str(error)


def test_open_dataset_names_the_mask_without_image(tmp_path):
    files = generic([1, 2])
    del files["images/2.png"]
    source = write_folder(tmp_path / "set", files)
    error = refusal(lambda: open_dataset("folder", source=source))
    assert type(error) is PolypSegError
    assert f"{source}: 1 mask(s) have no image, first masks/2.png" in str(error)


def test_open_dataset_refuses_one_name_in_two_folders(tmp_path):
    files = {f"{top}/{name}": data for top in ("x", "y") for name, data in generic([1]).items()}
    source = write_folder(tmp_path / "set", files)
    assert "have the same name" in str(refusal(lambda: open_dataset("folder", source=source)))


@pytest.mark.parametrize("name", ["kvasir_seg", "folder", "hyperkvasir_labelled", "cvc_clinicdb"])
def test_open_dataset_says_where_an_empty_folder_is(tmp_path, name):
    error = refusal(lambda: open_dataset(name, source=tmp_path, allow_partial=True))
    assert type(error) is UsageError
    assert f"no images in {tmp_path}" in str(error)


def test_open_dataset_says_which_folders_it_expected(tmp_path):
    write_folder(tmp_path, {"pictures/1.png": frame_file(1, ".png")})
    error = str(refusal(lambda: open_dataset("cvc_clinicdb", source=tmp_path, allow_partial=True)))
    assert "'Original'" in error
    assert "'Ground Truth'" in error


def test_open_dataset_suggests_the_name_that_was_meant():
    error = refusal(lambda: open_dataset("kvasir-seg"))
    assert type(error) is UsageError
    assert "unknown dataset 'kvasir-seg'. Did you mean 'kvasir_seg'?" in str(error)
    assert "cvc_clinicdb" in str(error)


def test_open_dataset_refuses_a_part_unless_one_is_meant(tmp_path):
    source = write_folder(tmp_path / "set", kvasir_layout()[0])
    error = refusal(lambda: open_dataset("kvasir_seg", source=source))
    assert type(error) is UsageError
    assert f"{source} holds 7 images but Kvasir-SEG has 1000" in str(error)
    assert "--allow-partial" in str(error)


def test_open_dataset_says_where_it_looked_and_how_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYPSEG_DATA", str(tmp_path / "nothing"))
    error = refusal(lambda: open_dataset("kvasir_seg"))
    assert type(error) is UsageError
    for part in (str(tmp_path / "nothing"), "kvasir-seg.zip", "POLYPSEG_DATA", "`polypseg data get kvasir_seg`"):
        assert part in str(error)


def test_open_dataset_says_how_to_request_what_cannot_be_downloaded(tmp_path):
    error = str(refusal(lambda: open_dataset("cvc_clinicdb", data_dir=tmp_path)))
    assert "https://polyp.grand-challenge.org/CVCClinicDB/" in error
    assert "polypseg data get" not in error


def test_open_dataset_asks_for_the_path_of_ones_own_folder():
    error = refusal(lambda: open_dataset("folder"))
    assert type(error) is UsageError
    assert "give its path" in str(error)


@pytest.mark.parametrize("location", ["Kvasir-SEG", "kvasir-seg.zip"])
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_open_dataset_finds_sets_in_the_data_folder(tmp_path, monkeypatch, location, by):
    files, codes = kvasir_layout()
    (write_zip if location.endswith(".zip") else write_folder)(tmp_path / "data" / location, files)
    if by == "environment":
        monkeypatch.setenv("POLYPSEG_DATA", str(tmp_path / "data"))
    where = {"data_dir": tmp_path / "data"} if by == "argument" else {}
    assert open_dataset("kvasir_seg", allow_partial=True, **where).ids == list(codes)


def test_clinicdb_says_which_file_is_not_a_frame_number(tmp_path):
    files = {"Original/polyp7.png": frame_file(1, ".png"), "Ground Truth/polyp7.png": mask_file(1, ".png")}
    source = write_folder(tmp_path / "set", files)
    error = refusal(lambda: open_dataset("cvc_clinicdb", source=source, allow_partial=True))
    assert "Original/polyp7.png is not named as in CVC-ClinicDB" in str(error)


def test_pair_names_both_files_of_different_size(tmp_path):
    files = generic([1]) | {"masks/1.png": encode(np.zeros((8, 8), dtype=np.uint8), ".png")}
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", files))
    error = str(refusal(lambda: opened.load(split="full")))
    assert str(tmp_path / "set/images/1.png") in error
    assert str(tmp_path / "set/masks/1.png") in error


def test_load_refuses_an_unknown_split_as_such(tmp_path):
    """Not as a "DatasetGenerationError", which would hide the choices."""
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", generic([1])))
    error = refusal(lambda: opened.load(split="by_moon"))
    assert type(error) is UsageError
    assert "choose from full, reference" in str(error)


# Loading


def test_load_gives_the_parts_of_the_pinned_split(tmp_path):
    files, codes = kvasir_layout()
    source = write_zip(tmp_path / "kvasir-seg.zip", files)
    loaded = load_polyps("kvasir_seg", source=source, allow_partial=True)
    pinned = pinned_split("kvasir_seg", "reference")
    assert {part: loaded[part].num_rows for part in loaded} == {"train": 3, "validation": 2, "test": 2}
    for part in loaded:
        assert loaded[part]["id"] == [i for i in pinned[part] if i in codes]


def test_load_splits_ones_own_folder_by_tenths(tmp_path):
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", generic(range(1, 12))))
    loaded = opened.load()
    assert {part: loaded[part]["id"] for part in loaded} == opened.split("reference")
    assert {part: loaded[part].num_rows for part in loaded} == {"train": 9, "validation": 1, "test": 1}


@pytest.mark.parametrize("layout", ["kvasir_seg", "clinicdb tif", "folder"])
def test_load_streams_equal_examples(tmp_path, own_cache, layout):
    name, files, codes, _ = LAYOUTS[layout]
    opened = open_dataset(name, source=write_zip(tmp_path / "set.zip", files), allow_partial=True)
    streamed = opened.load(split="full", streaming=True)
    assert isinstance(streamed, datasets.IterableDatasetDict)
    examples = list(streamed["full"])
    assert not list(own_cache.rglob("*.arrow")), "streaming wrote a cache"
    assert len(examples) == len(codes)
    for one, other in zip(examples, opened.load(split="full")["full"], strict=True):
        assert one.keys() == other.keys()
        for column in one:
            if column in ("image", "mask"):
                assert np.array_equal(np.asarray(one[column]), np.asarray(other[column]))
                assert one[column].mode == other[column].mode
            else:
                assert one[column] == other[column]


@pytest.fixture
def generated(monkeypatch):
    """The ids that were decoded anew, in order."""
    ids = []
    original = builder.PolypSegBuilder._generate_examples

    def counted(self, **arguments):
        for key, example in original(self, **arguments):
            ids.append(key)
            yield key, example

    monkeypatch.setattr(builder.PolypSegBuilder, "_generate_examples", counted)
    return ids


def test_load_decodes_once(tmp_path, generated):
    source = write_folder(tmp_path / "set", generic([1, 2]))
    first = open_dataset("folder", source=source).load(split="full")["full"]
    assert generated == ["1", "2"]
    second = open_dataset("folder", source=source).load(split="full")["full"]
    assert generated == ["1", "2"], "the cache was not used"
    assert second._fingerprint == first._fingerprint


def test_load_uses_the_cache_of_equal_content_at_another_place(tmp_path, generated):
    for place in ("here", "there"):
        source = write_folder(tmp_path / place, generic([1, 2]))
        open_dataset("folder", source=source).load(split="full")
    assert generated == ["1", "2"]


def test_load_keeps_splits_apart(tmp_path):
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", generic(range(1, 12))))
    assert list(opened.load(split="full")) == ["full"]
    assert set(opened.load(split="reference")) == {"train", "validation", "test"}
    assert opened.load(split="full")["full"].num_rows == 11


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_load_sees_a_mask_that_changed_in_place(tmp_path, form):
    """A corrected annotation with the same name, size and time: a stale cache would train on the old one."""
    files = generic([3], suffix=".bmp")

    def write():
        if form == "folder":
            write_folder(tmp_path / "set", files)
            return tmp_path / "set", tmp_path / "set/masks/3.bmp"
        path = write_zip(tmp_path / "set.zip", files, zipfile.ZIP_STORED)
        return path, path

    source, file = write()
    status = file.stat()
    before = open_dataset("folder", source=source).load(split="full")["full"]
    assert np.asarray(before[0]["mask"]).sum() == polyp_mask(3).sum()

    files["masks/3.bmp"] = mask_file(5, ".bmp")
    write()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    after = open_dataset("folder", source=source).load(split="full")["full"]
    assert np.asarray(after[0]["mask"]).tolist() == polyp_mask(5).tolist()
    assert after._fingerprint != before._fingerprint


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("broken", ["images/2.jpg", "masks/2.jpg"])
def test_load_names_a_truncated_file_and_works_after_repair(tmp_path, streaming, broken):
    files = generic([1, 2, 3], suffix=".jpg")
    source = write_folder(tmp_path / "set", files)
    (source / broken).write_bytes(files[broken][: len(files[broken]) - 30])

    def load():
        parts = open_dataset("folder", source=source).load(split="full", streaming=streaming)
        return list(parts["full"])

    error = refusal(load)
    assert type(error) is PolypSegError
    assert f"{source / broken} is truncated or not an image" in str(error)

    (source / broken).write_bytes(files[broken])
    assert [example["id"] for example in load()] == ["1", "2", "3"]


def test_load_that_failed_can_be_repeated_on_the_same_object(tmp_path):
    """A file that vanished, say on a network share, and came back."""
    files = generic([1, 2])
    source = write_folder(tmp_path / "set", files)
    opened = open_dataset("folder", source=source)
    assert opened.content_id
    (source / "masks/2.png").unlink()
    assert str(source / "masks/2.png") in str(refusal(lambda: opened.load(split="full")))
    write_folder(source, files)
    assert opened.load(split="full")["full"].num_rows == 2


def test_load_says_when_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path / "file"))
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", generic([1])))
    error = refusal(lambda: opened.load(split="full"))
    assert f"cannot write {tmp_path / 'file'}" in str(error)


# Synthetic frames


def synthetic(**options):
    small = {"count": 4, "size": (64, 64)} | options
    return open_dataset("synthetic_a", synthetic_options=SyntheticOptions(**small))


def test_synthetic_loads_without_any_file():
    full = synthetic().load(split="full")["full"]
    assert full["id"] == ["00000", "00001", "00002", "00003"]
    for example in full:
        assert example["image"].size == example["mask"].size == (64, 64)
        assert set(np.unique(np.asarray(example["mask"]))) <= {0, 1}
    assert any(np.asarray(example["mask"]).any() for example in full)


def test_synthetic_content_id_follows_every_option():
    variants = [synthetic(), synthetic(seed=1), synthetic(count=5), synthetic(size=(64, 96))]
    variants.append(open_dataset("synthetic_b", synthetic_options=SyntheticOptions(count=4, size=(64, 64))))
    assert len({opened.content_id for opened in variants}) == len(variants)
    assert synthetic().content_id == synthetic().content_id


def test_synthetic_content_id_follows_the_camera_and_the_version_of_the_drawing(monkeypatch):
    ids = {synthetic().content_id}
    monkeypatch.setattr("polypseg.data.synthetic.VERSION", 0)
    ids.add(synthetic().content_id)
    monkeypatch.setitem(CAMERAS, "a", dataclasses.replace(CAMERAS["a"], noise=0.0))
    ids.add(synthetic().content_id)
    assert len(ids) == 3


def test_synthetic_frames_are_drawn_once_while_they_fit(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "polypseg.data.polyps.synthetic.synthesize_frame",
        lambda camera, **options: drawn.append(options["index"]) or synthesize_frame(camera, **options),
    )
    kept = polyps._DrawnFrames(limit=2**20)
    monkeypatch.setattr(polyps, "_DRAWN", kept)
    opened = synthetic()
    first = [opened.pair(record) for record in opened.records]
    again = [opened.pair(record) for record in opened.records]
    assert drawn == [0, 1, 2, 3]
    for (frame, mask), (other, same) in zip(first, again, strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(other)) and np.array_equal(mask, same)
    one_frame = sum(map(len, next(iter(kept._kept.values()))))
    small = polyps._DrawnFrames(limit=2 * one_frame)
    monkeypatch.setattr(polyps, "_DRAWN", small)
    for record in opened.records:
        opened.pair(record)
    assert len(small._kept) < 4 and small._size == sum(len(a) + len(b) for a, b in small._kept.values())
    assert small._size <= 2 * one_frame


def test_synthetic_seed_changes_the_loaded_frames():
    """Same names and sizes: a cache without the seed would answer with the old frames."""
    one, other = (synthetic(seed=seed).load(split="full")["full"][0]["image"] for seed in (0, 1))
    assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_synthetic_frames_do_not_depend_on_the_count():
    few, many = synthetic(count=2), synthetic(count=4)
    assert np.array_equal(np.asarray(few.frame(few.records[1])), np.asarray(many.frame(many.records[1])))


# The real files


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "folder", "count", "groups"),
    [
        ("cvc_clinicdb", "CVC-ClinicDB-TIF", 12, {"sequence_id"}),
        ("etis_larib", "ETIS-LaribPolypDB", 2, set()),
        ("cvc_colondb", "CVC-ColonDB", 6, set()),
        ("polypgen", "PolypGen", 14, {"centre"}),
    ],
)
def test_load_reads_the_samples_of_every_published_layout(real_data, name, folder, count, groups):
    opened = open_dataset(name, source=real_data / "samples" / folder, allow_partial=True)
    full = opened.load(split="full")["full"]
    assert full.num_rows == count
    assert set(full.column_names) == {"id", "image", "mask"} | groups
    for example in full:
        mask = np.asarray(example["mask"])
        assert example["image"].size == mask.shape[::-1]
        assert set(np.unique(mask)) <= {0, 1}
        red, _, blue = example["image"].split()
        assert red.tobytes() != blue.tobytes(), "the frame lost its color"


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "count"), [("kvasir_seg", 1000), ("cvc_clinicdb", 612)])
def test_open_dataset_accepts_the_complete_sets(real_data, name, count):
    assert len(open_dataset(name, data_dir=real_data).records) == count


# Faults that were found once and must not come back


def test_load_keeps_a_frame_with_exif_orientation_in_line_with_its_mask(tmp_path):
    image = Image.fromarray(frame_pixels(1))
    exif = image.getexif()
    exif[Image.ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    files = {"images/1.jpg": buffer.getvalue(), "masks/1.png": mask_file(1, ".png")}
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", files))
    example = opened.load(split="full")["full"][0]
    assert example["image"].size == example["mask"].size == opened.frame(opened.records[0]).size


def test_open_dataset_refuses_two_masks_for_one_image(tmp_path):
    files = generic([1]) | {"masks/1_mask.png": mask_file(5, ".png")}
    source = write_folder(tmp_path / "set", files)
    with pytest.raises(PolypSegError, match=r"masks/1(_mask)?\.png"):
        open_dataset("folder", source=source)


def test_hyperkvasir_keeps_frames_of_one_name_in_two_classes_apart(tmp_path):
    files = {"lab/cecum/1.jpg": frame_file(1, ".jpg"), "lab/polyps/1.jpg": frame_file(9, ".jpg")}
    source = write_folder(tmp_path / "set", files)
    try:
        opened = open_dataset("hyperkvasir_labelled", source=source, allow_partial=True)
        classes = [example["class"] for example in opened.load(split="full")["full"]]
    except PolypSegError as error:
        assert "1.jpg" in str(error)
    else:
        assert sorted(classes) == ["cecum", "polyps"]


def test_load_names_a_truncated_frame_of_a_set_without_masks(tmp_path):
    source = write_folder(tmp_path / "set", {"lab/cecum/1.jpg": frame_file(1, ".jpg")[:-30]})
    opened = open_dataset("hyperkvasir_labelled", source=source, allow_partial=True)
    with pytest.raises(PolypSegError, match=r"lab/cecum/1\.jpg"):
        opened.load(split="full")


def test_load_reads_mis_tagged_tiff_of_a_set_without_masks(tmp_path):
    source = write_folder(tmp_path / "set", {"lab/cecum/1.tif": frame_file(2, ".tif")})
    opened = open_dataset("hyperkvasir_labelled", source=source, allow_partial=True)
    assert np.array_equal(np.asarray(opened.load(split="full")["full"][0]["image"]), frame_pixels(2))


def test_load_explains_or_accepts_a_set_too_small_to_split(tmp_path):
    """`reference` is the default, so this is what a first try with a handful of images meets."""
    opened = open_dataset("folder", source=write_folder(tmp_path / "set", generic([1, 2, 3])))
    try:
        loaded = opened.load()
    except PolypSegError as error:
        assert "full" in str(error)
    else:
        assert loaded["train"].num_rows == 3


def test_split_tells_that_images_are_in_no_part(tmp_path):
    """A renamed copy of Kvasir-SEG: a pinned split that covers nothing must not look like a split."""
    source = write_folder(tmp_path / "set", generic([1, 2, 3], suffix=".jpg"))
    with pytest.raises(PolypSegError):
        open_dataset("kvasir_seg", source=source, allow_partial=True).split("reference")


# Layouts as published and as people re-pack them


def colondb_layout():
    """As published: frame, mask and contour in one folder."""
    files = {}
    for code in (1, 2, 10):
        files[f"CVC-ColonDB/{code}.tiff"] = frame_file(code, ".tiff")
        files[f"CVC-ColonDB/p{code}.tiff"] = mask_file(code, ".tiff")
        files[f"CVC-ColonDB/cp{code}.tiff"] = mask_file(11, ".tiff")
    return files


def marked(codes, mask, image="{}"):
    files = {f"{image.format(code)}.jpg": frame_file(code, ".jpg") for code in codes}
    return files | {f"{mask.format(code)}.png": mask_file(code, ".png") for code in codes}


REPACKS = {
    "colondb as published": ("cvc_colondb", colondb_layout(), (1, 2, 10)),
    "colondb without its folder": (
        "cvc_colondb",
        {k.split("/")[1]: v for k, v in colondb_layout().items()},
        (1, 2, 10),
    ),
    "images and masks": ("cvc_clinicdb", marked((1, 2), "CVC/masks/{}", "CVC/images/{}"), (1, 2)),
    "image and mask": ("etis_larib", marked((1, 2), "mask/{}", "image/{}"), (1, 2)),
    "parts above": (
        "kvasir_seg",
        marked((1,), "train/masks/{}", "train/images/{}") | marked((2,), "test/masks/{}", "test/images/{}"),
        (1, 2),
    ),
    "parts below": (
        "kvasir_seg",
        marked((1,), "masks/train/{}", "images/train/{}") | marked((2,), "masks/val/{}", "images/val/{}"),
        (1, 2),
    ),
    "parts below beside others": (
        "folder",
        marked((1,), "masks/{}", "images/{}") | marked((2,), "masks/part2/{}", "images/part2/{}"),
        (1, 2),
    ),
    "parts below the folders of a center": (
        "polypgen",
        marked((1,), "C4/masks_C4/{}_mask", "C4/images_C4/{}")
        | marked((2,), "C4/masks_C4/more/{}_mask", "C4/images_C4/more/{}"),
        (1, 2),
    ),
    "parts of other folders": (
        "kvasir_seg",
        marked((1,), "test/masks/{}", "test/images/{}") | marked((2,), "train/mask/{}", "train/image/{}"),
        (1, 2),
    ),
    "parts in the names": ("folder", marked((1, 2), "train_masks/{}_mask", "train_images/{}"), (1, 2)),
    "suffixes": ("cvc_clinicdb", marked((1, 2), "Ground Truth/{}_mask", "Original/{}"), (1, 2)),
    "one folder": ("folder", marked((1, 2), "all/{}_mask", "all/{}"), (1, 2)),
    "one folder, segmentation": ("kvasir_seg", marked((1, 2), "{}_segmentation"), (1, 2)),
    "polypgen by center": ("polypgen", marked((1, 2), "PolypGen/C4/masks/{}_mask", "PolypGen/C4/images/{}"), (1, 2)),
}


@pytest.mark.parametrize("layout", REPACKS)
def test_open_dataset_recognizes_repacks(tmp_path, layout):
    name, files, codes = REPACKS[layout]
    opened = open_dataset(name, source=write_folder(tmp_path / "set", files), allow_partial=True)
    assert sorted(opened.ids) == sorted(map(str, codes))
    for record in opened.records:
        frame, mask = opened.pair(record)
        assert round(np.asarray(frame).mean() / 20) == int(record.id)
        assert mask.tolist() == polyp_mask(int(record.id)).tolist()
    if name == "polypgen":
        assert {record.groups["centre"] for record in opened.records} == {"C4"}


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (("x_mask",), ("x_mask",)),
        (("x_mask", "y"), ("x_mask", "y_mask")),
        (("x", "x_mask"), ("x", "x_mask")),
        (("x", "x_mask"), ("x_mask", "x_mask_mask")),
        (("x_gt", "y_label"), ("x_gt_mask", "y_label")),
        (("caf\u00e9",), ("cafe\u0301",)),
        (("cafe\u0301",), ("caf\u00e9_mask",)),
    ],
)
def test_masks_are_found_whatever_the_images_are_called(tmp_path, images, masks):
    """``masks/x_mask.png`` was called missing for ``images/x_mask.png``, as was an é in another form."""
    files = {f"images/{name}.png": frame_file(code, ".png") for code, name in enumerate(images, 1)}
    files |= {f"masks/{name}.png": mask_file(code, ".png") for code, name in enumerate(masks, 1)}
    for name in ("folder", "kvasir_seg"):
        opened = open_dataset(name, source=write_zip(tmp_path / "set.zip", files), allow_partial=True)
        assert opened.ids == list(images)
        assert [record.mask for record in opened.records] == [f"masks/{name}.png" for name in masks]
        assert all(opened.pair(record) for record in opened.records)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (marked((2,), "other/{}", "images/part2/{}"), r"1 image\(s\) have no mask, first images/part2/2\.jpg"),
        ({"masks/part2/2.png": b""}, r"1 mask\(s\) have no image, first masks/part2/2\.png"),
        (
            marked((1,), "masks/part2/{}", "images/part2/{}"),
            r"images/1\.jpg and images/part2/1\.jpg have the same name",
        ),
        (marked((1,), "train/mask/{}", "train/image/{}"), r"images/1\.jpg and train/image/1\.jpg have the same name"),
    ],
    ids=["image below", "mask below", "same names below", "same names beside"],
)
@pytest.mark.parametrize("name", ["kvasir_seg", "folder"])
def test_images_that_a_layout_leaves_out_are_named(tmp_path, name, more, words):
    """They vanished: "usable, images: 6" of 12."""
    source = write_folder(tmp_path / "set", marked((1,), "masks/{}", "images/{}") | more)
    with pytest.raises(PolypSegError, match=words):
        open_dataset(name, source=source, allow_partial=True)


def test_pictures_of_no_part_in_a_set_are_left_out(tmp_path):
    """A second annotation, boxes and contours, as published beside images and masks."""
    others = ("annotated_images/1.jpg", "bbox/1.jpg", "annotations/1.jpg", "preview.jpg")
    files = marked((1,), "masks/{}", "images/{}") | {name: frame_file(9, ".jpg") for name in others}
    opened = open_dataset("kvasir_seg", source=write_folder(tmp_path / "set", files), allow_partial=True)
    assert [(record.image, record.mask) for record in opened.records] == [("images/1.jpg", "masks/1.png")]


def test_open_dataset_tells_the_trees_it_knows_and_what_it_found(tmp_path):
    write_folder(tmp_path, {"a/1.png": frame_file(1, ".png"), "b/1.png": mask_file(1, ".png")})
    error = str(refusal(lambda: open_dataset("folder", source=tmp_path)))
    assert "images/NAME.png with masks/NAME.png" in error and "Images are in a, b" in error


def neopolyp(codes):
    files = {f"train/train/{code}.jpeg": frame_file(code, ".jpg") for code in codes}
    for code in codes:
        colored = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        colored[polyp_mask(code) > 0] = (255, 0, 0) if code % 2 else (0, 255, 0)
        files[f"train_gt/train_gt/{code}.jpeg"] = encode(colored, ".png")
    return files


def test_neopolyp_is_read_by_its_colors_and_other_values_can_be_asked_for(tmp_path):
    source = write_folder(tmp_path / "set", neopolyp([1, 2]))
    opened = open_dataset("neopolyp", source=source, allow_partial=True)
    assert [opened.mask(record).tolist() for record in opened.records] == [polyp_mask(c).tolist() for c in (1, 2)]
    red = open_dataset("neopolyp", source=source, allow_partial=True, mask_values="#ff0000")
    assert [bool(red.mask(record).any()) for record in red.records] == [True, False]
    assert red.content_id != opened.content_id != opened.source.content_id()


def test_mask_values_are_refused_where_there_are_no_mask_files(tmp_path):
    with pytest.raises(UsageError, match="mask values do not apply"):
        open_dataset("synthetic_a", mask_values="1")


def test_datasets_read_what_segment_reads(tmp_path):
    """A set of .webp frames had "no images"."""
    frame, mask = frame_file(3, ".jpg"), mask_file(3, ".png")
    for suffix in (".webp", ".gif", ".jp2", ".tga"):
        files = {f"images/a{suffix}": frame, f"masks/a{suffix}": mask}
        opened = open_dataset("folder", source=write_folder(tmp_path / suffix, files))
        assert opened.pair(opened.records[0])[1].tolist() == polyp_mask(3).tolist()
