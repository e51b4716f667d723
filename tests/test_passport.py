"""What a passport promises: all that a model saw of a test is found, what it did not see is not, and files are safe."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.polyps import open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.passport import (
    KINDS,
    NEAR_DUPLICATE,
    PASSPORT,
    SAME_CLIP,
    SAME_CONTENT,
    SAME_ID,
    ImagePrint,
    Passport,
    Seen,
    SplitManifest,
    find_collisions,
    make_manifest,
    refuse_collisions,
)

WIDTH, HEIGHT = 96, 80


def draw_frame(seed: int) -> NDArray[np.uint8]:
    """A smooth random frame, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def write_folder(path: Path, seeds: dict[str, int]) -> Path:
    """A folder of pairs: name of a frame -> seed of its picture."""
    for part in ("images", "masks"):
        (path / part).mkdir(parents=True)
    for name, seed in seeds.items():
        Image.fromarray(draw_frame(seed)).save(path / "images" / f"{name}.png")
        Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(path / "masks" / f"{name}.png")
    return path


def manifest_of(path: Path) -> SplitManifest:
    return make_manifest(open_dataset("folder", source=path), split="full", part="full")


def passport_of(*manifests: SplitManifest) -> Passport:
    seen = tuple(Seen(stage="fine-tuning", description=m.title, manifest=m) for m in manifests)
    return Passport(model_id="a_model", seen=seen)


def images_of(count: int, *, clip: bool = False, start: int = 1) -> tuple[ImagePrint, ...]:
    """Prints with random hashes, about 128 bits apart; ten frames a clip."""
    rng = np.random.default_rng(start)
    return tuple(
        ImagePrint(id=str(i), pixels=rng.bytes(16).hex(), hash=rng.bytes(32).hex(), clip=str(i // 10) if clip else None)
        for i in range(start, start + count)
    )


def manifest_with(images: tuple[ImagePrint, ...], *, dataset: str = "cvc_clinicdb", part: str = "x") -> SplitManifest:
    return SplitManifest(dataset=dataset, split="reference", part=part, content_id="0" * 16, images=images)


def flip_bits(hexed: str, count: int) -> str:
    """The hash with its first ``count`` bits inverted."""
    return f"{int(hexed, 16) ^ (((1 << count) - 1) << (256 - count)):064x}"


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_manifest_ignores_how_a_frame_is_stored_but_not_what_it_shows(tmp_path):
    folder = write_folder(tmp_path / "a", {"one": 1, "two": 2})
    before = manifest_of(folder)
    Image.fromarray(draw_frame(1)).save(folder / "images" / "one.png", compress_level=1)
    assert manifest_of(folder).digest == before.digest
    Image.fromarray(draw_frame(3)).save(folder / "images" / "one.png")
    assert manifest_of(folder).digest != before.digest


def test_manifest_digest_does_not_depend_on_order_or_on_the_parts_name():
    images = images_of(5)
    assert manifest_with(images).digest == manifest_with(images[::-1], part="other").digest
    assert manifest_with(images).digest != manifest_with(images[:4]).digest


def test_manifest_comes_back_from_its_file(tmp_path):
    manifest = manifest_with(images_of(30, clip=True))
    loaded = SplitManifest.load(manifest.save(tmp_path / "m.json"))
    assert loaded == manifest and loaded.digest == manifest.digest


def test_restrict_keeps_the_named_images_and_refuses_others():
    part = manifest_with(images_of(5)).restrict(["4", "2"], split="mine", part="test")
    assert [image.id for image in part.images] == ["4", "2"]
    assert (part.split, part.part) == ("mine", "test") and part.title == "CVC-ClinicDB, mine test"
    with pytest.raises(UsageError, match=r"1 image\(s\) are not in .*first 9"):
        manifest_with(images_of(5)).restrict(["1", "9"], split="mine", part="test")


def test_make_manifest_names_the_parts_for_an_unknown_one(tmp_path):
    folder = write_folder(tmp_path / "a", {"one": 1})
    with pytest.raises(UsageError, match="Choose from: full"):
        make_manifest(open_dataset("folder", source=folder), split="full", part="test")


# -- passports as files ------------------------------------------------------------------------------------------------


def test_passport_comes_back_from_its_folder_and_is_small(tmp_path):
    rng = np.random.default_rng(0)
    ids = ("cju" + "".join(rng.choice(list("abcdefghij0123456789"), 22)) for _ in range(800))
    images = tuple(ImagePrint(id=i, pixels=rng.bytes(16).hex(), hash=rng.bytes(32).hex()) for i in ids)
    listed = Seen(stage="fine-tuning", description="Kvasir", manifest=manifest_with(images, dataset="kvasir_seg"))
    passport = Passport(model_id="m", seen=(Seen(stage="pretraining", description="ImageNet-1k"), listed))
    path = passport.save(tmp_path)
    assert path == tmp_path / PASSPORT and path.stat().st_size < 150_000
    assert Passport.load(tmp_path) == passport


@pytest.mark.parametrize("column", ["ids", "pixels", "hashes", "clips"])
def test_load_refuses_a_passport_whose_lists_were_changed(tmp_path, column):
    path = passport_of(manifest_with(images_of(3, clip=True))).save(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    values = content["seen"][0]["manifest"][column]
    values[0] = "0" * len(values[0]) + ("0" if column in ("ids", "clips") else "")
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PolypSegError, match=r"passport\.json is damaged"):
        Passport.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "cannot read"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format": 2}', "newer polypseg"),
        ('{"format": 1, "model_id": "m", "seen": [{"stage": "pretraining"}]}', "damaged"),
    ],
)
def test_load_names_a_passport_that_it_cannot_read(tmp_path, text, found):
    (tmp_path / PASSPORT).write_text(text, encoding="utf-8")
    with pytest.raises(PolypSegError, match=found) as caught:
        Passport.load(tmp_path)
    assert PASSPORT in str(caught.value) and caught.value.exit_code == 1


