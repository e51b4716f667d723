"""What a receipt promises: every number in it follows from its images, and whatever was changed is named."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from polypseg.cli.evaluate import check_receipts
from polypseg.data import open_dataset
from polypseg.data.catalog import CLIP_COLUMN, DATASETS
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import (
    Receipt,
    check_receipt,
    digest_of,
    false_alarms,
    find_receipts,
    pack,
    read_content,
    read_receipt,
    read_score_set,
    refuse_other_weights,
    save_receipt,
    unpack,
)
from polypseg.provenance.local import STARTER_FOLDER
from polypseg.statistics import mean_intervals

FRAMES = ("1", "2", "26", "27", "3", "51", "52", "53", "54")
"""Of CVC-ClinicDB's clips 1, 2 and 3, sorted as strings; 54 repeats 53."""
CONVENTIONS = ("paper", "pooled", "pranet", "size", "lesions", "calibration")
STARTER = STARTER_FOLDER / "results" / "kvasir_seg.reference.test.receipt.json"


class Guesses:
    """Smooth random maps that lean toward the true mask."""

    name = "guesses"
    origin = {"source": "model", "weights_origin": {"sha256": "a" * 64, "row": "vit_base_dpt.random"}}  # noqa: RUF012

    def predict(self, dataset, ids):
        for record_id in ids:
            mask = dataset.mask(dataset.by_id[record_id])
            frame = "53" if record_id == "54" else record_id
            noise = gaussian_filter(np.random.default_rng(int(frame)).normal(size=mask.shape), 4)
            yield record_id, (1 / (1 + np.exp(-40 * noise - 2 * (mask - 0.5)))).astype(np.float32)


