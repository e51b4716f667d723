"""Operating points from labeled frames, and margins that hold what they promise."""

import csv
import json
from math import ceil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from constructed_models import PROCESSOR, RedFinder, constructed, draw_frame, write_expectation
from polypseg import zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import read_receipt
from polypseg.evaluation.receipt_reading import cell_of, read_results
from polypseg.expectation.calibrate import (
    DEFAULT,
    GRID,
    PEAKS,
    SHARES,
    THRESHOLDS,
    Labeled,
    calibrate,
    calibrate_files,
    choose_point,
    open_pairs,
    read_labeled,
    save_calibration,
    score_grid,
)
from polypseg.expectation.margins import relative_needs
from polypseg.hub.starter_tables import starter_table
from polypseg.inference.margin import Margin, read_margin
from polypseg.inference.operating_point import OperatingPoint, find_operating_point, read_operating_point
from polypseg.inference.prediction_source import PointedPredictions
from polypseg.inference.predictor import Steps
from polypseg.inference.segment_files import segment_files
from polypseg.inference.segmenter import Segmenter, load
from receipt_factory import DrawnDataset, DrawnPredictions, small_origin

CERTAIN = Steps(feature="expected_dice", x=(0.0, 1.0), y=(0.0, 1.0))


def make_margin(needs, **changes) -> Margin:
    return Margin(**{"needs": tuple(needs), "holds": CERTAIN, "level": 0.9, "usual": 0.9, "spread": 0.05} | changes)


# Operating points --------------------------------------------------------------------------------------


def test_point_cuts_logits_and_moved_maps_cut_at_half_alike():
    rng = np.random.default_rng(0)
    logits = np.kron(rng.normal(-2, 3, (8, 9)), np.ones((4, 4))).astype(np.float32)
    for point in (
        OperatingPoint(),
        OperatingPoint(threshold=0.3, temperature=1.7, minimum_share=0.02, minimum_peak=0.7),
    ):
        mask = point.mask(logits)
        probability = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        moved = point.moved(probability)
        assert ((moved > 0.5) == mask).all() and moved.min() >= 0 and moved.max() <= 1
    low = OperatingPoint(threshold=0.3, temperature=1.7)
    assert (low.mask(logits) == (1 / (1 + np.exp(-logits / 1.7)) > 0.3)).all()
    assert low.mask(logits).sum() > mask.sum()  # small regions are gone


@pytest.mark.parametrize(
    "values",
    [{"threshold": 0}, {"threshold": "x"}, {"temperature": 0}, {"minimum_share": 0.7}, {"minimum_peak": 1}],
)
def test_impossible_points_are_refused(values):
    with pytest.raises(UsageError, match="operating point"):
        OperatingPoint(**values)


def test_point_files_are_read_back_and_others_refused(tmp_path):
    point = OperatingPoint(threshold=0.4, minimum_share=0.01)
    assert read_operating_point(point.save(tmp_path / "p.json", more=1)) == point
    (tmp_path / "other.json").write_text('{"threshold": 0.4}')
    (tmp_path / "part.json").write_text('{"kind": "polypseg operating point"}')
    for name, words in (("other.json", "no operating point"), ("part.json", "does not give"), ("no.json", "exist")):
        with pytest.raises(UsageError, match=words):
            read_operating_point(tmp_path / name)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    point.save(tmp_path / "operating_point.json", weights={"model.safetensors": "0" * 64})
    with pytest.raises(UsageError, match="another model"):
        find_operating_point(tmp_path, "model")


def test_score_grid_is_what_each_cut_scores():
    rng = np.random.default_rng(0)
    logits = np.kron(rng.normal(0, 2, (10, 10)), np.ones((5, 5))).astype(np.float32)
    truth = np.roll(logits > 0.3, 2, axis=0)
    grid = score_grid(logits, truth)
    for row, column, layer in ((0, 0, 0), DEFAULT, (9, 5, 0), (6, 0, 3), (5, 5, 2)):
        point = OperatingPoint(threshold=THRESHOLDS[row], minimum_share=SHARES[column], minimum_peak=PEAKS[layer])
        mask = point.mask(logits)
        assert grid[row, column, layer] == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    assert (score_grid(np.full((9, 9), -9, np.float32), np.zeros((9, 9), bool)) == 1).all()