def test_load_of_a_folder_without_passport_is_an_error_that_names_it(tmp_path):
    with pytest.raises(PolypSegError, match=r"cannot read .*passport\.json"):
        Passport.load(tmp_path)


# -- collisions --------------------------------------------------------------------------------------------------------


def test_find_collisions_finds_the_same_picture_under_another_name(tmp_path):
    seen = manifest_of(write_folder(tmp_path / "seen", {"a": 1, "b": 2, "c": 3}))
    tested = manifest_of(write_folder(tmp_path / "tested", {"x": 2, "y": 7}))
    (hit,) = find_collisions(passport_of(seen), tested).found
    assert (hit.kind, hit.id, hit.seen_id, hit.bits, hit.stage) == (SAME_CONTENT, "x", "b", 0, "fine-tuning")


def test_find_collisions_finds_a_reencoded_picture_by_its_looks(tmp_path):
    seen = manifest_of(write_folder(tmp_path / "seen", {"a": 1, "b": 2}))
    folder = write_folder(tmp_path / "tested", {"y": 7})
    Image.fromarray(draw_frame(2)).save(folder / "images" / "x.jpg", quality=85)
    Image.fromarray(np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)).save(folder / "masks" / "x.png")
    (hit,) = find_collisions(passport_of(seen), manifest_of(folder)).found
    assert (hit.kind, hit.id, hit.seen_id) == (NEAR_DUPLICATE, "x", "b")


def test_equal_names_in_two_folders_of_ones_own_are_no_collision(tmp_path):
    seen = manifest_of(write_folder(tmp_path / "seen", {"a": 1}))
    tested = manifest_of(write_folder(tmp_path / "tested", {"a": 2}))
    assert find_collisions(passport_of(seen), tested).found == ()
    assert find_collisions(passport_of(seen), seen).images(SAME_ID) == ("a",)


def test_equal_names_in_one_published_set_are_a_collision_whatever_the_pixels():
    seen = manifest_with(images_of(3, start=1))
    other = tuple(
        ImagePrint(id=i.id, pixels=new.pixels, hash=new.hash)
        for i, new in zip(seen.images, images_of(3, start=50), strict=True)
    )
    found = find_collisions(passport_of(seen), manifest_with(other))
    assert found.images(SAME_ID) == ("1", "2", "3") and found.images(SAME_CONTENT, NEAR_DUPLICATE) == ()
    assert find_collisions(passport_of(seen), manifest_with(other, dataset="kvasir_seg")).found == ()


