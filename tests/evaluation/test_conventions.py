"""Every convention against an independent implementation, on hand-made and on random masks, and its intervals."""

import json
import time

import numpy as np
import pytest
from scipy import ndimage, spatial
from sklearn import metrics as sklearn_metrics

import frozen_measures
from polypseg.errors import UsageError
from polypseg.evaluation.conventions import CONVENTIONS, choose_conventions, conventions_markdown
from polypseg.evaluation.image_metrics import (
    MEASURES,
    THRESHOLDS,
    e_measure,
    largest_component,
    measure_image,
    threshold_counts,
)
from polypseg.evaluation.metrics import mean_with_interval, score


def disc(height, width, *, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def soft_cases():
    """Probability maps with every difficulty: soft edge, noise, several lesions, contact with the frame's border."""
    rng = np.random.default_rng(7)
    rows, columns = np.mgrid[:40, :56]
    blob = np.clip(1.2 - np.hypot(rows - 18, columns - 30) / 14, 0, 1)
    two = disc(40, 56, y=8, x=10, radius=6) | disc(40, 56, y=30, x=45, radius=8)
    shifted = disc(40, 56, y=9, x=12, radius=6) * 0.9 + disc(40, 56, y=20, x=30, radius=3) * 0.7
    corner = disc(40, 56, y=39, x=55, radius=12)
    pairs = {
        "blob": (blob, disc(40, 56, y=20, x=26, radius=10)),
        "noise": (rng.random((40, 56)), disc(40, 56, y=20, x=26, radius=10)),
        "two": (shifted + 0.05, two),
        "corner": (0.8 * disc(40, 56, y=36, x=50, radius=12) + 0.1 * rng.random((40, 56)), corner),
        "timid": (0.4 * blob, disc(40, 56, y=20, x=26, radius=10)),
    }
    return {name: (p.astype(np.float32), mask) for name, (p, mask) in pairs.items()}


def hard_cases():
    """The masks that break formulas."""
    empty, full = np.zeros((12, 16), bool), np.ones((12, 16), bool)
    polyp, pixel = disc(12, 16, y=5, x=7, radius=3), np.zeros((12, 16), bool)
    pixel[4, 9] = True
    pairs = {
        "empty/empty": (empty, empty),
        "missed": (empty, polyp),
        "false alarm": (polyp, empty),
        "perfect": (polyp, polyp),
        "one pixel": (pixel, pixel),
        "one pixel found in a polyp": (disc(12, 16, y=5, x=7, radius=0), polyp),
        "full frame": (full, full),
        "all of the frame for a polyp": (full, polyp),
    }
    return {name: (p.astype(np.float32), mask) for name, (p, mask) in pairs.items()}


CASES = soft_cases() | hard_cases()


def measured(*names, **options):
    return [measure_image(*CASES[name], **options) for name in names or CASES]


def values(convention, *names):
    return CONVENTIONS[convention].values(measured(*names))


# -- conventions from the counts ---------------------------------------------------------------------------------------

SKLEARN = {
    "dice": sklearn_metrics.f1_score,
    "iou": sklearn_metrics.jaccard_score,
    "precision": sklearn_metrics.precision_score,
    "recall": sklearn_metrics.recall_score,
}


def test_paper_is_the_mean_of_scikit_learns_scores():
    found = values("paper", *soft_cases())
    for name, function in SKLEARN.items():
        scores = [function(m.ravel(), (p > 0.5).ravel(), zero_division=0) for p, m in soft_cases().values()]
        assert found[name] == pytest.approx(np.mean(scores), abs=1e-12)


def test_pooled_is_scikit_learns_score_of_all_pixels_at_once():
    truth = np.concatenate([m.ravel() for _, m in CASES.values()])
    predicted = np.concatenate([(p > 0.5).ravel() for p, _ in CASES.values()])
    found = values("pooled")
    for name, function in SKLEARN.items():
        assert found[name] == pytest.approx(function(truth, predicted), abs=1e-12)
    assert found["iou"] == pytest.approx(found["dice"] / (2 - found["dice"]))


def test_ssl4gie_is_the_references_formula():
    s, rows = 1e-8, []
    for p, m in CASES.values():
        i, a, t = (float(np.sum(x)) for x in ((p > 0.5) & m, p > 0.5, m))
        rows.append((2 * (i + s) / (a + t + s), (i + s) / (a + t - i + s), (i + s) / (a + s), (i + s) / (t + s)))
    assert list(values("ssl4gie").values()) == pytest.approx(np.mean(rows, axis=0), abs=1e-12)
    assert values("ssl4gie", "empty/empty")["dice"] == 2


def test_fg_bg_mean_is_scikit_learns_macro_average():
    for names in (tuple(soft_cases()), ("missed", "perfect", "false alarm")):
        macro = [
            [
                f(CASES[n][1].ravel(), (CASES[n][0] > 0.5).ravel(), average="macro", zero_division=0)
                for f in (sklearn_metrics.f1_score, sklearn_metrics.jaccard_score)
            ]
            for n in names
        ]
        assert list(values("fg_bg_mean", *names).values()) == pytest.approx(np.mean(macro, axis=0), abs=1e-12)


def test_fg_bg_pooled_is_the_macro_average_of_all_pixels():
    truth = np.concatenate([m.ravel() for _, m in CASES.values()])
    predicted = np.concatenate([(p > 0.5).ravel() for p, _ in CASES.values()])
    found = values("fg_bg_pooled")
    assert found["dice"] == pytest.approx(sklearn_metrics.f1_score(truth, predicted, average="macro"), abs=1e-12)
    assert found["iou"] == pytest.approx(sklearn_metrics.jaccard_score(truth, predicted, average="macro"), abs=1e-12)


@pytest.mark.parametrize(
    ("case", "paper", "ssl4gie", "fg_bg_dice"),
    [  # Dice, IoU, precision, recall; background Dice by hand: 192 pixels, a polyp of 29
        ("empty/empty", (1, 1, 1, 1), (2, 1, 1, 1), 1),
        ("missed", (0, 0, 0, 0), (0, 0, 1, 0), (2 * 163 / (192 + 163)) / 2),
        ("false alarm", (0, 0, 0, 0), (0, 0, 0, 1), (2 * 163 / (192 + 163)) / 2),
        ("perfect", (1, 1, 1, 1), (1, 1, 1, 1), 1),
        ("one pixel", (1, 1, 1, 1), (1, 1, 1, 1), 1),
        ("full frame", (1, 1, 1, 1), (1, 1, 1, 1), 1),
        (
            "all of the frame for a polyp",
            (58 / 221, 29 / 192, 29 / 192, 1),
            (58 / 221, 29 / 192, 29 / 192, 1),
            29 / 221,
        ),
        ("one pixel found in a polyp", (2 / 30, 1 / 29, 1, 1 / 29), (2 / 30, 1 / 29, 1, 1 / 29), None),
    ],
)
def test_hand_made_masks_score_as_the_empty_rules_say(case, paper, ssl4gie, fg_bg_dice):
    assert tuple(values("paper", case).values()) == pytest.approx(paper, abs=1e-7)
    assert tuple(values("ssl4gie", case).values()) == pytest.approx(ssl4gie, abs=1e-7)
    assert tuple(values("pooled", case).values()) == pytest.approx(paper, abs=1e-12)  # one image
    if fg_bg_dice is not None:
        assert values("fg_bg_mean", case)["dice"] == pytest.approx(fg_bg_dice)
        assert values("fg_bg_pooled", case)["dice"] == pytest.approx(fg_bg_dice)


# -- 256 thresholds ----------------------------------------------------------------------------------------------------


def toolbox_scores(p, mask):
    """(256, 2): Dice and IoU at each threshold by PraNet's toolbox: masks compared by pixel, 0 without overlap."""
    rows = []
    for threshold in np.arange(256, dtype=np.float32) / np.float32(255):
        predicted = p >= threshold
        i, a, t = ((x).sum() for x in (predicted & mask, predicted, mask))
        rows.append((2 * i / (a + t), i / (a + t - i)) if i else (0.0, 0.0))
    return np.array(rows)


@pytest.mark.parametrize("rescaled", [False, True])
def test_pranet_is_the_toolboxs_loop_over_thresholds(rescaled):
    curves = []
    for p, mask in CASES.values():
        if rescaled and p.max() > p.min():
            p = (p - p.min()) / (p.max() - p.min())
        curves.append(toolbox_scores(p, mask))
    curve = np.mean(curves, axis=0)
    wanted = (curve[:, 0].mean(), curve[:, 0].max(), curve[:, 1].mean(), curve[:, 1].max())
    assert tuple(values("pranet_rescaled" if rescaled else "pranet").values()) == pytest.approx(wanted, abs=1e-12)


def test_pranet_rescaled_makes_a_timid_map_confident():
    assert values("paper", "timid")["dice"] == 0
    assert values("pranet_rescaled", "timid")["max_dice"] == pytest.approx(
        values("pranet", "blob")["max_dice"], abs=0.02
    )


@pytest.mark.parametrize(("case", "expected"), [("empty/empty", 0), ("missed", 58 / 221 / 256), ("false alarm", 0)])
def test_pranet_of_empty_masks_is_zero_wherever_nothing_overlaps(case, expected):
    assert values("pranet", case)["mean_dice"] == pytest.approx(expected)  # at threshold 0 all pixels are predicted


def test_threshold_counts_are_exact_for_eight_bit_maps_and_between_their_steps():
    mask = np.ones((1, 256), bool)
    on_steps = THRESHOLDS[None, :]
    assert threshold_counts(on_steps, mask)[1].tolist() == list(range(256, 0, -1))
    below = np.nextafter(on_steps, np.float32(-1)).clip(0)
    assert threshold_counts(below, mask)[1].tolist() == [256, *range(254, -1, -1)]


# -- structure measures ------------------------------------------------------------------------------------------------

PYSODMETRICS = {  # version 1.6.2, normalize=False: S, weighted F, adaptive E, mean and maximum of E's curve, MAE
    "blob": (0.782981042, 0.569642523, 0.841194959, 0.71609364, 0.929688926, 0.116285345),
    "noise": (0.323260418, 0.18216007, 0.250111657, 0.369444421, 0.794854742, 0.501383516),
    "two": (0.533025155, 0.319577894, 0.7057898, 0.6450563, 0.7057898, 0.159910715),
    "corner": (0.577057666, 0.396254681, 0.811268728, 0.6995712, 0.959542465, 0.094194707),
    "timid": (0.603292649, 0.344734262, 0.841194959, 0.436148879, 0.929688926, 0.131424852),
    "empty/empty": (1.0, 0.0, 0.0, 1.001308901, 1.005235602, 0.0),
    "missed": (0.424479167, 0.008854147, 0.251308901, 0.251308901, 0.251308901, 0.151041667),
    "false alarm": (0.848958333, 0.0, 0.853403141, 0.850069535, 0.853403141, 0.151041667),
    "perfect": (1.0, 1.0, 1.005235602, 1.002290576, 1.005235602, 0.0),
    "one pixel": (1.0, 1.0, 1.005235602, 1.002290576, 1.005235602, 0.0),
    "one pixel found in a polyp": (0.432541487, 0.112928355, 0.28468197, 0.284551606, 0.28468197, 0.145833333),
    "full frame": (1.0, 1.0, 1.005235602, 1.005235602, 1.005235602, 0.0),
    "all of the frame for a polyp": (0.075520833, 0.208513558, 0.251308901, 0.251308901, 0.251308901, 0.848958333),
}


@pytest.mark.parametrize("case", CASES)
def test_structure_measures_equal_pysodmetrics(case):
    found = values("structure", case)
    order = ("s_measure", "weighted_f", "e_adaptive", "e_mean", "e_max", "mae")
    assert [found[name] for name in order] == pytest.approx(PYSODMETRICS[case], abs=2e-9)


def test_structure_maximum_is_of_the_mean_curve_not_of_each_image():
    images = measured("blob", "noise")
    curve = np.mean([e_measure(*i.curve, i.true, i.pixels) for i in images], axis=0)
    found = CONVENTIONS["structure"].values(images)
    assert found["e_max"] == pytest.approx(curve.max()) and found["e_mean"] == pytest.approx(curve.mean())
    assert found["e_max"] < np.mean([PYSODMETRICS[name][4] for name in ("blob", "noise")]) - 1e-3


@pytest.mark.filterwarnings("error")
def test_structure_of_a_polyp_in_the_last_column_is_finite():
    mask = np.zeros((9, 11), bool)
    mask[8, 10] = True
    found = measure_image(mask.astype(np.float32), mask)
    assert found.s_measure == pytest.approx(1) and found.weighted_f == pytest.approx(1)


# -- contours ----------------------------------------------------------------------------------------------------------

MONAI = {  # version 1.6.1: compute_surface_dice at 2 pixels, compute_hausdorff_distance at 95 %
    "blob": (0.3703704, 5.0),
    "noise": (0.1687612, 20.248457),
    "two": (0.4354839, 22.388561),
    "corner": (0.6129032, 5.726493),
    "perfect": (1.0, 0.0),
    "one pixel": (1.0, 0.0),
    "one pixel found in a polyp": (0.0, 3.0),
    "full frame": (1.0, 0.0),
    "all of the frame for a polyp": (0.0294118, 6.540410),
}


def contour(mask):
    """Pixels with a 4-neighbor that is background or outside the frame, one by one."""
    padded = np.pad(mask, 1)
    points = np.argwhere(padded)
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return np.array([q for q in points if not all(padded[q[0] + a, q[1] + b] for a, b in steps)])


@pytest.mark.parametrize("case", MONAI)
def test_surface_measures_equal_monai_and_every_pair_of_contour_pixels(case):
    p, mask = CASES[case]
    found = measure_image(p, mask)
    assert (found.surface_dice, found.hd95) == pytest.approx(MONAI[case], abs=1e-5)
    distances = spatial.distance.cdist(contour(p > 0.5), contour(mask))
    one, other = distances.min(axis=1), distances.min(axis=0)
    near = (np.sum(one <= 2) + np.sum(other <= 2)) / (len(one) + len(other))
    assert found.surface_dice == pytest.approx(near, abs=1e-12)
    assert found.hd95 == pytest.approx(max(np.percentile(one, 95), np.percentile(other, 95)), abs=1e-9)


@pytest.mark.parametrize(
    ("case", "dice", "hd95"),
    [("empty/empty", 1, 0), ("missed", 0, 20), ("false alarm", 0, 20)],  # 20 = hypot(12, 16)
)
def test_surface_of_empty_masks_follows_the_rule(case, dice, hd95):
    found = values("surface", case)
    assert (found["surface_dice"], found["hd95"], found["hd95_relative"]) == (dice, hd95, hd95 / 20)
    assert np.isnan(found["hd95_both_present"])


def test_surface_dice_depends_on_the_stated_tolerance():
    shifted = np.roll(CASES["perfect"][1], 2, axis=1)
    by_tolerance = [measure_image(shifted.astype(np.float32), CASES["perfect"][1], tolerance=t) for t in (0, 1, 2)]
    scores = [m.surface_dice for m in by_tolerance]
    assert scores[0] < scores[1] < scores[2] == 1


# -- lesions -----------------------------------------------------------------------------------------------------------


def boxes(*corners, height=40, width=60):
    mask = np.zeros((height, width), bool)
    for y, x, size in corners:
        mask[y : y + size, x : x + size] = True
    return mask


@pytest.mark.parametrize(
    ("case", "predicted", "truth", "expected"),
    [  # lesions, found, found by IoU, components, false, false by IoU
        ("two lesions, one found", [(5, 5, 10)], [(5, 5, 10), (25, 40, 8)], (2, 1, 1, 1, 0, 0)),
        ("touched at a corner", [(14, 14, 10)], [(5, 5, 10)], (1, 1, 0, 1, 0, 1)),
        ("one blob over two lesions", [(0, 0, 30)], [(2, 2, 8), (20, 20, 8)], (2, 2, 0, 1, 0, 1)),
        ("two pieces of one lesion", [(5, 5, 8), (18, 5, 4)], [(5, 5, 17)], (1, 1, 0, 2, 0, 2)),
        ("a false alarm beside", [(5, 5, 10), (30, 50, 5)], [(5, 5, 10)], (1, 1, 1, 2, 1, 1)),
        ("IoU just above a half", [(0, 0, 10)], [(0, 0, 14)], (1, 1, 1, 1, 0, 0)),
        (
            "specks under 10 pixels count on no side",
            [(5, 5, 10), (30, 50, 3)],
            [(5, 5, 10), (35, 2, 1)],
            (1, 1, 1, 1, 0, 0),
        ),
        ("corners join", [(5, 5, 5), (10, 10, 5)], [(5, 5, 5), (10, 10, 5)], (1, 1, 1, 1, 0, 0)),
        ("nothing", [], [], (0, 0, 0, 0, 0, 0)),
    ],
)
def test_lesions_are_found_by_touch_and_by_iou(case, predicted, truth, expected):
    m = measure_image(boxes(*predicted).astype(np.float32), boxes(*truth))
    found = (m.lesions, m.found, m.found_iou, m.components, m.false_components, m.false_components_iou)
    assert found == expected, case


def test_lesions_equal_a_loop_over_pairs_of_components():
    rng = np.random.default_rng(3)
    for _ in range(10):
        p, t = (ndimage.gaussian_filter(rng.random((2, 60, 80)), (0, 3, 3)) > 0.515).astype(bool)
        labels = []
        for mask in (t, p):
            label, number = ndimage.label(mask, np.ones((3, 3)))
            labels.append([label == k for k in range(1, number + 1) if (label == k).sum() >= 10])
        touching = [[(a & b).any() for b in labels[1]] for a in labels[0]]
        iou = [[(a & b).sum() / (a | b).sum() > 0.5 for b in labels[1]] for a in labels[0]]
        m = measure_image(p.astype(np.float32), t)
        assert m.lesions == len(labels[0]) > 3 and m.components == len(labels[1])
        assert (m.found, m.found_iou) == (np.any(touching, axis=1).sum(), np.any(iou, axis=1).sum())
        assert m.false_components == (~np.any(touching, axis=0)).sum()
        assert m.false_components_iou == (~np.any(iou, axis=0)).sum()


def test_lesion_rates_pool_lesions_and_count_alarms_on_frames_without_polyp():
    def image(predicted, truth):
        return measure_image(boxes(*predicted).astype(np.float32), boxes(*truth))

    polyp, alarm = (5, 5, 10), (25, 40, 8)
    images = [image([polyp], [polyp, alarm]), image([polyp], [polyp]), image([alarm], []), image([], [])]
    found = CONVENTIONS["lesions"].values(images)
    assert found == pytest.approx(
        {
            "sensitivity": 2 / 3,
            "false_positives": 1 / 4,
            "sensitivity_iou": 2 / 3,
            "false_positives_iou": 1 / 4,
            "false_alarms": 1 / 2,
        }
    )
    assert np.isnan(CONVENTIONS["lesions"].values(images[:2])["false_alarms"])
    assert CONVENTIONS["lesions"].summary(images[:2])["false_alarms"]["mean"] is None


# -- calibration, size -------------------------------------------------------------------------------------------------


def expected_calibration_error(p, y):
    confidence, correct = np.maximum(p, 1 - p), (p > 0.5) == y
    edges, total = np.linspace(0.5, 1, 11), 0.0
    for k in range(10):
        inside = (confidence >= edges[k]) & ((confidence < edges[k + 1]) | (k == 9))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def test_calibration_equals_a_loop_over_bins_and_scikit_learns_brier_score():
    rng = np.random.default_rng(5)
    cases = [(rng.random((30, 40)).astype(np.float32), rng.random((30, 40)) < share) for share in (0.1, 0.3)]
    p, y = (np.concatenate([c[k].ravel() for c in cases]) for k in (0, 1))
    p = p.astype(np.float64)
    found = CONVENTIONS["calibration"].values([measure_image(*case) for case in cases])
    for name, chosen in (("ece_inside", y), ("ece_outside", ~y), ("ece", y | True)):
        assert found[name] == pytest.approx(expected_calibration_error(p[chosen], y[chosen]), abs=1e-9)
    assert found["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(y, p), abs=1e-12)
    assert found["brier_inside"] == pytest.approx(np.mean((p[y] - 1) ** 2), abs=1e-12)


def test_calibration_inside_shows_what_the_background_hides():
    mask = boxes((10, 10, 5))
    found = CONVENTIONS["calibration"].values([measure_image(np.where(mask, 0.2, 0.0).astype(np.float32), mask)])
    assert found["ece_inside"] == pytest.approx(0.8) and found["ece"] < 0.02
    assert np.isnan(values("calibration", "empty/empty")["ece_inside"])
    assert values("calibration", "perfect")["ece"] == values("calibration", "perfect")["brier"] == 0


def test_size_strata_are_cut_by_the_share_of_the_frame():
    sides, frame = {"small": 20, "medium": 30, "large": 50}, (100, 100)  # 4 %, 9 %, 25 %
    images = []
    for k, side in enumerate(sides.values()):
        mask = boxes((0, 0, side), height=frame[0], width=frame[1])
        images.append(measure_image(boxes((0, 0, side - k), height=100, width=100).astype(np.float32), mask))
    images.append(measure_image(*CASES["false alarm"]))
    found = CONVENTIONS["size"].values(images)
    for k, (name, side) in enumerate(sides.items()):
        inner, outer = (side - k) ** 2, side**2
        assert found[f"dice_{name}"] == pytest.approx(2 * inner / (inner + outer))
        assert found[f"iou_{name}"] == pytest.approx(inner / outer)
    summary = CONVENTIONS["size"].summary(images[:1])
    assert summary["dice_small"]["n"] == 1 and summary["dice_large"] == {
        "mean": None,
        "low": None,
        "high": None,
        "n": 0,
    }


# -- all conventions ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_gives_its_outputs_with_intervals_that_json_can_hold(convention):
    images = measured()
    summary = json.loads(json.dumps(CONVENTIONS[convention].summary(images), allow_nan=False))
    assert tuple(summary) == CONVENTIONS[convention].outputs
    found = CONVENTIONS[convention].values(images)
    for name, entry in summary.items():
        assert entry["mean"] == pytest.approx(found[name])
        if convention != "size" or entry["n"] > 1:
            assert entry["low"] <= entry["mean"] <= entry["high"], name
            assert convention == "size" or entry["low"] < entry["high"], name
    one = CONVENTIONS[convention].summary(measured("blob"))
    assert all(entry["low"] is None for name, entry in one.items()), one


def test_interval_of_means_is_mean_with_intervals():
    images = measured()
    scores = score([(i.intersection, i.predicted, i.true) for i in images])
    for name, entry in CONVENTIONS["paper"].summary(images).items():
        assert entry == mean_with_interval(scores[name]) | {"n": len(images)}


def test_interval_of_pooled_scores_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(11)
    images = [measure_image(*CASES[name]) for name in rng.choice(list(soft_cases()), size=40)]
    counts = np.array([(i.intersection, i.predicted, i.true) for i in images])
    drawn = []
    for _ in range(3000):
        i, p, t = counts[rng.integers(0, 40, size=40)].sum(axis=0)
        drawn.append(2 * i / (p + t))
    found = CONVENTIONS["pooled"].summary(images)["dice"]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found == CONVENTIONS["pooled"].summary(images)["dice"]


def test_choose_conventions_names_the_closest_to_a_wrong_one():
    assert [c.name for c in choose_conventions(["pooled", "paper"])] == ["pooled", "paper"]
    with pytest.raises(UsageError, match=r"unknown metric convention 'pool'.*Did you mean 'pooled'\?"):
        choose_conventions(["pool"])


def test_markdown_table_has_a_whole_row_for_every_convention():
    lines = conventions_markdown().splitlines()
    assert len(lines) == 2 + len(CONVENTIONS)
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}
    assert all(c.formula and c.empty and c.source for c in CONVENTIONS.values())


@pytest.mark.parametrize(
    ("probability", "mask"),
    [
        (np.zeros((3, 4)), np.zeros((4, 3))),
        (np.zeros((1, 3, 4)), np.zeros((1, 3, 4))),
        (np.full((3, 4), 1.01), np.zeros((3, 4))),
        (np.full((3, 4), -0.01), np.zeros((3, 4))),
        (np.full((3, 4), np.nan), np.zeros((3, 4))),
        (np.zeros((0, 4)), np.zeros((0, 4))),
    ],
)
def test_measure_image_refuses_what_is_no_probability_map(probability, mask):
    with pytest.raises(ValueError, match="probabilit"):
        measure_image(probability.astype(np.float32), mask)


def test_measure_image_is_strict_at_one_half():
    half, mask = np.full((4, 4), 0.5, np.float32), np.ones((4, 4), bool)
    assert measure_image(half, mask).predicted == 0
    assert measure_image(np.nextafter(half, np.float32(1)), mask).predicted == 16


def test_row_of_an_image_is_single_numbers():
    row = measured("blob")[0].row()
    assert json.loads(json.dumps(row)) == row
    assert row["share"] == pytest.approx(CASES["blob"][1].mean()) and row["height"] == 40


def random_case(rng):
    """A map and a mask of random sizes and shapes, each sometimes empty, full, saturated or of few values."""
    height, width = rng.integers(4, 90, 2)
    rows, columns = np.mgrid[:height, :width]

    def blobs():
        found = np.zeros((height, width), bool)
        for _ in range(rng.integers(0, 4)):
            y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.5, 25)
            found |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        return found

    mask, guess = blobs(), blobs()
    if rng.random() < 0.1:
        mask = ~mask
    p = np.clip(0.8 * guess + rng.choice([0.0, 0.02, 0.3]) * rng.normal(size=guess.shape), 0, 1)
    if rng.random() < 0.3:
        p = ndimage.gaussian_filter(p, 3)
    if rng.random() < 0.2:
        p = np.round(p * 255) / 255
    return p.astype(np.float32), mask


