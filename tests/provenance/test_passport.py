"""What a passport promises: all that a model saw of a test is found, what it did not see is not, and files are safe."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from PIL import Image

from polypseg import zoo
from polypseg.cli.evaluate import Seen as EvaluateSeen
from polypseg.cli.evaluate import evaluate
from polypseg.data.corpus import open_frames
from polypseg.data.polyps import SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import check_receipt, read_content
from polypseg.files import write_json
from polypseg.hub import export as export_module
from polypseg.hub.card_facts import planned_facts
from polypseg.hub.export import export_model
from polypseg.hub.model_card import render_card
from polypseg.provenance import passport as passport_module
from polypseg.provenance.checksums import MANIFEST, read_manifest
from polypseg.provenance.origin import PretrainingRecord, WeightsOrigin
from polypseg.provenance.passport import (
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
    attach_passport,
    check_seen,
    find_collisions,
    frames_manifest,
    kept_manifest,
    make_manifest,
    refuse_collisions,
    seen_by_encoder,
)
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model, finetune
from polypseg.weights.loading import PRETRAINING_KEY, write_timm_encoder
from tiny_models import SMOKE_ORIGIN, write_tiny_model

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
def test_every_reference_clinicdb_test_frame_has_a_seen_neighbor(clinicdb):
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


# -- kept manifests ----------------------------------------------------------------------------------------------------


def test_kept_manifest_reads_the_images_once_and_makes_a_damaged_copy_again(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path / "cache"))
    data = open_dataset("folder", source=write_folder(tmp_path / "a", {"one": 1, "two": 2}))
    first = kept_manifest(data, split="full", part="full")
    assert first == make_manifest(data, split="full", part="full")
    assert kept_manifest(data, split="full", part="full", limit=1).part == "full-first1"
    (whole, _) = sorted((tmp_path / "cache" / "manifests").iterdir(), key=lambda path: -path.stat().st_size)
    with monkeypatch.context() as patched:
        patched.setattr(passport_module, "fingerprint", lambda frame: pytest.fail("read again"))
        assert kept_manifest(data, split="full", part="full") == first
    whole.write_text("{")
    assert kept_manifest(data, split="full", part="full") == first


def test_frames_manifest_leaves_out_what_could_not_be_read(tmp_path):
    folder = write_folder(tmp_path / "a", {"one": 1, "two": 2}) / "images"
    (folder / "bad.png").write_bytes(b"no image")
    frames = open_frames(folder.parent, corpus_folder="images")
    assert [frames.name(k) for k in range(3)] == ["images/bad.png", "images/one.png", "images/two.png"]
    manifest = frames_manifest(frames, left_out={0})
    labeled = make_manifest(
        open_dataset("folder", source=write_folder(tmp_path / "b", {"x": 2})), split="full", part="full"
    )
    (hit,) = find_collisions(passport_of(manifest), labeled).found
    assert (hit.kind, hit.seen_id) == (SAME_CONTENT, "images/two.png")
    with pytest.raises(PolypSegError, match=r"bad\.png"):
        frames_manifest(frames)


# -- what a run writes -------------------------------------------------------------------------------------------------


TINY = ["data.image_size=64", "model.encoder=resnet10t", "model.decoder_channels=8", "training.total_batch_size=8"]
TINY += ["training.epochs=1"]


def write_encoder(folder: Path, passport: Passport) -> Path:
    """An encoder as `pretrain.py` leaves it; its record names the passport beside it."""
    digest = hashlib.sha256(passport.save(folder.with_name("pretraining")).read_bytes()).hexdigest()
    path = write_timm_encoder(
        folder,
        timm.create_model("resnet10t", num_classes=0).state_dict(),
        architecture="resnet10t",
        num_features=512,
        facts={},
        origin=PretrainingRecord(method="moco_v3", recipe="r", frames=30, source="frames", passport=digest),
        key=PRETRAINING_KEY,
    )
    passport.save(folder)
    return path


@pytest.mark.slow
def test_finetuning_leaves_the_passport_of_all_stages_and_export_takes_it_along(tmp_path, monkeypatch):
    """An encoder that `pretrain.py` left with its passport, fine-tuning, then an export and a card."""
    stage = Seen(stage="pretraining", description="30 frames", manifest=manifest_with(images_of(30), dataset="frames"))
    weights = write_encoder(tmp_path / "encoder", Passport(model_id="r", seen=(stage,)))

    def train(*, resume: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        recipe = load_recipe("smoke", overrides=TINY)
        model = build_model(zoo.get("RN-HK-MC"), recipe, encoder_weights=str(weights))
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "run")
        finetune(model, data, recipe, accelerator, run_dir=tmp_path / "run", resume=resume)

    data = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=20, size=(64, 64)))
    train(resume=False)
    best = tmp_path / "run" / "best"
    passport = Passport.load(best)
    assert [seen.stage for seen in passport.seen] == ["pretraining", "fine-tuning", "validation"]
    assert [len(seen.manifest.images) for seen in passport.seen] == [30, 16, 2]
    assert [image.id for image in passport.seen[1].manifest.images] == data.split("reference")["train"]
    written = (best / PASSPORT).read_bytes()
    record = json.loads((best / "config.json").read_text())["weights_origin"]
    assert record["passport"] == hashlib.sha256(written).hexdigest() and record["finished"] is True

    (best / PASSPORT).unlink()  # as a version without passports leaves a run
    train(resume=True)
    assert (best / PASSPORT).read_bytes() == written

    monkeypatch.setattr(export_module, "_write_card", lambda *_, **__: None)
    done = export_model(best, tmp_path / "exported", organization="someone")
    assert (done.folder / PASSPORT).read_bytes() == written and PASSPORT in read_manifest(done.folder / MANIFEST)
    tested = make_manifest(data, split="reference", part="train")
    with pytest.raises(UsageError, match="16 of 16 images"):
        check_seen(done.folder, tested)
    (done.folder / PASSPORT).unlink()
    with pytest.raises(PolypSegError, match=r"passport\.json is missing that the weights' record names"):
        check_seen(done.folder, tested)
    (weights.parent / PASSPORT).unlink()
    with pytest.raises(PolypSegError, match="missing that the weights' record names"):
        build_model(zoo.get("RN-HK-MC"), load_recipe("smoke", overrides=TINY), encoder_weights=str(weights))
    facts = replace(planned_facts(zoo.get("RN-HK-MC"), organization="someone"), passport=passport)
    card = str(render_card(facts))
    assert "## What the model saw" in card and "- pretraining: 30 frames (30 images)" in card
    assert "What the model saw" not in str(render_card(replace(facts, passport=None)))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"encoder_initialisation": "random"}, ()),
        ({"encoder_initialisation": zoo.STARTERS["tf_efficientnet_lite0"]}, (zoo.STARTERS["tf_efficientnet_lite0"],)),
        (
            {"encoder_initialisation": "timm:resnet50.tv_in1k", "row": "resnet50_deeplabv3plus.supervised_imagenet1k"},
            ("ImageNet-1k, as timm:resnet50.tv_in1k",),
        ),
        (
            {"encoder_initialisation": "file e", "pretraining": {"frames": 30, "source": "frames"}},
            ("30 frames of frames",),
        ),
    ],
)
def test_what_is_not_listed_is_a_stage_all_the_same(record, expected, tmp_path):
    seen = seen_by_encoder(str(tmp_path / "model.safetensors"), WeightsOrigin.of(record))
    assert tuple(stage.description for stage in seen) == expected
    assert all(stage.manifest is None and stage.stage == "pretraining" for stage in seen)


# -- before a test -----------------------------------------------------------------------------------------------------


def model_folder(path: Path, passport: Passport | None, *, named: bool = False) -> Path:
    write_json(path / "config.json", {"weights_origin": {"model_id": "m"}})
    if passport is not None and named:
        attach_passport(path, passport)
    elif passport is not None:
        passport.save(path)
    return path


def test_check_seen_refuses_reports_or_excludes(tmp_path):
    images = images_of(30, clip=True)
    seen, tested = manifest_with(images[:5]), manifest_with((*images[5:8], *images[20:]), part="test")
    folder = model_folder(tmp_path / "best", passport_of(seen), named=True)
    with pytest.raises(UsageError, match=r"same clip: 3.*--seen report.*--seen exclude"):
        check_seen(folder, tested)
    same, report = check_seen(folder, tested, rule="report")
    assert same is tested and len(report.collisions.images()) == 3 and report.excluded == () and report.reason is None
    left, excluded = check_seen(folder, tested, rule="exclude")
    assert [image.id for image in left.images] == [image.id for image in images[20:]]
    assert left.part == "test-unseen10" and excluded.excluded == ("6", "7", "8")
    assert excluded.passport == hashlib.sha256((folder / PASSPORT).read_bytes()).hexdigest()
    with pytest.raises(UsageError, match="saw every image"):
        check_seen(folder, tested.restrict(["6"], split="x", part="y"), rule="exclude")
    unseen, nothing = check_seen(folder, tested.restrict(["25"], split="x", part="y"), rule="exclude")
    assert unseen.part == "y" and nothing.collisions.found == ()


def test_check_seen_says_that_a_model_has_no_passport_and_stops_at_another_one(tmp_path):
    tested = manifest_with(images_of(2))
    _, unknown = check_seen(model_folder(tmp_path / "a", None), tested)
    assert unknown.collisions is None and "no passport.json" in unknown.reason
    _, files = check_seen(None, tested)
    assert files.collisions is None and "without a passport" in files.reason
    folder = model_folder(tmp_path / "b", passport_of(manifest_with(images_of(2, start=50))), named=True)
    passport_of(manifest_with(images_of(1, start=90))).save(folder)
    with pytest.raises(PolypSegError, match="not the one that the weights' record names"):
        check_seen(folder, tested, rule="report")


def evaluate_with(folder: Path, **options) -> None:
    """`polypseg evaluate` of a tiny model with a passport, before any prediction is made."""
    evaluate(model=str(folder), convention=["paper"], **options)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("dataset", "split", "tested", "found"),
    [
        ("kvasir_seg", "official", 100, r"same content: 88, same id: 88"),
        ("kvasir_seg", "reference", 100, r"2 of 100 images .*near-duplicate: 2"),
        ("cvc_clinicdb", "reference", 61, r"61 of 61 images .*same clip: 61"),
    ],
)
def test_evaluate_refuses_what_the_training_part_gives_away(
    dataset, split, tested, found, kvasir, clinicdb, real_data, tmp_path
):
    parts, place = {"kvasir_seg": (kvasir, "Kvasir-SEG"), "cvc_clinicdb": (clinicdb, "CVC-ClinicDB")}[dataset]
    folder = write_tiny_model(tmp_path / "best", origin=SMOKE_ORIGIN)
    attach_passport(folder, passport_of(parts[split, "train"]))
    where = {"dataset": dataset, "source": [str(real_data / place)], "split": "reference", "part": "test"}
    with pytest.raises(UsageError, match=found) as caught:
        evaluate_with(folder, output=tmp_path / "results", **where)
    assert "--seen report" in str(caught.value) and not (tmp_path / "results").exists()
    if dataset == "kvasir_seg":
        left, check = check_seen(folder, parts["reference", "test"], rule="exclude")
        assert len(left.images) == tested - len(check.excluded) == {"official": 12, "reference": 98}[split]


def test_evaluate_tests_the_rest_and_names_it(tmp_path):
    data = open_dataset("folder", source=write_folder(tmp_path / "data", {"a": 1, "b": 2, "c": 3}))
    whole = make_manifest(data, split="full", part="full")
    folder = write_tiny_model(tmp_path / "best", origin=SMOKE_ORIGIN)
    attach_passport(folder, passport_of(whole.restrict(["b"], split="full", part="train")))
    where = {"dataset": "folder", "source": [str(tmp_path / "data")], "output": tmp_path / "results"}
    with pytest.raises(UsageError, match="1 of 3 images"):
        evaluate_with(folder, **where)
    evaluate_with(folder, seen=EvaluateSeen.exclude, name="mine", save_masks=True, **where)
    evaluate_with(folder, seen=EvaluateSeen.report, name="mine", **where)
    results = tmp_path / "results" / "mine"
    left = read_content(results / "folder.full.full-unseen2.receipt.json")
    assert [row["id"] for row in left["images"]] == ["a", "c"] and left["seen"]["excluded"] == ["b"]
    whole_receipt = read_content(results / "folder.full.full.receipt.json")
    assert whole_receipt["n"] == 3 and whole_receipt["collisions"]["images"][0]["id"] == "b"
    assert whole_receipt["model"]["seed"] == 42 and len(whole_receipt["model"]["sha256"]) == 64
    assert all(check_receipt(path) == [] for path in results.glob("*.receipt.json"))
    assert sorted(path.name for path in (results / "masks" / "folder").iterdir()) == ["a.png", "c.png"]


def test_centers_are_in_the_manifest_only_where_a_set_tells_them(tmp_path):
    images = tuple(ImagePrint(id=str(k), pixels="0" * 32, hash="0" * 64, centre=f"C{k}") for k in (1, 2))
    told = SplitManifest(dataset="polypgen", split="full", part="full", content_id="x", images=images)
    silent = replace(told, images=tuple(replace(image, centre=None) for image in images))
    assert told.content()["centres"] == ["C1", "C2"] and "centres" not in silent.content()
    assert told.digest != silent.digest
    for manifest in (told, silent):
        assert SplitManifest.load(manifest.save(tmp_path / "m.json")) == manifest