@pytest.mark.parametrize(("bits", "expected"), [(0, 1), (10, 1), (11, 0)])
def test_near_duplicates_are_at_most_ten_bits_apart(bits, expected):
    seen = manifest_with(images_of(40), dataset="kvasir_seg")
    twin = ImagePrint(id="new", pixels="f" * 32, hash=flip_bits(seen.images[7].hash, bits))
    found = find_collisions(passport_of(seen), manifest_with((twin,))).found
    assert [(hit.kind, hit.seen_id, hit.bits) for hit in found] == [(NEAR_DUPLICATE, "8", bits)] * expected


def test_same_clip_names_the_nearest_seen_frame_of_each_frame():
    images = images_of(30, clip=True, start=10)  # clips 1: 10-19, 2: 20-29, 3: 30-39
    by_id = {image.id: image for image in images}
    seen = manifest_with(tuple(by_id[i] for i in ("10", "15", "31")))
    tested = manifest_with(tuple(by_id[i] for i in ("13", "25", "38")))
    found = find_collisions(passport_of(seen), tested).found
    assert [(hit.kind, hit.id, hit.seen_id, hit.frames_apart) for hit in found] == [
        (SAME_CLIP, "13", "15", 2),
        (SAME_CLIP, "38", "31", 7),
    ]
    elsewhere = SplitManifest(
        dataset="polypgen", split="full", part="full", content_id="0" * 16, images=tested.images
    )  # clip 1 of another set is another clip
    assert find_collisions(passport_of(seen), elsewhere).found == ()


def test_refuse_collisions_counts_them_and_names_the_first():
    seen = manifest_with(images_of(30, clip=True), part="train")
    tested = manifest_with(seen.images[4:7] + images_of(2, start=500), part="test")
    with pytest.raises(UsageError) as caught:
        refuse_collisions(passport_of(seen), tested)
    message = str(caught.value)
    assert message.startswith("3 of 5 images of CVC-ClinicDB, reference test collide with what the model saw")
    assert "same content: 3, same id: 3, same clip: 3" in message
    assert "first 5: same content as 5 of CVC-ClinicDB, reference train (fine-tuning)" in message
    assert "\n" not in message and caught.value.exit_code == 2


def test_refuse_collisions_lets_other_kinds_pass_into_the_report():
    images = images_of(20, clip=True)
    passport, tested = passport_of(manifest_with(images[:12])), manifest_with(images[12:14])
    with pytest.raises(UsageError, match="same clip: 2"):
        refuse_collisions(passport, tested)
    report = refuse_collisions(passport, tested, kinds=(SAME_CONTENT, SAME_ID, NEAR_DUPLICATE))
    assert report.images() == ("13", "14") and report.content()["kinds"][SAME_CLIP] == 2
    assert json.loads(json.dumps(report.content()))["colliding"] == 2
    with pytest.raises(UsageError, match="Did you mean 'same clip'"):
        refuse_collisions(passport, tested, kinds=("same-clip",))


def test_what_is_not_listed_is_said_to_be_unchecked():
    passport = Passport(model_id="m", seen=(Seen(stage="pretraining", description="ImageNet-1k"),))
    report = refuse_collisions(passport, manifest_with(images_of(4)))
    assert report.found == () and report.unchecked == ("pretraining on ImageNet-1k",)
    assert report.summary == (
        "none of the 4 images of CVC-ClinicDB, reference x is among what the model is known to have seen. "
        "Not checked, as not listed: pretraining on ImageNet-1k."
    )


def test_an_empty_manifest_is_kept_and_collides_with_nothing(tmp_path):
    empty = manifest_with(())
    assert SplitManifest.load(empty.save(tmp_path / "m.json")) == empty
    assert find_collisions(passport_of(empty), manifest_with(images_of(3))).found == ()
    assert find_collisions(passport_of(manifest_with(images_of(3))), empty).summary.startswith("none of the 0 images")


