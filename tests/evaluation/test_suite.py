"""What the suite promises: every test at hand is run once and filed, what is missing or refused is said."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.cli.evaluate import evaluate
from polypseg.data import open_dataset
from polypseg.data.catalog import DATASETS, NEGATIVES
from polypseg.data.splits import pinned_split
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import check_receipt, find_receipts
from polypseg.evaluation.suite import SUITE, SuitePlan, run_suite
from polypseg.files import read_json, write_json
from polypseg.provenance.passport import Passport, Seen, attach_passport, make_manifest
from tiny_models import SMOKE_ORIGIN, write_tiny_model

SIZE = (24, 32)


class Halves:
    """Predicts the left half of bright frames and nothing of dark ones; counts what it is asked for."""

    name = "halves"
    origin = {"source": "test"}  # noqa: RUF012

    def __init__(self):
        self.asked: list[str] = []

    def predict(self, dataset, ids):
        for record_id in ids:
            self.asked.append(record_id)
            bright = np.asarray(dataset.frame(dataset.by_id[record_id])).mean() > 128
            probability = np.zeros(SIZE, np.float32)
            probability[:, :16] = 0.9 if bright else 0.1
            yield record_id, probability


def write_pair(folder: Path, name: str, *, images: str, masks: str, seed: int, bright: bool = True, polyp: bool = True):
    rng = np.random.default_rng(seed)
    frame = rng.integers(150 if bright else 0, 256 if bright else 100, (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    mask[:, :16] = 255 * polyp
    for part, pixels in ((images, frame), (masks, mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / part / f"{name}.png")


@pytest.fixture(scope="module")
def kvasir(tmp_path_factory) -> Path:
    """Three images of both test parts, two of the reference's only, one of its training part."""
    folder = tmp_path_factory.mktemp("kvasir")
    reference, official = (pinned_split("kvasir_seg", name) for name in ("reference", "official"))
    both = sorted(set(reference["test"]) & set(official["test"]))[:3]
    alone = sorted(set(reference["test"]) - set(official["test"]))[:2]
    other = sorted(set(reference["train"]) & set(official["train"]))[:1]
    for seed, name in enumerate([*both, *alone, *other]):
        write_pair(folder, name, images="images", masks="masks", seed=seed)
    return folder


@pytest.fixture
def nothing_at_home(monkeypatch, tmp_path):
    """A data folder without data."""
    monkeypatch.setenv("POLYPSEG_DATA", str(tmp_path / "nowhere"))


def plan_of(tmp_path: Path, **fields) -> SuitePlan:
    return SuitePlan(output=tmp_path / "results", **({"conventions": ("paper",), "allow_partial": True} | fields))


# -- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_has_each_test_once_and_the_pinned_numbers_of_images():
    assert len({test.name for test in SUITE}) == len(SUITE)
    for test in SUITE:
        if test.dataset == NEGATIVES or test.split == "centre":
            continue
        expected = DATASETS[test.dataset].count
        if test.split != "full":
            expected = len(pinned_split(test.dataset, test.split)[test.part])
        assert test.count == expected, test.name
    assert {test.count for test in SUITE} >= {100, 120, 612, 61, 66, 380, 196}


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_at_home")
def test_an_image_of_several_tests_is_predicted_once_and_every_test_has_a_receipt(kvasir, tmp_path):
    source = Halves()
    outcomes = run_suite(source, plan_of(tmp_path, sources={"kvasir_seg": kvasir}))
    tested = {o.test: o for o in outcomes if o.status == "tested"}
    assert set(tested) == {"kvasir-reference", "kvasir-official"}
    assert len(source.asked) == len(set(source.asked)) == 5
    assert tested["kvasir-reference"].part == "test-partial5" and tested["kvasir-official"].part == "test-partial3"
    assert tested["kvasir-reference"].dice == 1 and tested["kvasir-reference"].seen_images is None
    receipts = find_receipts(tmp_path / "results")
    assert sorted(path.name for path in receipts) == [
        "kvasir_seg.official.test-partial3.receipt.json",
        "kvasir_seg.reference.test-partial5.receipt.json",
    ]
    assert all(check_receipt(path) == [] for path in receipts)
    rows = list(csv.DictReader((tmp_path / "results" / "halves" / "suite.csv").open()))
    assert [row["test"] for row in rows] == [test.name for test in SUITE]
    assert read_json(tmp_path / "results" / "halves" / "suite.json")["tests"][0]["receipt"] == receipts_name(rows[0])


