"""Expected Dice without masks: constructed models of known quality, held-out folds, intervals, refusals."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from constructed_models import PROCESSOR, SIDE, constructed, draw_frame, expectation_content, write_expectation
from polypseg.errors import PolypSegError, UsageError
from polypseg.expectation import estimate as estimates
from polypseg.expectation import fit, intervals
from polypseg.expectation.calibrate import Labeled, calibrate
from polypseg.expectation.cells import Cell, Row, measure_mask, needed_margin, table
from polypseg.expectation.estimate import LEAST, estimate, estimate_files
from polypseg.expectation.folds import folds, held_out
from polypseg.expectation.frames import read_frames
from polypseg.expectation.intervals import (
    SetInterval,
    auroc,
    conformal_quantile,
    covered_when_left_out,
    rank_correlation,
)
from polypseg.expectation.learner import LEARNERS, learn_linear, learn_steps, predict
from polypseg.expectation.page import render_page
from polypseg.files import read_json
from polypseg.inference import gate
from polypseg.inference.expected import read_expectation
from polypseg.inference.features import ALL, SINGLE, compare_views, describe, look_at, to_colors
from polypseg.inference.gate import describe_place, learn_gate
from polypseg.inference.operating_point import OPERATING_POINT, find_operating_point
from polypseg.inference.predictor import read_predictor
from polypseg.inference.regions import drop_regions, grow_mask
from polypseg.provenance.checksums import check_folder, write_manifest
from polypseg.provenance.local import STARTER_FOLDER
from polypseg.provenance.passport import PASSPORT, Passport, Seen, SplitManifest, image_print


def write_frames(folder, seeds, *, polyp=True):
    folder.mkdir()
    for number, seed in enumerate(seeds):
        draw_frame(seed, polyp=polyp)[0].save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return write_expectation(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def quick_measures(monkeypatch):
    """The shift measures take most of an estimate's time on frames as small as these."""
    monkeypatch.setattr(estimates, "measure_frame", lambda frame: {"lab_l_mean": float(frame.mean() / 2.55)})


# Features ----------------------------------------------------------------------------------------------


def test_features_of_a_right_mask_say_that_it_is_sure_and_of_none_that_it_is_empty():
    segmenter = constructed()
    right = look_at(segmenter, segmenter.prepare([draw_frame(1)[0]])[0], views=True).features
    none = look_at(segmenter, segmenter.prepare([draw_frame(1, polyp=False)[0]])[0], views=True).features
    assert set(right) == set(ALL) == set(none)
    assert right["soft_dice"] > 0.95 and right["agree_flip"] == 1 and right["regions"] == 1 and right["contrast"] > 0.2
    assert none["soft_dice"] == none["size"] == none["entropy"] == 0 and none["agree_least"] == 1


def test_features_see_doubt():
    colors = np.full((3, 40, 40), 0.5, np.float32)
    y, x = np.mgrid[:40, :40]
    logits = (10 - np.hypot(y - 20, x - 20)).astype(np.float32)
    sure, unsure = describe(5 * logits, colors), describe(0.2 * logits, colors)
    assert sure["soft_dice"] > unsure["soft_dice"] and sure["entropy"] < unsure["entropy"]
    assert sure["doubt"] < unsure["doubt"] and sure["threshold_dice"] > unsure["threshold_dice"]
    assert compare_views(logits, [logits, -logits])["agree_least"] == 0


@pytest.mark.parametrize("wanted", [("soft_dice",), ("inside", "at_border"), ("soft_dice", "entropy"), ("grain",)])
def test_features_that_are_wanted_are_those_of_all(wanted):
    colors = np.random.default_rng(0).random((3, 40, 40)).astype(np.float32)
    y, x = np.mgrid[:40, :40]
    for logits in (10 - np.hypot(y - 20, x - 20), np.full((40, 40), -5.0)):
        whole, part = (describe(logits.astype(np.float32), colors, features=names) for names in (SINGLE, wanted))
        assert whole.keys() == set(SINGLE) and set(wanted) <= part.keys()
        assert part == {name: whole[name] for name in part}


@pytest.mark.parametrize("shape", [(7, 9), (8, 9), (1, 2), (1, 1), (64, 64)])
def test_median_is_numpys(shape):
    values = np.random.default_rng(0).random(shape).astype(np.float32)
    assert gate._median(values) == np.median(values) and gate._median(values).dtype == np.float32