def test_collisions_of_several_stages_are_all_found():
    images = images_of(6)
    seen = (
        Seen(stage="fine-tuning", description="a", manifest=manifest_with(images[:3])),
        Seen(stage="validation", description="b", manifest=manifest_with(images[3:5])),
    )
    found = find_collisions(Passport(model_id="m", seen=seen), manifest_with(images))
    assert [(hit.id, hit.stage) for hit in found.found if hit.kind == SAME_CONTENT] == [
        ("1", "fine-tuning"),
        ("2", "fine-tuning"),
        ("3", "fine-tuning"),
        ("4", "validation"),
        ("5", "validation"),
    ]
    assert len(found.images()) == 5 and set(found.content()["kinds"]) == set(KINDS)


# -- the public sets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kvasir(real_data):
    return _parts(real_data / "Kvasir-SEG", "kvasir_seg", ("reference", "official"))


@pytest.fixture(scope="module")
def clinicdb(real_data):
    return _parts(real_data / "CVC-ClinicDB", "cvc_clinicdb", ("reference", "sequence_disjoint"))


def _parts(path: Path, name: str, splits: tuple[str, ...]) -> dict[tuple[str, str], SplitManifest]:
    """(split, part) -> manifest, each frame read once."""
    dataset = open_dataset(name, source=path)
    whole = make_manifest(dataset, split="full", part="full")
    return {
        (split, part): whole.restrict(ids, split=split, part=part)
        for split in splits
        for part, ids in dataset.split(split).items()
    }


@pytest.mark.real_data
def test_a_model_of_the_official_kvasir_split_saw_88_of_the_100_reference_test_images(kvasir):
    found = find_collisions(passport_of(kvasir["official", "train"]), kvasir["reference", "test"])
    assert len(found.images(SAME_CONTENT)) == len(found.images(SAME_ID)) == 88
    with pytest.raises(UsageError, match="of 100 images of Kvasir-SEG, reference test"):
        refuse_collisions(passport_of(kvasir["official", "train"]), kvasir["reference", "test"])


@pytest.mark.real_data
def test_two_near_duplicates_straddle_the_reference_kvasir_split(kvasir, tmp_path):
    passport = passport_of(kvasir["reference", "train"])
    found = find_collisions(passport, kvasir["reference", "test"]).found
    assert {(hit.kind, hit.id) for hit in found} == {
        (NEAR_DUPLICATE, "cju76lsehyia10987u54vn8rb"),
        (NEAR_DUPLICATE, "cju886ryxnsl50801r93jai7q"),
    }
    assert len(found) == 2
    assert passport.save(tmp_path).stat().st_size < 150_000  # 800 images
    assert find_collisions(Passport.load(tmp_path), kvasir["reference", "test"]).found == found


@pytest.mark.real_data
def test_every_reference_clinicdb_test_frame_has_a_seen_neighbour(clinicdb):
    found = find_collisions(passport_of(clinicdb["reference", "train"]), clinicdb["reference", "test"])
    assert len(found.images(SAME_CLIP)) == found.tested == 61
    assert max(hit.frames_apart for hit in found.found if hit.kind == SAME_CLIP) == 2
    assert found.images(SAME_CONTENT, SAME_ID) == () and found.images(NEAR_DUPLICATE)


@pytest.mark.real_data
@pytest.mark.parametrize(("seen", "tested"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_no_part_of_the_sequence_disjoint_split_collides_with_another(clinicdb, seen, tested):
    passport = passport_of(clinicdb["sequence_disjoint", seen])
    assert refuse_collisions(passport, clinicdb["sequence_disjoint", tested]).found == ()


@pytest.mark.real_data
def test_the_two_public_sets_do_not_collide(kvasir, clinicdb):
    for part in ("train", "validation", "test"):
        passport = passport_of(kvasir["reference", part])
        assert all(
            find_collisions(passport, clinicdb["reference", p]).found == () for p in ("train", "validation", "test")
        )