def write_clinicdb(folder: Path) -> Path:
    """Frames of 40x56 pixels with a square polyp; none on frame 27."""
    for name in FRAMES:
        rng = np.random.default_rng(53 if name == "54" else int(name))
        frame, mask = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8), np.zeros((40, 56), np.uint8)
        if name != "27":
            mask[5 : 10 + int(rng.integers(4, 20)), 8 : 14 + int(rng.integers(4, 30))] = 255
        for part, pixels in (("Original", frame), ("Ground Truth", mask)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / part / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_clinicdb(tmp_path_factory.mktemp("clinicdb"))
    return open_dataset("cvc_clinicdb", source=folder, allow_partial=True)


@pytest.fixture(scope="module")
def written(dataset, tmp_path_factory):
    """A receipt of some conventions."""
    return score_predictions(Guesses(), dataset, conventions=CONVENTIONS).write(tmp_path_factory.mktemp("results"))


@pytest.fixture
def content(written):
    return copy.deepcopy(read_content(written))


def differences(content: dict, folder: Path) -> list[str]:
    """Of a content whose digest was made to fit."""
    return check_receipt(save_receipt(folder / "x.receipt.json", content | {"digest": ""}))


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_receipt_of_every_convention_is_computed_again_without_a_difference(dataset, tmp_path):
    path = score_predictions(Guesses(), dataset).write(tmp_path)
    assert path == tmp_path / "guesses" / "cvc_clinicdb.full.full.receipt.json"
    assert check_receipt(path) == []
    assert list(find_receipts(tmp_path)) == [path]


def test_only_what_the_conventions_need_is_measured_and_a_later_call_adds_to_it(dataset, tmp_path):
    measured: dict = {}
    paper = score_predictions(Guesses(), dataset, conventions=("paper",), measured=measured)
    row = paper.content()["images"][0]
    assert row["true"] and row["paper.dice"] and not {"mae", "hd95", "hd95_relative", "lesions"} & set(row)
    assert check_receipt(paper.write(tmp_path / "paper")) == []
    both = score_predictions(Guesses(), dataset, conventions=("paper", "lesions"), measured=measured)
    assert both.images[0].lesions == 1 and both.images[0].hd95 is None
    assert check_receipt(both.write(tmp_path / "both")) == []
    whole = score_predictions(Guesses(), dataset).content()
    for part in (paper, both):
        assert part.summary() == {name: whole["scores"][name] for name in part.conventions}

    class NoMore(Guesses):
        def predict(self, dataset, ids):
            raise AssertionError("it was measured before")

    assert score_predictions(NoMore(), dataset, conventions=("lesions",), measured=measured).summary()


def test_a_row_without_a_measure_that_a_convention_needs_is_damage(content, tmp_path):
    del content["images"][3]["found"]
    (told, *_) = differences(content, tmp_path)
    assert "the receipt is damaged" in told and "found was not measured" in told


def test_a_mask_of_another_size_than_its_frame_is_named(dataset):
    class Cropped(Guesses):
        def predict(self, dataset, ids):
            for record_id, probability in super().predict(dataset, ids):
                yield record_id, probability[1:]

    with pytest.raises(PolypSegError, match=r"the mask of 1 is 56x40, its prediction 56x39"):
        score_predictions(Cropped(), dataset, conventions=("paper",))


def test_a_receipt_says_what_was_tested_on_what(content):
    assert content["model"]["sha256"] == "a" * 64 and content["model"]["row"] == "vit_base_dpt.random"
    assert content["model"]["seed"] is None and content["predictions"] == {"source": "model"}
    assert content["n"] == 9 and [row["clip"] for row in content["images"]] == list("112213333")
    assert content["collisions"] is None and "without a passport" in content["seen"]["reason"]
    assert content["clusters"] == {
        "by": "clip",
        "images": 9,
        "observations": 8,
        "repeats_merged": 1,
        "clusters": 3,
    }
    assert content["environment"]["versions"]["polypseg"] and content["bootstrap"]["seed"] == 0


def test_the_seed_is_that_of_the_recorded_recipe(dataset, tmp_path):
    class Trained(Guesses):
        origin = {  # noqa: RUF012
            "source": "model",
            "weights_origin": {
                "model_id": "vit_base_dpt.random",
                "recipe": "finetune",
                "recipe_changes": ["seed=7"],
                "finetuned_on": "kvasir_seg reference/train",
            },
        }

    result = score_predictions(Trained(), dataset, limit=2, conventions=("paper",))
    assert result.content()["model"]["seed"] == 7


def test_repeats_count_once_in_the_interval_by_cluster_and_clips_are_drawn_whole(content):
    dice = np.array([row["paper.dice"] for row in content["images"]])
    found = content["scores_by_cluster"]["paper"]["dice"]
    assert content["scores"]["paper"]["dice"]["mean"] == pytest.approx(dice.mean())
    assert found["mean"] == pytest.approx(dice[:8].mean()) and (found["n"], found["clusters"]) == (8, 3)
    expected = mean_intervals(read_score_set({"m": [Receipt.of(content, path=Path("x"))]}, metric="paper.dice"))["m"]
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert 1 <= found["effective_size"] <= 8


def test_scores_of_the_whole_set_have_an_interval_over_clips_too(content):
    """Against a bootstrap written out: three clips drawn, their counts summed, percentiles at the expanded tails."""
    from polypseg.statistics.intervals import expanded_tails

    rows, rng = content["images"][:8], np.random.default_rng(5)
    counts = np.array([[row["intersection"], row["predicted"] + row["true"]] for row in rows], dtype=float)
    clips = np.array([int(row["clip"]) for row in rows]) - 1
    sums = np.stack([counts[clips == clip].sum(axis=0) for clip in range(3)])
    drawn = sums[rng.integers(0, 3, (20_000, 3))].sum(axis=1)
    low, high = np.quantile(2 * drawn[:, 0] / drawn[:, 1], expanded_tails(2))
    found = content["scores_by_cluster"]["pooled"]["dice"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.005)


def test_packed_tables_come_back(content):
    whole = np.random.default_rng(0).integers(0, 2**33, (3, 2, 256))
    assert (unpack(pack(whole)) == whole).all() and unpack(pack(whole)).dtype == np.int64
    numbers = np.random.default_rng(0).normal(size=(4, 2))
    assert (unpack(json.loads(json.dumps(pack(numbers)))) == numbers).all()
    with pytest.raises(ValueError, match="unknown type"):
        unpack(pack(numbers) | {"type": "|O"})


# -- what is checked ---------------------------------------------------------------------------------------------------


def change_row(column: str, value: object):
    return lambda content: content["images"][2].update({column: value})


def change_score(key: str, convention: str, output: str, field: str):
    def change(content):
        content[key][convention][output][field] += 0.001

    return change


def delete_row(content):
    del content["images"][4]


def forget_image(content):
    """A row less, and everything that counts rows made to fit."""
    del content["images"][4]
    content["n"] -= 1


def change_pixels(content):
    content["manifest"]["pixels"][0] = "0" * 32


def change_definition(content):
    content["definitions"]["paper"]["formula"] += " or so"


def drop_table(content):
    del content["tables"]["curve"]


def change_table(content):
    content["tables"]["squared_error"] = pack(unpack(content["tables"]["squared_error"]) * 1.01)


def change_weights(field: str, value: object):
    return lambda content: content["model"].update({field: value})


def invent_collisions(content):
    hit = {"kind": "same id", "id": "1", "seen_id": "1", "stage": "fine-tuning", "seen_in": "x", "bits": 0}
    kinds = {"same content": 0, "same id": 0, "near-duplicate": 0, "same clip": 0}
    content["collisions"] = {"tested": 9, "colliding": 0, "kinds": kinds, "unchecked": [], "images": [hit]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_row("paper.dice", 0.123), "images[26].paper.dice: stored 0.123"),
        (change_row("intersection", 1), "images[26].paper.dice"),
        (change_row("largest_component", 10**6), "images[26].largest_component"),
        (change_row("id", "28"), "images: their ids are not those of the manifest"),
        (change_row("clip", "3"), "images[26].clip: stored '3', recomputed '2'"),
        (change_row("lesions", 5), "scores.lesions.sensitivity.mean"),
        (change_score("scores", "paper", "dice", "mean"), "scores.paper.dice.mean"),
        (change_score("scores", "pooled", "iou", "high"), "scores.pooled.iou.high"),
        (change_score("scores", "pranet", "max_dice", "low"), "scores.pranet.max_dice.low"),
        (change_score("scores_by_cluster", "paper", "dice", "low"), "scores_by_cluster.paper.dice.low"),
        (change_score("scores_by_cluster", "paper", "iou", "effective_size"), "scores_by_cluster.paper.iou.effective"),
        (change_score("scores_by_cluster", "calibration", "ece", "mean"), "scores_by_cluster.calibration.ece.mean"),
        (lambda content: content["clusters"].update(repeats_merged=0), "clusters.repeats_merged"),
        (lambda content: content.update(n=10), "n: stored 10, but there are 9 images"),
        (lambda content: content["false_alarms"].update(alarms=0), "false_alarms.alarms"),
        (lambda content: content["dataset"].update(part="test"), "dataset.part"),
        (delete_row, "n: stored 9, but there are 8 images"),
        (forget_image, "images: their ids are not those of the manifest"),
        (change_pixels, "manifest: its images are not those of its digest"),
        (change_definition, "definitions.paper.formula"),
        (drop_table, "tables.curve: is missing or damaged ('curve'); not recomputable: pranet, structure"),
        (change_table, "scores.calibration.brier.mean"),
        (invent_collisions, "collisions.colliding: stored 0, recomputed 1"),
        (lambda content: content["seen"].update(reason=None), "collisions: neither listed nor a reason"),
        (lambda content: content.pop("clusters"), "the receipt is damaged"),
        (lambda content: content["bootstrap"].update(seed=1), "bootstrap.seed: stored 1, recomputed 0"),
        (lambda content: content["bootstrap"].update(resamples=50), "bootstrap.resamples: stored 50"),
        (lambda content: content["bootstrap"].update(by_image="99 %"), "bootstrap.by_image"),
        (lambda content: content["bootstrap"].update(more=1), "bootstrap.more: stored, but nothing computes it"),
        (change_weights("sha256", "g" * 64), "model.sha256: 'gggg"),
        (change_weights("sha256", "a" * 63), "model.sha256: "),
        (change_weights("sha256", 7), "model.sha256: 7 is no SHA-256"),
        (change_weights("sha256", "b" * 64), "model.sha256: stored 'bbb"),
        (change_weights("seed", "1"), "model.seed: '1' is no whole number"),
        (
            lambda content: content.update(surface_tolerance_pixels=9.0),
            "surface_tolerance_pixels: stored 9.0, recomputed 2",
        ),
        (
            lambda content: content.update(surface_tolerance_pixels=[]),
            "surface_tolerance_pixels: Input should be a valid",
        ),
        (change_row("tolerance", 9.0), "surface_tolerance_pixels: stored 2.0, recomputed 9.0"),
        (lambda content: content["dataset"].update(synthetic=True), "dataset.synthetic: stored True, recomputed False"),
        (lambda content: content["dataset"].update(synthetic=0), "dataset.synthetic: "),
        (lambda content: content["dataset"].update(title="Kvasir-SEG"), "dataset.title: stored 'Kvasir-SEG'"),
        (lambda content: content["dataset"].update(title=None), "dataset.title: "),
        (
            lambda content: content["seen"].update(rule="x"),
            "seen.rule: Input should be 'refuse', 'report' or 'exclude'",
        ),
        (lambda content: content["seen"].update(rule=None), "seen.rule: "),
        (lambda content: content["seen"].update(excluded=["99"]), "seen.excluded: nothing was checked"),
        (lambda content: content["seen"].update(passport="a" * 64), "seen.passport: collisions are listed where"),
        (lambda content: content.update(environment={}), "environment.created: Field required"),
        (lambda content: content["environment"].pop("command"), "environment.command: Field required"),
        (lambda content: content["environment"].update(versions={}), "environment.versions: "),
        (lambda content: content["environment"].update(git_revision="main"), "environment.git_revision: "),
        (lambda content: content["environment"].update(created="today"), "environment.created: "),
        (lambda content: content["environment"].update(more=1), "environment.more: "),
        (lambda content: content.update(n=9.0), "n: "),
    ],
)
def test_whatever_is_changed_is_named(content, change, field, tmp_path):
    change(content)
    found = differences(content, tmp_path)
    assert any(line.startswith(field) for line in found), found


