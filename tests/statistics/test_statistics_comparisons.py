"""Paired comparisons: p-values against brute force, effects by hand, and no difference where there is none."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from polypseg.errors import UsageError
from polypseg.statistics import Interval, compare_models, effect_sizes, holm, score_set, sign_flip_p_values
from polypseg.statistics.comparisons import reading, wilcoxon_p_value


def brute_force_p(sums):
    totals = [abs(np.dot(signs, sums)) for signs in product((-1, 1), repeat=len(sums))]
    return np.mean([total >= abs(sum(sums)) - 1e-12 for total in totals])


@pytest.mark.parametrize("clusters", [1, 2, 5, 11])
def test_exact_sign_flip_p_equals_brute_force(clusters):
    sums = np.random.default_rng(clusters).normal(0.3, 1, size=(3, clusters))
    assert sign_flip_p_values(sums) == pytest.approx([brute_force_p(row) for row in sums], abs=1e-12)


def test_exact_sign_flip_p_of_one_sided_clusters_is_the_least_possible():
    assert sign_flip_p_values([[1.0, 2.0, 0.5, 3.0]])[0] == 2 / 2**4
    assert sign_flip_p_values([[1.0] * 15])[0] == 2 / 2**15


def test_sign_flip_p_counts_patterns_that_tie_but_for_rounding():
    sums = [0.1, 0.2, 0.3, -0.3, 0.1, -0.1]  # many patterns reach the total exactly
    assert sign_flip_p_values(sums)[0] == pytest.approx(brute_force_p(np.array(sums)))


def test_random_sign_flip_p_agrees_with_scipy():
    sums = np.random.default_rng(0).normal(0.35, 1, size=30)
    theirs = stats.permutation_test(
        (sums,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(5)
    ).pvalue
    mine = sign_flip_p_values(sums)[0]
    assert mine == pytest.approx(theirs, abs=0.01) and mine == sign_flip_p_values(sums)[0]


def test_random_sign_flip_p_is_never_zero_and_independent_of_blocks(monkeypatch):
    sums = np.full((1, 40), 5.0)
    assert sign_flip_p_values(sums)[0] == pytest.approx(1 / 20_000)
    mixed = np.random.default_rng(1).normal(size=(2, 40))
    whole = sign_flip_p_values(mixed)
    monkeypatch.setattr("polypseg.statistics.comparisons._BLOCK", 40 * 1000)
    assert sign_flip_p_values(mixed) == pytest.approx(whole, abs=0.02)


def test_sign_flip_test_of_clips_holds_its_level_where_images_would_not():
    """No true difference, but differences shared within clips of ten: 5 % of cases may be significant."""
    rng = np.random.default_rng(4)
    differences = np.repeat(rng.normal(size=(1000, 25)), 10, axis=1) + rng.normal(size=(1000, 250))
    by_clip = differences.reshape(1000, 25, 10).sum(axis=2)
    assert np.mean(sign_flip_p_values(by_clip, patterns=1999) < 0.05) == pytest.approx(0.05, abs=0.025)
    assert np.mean(sign_flip_p_values(differences, patterns=1999) < 0.05) > 0.3


def test_holm_equals_a_hand_computation():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then the running maximum.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2]) == pytest.approx([0.2])


def test_effect_sizes_equal_a_hand_computation():
    found = effect_sizes([1.0, -2.0, 3.0, 0.0])
    assert found["cohens_dz"] == pytest.approx(0.5 / np.std([1, -2, 3, 0], ddof=1))
    assert found["rank_biserial"] == pytest.approx((1 - 2 + 3) / 6)
    assert found["superiority"] == pytest.approx(0.5 + 0.25 / 2)
    assert effect_sizes([0.2, 0.1]) | {"cohens_dz": None} == {
        "cohens_dz": None,
        "rank_biserial": 1.0,
        "superiority": 1.0,
    }


def test_wilcoxon_equals_scipys_without_zeros():
    values = np.random.default_rng(2).normal(0.2, 1, size=40)
    assert wilcoxon_p_value([*values, 0.0, 0.0]) == pytest.approx(stats.wilcoxon(values).pvalue)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.002, 0.008, "different, but by less than the margin"),
        (0.002, 0.012, "different"),
        (-0.05, -0.02, "different"),
        (-0.004, 0.009, "equivalent"),
        (-0.004, 0.010, "undecided"),
        (-0.02, 0.03, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_reading_needs_the_whole_interval_within_the_margin(low, high, said):
    assert reading(Interval(estimate=0.0, low=low, high=high), margin=0.01) == said


@pytest.mark.filterwarnings("error")
def test_two_identical_models_do_not_differ():
    values = np.random.default_rng(0).random(50)
    (found,) = compare_models(score_set({"a": values, "b": values}))
    assert (found.difference.estimate, found.difference.low, found.difference.high) == (0, 0, 0)
    assert found.p_permutation == found.p_wilcoxon == found.p_holm == 1
    assert found.effect == {"cohens_dz": None, "rank_biserial": 0.0, "superiority": 0.5}
    assert found.reading == "equivalent"


@pytest.mark.slow
def test_a_known_shift_is_recovered_in_95_of_100_cases():
    rng = np.random.default_rng(7)
    clusters = np.repeat(range(40), 5)
    hits = 0
    for case in range(200):
        shared = rng.normal(size=200)  # how hard an image is, for both models
        noise = rng.normal(scale=0.1, size=40)[clusters] + rng.normal(scale=0.1, size=200)
        scores = score_set({"a": shared + 0.05 + noise, "b": shared}, clusters=clusters.tolist())
        difference = compare_models(scores, resamples=1000, seed=case)[0].difference
        hits += difference.low <= 0.05 <= difference.high
    assert 0.9 < hits / 200 < 0.99  # observed: 0.93


def test_compare_models_adjusts_one_family_and_keeps_directions():
    rng = np.random.default_rng(3)
    base = rng.normal(0.7, 0.1, size=60)
    scores = score_set({"a": base, "b": base - 0.1 + rng.normal(scale=0.05, size=60), "c": base + 1e-4})
    found = {(c.a, c.b): c for c in compare_models(scores, margin=0.01)}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"].difference.low > 0.05 and found["b", "c"].difference.high < -0.05
    assert found["a", "c"].reading == "different, but by less than the margin"
    p = [c.p_permutation for c in found.values()]
    assert [c.p_holm for c in found.values()] == pytest.approx(holm(p))
    row = found["a", "b"].row()
    assert row["reading"] == "different" and row["superiority"] > 0.9 and row["difference_low"] > 0.05


def test_compare_models_tests_clusters_not_images():
    """One clip that differs much is one cluster of five: p cannot fall below 2 / 2^5, however many its frames."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(range(5), 100)
    a = rng.normal(size=500)
    scores = score_set({"a": a + 1, "b": a}, clusters=clusters.tolist())
    (found,) = compare_models(scores)
    assert found.p_permutation == pytest.approx(2 / 2**5) and found.p_wilcoxon == pytest.approx(2 / 2**5)


def test_seeds_widen_the_interval_of_a_difference():
    rng = np.random.default_rng(6)
    base = rng.normal(0.7, 0.1, size=100)
    seeds_of_a = base + np.array([-0.06, 0.0, 0.06])[:, None]
    with_seeds = score_set({"a": seeds_of_a, "b": np.stack([base] * 3)})
    averaged = score_set({"a": seeds_of_a.mean(axis=0), "b": base})
    (wide,), (narrow,) = compare_models(with_seeds), compare_models(averaged)
    assert narrow.difference.high - narrow.difference.low < 1e-9 and wide.difference.high > 0.04


def test_compare_models_refuses_unknown_models_and_margins():
    scores = score_set({"first": [0.1, 0.2], "second": [0.2, 0.1]})
    with pytest.raises(UsageError, match="Did you mean 'second'"):
        compare_models(scores, pairs=[("first", "secnd")])
    with pytest.raises(ValueError, match="positive"):
        compare_models(scores, margin=0)
    assert compare_models(scores, pairs=[]) == []