@pytest.mark.parametrize("seed", range(4))
def test_growing_and_dropping_regions_are_scipys(seed):
    mask = np.random.default_rng(seed).random((31, 23)) < 0.15
    for reach in (1, 3):
        assert (grow_mask(mask, reach) == ndimage.maximum_filter(mask, 2 * reach + 1, mode="constant")).all()
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = ndimage.sum(mask, labels, range(count + 1))
    values = np.random.default_rng(seed).random(mask.shape, dtype=np.float32)
    peaks = np.array([values[labels == number].max(initial=-1) for number in range(len(sizes))])
    by_size = drop_regions(mask, least=4, values=values, peak=-np.inf)
    assert (by_size == (mask & (sizes >= 4)[labels])).all()
    found = drop_regions(mask, least=4, values=values, peak=0.9)
    assert (found == (mask & ((sizes >= 4) & (peaks > np.float32(0.9)))[labels])).all() and found.any()
    assert not drop_regions(np.zeros((5, 5), bool), least=2, values=np.zeros((5, 5), np.float32), peak=0).any()


# Learners ----------------------------------------------------------------------------------------------


def random_rows(seed=0, count=300):
    rng = np.random.default_rng(seed)
    features = rng.random((count, len(ALL)))
    return features, np.clip(features[:, 0] * 0.6 + features[:, 1] * 0.4 + rng.normal(0, 0.05, count), 0, 1)


def test_every_predictor_comes_back_from_json_and_keeps_the_mean():
    features, dice = random_rows()
    for predictor in (
        learn_steps(features, dice, feature="soft_dice"),
        learn_linear(features, dice, names=SINGLE),
    ):
        again = read_predictor(json.loads(json.dumps(predictor.content())))
        assert (predict(again, features) == predict(predictor, features)).all()
        assert predict(predictor, features).mean() == pytest.approx(dice.mean(), abs=0.01)
    for damaged in ({"kind": "steps"}, {}, {"kind": "oracle"}):
        with pytest.raises(PolypSegError):
            read_predictor(damaged)


KINDS = ("none", *(f"kind {number}" for number in range(6)))


def make_cells(dice_of, *, kinds=KINDS, sets=("kvasir_seg.validation", "kvasir_seg.test", "a", "b")):
    """Cells in which ``dice_of(soft Dice)`` is measured; another model in each set."""
    rng, cells = np.random.default_rng(0), []
    for name in sets:
        for model, kind in [*((fit.SHIPPED, kind) for kind in kinds), ("other", "none")]:
            rows = []
            for number in range(24):
                features = rng.random(len(ALL))
                soft = float(features[0] ** (0.5 if kind == "none" else 1))
                features[0] = soft
                row = {"dice": dice_of(soft), "recall": 0.9, "need": 0.02 * (1 - soft), "size": 0.3}
                rows.append(Row(id=str(number), group=f"{name}/{number}", features=tuple(features), **row))
            cells.append(Cell(model=model, set=name, kind=kind, severity=0 if kind == "none" else 3, rows=tuple(rows)))
    return cells


@pytest.fixture
def small_learners(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 30)
    monkeypatch.setattr(fit, "LEARNERS", {n: LEARNERS[n] for n in ("isotonic on soft Dice", "line, three passes")})


def test_no_fold_learns_from_the_set_corruption_or_model_that_it_predicts():
    columns = table(make_cells(lambda soft: soft))
    made = list(folds(columns, model=fit.SHIPPED, anchor=fit.VALIDATION))
    assert len(made) == 3 * (len(KINDS) + 1)
    for fold in made:
        assert not set(columns["set"][fold.train]) & set(columns["set"][fold.test])
        assert not set(columns["group"][fold.train]) & set(columns["group"][fold.test])
        (kind,), (model,) = set(columns["kind"][fold.test]), set(columns["model"][fold.test])
        assert kind == "none" or kind not in columns["kind"][fold.train]
        assert model == fit.SHIPPED or model not in columns["model"][fold.train]
    expected = held_out(columns, LEARNERS["isotonic on soft Dice"], model=fit.SHIPPED, anchor=fit.VALIDATION)
    assert (np.isnan(expected) == (columns["set"] == fit.VALIDATION)).all()


def test_a_baseline_that_is_right_ships(small_learners):
    content = fit.fit_cells(make_cells(lambda soft: soft))
    assert content["chosen"] == {"one_pass": "mean soft Dice", "three_passes": "mean soft Dice"}
    assert content["evidence"]["mean_absolute_error"] == pytest.approx(0, abs=1e-9)


def test_too_few_held_out_things_give_no_interval(small_learners):
    with pytest.raises(UsageError, match="too few for a 90%"):
        fit.fit_cells(make_cells(lambda soft: soft, kinds=KINDS[:2]))