def grid_of(count, *, better=0.0, noise=0.02, seed=0):
    """Scores of ``count`` frames; threshold 0.3 is better by ``better``."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.6, 0.9, (count, 1, 1, 1)) + np.zeros((1, *GRID))
    scores += rng.normal(0, noise, (count, len(THRESHOLDS), 1, 1))
    scores[:, THRESHOLDS.index(0.3)] += better
    return scores


def test_a_better_point_is_found_and_noise_keeps_the_default():
    found = choose_point(grid_of(12, better=0.1), [str(k) for k in range(12)])
    assert found.better and found.point.threshold == 0.3 and found.bound > 0.03
    kept = [choose_point(grid_of(8, seed=s), [str(k) for k in range(8)]) for s in range(30)]
    assert sum(one.better for one in kept) <= 3  # one-sided 5 %
    unsure = next(one for one in kept if not one.better)
    assert unsure.point.is_default and "nothing better" in unsure.lines()[1]


def test_most_alarms_bounds_the_alarms_and_keeps_the_best_dice():
    """Regions need a peak to be believed: it costs frames with polyps less than a higher threshold does."""
    scores, free = grid_of(40, noise=0.0), np.arange(40) < 20
    scores[free] = 0.0  # an alarm
    layer, row = PEAKS.index(0.95), THRESHOLDS.index(0.7)
    scores[:19, :, :, layer:] = 1.0
    scores[:19, row:] = 1.0
    scores[~free, :, :, layer:] -= 0.01
    scores[~free, row:] -= 0.05
    names = [str(k) for k in range(40)]
    found = choose_point(scores, names, free=free, most_alarms=0.1)
    assert found.chosen == (0.5, 0.0, 0.95) and found.better and found.alarms == pytest.approx((1, 0.05))
    assert found.point.minimum_peak == 0.95 and found.point.drops_regions and not found.point.is_default
    assert "raise an alarm: 100.0% at the default, 5.0% at this one" in found.lines()[0]
    with pytest.raises(UsageError, match="frames with polyps and frames without"):
        choose_point(scores, names, most_alarms=0.1)


def test_a_region_that_is_nowhere_sure_is_dropped():
    logits = np.full((20, 30), -5, np.float32)
    logits[2:8, 2:8], logits[12:18, 12:18] = 1, 1
    logits[14, 14] = 6
    mask = OperatingPoint(minimum_peak=0.9).mask(logits)
    assert mask.sum() == 36 and mask[14, 14] and not mask[3, 3]


def test_frames_of_one_clip_are_one_piece_of_evidence():
    scores = np.repeat(grid_of(6, better=0.03, noise=0.08), 20, axis=0)
    clips = [str(k // 20) for k in range(120)]
    assert choose_point(scores, clips).bound < choose_point(scores, [str(k) for k in range(120)]).bound
    assert choose_point(scores, clips).groups == 6


def test_calibration_corrects_a_model_that_says_too_little(tmp_path):
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
    for seed in range(8):
        frame, mask = draw_frame(seed)
        frame.save(tmp_path / "frames" / f"clip{seed}_1.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "masks" / f"clip{seed}_1_mask.png")

    class Shy(RedFinder):
        def polyp_logits(self, pixels, *, names=()):
            return super().polyp_logits(pixels) / 20 - 0.4

    shy = Segmenter(runtime=Shy(), processor=PROCESSOR, name="shy")
    path = tmp_path / "point.json"
    found = calibrate_files(shy, tmp_path / "frames", tmp_path / "masks", path, clip="(clip[0-9]+)_")
    assert found.better and found.groups == 8 and found.chosen[0] < 0.5
    point = read_operating_point(path)
    better = Segmenter(runtime=Shy(), processor=PROCESSOR, name="shy", operating_point=point)
    frame, mask = draw_frame(3)
    dice = [2 * (m & mask).sum() / (m.sum() + mask.sum()) for m in (one.predict(frame).mask for one in (shy, better))]
    assert dice[1] > dice[0]
    for expression, words in (("(", "regular"), ("clip", "brackets"), ("(x)", "does not match")):
        with pytest.raises(UsageError, match=words):
            read_labeled(open_pairs(tmp_path / "frames", tmp_path / "masks"), clip=expression)


def test_too_few_clips_and_unpaired_frames_are_refused(tmp_path):
    labeled = [Labeled(name=str(k), group="one", frame=draw_frame(k)[0], truth=draw_frame(k)[1]) for k in range(6)]
    with pytest.raises(UsageError, match="too few"):
        calibrate(constructed(), labeled)
    for folder, name in (("frames", "a.png"), ("masks", "b.png")):
        (tmp_path / folder).mkdir()
        draw_frame(0)[0].save(tmp_path / folder / name)
    with pytest.raises(PolypSegError, match="no mask"):
        open_pairs(tmp_path / "frames", tmp_path / "masks")


def test_point_and_threshold_exclude_each_other_and_files_take_a_point(tmp_path):
    point = OperatingPoint(threshold=0.8, minimum_share=0.2)
    segmenter = constructed(operating_point=point)
    frame, _ = draw_frame(1)
    with pytest.raises(UsageError, match="give no other"):
        segmenter.predict(frame, threshold=0.5)
    assert not segmenter.predict(frame).mask.any() and constructed().predict(frame).mask.any()
    frame.save(tmp_path / "a.png")
    segment_files(segmenter, [str(tmp_path / "a.png")], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["minimum_share"] == 0.2
    with pytest.raises(UsageError, match="another threshold"):
        segment_files(constructed(), [str(tmp_path / "a.png")], tmp_path / "out")


def test_evaluation_takes_a_point_and_records_it():
    class Source:
        name, origin = "m", {"source": "model"}

        def predict(self, dataset, ids):
            yield from ((i, np.array([[0.2, 0.4, 0.9]], np.float32)) for i in ids)

    pointed = PointedPredictions(source=Source(), point=OperatingPoint(threshold=0.3))
    (found,) = pointed.predict(None, ["a"])
    assert ((found[1] > 0.5) == [[False, True, True]]).all()
    assert pointed.origin["operating_point"]["threshold"] == 0.3 and pointed.name == "m"


def test_a_receipt_at_a_point_replaces_none_and_is_told_apart(tmp_path):
    dataset = DrawnDataset("cvc_clinicdb", 6)
    plain = DrawnPredictions("m", weights_origin=small_origin(zoo.get("RN-NA-NA"), seed=1), skill=1.0, seed=1)
    pointed = PointedPredictions(source=plain, point=OperatingPoint(threshold=0.9, minimum_share=0.01))
    manifest = dataset.manifest("full", "full")
    paths = [
        score_predictions(source, dataset, conventions=("paper",), manifest=manifest).write(tmp_path)
        for source in (plain, pointed)
    ]
    assert [path.name.partition(".full.full")[2] for path in paths] == [
        ".receipt.json",
        ".operating-point.receipt.json",
    ]
    one, other = (read_receipt(path) for path in paths)
    assert one.operating_point is None and other.operating_point["threshold"] == 0.9
    assert one.stated["recall"].mean > other.stated["recall"].mean and not other.differences()
    assert [receipt.path for receipt in read_results(tmp_path)] == paths[:1], "cards state masks at 0.5"
    table, _, second = starter_table(tmp_path).partition("operating point")
    assert cell_of(one.stated["dice"]) in table and cell_of(other.stated["dice"]) in second and "0.90" in second


def test_commands_refuse_points_that_do_not_apply(tmp_path):
    from polypseg.cli.app import app

    OperatingPoint(threshold=0.4).save(tmp_path / "p.json")
    given = ["evaluate", "--dataset", "kvasir_seg", "--predictions", str(tmp_path), "--operating-point"]
    result = CliRunner().invoke(app, [*given, str(tmp_path / "p.json")])
    assert isinstance(result.exception, UsageError) and "--predictions" in str(result.exception)
    with pytest.raises(UsageError, match="does not exist"):
        load(operating_point=tmp_path / "absent.json")


# Margins -----------------------------------------------------------------------------------------------


def test_margin_holds_in_the_promised_share_of_exchangeable_frames():
    rng, held = np.random.default_rng(0), []
    for _ in range(300):
        needs = rng.exponential(size=200)
        factor = make_margin(sorted(needs[:100])).factor(0.9)
        held.append((needs[100:] <= factor).mean())
    assert np.mean(held) == pytest.approx(ceil(0.9 * 101) / 101, abs=0.01)


def test_margin_grows_the_mask_by_its_need_and_never_promises_what_missed_polyps_forbid():
    margin = make_margin([0.1] * 20)
    mask = np.zeros((40, 40), bool)
    mask[15:25, 15:25] = True
    assert margin.grow(mask, level=0.9).sum() == 12**2
    assert not margin.grow(np.zeros((9, 9), bool), level=0.9).any()
    missed = make_margin([0.1] * 17 + [None] * 3)
    assert missed.factor(0.8) == 0.1
    with pytest.raises(UsageError, match=r"ask for 0\.8"):
        missed.factor(0.9)
    with pytest.raises(UsageError, match="between 0 and 1"):
        margin.factor(1)
    again = read_margin(json.loads(json.dumps(missed.content())))
    assert again.needs == missed.needs and again.expected_coverage([0.5, None]) == 0.25
    with pytest.raises(PolypSegError, match="damaged"):
        read_margin({})


def test_alarm_is_raised_for_frames_of_which_little_is_expected():
    margin = make_margin([0.1] * 20)
    assert margin.alarm([0.92] * 30) == "" and "60%" in margin.alarm([0.6] * 30)
    assert margin.alarm([0.9] * 20 + [None] * 10)
    rng = np.random.default_rng(0)
    like = rng.normal(0.9, 0.05, (200, 30)).clip(0, 1)
    assert np.mean([bool(margin.alarm(row.tolist())) for row in like]) <= 0.06


def test_needs_are_in_units_of_the_mask():
    columns = {"need": np.array([0.02, -1.0, 0.0]), "size": np.array([0.2, 0.0, 0.1])}
    assert relative_needs(columns).tolist() == pytest.approx([0.1, np.inf, 0])


def test_segment_writes_margins_flags_and_alarm(tmp_path):
    learned = write_expectation(tmp_path / "model")
    segmenter = constructed(expectation=learned)
    (tmp_path / "in").mkdir()
    for seed in range(4):
        draw_frame(seed, polyp=seed > 0)[0].save(tmp_path / "in" / f"{seed}.png")
    report = segment_files(segmenter, [str(tmp_path / "in")], tmp_path / "out", margin=0.9)
    for seed in range(4):
        mask, grown = (np.asarray(Image.open(tmp_path / "out" / f / f"{seed}.png")) > 0 for f in ("masks", "margins"))
        assert (grown >= mask).all() and (grown.sum() > mask.sum() or seed == 0)
    rows = list(csv.DictReader((tmp_path / "out" / "frames.csv").open()))
    assert [row["flag"] for row in rows] == ["no mask", "", "", ""] and rows[0]["expected_dice"] == ""
    assert all(float(row["expected_dice"]) > 0.9 for row in rows[1:]) and report.flags == {"no mask": 1}
    assert any("1 frame(s) with an empty mask" in line for line in report.lines())
    for other, margin, words in ((constructed(), 0.9, "no margin is known"), (segmenter, 0.99, "ask for")):
        with pytest.raises(UsageError, match=words):
            segment_files(other, [str(tmp_path / "in")], tmp_path / "o2", margin=margin)
    with pytest.raises(UsageError, match=r"threshold 0\.5"):
        segment_files(segmenter, [str(tmp_path / "in")], tmp_path / "o2", margin=0.9, threshold=0.4)


def test_saved_calibration_says_how_it_was_found(tmp_path):
    found = choose_point(grid_of(6), list("abcdef"), free=np.arange(6) < 2)
    content = json.loads(save_calibration(found, tmp_path / "p.json", model="m", weights={"a": "b"}).read_text())
    assert content["evidence"]["groups"] == 6 and content["evidence"]["polyp_free"] == 2 and content["model"] == "m"