def receipts_name(row: dict[str, str]) -> str:
    return f"{row['dataset']}.{row['split']}.{row['part']}.receipt.json"


@pytest.mark.usefixtures("nothing_at_home")
def test_what_is_not_at_hand_says_how_to_get_it(kvasir, tmp_path):
    outcomes = {o.test: o for o in run_suite(Halves(), plan_of(tmp_path, sources={"kvasir_seg": kvasir}))}
    assert outcomes["etis"].status == outcomes["polypgen-c3"].status == "not at hand"
    assert "Register at" in outcomes["clinicdb-full"].reason and "synapse" in outcomes["polypgen-c1"].reason
    assert "--negatives" in outcomes["negatives"].reason
    with pytest.raises(UsageError, match="no test of the suite could be run: ETIS"):
        run_suite(Halves(), plan_of(tmp_path, only=("etis",)))


def test_an_incomplete_set_fails_unless_a_part_is_meant(kvasir, tmp_path):
    outcomes = run_suite(
        Halves(),
        plan_of(
            tmp_path,
            sources={"kvasir_seg": kvasir},
            only=("kvasir-official", "ours"),
            own={"ours": kvasir},
            allow_partial=False,
        ),
    )
    assert [(o.test, o.status) for o in outcomes] == [("kvasir-official", "failed"), ("ours", "tested")]
    assert "--allow-partial" in outcomes[0].reason
    assert (outcomes[1].dataset, outcomes[1].n) == ("ours", 6)


def test_polypgen_is_tested_by_hospital_and_on_its_frames_without_polyp(tmp_path):
    folder = tmp_path / "polypgen"
    for seed, (center, polyp, bright) in enumerate(
        [("C1", True, True), ("C1", True, False), ("C1", False, True), ("C2", True, True), ("C2", False, False)]
    ):
        names = {"images": f"images_{center}", "masks": f"masks_{center}"}
        write_pair(folder, f"{center}_{seed}", seed=seed, polyp=polyp, bright=bright, **names)
    names = ("polypgen-c1", "polypgen-c2", "polypgen-c3", "polypgen-without-polyp")
    source = Halves()
    plan = plan_of(tmp_path, sources={"polypgen": folder}, only=names, alarm_area=20)
    c1, c2, c3, without = run_suite(source, plan)
    assert (c1.n, c1.dice, c1.part) == (2, 0.5, "C1-partial2") and (c2.n, c2.dice) == (1, 1.0)
    assert c3.status == "failed" and "no image for the test polypgen-c3" in c3.reason
    assert (without.n, without.false_alarms_per_100, without.dice) == (2, 50.0, None)
    assert without.predicted_share == pytest.approx(0.25) and len(source.asked) == 5
    receipt = read_json(tmp_path / "results" / "halves" / without.receipt)
    assert receipt["false_alarms"]["minimal_area_pixels"] == 20 and receipt["dataset"]["part"].startswith(
        "without-polyp"
    )


def test_a_folder_of_frames_without_polyps_needs_no_masks(tmp_path):
    folder = tmp_path / "frames"
    for seed in range(4):
        write_pair(folder, f"{seed}", images="cecum", masks="../unused", seed=seed, bright=seed == 0)
    (outcome,) = run_suite(Halves(), plan_of(tmp_path, negatives=folder, only=("negatives",)))
    assert (outcome.n, outcome.false_alarms_per_100, outcome.dice) == (4, 25.0, None)
    assert outcome.false_alarms_low < 25 < outcome.false_alarms_high
    assert check_receipt(tmp_path / "results" / "halves" / outcome.receipt) == []


def test_saved_masks_are_bilevel_and_those_of_the_threshold(kvasir, tmp_path):
    plan = plan_of(tmp_path, sources={"kvasir_seg": kvasir}, only=("kvasir-official",), save_masks=True)
    run_suite(Halves(), plan)
    masks = sorted((tmp_path / "results" / "halves" / "masks" / "kvasir_seg").glob("*.png"))
    assert len(masks) == 3
    for path in masks:
        with Image.open(path) as image:
            assert image.mode == "1" and (np.asarray(image)[:, :16]).all() and not np.asarray(image)[:, 16:].any()