@pytest.mark.parametrize("rule", ["refuse", "exclude"])
def test_a_rule_that_was_not_followed_is_named(content, rule, tmp_path):
    """One image collides and was tested all the same, which the rule `report` only allows."""
    invent_collisions(content)
    content["collisions"] |= {"colliding": 1, "kinds": content["collisions"]["kinds"] | {"same id": 1}}
    content["seen"] |= {"rule": "report", "passport": "a" * 64, "reason": None}
    assert differences(content, tmp_path) == []
    content["seen"]["rule"] = rule
    (line,) = differences(content, tmp_path)
    assert line == f"seen.rule: '{rule}' is not what was done: 1 seen, 0 left out"


def test_a_change_that_no_score_depends_on_breaks_the_digest(content, tmp_path, written):
    path = tmp_path / "x.receipt.json"
    path.write_text(written.read_text().replace('"platform": "', '"platform": "x'))
    (line,) = check_receipt(path)
    assert line.startswith("digest:")
    assert digest_of(content) == content["digest"]


def test_other_files_are_no_receipts(tmp_path):
    path = tmp_path / "a.receipt.json"
    for text, found in (("{}", "no evaluation receipt"), ('{"receipt": 2}', "of format 2"), ("{", "cannot read")):
        path.write_text(text)
        with pytest.raises(PolypSegError, match=found):
            check_receipt(path)