@pytest.mark.parametrize(("dice", "value"), [(1.0, 1.0), (0.0, 0.0)], ids=["always right", "always wrong"])
def test_a_model_that_is_always_the_same_is_expected_to_be(small_learners, dice, value):
    content = fit.fit_cells(make_cells(lambda soft: dice))
    assert content["chosen"]["one_pass"] == "anchor Dice"  # nothing is learned where there is nothing to learn
    predictor = read_predictor(content["three_passes"])
    assert predictor(np.random.default_rng(0).random((5, 1))) == pytest.approx(value)


def test_a_model_that_is_right_on_one_half_is_told_by_its_confidence(small_learners):
    content = fit.fit_cells(make_cells(lambda soft: float(soft > 0.6)))
    assert content["chosen"]["three_passes"] in ("isotonic on soft Dice", "ATC of soft Dice", "line, three passes")
    predictor = read_predictor(content["three_passes"])
    if len(predictor.features) == 1:
        assert predictor(np.array([[0.2], [0.95]])) == pytest.approx([0, 1], abs=0.05)
    assert content["evidence"]["frames"]["three_passes"]["auroc_all"]["estimate"] > 0.95
    assert all(abs(row["expected"] - row["dice"]) < 0.1 for row in content["evidence"]["units"])


def test_everything_learned_is_written_read_back_and_rendered(small_learners, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "SHA256SUMS").write_text("")
    write_manifest(tmp_path)
    places = [describe_place(to_colors(PROCESSOR.prepare(draw_frame(s)[0]), PROCESSOR)) for s in range(60)]
    learned = fit.Learned(
        gate=learn_gate(places, list(range(60))), measures={"lab_l_mean": (50, 5)}, frames=40, polyp_free=0
    )
    refused = [
        {"set": name, "n": 9, "unlike": share, "refused": bool(share), "to_refuse": bool(share)}
        for name, share in (("noise", 1.0), ("a", 0.0))
    ]
    pairs = [(f"{s}", *draw_frame(s, polyp=s % 2 == 0)) for s in range(6)]
    labeled = [Labeled(name=name, group=name, frame=frame, truth=truth) for name, frame, truth in pairs]
    monkeypatch.setattr(fit, "gather", lambda *a, **k: make_cells(lambda soft: soft))
    monkeypatch.setattr(fit, "learn_frames", lambda *a, **k: learned)
    monkeypatch.setattr(fit, "refusals", lambda *a, **k: refused)
    monkeypatch.setattr(fit, "learn_point", lambda *a, **k: calibrate(constructed(), labeled))
    written, point = fit.learn_model(tmp_path, data_dir=None, cache=tmp_path / "c", echo=lambda line: None)
    check_folder(tmp_path)  # the manifest lists what was written
    expectation = read_expectation(tmp_path)
    assert constructed(expectation=expectation).predict(draw_frame(7)[0]).expected_dice > 0.9
    assert find_operating_point(tmp_path, "model").temperature > 0
    page = render_page(read_json(written), read_json(point))
    assert "| mean soft Dice (baseline) | 0.000 |" in page and "`estimate`, `segment`" in page.replace(" ,", ",")
    assert "floor missed" not in page.split("margin:")[0] and "{" not in page
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(PolypSegError, match=r"model\.safetensors \(damaged\)"):
        fit.learn_model(tmp_path, data_dir=None, cache=tmp_path / "c", echo=lambda line: None)
    write_manifest(tmp_path)
    with pytest.raises(UsageError, match="another model"):
        read_expectation(tmp_path)


# Intervals ---------------------------------------------------------------------------------------------


def test_conformal_quantile_is_the_order_statistic_that_covers():
    assert conformal_quantile(range(1, 10)) == 9 and conformal_quantile(range(1, 20)) == 18
    assert math.isinf(conformal_quantile(range(8)))
    draws = np.random.default_rng(0).exponential(size=(2000, 20))
    covered = [row[-1] <= conformal_quantile(row[:-1]) for row in draws]
    assert np.mean(covered) == pytest.approx(18 / 20, abs=0.02)
    assert sum(covered_when_left_out([*[0.01] * 19, 0.5])) == 19


def test_interval_widens_for_few_clips_and_stays_within_0_and_1():
    interval = SetInterval(half_width=0.05, frames=60, spread=0.2)
    assert interval.bounds(0.5, groups=60) == pytest.approx((0.45, 0.55))
    low, high = interval.bounds(0.5, groups=3)
    assert high - low > 0.3 and interval.bounds(0.99, groups=3)[1] == 1