def test_a_refused_test_does_not_end_the_run(kvasir, tmp_path):
    """A model that trained on an image of the reference's test part, as a passport beside it says."""
    data = open_dataset("kvasir_seg", source=kvasir, allow_partial=True)
    reference = make_manifest(data, split="reference", part="test")
    official = set(data.split("official")["test"])
    trained = [image.id for image in reference.images if image.id not in official]
    seen = Seen(stage="fine-tuning", description="x", manifest=reference.restrict(trained, split="x", part="train"))
    model = tmp_path / "best"
    write_json(model / "config.json", {})
    Passport(model_id="m", seen=(seen,)).save(model)
    names = ("kvasir-reference", "kvasir-official")
    plan = plan_of(tmp_path, sources={"kvasir_seg": kvasir}, only=names)
    refused, tested = run_suite(Halves(), plan, model_folder=model)
    assert refused.status == "refused" and "2 of 5 images" in refused.reason and "--seen exclude" in refused.reason
    assert (tested.status, tested.n, tested.seen_images) == ("tested", 3, 0)
    plan = plan_of(tmp_path, sources={"kvasir_seg": kvasir}, only=names[:1], rule="exclude")
    (left,) = run_suite(Halves(), plan, model_folder=model)
    assert (left.n, left.part) == (3, "test-partial5-unseen3")
    receipt = read_json(tmp_path / "results" / "halves" / left.receipt)
    assert receipt["seen"]["excluded"] == trained and receipt["collisions"]["colliding"] == 2
    assert check_receipt(tmp_path / "results" / "halves" / left.receipt) == []


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"only": ("kvasir",)}, "unknown test of the suite 'kvasir'"),
        ({"sources": {"kvasir-seg": Path()}}, "Did you mean 'kvasir_seg'"),
        ({"conventions": ("pooled",)}, "of the convention 'paper'"),
        ({"own": {"../x": Path()}}, "cannot name a folder of your own"),
    ],
)
@pytest.mark.usefixtures("nothing_at_home")
def test_wrong_plans_are_refused(tmp_path, fields, found):
    with pytest.raises(UsageError, match=found):
        run_suite(Halves(), plan_of(tmp_path, **fields))


def test_a_folder_of_ones_own_may_not_take_the_name_of_a_published_set(kvasir, tmp_path):
    with pytest.raises(UsageError, match="'kvasir_seg' cannot name a folder of your own: choose another word"):
        run_suite(Halves(), plan_of(tmp_path, own={"kvasir_seg": kvasir}))


def test_the_command_prints_every_test_and_fails_for_a_refused_one(kvasir, tmp_path, capsys):
    model = write_tiny_model(tmp_path / "best", origin=SMOKE_ORIGIN)
    data = open_dataset("kvasir_seg", source=kvasir, allow_partial=True)
    seen = Seen(stage="fine-tuning", description="x", manifest=make_manifest(data, split="official", part="test"))
    attach_passport(model, Passport(model_id="m", seen=(seen,)))
    options = {"suite": True, "allow_partial": True, "convention": ["paper"], "output": tmp_path / "results"}
    options |= {"model": str(model), "name": "mine", "source": [f"kvasir_seg={kvasir}"]}
    with pytest.raises(
        PolypSegError, match=r"1 of 2 tests were refused or failed, first kvasir-official: 3 of 3 images"
    ):
        evaluate(only=["kvasir-official", "mirror"], own=[f"mirror={write_dark(tmp_path / 'dark')}"], **options)
    printed = capsys.readouterr().out
    assert "refused" in printed and "kvasir-official: refused: 3 of 3" in printed
    assert (tmp_path / "results" / "mine" / "mirror.full.full.receipt.json").is_file()
    with pytest.raises(UsageError, match="--dataset does not apply"):
        evaluate(dataset="kvasir_seg", **options)
    with pytest.raises(UsageError, match="--own 'x' must look like NAME=PATH"):
        evaluate(own=["x"], **options)


def write_dark(folder: Path) -> Path:
    write_pair(folder, "a", images="images", masks="masks", seed=99, bright=False)
    return folder
