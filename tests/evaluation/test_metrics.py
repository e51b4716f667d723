"""The four scores by hand, by scikit-learn and by their algebra, and the interval's coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from polypseg.errors import UsageError
from polypseg.evaluation.metrics import CONVENTIONS, mean_with_interval, pixel_counts, score
from polypseg.statistics.scores import METRICS

Mask = list[list[int]]


def scores_of(prediction: Mask, target: Mask, convention: str) -> dict[str, float]:
    counts = pixel_counts(np.array(prediction, dtype=bool), np.array(target, dtype=bool))
    return {name: float(values[0]) for name, values in score([counts], convention=convention).items()}


@st.composite
def counts_of_nonempty_masks(draw: st.DrawFn) -> tuple[int, int, int]:
    predicted, true = draw(st.integers(1, 10**6)), draw(st.integers(1, 10**6))
    return draw(st.integers(0, min(predicted, true))), predicted, true


@st.composite
def any_counts(draw: st.DrawFn) -> tuple[int, int, int]:
    predicted, true = draw(st.integers(0, 10**6)), draw(st.integers(0, 10**6))
    return draw(st.integers(0, min(predicted, true))), predicted, true


# -- by hand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [  # expected: Dice, IoU, precision, recall
        ([[1, 1], [0, 0]], [[1, 0], [0, 0]], (2 / 3, 1 / 2, 1 / 2, 1)),
        ([[1, 0], [0, 0]], [[1, 1], [1, 0]], (1 / 2, 1 / 3, 1, 1 / 3)),
        ([[1, 1], [0, 0]], [[1, 0], [1, 0]], (1 / 2, 1 / 3, 1 / 2, 1 / 2)),
        ([[1, 1], [1, 1]], [[0, 0], [0, 1]], (2 / 5, 1 / 4, 1 / 4, 1)),
        ([[0, 1], [1, 0]], [[0, 1], [1, 0]], (1, 1, 1, 1)),
        ([[1, 0], [0, 0]], [[0, 0], [0, 1]], (0, 0, 0, 0)),
    ],
)
def test_score_of_two_by_two_masks_is_as_computed_by_hand(prediction, target, expected, convention):
    found = scores_of(prediction, target, convention)
    assert tuple(found) == METRICS
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-7)


EMPTY, ONE = [[0, 0], [0, 0]], [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("case", "prediction", "target", "convention", "expected"),
    [
        ("nothing to find, nothing found", EMPTY, EMPTY, "standard", (1, 1, 1, 1)),
        ("nothing to find, nothing found", EMPTY, EMPTY, "ssl4gie", (2, 1, 1, 1)),
        ("missed polyp", EMPTY, ONE, "standard", (0, 0, 0, 0)),
        ("missed polyp", EMPTY, ONE, "ssl4gie", (0, 0, 1, 0)),
        ("false alarm", ONE, EMPTY, "standard", (0, 0, 0, 0)),
        ("false alarm", ONE, EMPTY, "ssl4gie", (0, 0, 0, 1)),
    ],
)
def test_score_of_empty_masks_follows_the_convention(case, prediction, target, convention, expected):
    found = tuple(scores_of(prediction, target, convention).values())
    assert found == pytest.approx(expected, abs=1e-7), case


def test_score_defaults_to_standard():
    assert score([(0, 0, 0)])["dice"][0] == 1


def test_score_keeps_images_apart_and_in_order():
    found = score([(1, 2, 1), (0, 0, 0), (0, 3, 5), (4, 4, 4)])
    np.testing.assert_allclose(found["dice"], [2 / 3, 1, 0, 1])
    assert all(values.shape == (4,) for values in found.values())


@pytest.mark.filterwarnings("error")  # 0/0 is an answer here, not a warning in the user's log
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_score_of_empty_masks_gives_no_warning(convention):
    assert np.isfinite(list(score([(0, 0, 0), (0, 0, 4), (0, 4, 0)], convention=convention).values())).all()


def test_score_names_the_conventions_when_it_knows_not_the_asked_one():
    with pytest.raises(UsageError, match=r"'standrd'.*Did you mean 'standard'\?.*ssl4gie, standard"):
        score([(0, 0, 0)], convention="standrd")


def test_pixel_counts_counts_intersection_prediction_and_target():
    prediction, target = np.array([[1, 1, 1], [0, 0, 0]], bool), np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert pixel_counts(prediction, target) == (2, 3, 4)


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (2,), (2, 2, 1)])
def test_pixel_counts_refuses_masks_of_different_shapes(shape):
    with pytest.raises(ValueError, match="differ in shape"):
        pixel_counts(np.ones((2, 2), bool), np.ones(shape, bool))


# -- algebra -----------------------------------------------------------------------------------------------------------


@given(counts_of_nonempty_masks())
@settings(deadline=None)
def test_score_conventions_agree_on_nonempty_masks(counts):
    standard, reference = score([counts], convention="standard"), score([counts], convention="ssl4gie")
    for name in METRICS:
        assert standard[name][0] == pytest.approx(reference[name][0], abs=1e-6)


@given(any_counts())
@settings(deadline=None)
def test_score_standard_lies_in_the_unit_interval_and_iou_follows_from_dice(counts):
    found = {name: float(values[0]) for name, values in score([counts]).items()}
    assert all(0 <= value <= 1 for value in found.values())
    assert found["iou"] == pytest.approx(found["dice"] / (2 - found["dice"]), abs=1e-12)
    assert min(found["precision"], found["recall"]) - 1e-12 <= found["dice"]
    assert found["dice"] <= max(found["precision"], found["recall"]) + 1e-12


@given(counts_of_nonempty_masks())
@settings(deadline=None)
def test_score_swaps_precision_and_recall_when_prediction_and_target_swap(counts):
    intersection, predicted, true = counts
    one, other = score([counts]), score([(intersection, true, predicted)])
    assert (one["dice"], one["iou"]) == (other["dice"], other["iou"])
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_score_equals_scikit_learn(share):
    rng = np.random.default_rng(0)
    for _ in range(20):
        prediction, target = rng.random((2, 24, 31)) < share
        found = score([pixel_counts(prediction, target)])
        oracle = {
            "dice": sklearn_metrics.f1_score,
            "iou": sklearn_metrics.jaccard_score,
            "precision": sklearn_metrics.precision_score,
            "recall": sklearn_metrics.recall_score,
        }
        for name, function in oracle.items():
            wanted = function(target.ravel(), prediction.ravel(), zero_division=0)
            assert found[name][0] == pytest.approx(wanted, abs=1e-12)


# -- interval ----------------------------------------------------------------------------------------------------------


def width(interval: dict[str, float]) -> float:
    return interval["high"] - interval["low"]


def test_mean_with_interval_contains_the_mean():
    for seed in range(20):
        sample = np.random.default_rng(seed).beta(4, 1, size=30)  # skewed, like Dice scores
        found = mean_with_interval(sample, resamples=1000)
        assert found["mean"] == pytest.approx(sample.mean())
        assert 0 <= found["low"] < found["mean"] < found["high"] <= 1


def test_mean_with_interval_narrows_with_the_root_of_the_number_of_images():
    rng = np.random.default_rng(0)
    few, many = (
        np.mean([width(mean_with_interval(rng.normal(size=n), resamples=1000)) for _ in range(10)]) for n in (50, 800)
    )
    assert 3.4 < few / many < 4.6  # sqrt(800 / 50) = 4
    assert many == pytest.approx(2 * 1.96 / np.sqrt(800), rel=0.1)


def test_mean_with_interval_repeats_with_its_seed():
    sample = np.random.default_rng(1).random(40)
    assert mean_with_interval(sample) == mean_with_interval(sample) == mean_with_interval(list(sample), seed=0)
    assert mean_with_interval(sample, seed=1) != mean_with_interval(sample, seed=2)


def test_mean_with_interval_of_one_image_has_no_interval():
    assert mean_with_interval([0.7]) == {"mean": 0.7, "low": None, "high": None}


@pytest.mark.filterwarnings("error")  # SciPy warns of degenerate samples
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_mean_with_interval_of_equal_scores_has_no_width(value):
    found = mean_with_interval([value] * 7)
    assert found["low"] == found["mean"] == found["high"] == pytest.approx(value)


def test_mean_with_interval_covers_the_true_mean_in_about_95_of_100_cases():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        found = mean_with_interval(rng.normal(0.5, 0.2, size=50), resamples=1000)
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99  # observed: 0.93; the percentile bootstrap covers a little less