def test_ranks_are_those_of_the_libraries():
    rng = np.random.default_rng(0)
    scores, failed = rng.integers(0, 9, 80) / 9, rng.random(80) < 0.3
    assert auroc(scores, failed) == pytest.approx(roc_auc_score(failed, -scores))
    other = rng.integers(0, 5, 80)
    assert rank_correlation(scores, other) == pytest.approx(stats.spearmanr(scores, other).statistic)
    assert math.isnan(auroc(scores, np.zeros(80, bool))) and math.isnan(rank_correlation(scores, np.ones(80)))


# The estimate ------------------------------------------------------------------------------------------


def test_estimate_of_a_right_model_is_near_its_measured_dice(learned, tmp_path):
    folder = write_frames(tmp_path / "frames", range(100, 100 + LEAST))
    found = estimate_files(constructed(expectation=learned), [str(folder)], tmp_path / "out")
    measured = []
    for seed in range(100, 100 + LEAST):
        frame, mask = draw_frame(seed)
        measured.append(measure_mask(constructed().predict(frame).mask, mask)["dice"])
    assert found.low <= np.mean(measured) <= found.high and found.refused == ""
    assert found.verdict[0].startswith(f"Expected mean Dice {found.expected:.2f}") and len(found.verdict) == 3
    page = (tmp_path / "out" / "estimate.html").read_text()
    assert found.verdict[0] in page and "data:image/jpeg" in page and "<svg" in page
    assert read_json(tmp_path / "out" / "estimate.json")["expected_dice"] == found.expected
    assert (tmp_path / "out" / "frames.csv").read_text().count("\n") == LEAST + 1


def test_names_order_and_repeats_of_frames_change_nothing(learned, tmp_path, quick_measures):
    segmenter, seeds = constructed(expectation=learned), list(range(200, 200 + LEAST + 5))
    first = estimate(segmenter, read_frames([str(write_frames(tmp_path / "a", seeds))], output=tmp_path / "o"))
    again = write_frames(tmp_path / "b", [*reversed(seeds), *seeds[:10]])
    second = estimate(segmenter, read_frames([str(again)], output=tmp_path / "o"))
    assert (first.expected, first.low, first.high, first.below_half) == (
        second.expected, second.low, second.high, second.below_half
    )  # fmt: skip
    assert second.repeats == 10 and second.given == len(seeds) + 10 and len(second.frames) == len(seeds)
    some = [read_frames([str(tmp_path / name)], output=tmp_path / "o", limit=31) for name in "ab"]
    assert [f.digest for f in some[0].frames] == [f.digest for f in some[1].frames]


def test_noise_and_frames_without_masks_are_refused_not_guessed(learned, tmp_path, quick_measures):
    segmenter, rng = constructed(expectation=learned), np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(LEAST):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(tmp_path / "noise" / f"{number}.png")
    write_frames(tmp_path / "free", range(LEAST), polyp=False)
    for name, why in (("noise", "unlike"), ("free", "no polyp")):
        found = estimate(segmenter, read_frames([str(tmp_path / name)], output=tmp_path / "o"))
        assert why in found.refused and found.expected is None and "Nothing can be said" in found.verdict[0]


def test_too_few_frames_and_models_of_which_nothing_was_learned_are_refused(learned, tmp_path):
    given = read_frames([str(write_frames(tmp_path / "few", [1, 2, 2]))], output=tmp_path / "o")
    with pytest.raises(UsageError, match="2 distinct"):
        estimate(constructed(expectation=learned), given)
    with pytest.raises(UsageError, match="nothing was learned"):
        estimate(constructed(), given)


def test_frames_that_the_model_saw_are_counted(learned, tmp_path, quick_measures):
    folder = write_frames(tmp_path / "frames", range(LEAST))
    prints = tuple(image_print(str(s), draw_frame(s)[0]) for s in range(LEAST))
    manifest = SplitManifest(dataset="folder", split="full", part="train", content_id="", images=prints)
    passport = Passport(model_id="constructed", seen=(Seen(stage="fine-tuning", description="x", manifest=manifest),))
    passport.save(tmp_path / "model")
    assert (tmp_path / "model" / PASSPORT).is_file()
    found = estimate_files(constructed(expectation=learned), [str(folder)], tmp_path / "o", folder=tmp_path / "model")
    assert found.seen_images == LEAST and "seen in training" in found.verdict[0]