@pytest.mark.parametrize("case", [*CASES, *range(150)])
def test_measures_equal_the_plain_ones_to_a_billionth(case):
    p, mask = random_case(np.random.default_rng(case)) if isinstance(case, int) else CASES[case]
    ours, plain = measure_image(p, mask, tolerance=1.5), frozen_measures.measure_image(p, mask, tolerance=1.5)
    for name, expected in vars(plain).items():
        found = getattr(ours, name)
        if np.issubdtype(np.asarray(expected).dtype, np.integer):
            assert np.array_equal(found, expected), name
        else:
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=lambda c: c.name)
def test_a_convention_needs_what_it_names_and_refuses_images_without_it(convention):
    whole = [measure_image(*CASES[name]) for name in ("blob", "two", "missed", "false alarm")]
    some = [measure_image(*CASES[name], measures=convention.needs) for name in ("blob", "two", "missed", "false alarm")]
    assert {name for name in MEASURES if getattr(some[0], name) is not None} == set(convention.needs)
    assert convention.summary(some) == convention.summary(whole)
    for needed in convention.needs:
        less = [measure_image(*CASES["blob"], measures=set(convention.needs) - {needed})]
        with pytest.raises(ValueError, match=f"{needed} was not measured, which the convention '{convention.name}'"):
            convention.values(less)


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match="unknown measures: dice"):
        measure_image(*CASES["blob"], measures=("dice",))


def test_largest_component_is_that_of_8_neighbors():
    mask = np.zeros((9, 9), bool)
    assert largest_component(mask) == 0
    mask[0, 0] = mask[1, 1] = mask[8, 8] = True
    assert largest_component(mask) == 2 and largest_component(~np.zeros((3, 4), bool)) == 12


def test_measure_image_is_quick():
    """A frame of 576x768; about 0.08 s of one core where this was written, 0.14 s for a full frame."""
    rows, columns = np.mgrid[:576, :768]
    mask = disc(576, 768, y=300, x=350, radius=140)
    p = np.clip(1.5 - np.hypot(rows - 310, columns - 360) / 200, 0, 1).astype(np.float32)
    used = []
    for _ in range(3):
        start = time.process_time()
        measure_image(p, mask)
        used.append(time.process_time() - start)
    assert min(used) < 0.4