def break_score(content):
    content["scores_by_cluster"]["paper"]["dice"]["low"] = "0.4"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda content: content.pop("clusters"), "clusters: "),
        (lambda content: content["dataset"].pop("content_id"), "dataset.content_id: "),
        (lambda content: content.update(n="9"), "n: "),
        (change_weights("seed", True), "model.seed: "),
        (change_row("true", None), "images.2.true: "),
        (change_row("paper.dice", "0.5"), "images.2.paper.dice"),
        (break_score, "scores_by_cluster.paper.dice.low: "),
    ],
)
def test_a_damaged_receipt_is_refused_when_it_is_read_by_file_and_field(content, change, field, tmp_path):
    change(content)
    path = save_receipt(tmp_path / "x.receipt.json", content)
    with pytest.raises(PolypSegError, match=rf"{re.escape(str(path))} is a damaged receipt \({re.escape(field)}"):
        read_receipt(path)
    assert check_receipt(path)  # which goes on to name all that is wrong


def test_a_receipt_says_what_its_file_says(content, written):
    receipt = read_receipt(written)
    assert receipt.test == ("cvc_clinicdb", "full", "full") and receipt.row == "vit_base_dpt.random"
    assert receipt.per_image("iou").tolist() == [row["paper.iou"] for row in content["images"]]
    assert receipt.stated["dice"].low == content["scores_by_cluster"]["paper"]["dice"]["low"] and receipt.is_unchanged
    assert receipt.calibration().shape == (2, 10, 3) and receipt.differences() == []
    assert not Receipt.of(content | {"name": "other"}, path=written).is_unchanged
    with pytest.raises(ValueError, match="frozen"):
        receipt.name = "other"


