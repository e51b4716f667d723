"""What a published pair of Dice and IoU can come from: theorems by hypothesis, constructed sets, published rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polypseg.errors import UsageError
from polypseg.evaluation.diagnose import diagnose, highest_iou, iou_of_dice, two_classes

FEW_IMAGES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000)), min_size=1, max_size=6
)


def test_iou_of_dice_is_the_algebra_of_one_pair_of_masks():
    intersection, predicted, true = 30, 50, 70
    assert iou_of_dice(2 * intersection / (predicted + true)) == pytest.approx(30 / 90)
    assert (iou_of_dice(0), iou_of_dice(1)) == (0, 1)


def test_highest_iou_is_what_a_search_over_sets_finds():
    grid = np.linspace(0, 1, 41)
    for k, mesh in ((2, np.meshgrid(grid, grid)), (3, np.meshgrid(grid, grid, grid))):
        dice = np.stack([axis.ravel() for axis in mesh])
        means, ious = dice.mean(axis=0), iou_of_dice(dice).mean(axis=0)
        for wanted in (0.1, 0.5, 0.6, 0.9, 1.0):
            found = ious[np.isclose(means, wanted)].max()
            assert found == pytest.approx(highest_iou(wanted, k), abs=1e-9)
    assert highest_iou(0.73, math.inf) == 0.73


# -- every convention's own pairs must be found possible ---------------------------------------------------------------


def clipped(images):
    return np.array([(min(i, p, t), p, t) for i, p, t in images], dtype=float).T


@given(FEW_IMAGES)
@settings(deadline=None, max_examples=60)
def test_diagnose_never_excludes_the_convention_that_made_the_pair(images):
    i, p, t = clipped(images)
    pixels = 4000.0
    dice, n = 2 * i / (p + t), len(i)
    back_i, back_p, back_t = pixels - p - t + i, pixels - p, pixels - t
    back = 2 * back_i / (back_p + back_t)
    pooled, pooled_back = 2 * i.sum() / (p + t).sum(), 2 * back_i.sum() / (back_p + back_t).sum()
    both = np.concatenate([dice, back])
    pairs = {
        "paper": (dice.mean(), iou_of_dice(dice).mean()),
        "pooled": (pooled, iou_of_dice(pooled)),
        "fg_bg_mean": (both.mean(), iou_of_dice(both).mean()),
        "fg_bg_pooled": ((pooled + pooled_back) / 2, (iou_of_dice(pooled) + iou_of_dice(pooled_back)) / 2),
    }
    for name, (d, j) in pairs.items():
        for digits in (2, 3, 4):
            found = diagnose(round(d, digits), round(j, digits), n, tolerance=0.5001 * 10.0**-digits)
            assert name in found.possible, (name, digits, found)
            percent = diagnose(round(100 * d, digits), round(100 * j, digits), n, tolerance=0.5001 * 10.0**-digits)
            assert d < 0.03 or j < 0.03 or name in percent.possible


def test_diagnose_never_excludes_means_and_maxima_over_thresholds():
    rng = np.random.default_rng(0)
    for shape in (0.1, 0.5, 2.0, 50.0):
        curves = rng.beta(shape, 1, size=(2, 256))
        dice, iou = curves.mean(axis=0), iou_of_dice(curves).mean(axis=0)
        assert "pranet" in diagnose(dice.mean(), iou.mean(), 2, tolerance=1e-9).possible
        assert "pranet" in diagnose(dice.max(), iou.max(), tolerance=1e-9).possible


def test_diagnose_never_excludes_the_references_formula_with_empty_images():
    for dice in ([0.8, 0.6, 2.0], [0.1, 2.0, 2.0], [0.0, 0.0, 2.0], [0.95] * 9 + [2.0]):
        iou = [1.0 if d == 2 else iou_of_dice(d) for d in dice]
        found = diagnose(float(np.mean(dice)), float(np.mean(iou)), tolerance=1e-6)
        assert "ssl4gie" in found.possible and "paper" not in found.possible
        assert found.verdict == ("smoothed" if np.mean(dice) > 1 else "impossible")


def test_diagnose_bounds_the_spread_of_what_was_averaged():
    rng = np.random.default_rng(0)
    for a, b in ((8, 2), (2, 2), (0.5, 0.5), (50, 5)):
        dice = rng.beta(a, b, size=100)
        found = diagnose(dice.mean(), iou_of_dice(dice).mean(), 100, tolerance=1e-9)
        assert found.verdict == "means"
        low, high = found.spread
        assert low <= dice.std() <= high and low > 0.3 * dice.std()


# -- verdicts ----------------------------------------------------------------------------------------------------------

DUCK_NET = [
    # RazvanDu/DUCK-Net, README.md at commit 12275ab, section "Results": DSC, Jaccard, precision, recall.
    # "Trained on Kvasir-SEG and tested on CVC-ClinicDB"
    (0.7010, 0.5397, 0.6640, 0.7423),
    (0.7457, 0.5945, 0.7642, 0.7280),
    (0.7744, 0.6319, 0.9494, 0.6539),
    (0.5784, 0.4068, 0.5974, 0.5605),
    (0.6763, 0.5109, 0.6965, 0.6572),
    (0.8314, 0.7114, 0.8839, 0.7848),
    (0.8014, 0.6686, 0.8851, 0.7321),
    (0.8211, 0.6965, 0.8860, 0.7650),
    # "Trained on CVC-ClinicDB and tested on Kvasir-SEG"
    (0.5369, 0.3670, 0.4374, 0.6951),
    (0.5531, 0.3822, 0.4242, 0.7944),
    (0.6852, 0.5212, 0.7647, 0.6207),
    (0.7272, 0.5714, 0.9180, 0.6021),
    (0.5152, 0.3469, 0.3939, 0.7443),
    (0.8800, 0.7858, 0.9659, 0.8082),
    (0.7525, 0.6032, 0.6873, 0.8314),
    (0.8251, 0.7023, 0.7740, 0.8834),
]


@pytest.mark.parametrize(("dice", "iou", "precision", "recall"), DUCK_NET)
def test_diagnose_finds_published_cross_dataset_rows_pooled(dice, iou, precision, recall):
    found = diagnose(dice, iou, tolerance=1e-4, precision=precision, recall=recall)
    assert found.verdict == diagnose(100 * dice, 100 * iou, tolerance=1e-2).verdict == "pooled"
    assert abs(found.gap) < 1e-4 and found.spread[1] < 0.05
    assert "harmonic mean" in found.words and "pooled" in found.words


@pytest.mark.parametrize(
    ("dice", "iou", "precision", "recall"),
    [(0.7984, 0.6969, 0.8322, 0.7724), (0.8032, 0.7037, 0.8100, 0.8274)],  # the same README: U-Net on ETIS and ColonDB
)
def test_diagnose_finds_the_two_rows_of_that_table_that_are_means(dice, iou, precision, recall):
    found = diagnose(dice, iou, precision=precision, recall=recall)
    assert found.verdict == "means" and "pooled" in found.excluded and "paper" in found.possible
    assert found.gap == pytest.approx(0.0325, abs=2e-4)
    assert found.spread[0] == pytest.approx(0.127, abs=1e-3)


def test_diagnose_finds_that_tables_misprint_impossible():
    """DUCK-Net with 17 filters on CVC-ClinicDB: precision and recall give Dice 0.9447, printed is 0.9450."""
    found = diagnose(0.9450, 0.8952, tolerance=1e-4)
    assert found.verdict == "impossible" and "misprint" in found.words
    assert diagnose(0.9447, 0.8952, precision=0.9488, recall=0.9406).verdict == "pooled"


def test_diagnose_takes_two_classes_apart():
    """A README's fg Dice 73.37 and bg Dice 98.37 were reported as 85.87 (users' thread of medical_seg)."""
    iou = (iou_of_dice(0.7337) + iou_of_dice(0.9837)) / 2
    found = diagnose(85.87, round(100 * iou, 2))
    assert found.verdict == "means" and {"fg_bg_mean", "fg_bg_pooled"} <= set(found.possible)
    assert two_classes(found.dice, iou) == pytest.approx((0.7337, 0.9837), abs=1e-4)
    assert "Dice 0.734 and 0.984" in found.words


def test_diagnose_excludes_two_pooled_classes_where_iou_is_too_high_for_two():
    found = diagnose(0.8980, 0.8400, tolerance=1e-4)
    assert found.verdict == "means" and "fg_bg_pooled" in found.excluded and "too far above" in found.words
    with pytest.raises(ValueError, match="no two classes"):
        two_classes(0.898, 0.840)


def test_diagnose_says_what_rounding_allows():
    exact = diagnose(0.8, iou_of_dice(0.8), tolerance=0.0)
    assert exact.rounding == (0, 0) and exact.verdict == "pooled" and exact.spread == (0, 0)
    two_digits = diagnose(0.83, 0.71)
    assert two_digits.tolerance == pytest.approx(0.01) and two_digits.verdict == "undecided"
    assert two_digits.rounding[0] == pytest.approx(iou_of_dice(0.82) - iou_of_dice(0.83) - 0.01)
    assert two_digits.rounding[1] == pytest.approx(iou_of_dice(0.84) - iou_of_dice(0.83) + 0.01)
    assert {"pooled", "paper"} <= set(two_digits.possible)


@pytest.mark.parametrize(
    ("dice", "iou", "words"),
    [
        (0.9000, 0.9312, "IoU averaged over polyp and background"),
        (0.3000, 0.9512, "IoU exceeds Dice"),
        (0.9000, 0.7012, "Means lie on or above the curve"),
        (0.8587, 0.5794, "polyp (0.734) and background (0.984)"),
        (1.0500, 0.3012, "A Dice above 1"),
    ],
)
def test_diagnose_finds_impossible_pairs_and_what_would_explain_them(dice, iou, words):
    found = diagnose(dice, iou)
    assert found.verdict == "impossible" and words in found.words
    assert not set(found.possible) - {"ssl4gie"}
    assert not (dice == 0.3 and "averaged over polyp" in found.words)


def test_diagnose_uses_the_number_of_images():
    one = diagnose(0.5000, 0.4512, 1)
    assert "paper" in one.excluded and "pranet" in one.possible and "over thresholds then" in one.words
    assert "paper" in diagnose(0.5000, 0.4512, 2).possible  # 1 and 0
    assert "paper" in diagnose(0.5000, 0.4512).possible
    assert diagnose(0.8000, 0.66667, 1).verdict == "pooled"
    assert diagnose(0.501, 0.501, 1, tolerance=0.0).verdict == "impossible"


def test_diagnose_uses_precision_and_recall():
    iou = iou_of_dice(0.8)
    assert diagnose(0.8, iou, precision=0.8, recall=0.8).verdict == "pooled"
    means = diagnose(0.8, iou, precision=0.9, recall=0.9)
    assert means.verdict == "means" and "not the harmonic mean" in means.words
    above = diagnose(0.8, iou, precision=0.7, recall=0.7)
    assert above.verdict == "impossible" and "Dice exceeds the harmonic mean" in above.words


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((float("nan"), 0.5), "scores lie in"),
        ((-0.1, 0.5), "scores lie in"),
        ((101, 99), "scores lie in"),
        ((0.9, 0.8, 0), "n is at least 1"),
        ((89.8, 0.84), "one looks like a fraction"),
    ],
)
def test_diagnose_refuses_what_is_no_pair(arguments, match):
    with pytest.raises(UsageError, match=match):
        diagnose(*arguments)
    with pytest.raises(UsageError, match="below 0"):
        diagnose(0.9, 0.8, tolerance=-1)