def test_expectation_of_other_weights_or_damaged_is_refused(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"one")
    write_expectation(tmp_path)
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"another onnx/model\.onnx"):
        read_expectation(tmp_path)
    for text in ("[]", '{"format": 1}', "{"):
        (tmp_path / "expectation.json").write_text(text)
        with pytest.raises(PolypSegError):
            read_expectation(tmp_path)
    (tmp_path / "expectation.json").write_text(json.dumps(expectation_content(tmp_path) | {"format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        read_expectation(tmp_path)


def test_predictions_say_what_is_expected_and_flag_what_is_not(learned):
    segmenter = constructed(expectation=learned)
    good, empty, noise = segmenter.predict(
        [draw_frame(3)[0], draw_frame(3, polyp=False)[0],
         Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))]
    )  # fmt: skip
    assert good.expected_dice > 0.9 and good.flag == ""
    assert (empty.expected_dice, empty.flag) == (None, "no mask")
    assert (noise.expected_dice, noise.flag) == (None, "unlike")
    assert segmenter.predict(draw_frame(3)[0], threshold=0.4).expected_dice is None
    assert constructed().predict(draw_frame(3)[0]).expected_dice is None


# Cells -------------------------------------------------------------------------------------------------


def test_needed_margin_is_the_least_that_holds_nine_tenths():
    rng = np.random.default_rng(1)
    for _ in range(10):
        truth = ndimage.binary_dilation(rng.random((40, 40)) < 0.01, iterations=4)
        mask = np.roll(truth, int(rng.integers(1, 9)), axis=1) & (rng.random((40, 40)) < 0.9)
        if not mask.any() or not truth.any():
            continue
        width = needed_margin(mask, truth)
        held = [(grow_mask(mask, k) if k else mask)[truth].mean() >= 0.9 for k in (width - 1, width)]
        assert held[1] and (width == 0 or not held[0])


def test_always_wrong_model_measures_near_zero():
    frame, mask = draw_frame(5)
    assert measure_mask(constructed(wrong=True).predict(frame).mask, mask)["dice"] < 0.1


# The shipped model -------------------------------------------------------------------------------------

shipped = pytest.mark.skipif(
    not (STARTER_FOLDER / "expectation.json").is_file(), reason="nothing has been learned of the shipped model yet"
)


@shipped
def test_page_is_rendered_from_what_was_measured():
    from test_docs import REPOSITORY

    learned, point = (read_json(STARTER_FOLDER / name) for name in ("expectation.json", OPERATING_POINT))
    page = (REPOSITORY / "docs" / "estimate.md").read_text()
    measured = REPOSITORY / "docs" / "estimate"
    assert page == render_page(learned, point, measured=measured), (
        "run training_scripts/fit_expectation.py --only-page --page docs/estimate.md --measured docs/estimate"
    )


@shipped
def test_page_shows_the_measured_adaptation_and_refuses_that_of_other_weights(tmp_path):
    learned, point = (read_json(STARTER_FOLDER / name) for name in ("expectation.json", OPERATING_POINT))
    digest = learned["model"]["sha256"]["model.safetensors"]
    said = {"gain": 0.021, "bound": -0.002, "adapted": False, "groups": 5}
    common = {"draw": "CVC-ClinicDB, 0", "given": 30, "before": 0.845, "model": digest}
    plans = {"TuningPlan(steps=8)": 0.031, "StatisticsPlan(prior=64)": -0.004}
    draws = [common | {"purpose": "test", "said": said, "gain": 0.0}, common | {"purpose": "ceiling"} | plans]
    file = tmp_path / "adaptation.jsonl"
    file.write_text("".join(json.dumps(draw) + "\n" for draw in draws))
    page = render_page(learned, point, measured=tmp_path)
    assert "| CVC-ClinicDB, 0 | 0.845 | +0.021 | -0.002 | no | +0.000 | +0.031 |" in page
    assert "mean of 1 draws | +0.000 | -.005 | +.03 | floor met |" in page
    file.write_text(file.read_text().replace(digest, "0" * 64))
    with pytest.raises(PolypSegError, match="other weights"):
        render_page(learned, point, measured=tmp_path)


@shipped
def test_shipped_expectation_is_of_the_shipped_weights_and_beats_or_is_a_baseline():
    learned = read_expectation(STARTER_FOLDER)
    candidates = {one["name"]: one for one in learned.content["evidence"]["candidates"]}
    best = min(one["error"] for one in candidates.values() if one["baseline"])
    assert candidates[learned.content["chosen"]["three_passes"]]["error"] <= best + fit.WORTH
    assert all(row["refused"] == row["to_refuse"] for row in learned.content["refusals"])


def test_command_says_why_there_is_no_estimate(tmp_path):
    from polypseg.cli.app import app

    folder = write_frames(tmp_path / "few", [1, 2])
    result = CliRunner().invoke(app, ["estimate", str(folder), "--output", str(tmp_path / "o"), "--limit", "5"])
    assert result.exit_code == 2 and not (tmp_path / "o" / "estimate.json").exists()