def test_check_receipts_names_the_file_and_the_field(content, written, tmp_path, capsys):
    check_receipts([written.parent])
    assert "as computed again" in capsys.readouterr().out
    content["scores"]["paper"]["dice"]["mean"] += 0.01
    save_receipt(tmp_path / "good" / "x.receipt.json", read_content(written))
    bad = save_receipt(tmp_path / "worse" / "y.receipt.json", content)
    with pytest.raises(PolypSegError, match=r"1 of 2 receipts .*y\.receipt\.json: scores\.paper\.dice\.mean") as caught:
        check_receipts([tmp_path])
    assert caught.value.exit_code == 1
    printed = capsys.readouterr().out
    assert f"{bad}: 1 difference(s)" in printed and "recomputed" in printed
    with pytest.raises(UsageError, match="nothing does not exist"):
        check_receipts([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="run `polypseg evaluate` first"):
        check_receipts([tmp_path / "empty"])


def test_results_of_other_weights_are_not_replaced(written):
    refuse_other_weights(written, sha256="a" * 64)
    refuse_other_weights(written.with_name("none"), sha256="b" * 64)
    with pytest.raises(UsageError, match=r"is of other weights .*--name"):
        refuse_other_weights(written, sha256="b" * 64)


# -- false alarms ------------------------------------------------------------------------------------------------------


def test_false_alarms_count_distinct_frames_without_polyp_from_a_minimal_area():
    areas = (0, 3, 12, 50, 50)
    rows = [{"true": 0, "predicted": 2 * a, "height": 10, "width": 20, "largest_component": a} for a in areas] + [
        {"true": 9, "predicted": 99, "height": 10, "width": 20, "largest_component": 99}
    ]
    found = false_alarms(rows, ["a", "b", "c", "d", "d", "e"], minimal_area=10)
    assert (found["frames"], found["alarms"]) == (4, 2)
    # Wilson's interval of 2 in 4: center 0.5, half width z sqrt(1 + z^2/4 ...)/(...), from the formula
    z, n, p = 1.959964, 4, 0.5
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["per_100_frames"]["low"] == pytest.approx(100 * (0.5 - half), abs=1e-4)
    assert found["per_100_frames"]["high"] == pytest.approx(100 * (0.5 + half), abs=1e-4)
    assert found["predicted_share"]["mean"] == pytest.approx((0 + 6 + 24 + 100) / 200 / 4)
    assert false_alarms(rows, list("abcdef"), minimal_area=1)["alarms"] == 4
    assert false_alarms(rows[-1:], ["e"], minimal_area=1) is None


# -- receipts as scores ------------------------------------------------------------------------------------------------


def test_read_score_set_takes_a_receipts_columns_clips_and_repeats(content):
    read = Receipt.of(content, path=Path("x.receipt.json"))
    scores = read_score_set({"m": [read]}, metric="paper.iou")
    assert scores.images == 9 and scores.observations == 8 and scores.cluster_sizes.tolist() == [3, 2, 3]
    assert scores.per_observation()[0] == pytest.approx([row["paper.iou"] for row in content["images"]][:8])
    assert (read_score_set({"m": [read]}).values == read_score_set({"m": [read]}, metric="paper.dice").values).all()
    with pytest.raises(UsageError, match=r"Did you mean 'paper\.dice'"):
        read_score_set({"m": [read]}, metric="paper.dise")
    with pytest.raises(UsageError, match=r"size\.dice_small is undefined on \d of 9 images"):
        read_score_set({"m": [read]}, metric="size.dice_small")


def result(model: str, dices: dict[str, float], *, dataset: str = "cvc_clinicdb", content: str = "c") -> Receipt:
    """A receipt of these scores."""
    clip = DATASETS[dataset].groups.get(CLIP_COLUMN, lambda *_: None)
    images = [
        {"id": i, "clip": clip(i, ""), "paper.dice": d, "paper.iou": d / 2, "paper.precision": d, "paper.recall": d}
        for i, d in dices.items()
    ]
    facts = {"name": dataset, "title": "T", "split": "full", "part": "full", "manifest": content}
    rows = [{"intersection": 0, "predicted": 0, "true": 0, **image} for image in images]
    whole = read_content(STARTER) | {"name": model, "images": rows, "manifest": {"pixels": list(dices)}}
    return Receipt.of(whole | {"dataset": whole["dataset"] | facts}, path=Path("x.receipt.json"))


def test_read_score_set_finds_the_clips_of_clinicdb_and_merges_the_given_repeats():
    dices = {"1": 0.2, "25": 0.4, "26": 0.9, "50": 0.5, "51": 0.7}
    scores = read_score_set({"a": [result("a", dices)], "b": [result("b", dices)]}, repeats=[["26", "50"]])
    assert scores.models == ("a", "b") and scores.title == "T, full full"
    assert scores.clusters.tolist() == [0, 0, 1, 2]
    assert scores.per_observation()[0] == pytest.approx([0.2, 0.4, 0.7, 0.7])
    assert read_score_set({"a": [result("a", dices)]}, metric="iou").means == pytest.approx([0.27])


def test_read_score_set_takes_every_seed_and_every_image_of_a_set_without_clips():
    one, two = result("a", {"x": 0.2, "y": 0.6}, dataset="folder"), result("a", {"x": 0.4, "y": 0.8}, dataset="folder")
    scores = read_score_set({"a": [one, two]})
    assert scores.seeds == 2 and scores.cluster_count == 2 and scores.means == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (result("b", {"1": 0.2, "3": 0.4}), "the images"),
        (result("b", {"1": 0.2, "2": 0.4}, content="d"), "the content of the images"),
    ],
)
def test_read_score_set_refuses_results_of_other_images(other, found):
    with pytest.raises(UsageError, match=f"a on T and b on T differ in {found}"):
        read_score_set({"a": [result("a", {"1": 0.2, "2": 0.4})], "b": [other]})


def test_read_score_set_refuses_unequal_seeds_and_unknown_metrics():
    one = result("a", {"1": 0.2})
    with pytest.raises(UsageError, match="a 1, b 2"):
        read_score_set({"a": [one], "b": [one, one]})
    with pytest.raises(UsageError, match="Did you mean 'dice'"):
        read_score_set({"a": [one]}, metric="dise")
