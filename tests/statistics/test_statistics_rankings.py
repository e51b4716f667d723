"""Rankings: firm where the data are, open where they are not, and never a flip out of nothing."""

import json

import numpy as np
import pytest
from scipy import stats

from polypseg.statistics import agreement_row, analyze_rank_change, competition_ranks, draw_both, score_set
from polypseg.statistics.orders import kendall_tau, one_order_p_value, order_signs, same_order_taus

CLIPS = np.repeat(range(29), 21)


def two_sets(rng, inside_means, outside_means, *, noise=0.1):
    """100 images, and 29 clips in which each model has luck of its own; the images' difficulty is shared."""
    models = len(inside_means)
    names = [f"m{i}" for i in range(models)]
    inside = np.asarray(inside_means)[:, None] + rng.normal(scale=0.15, size=100)
    outside = np.asarray(outside_means)[:, None] + rng.normal(scale=0.15, size=29)[CLIPS]
    inside = inside + rng.normal(scale=noise, size=(models, 100))
    outside = outside + rng.normal(scale=noise, size=(models, 29))[:, CLIPS]
    outside = outside + rng.normal(scale=noise, size=(models, len(CLIPS)))
    return (
        score_set(dict(zip(names, inside, strict=True)), title="in"),
        score_set(dict(zip(names, outside, strict=True)), title="out", clusters=CLIPS.tolist()),
    )


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_tau_equals_scipys(ties):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50, 7))
    if ties:
        one, other = one.round(), other.round()
    found = kendall_tau(one, other)
    assert found == pytest.approx([stats.kendalltau(a, b).statistic for a, b in zip(one, other, strict=True)])


def test_kendall_tau_of_all_tied_is_zero_and_rounding_is_a_tie():
    means = np.array([[0.5, 0.5 + 1e-14, 0.5]])
    assert not order_signs(means).any() and kendall_tau(means, means)[0] == 0


@pytest.mark.filterwarnings("error")
def test_two_identical_models_share_their_ranks_and_flip_with_probability_a_half():
    rng = np.random.default_rng(0)
    values = rng.random((2, 50))
    sets = [score_set({"a": v, "b": v, "worse": v - 0.5}) for v in values]
    change = analyze_rank_change(*sets, resamples=500)
    for ranking in (change.inside, change.outside):
        assert ranking.ranks.tolist() == [1.5, 1.5, 3.0]
        assert ranking.probability == pytest.approx(np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))
        assert ranking.above[0, 1] == 0.5 and ranking.above[0, 2] == 1
    assert change.flips[0, 1] == 0.5 and change.flips[0, 2] == 0 and np.diag(change.flips).tolist() == [0, 0, 0]
    pair = change.pairs[0]
    assert (pair["a"], pair["b"], pair["flipped"], pair["p_flip"], pair["flip_probability"]) == (
        "a",
        "b",
        False,
        1,
        0.5,
    )
    assert change.agreement.same_winner == pytest.approx(0.5)
    assert change.agreement.tau.estimate == pytest.approx(1) and change.agreement.noise_share is None


def test_a_clear_reversal_is_a_flip_beyond_doubt():
    change = analyze_rank_change(*two_sets(np.random.default_rng(1), [0.9, 0.7, 0.5], [0.4, 0.6, 0.8], noise=0.05))
    assert change.agreement.tau.estimate == -1 and change.agreement.p_one_order < 0.01
    assert change.flips[0, 2] > 0.999
    assert change.agreement.same_winner < 0.001 and change.agreement.winner_stays < 0.001
    assert [pair["flipped"] for pair in change.pairs] == [True] * 3
    assert all(pair["p_flip_holm"] < 0.001 for pair in change.pairs)
    row = change.rows()[0]
    assert (row["rank_inside"], row["rank_outside"], row["rank_change"]) == (1, 3, -2)
    assert row["best_inside"] > 0.999 and row["best_outside"] < 0.001


def test_a_firm_common_order_stays():
    change = analyze_rank_change(*two_sets(np.random.default_rng(2), [0.9, 0.7, 0.5], [0.8, 0.6, 0.4], noise=0.05))
    agreement = change.agreement
    assert agreement.tau.estimate == 1 and agreement.tau.low == 1 and agreement.expected_tau > 0.99
    assert agreement.winner_stays > 0.99 and agreement.same_winner > 0.99 and agreement.p_one_order == 1
    assert change.flips.max() < 0.01 and not any(pair["flipped"] for pair in change.pairs)
    assert [pair["p_flip"] for pair in change.pairs] == [1, 1, 1]  # both differences are real, but not opposite


def test_flip_probability_of_independent_sets_is_that_of_opposite_orders():
    change = analyze_rank_change(*two_sets(np.random.default_rng(3), [0.8, 0.79], [0.6, 0.62]), resamples=20_000)
    above = change.inside.above[0, 1], change.outside.above[0, 1]
    expected = above[0] * (1 - above[1]) + (1 - above[0]) * above[1]
    assert 0.05 < expected < 0.95 and change.flips[0, 1] == pytest.approx(expected, abs=0.015)


def test_rank_probabilities_are_doubly_stochastic_and_agree_with_counted_ranks():
    sets = two_sets(np.random.default_rng(4), [0.8, 0.79, 0.81, 0.8], [0.6] * 4)
    change = analyze_rank_change(*sets, resamples=2000, seed=5)
    draws, _ = draw_both(*sets, resamples=2000, seed=5)
    ranks = stats.rankdata(-draws.values, axis=1)
    counted = np.array([[(ranks[:, m] == r).mean() for r in range(1, 5)] for m in range(4)])
    assert change.inside.probability == pytest.approx(counted)
    for ranking in (change.inside, change.outside):
        assert ranking.probability.sum(axis=0) == pytest.approx(np.ones(4))
        assert ranking.probability.sum(axis=1) == pytest.approx(np.ones(4))
    for row, shares in zip(change.rows(), counted.cumsum(axis=1), strict=True):
        assert shares[row["rank_inside_high"] - 1] >= 0.975 and row["rank_inside_low"] <= row["rank_inside_high"]
        assert row["rank_inside_low"] == 1 or shares[row["rank_inside_low"] - 2] < 0.025


@pytest.mark.slow
def test_flip_test_rarely_errs_when_the_orders_are_equal():
    """Two models whose true order is the same, barely, in one set: a flip may be claimed in at most 5 % of cases."""
    rng = np.random.default_rng(6)
    claims = 0
    for case in range(100):
        change = analyze_rank_change(*two_sets(rng, [0.8, 0.7], [0.6001, 0.6]), resamples=20, seed=case)
        claims += change.pairs[0]["p_flip"] <= 0.05
    assert claims <= 8  # at the border of the hypothesis one direction of two counts: 2.5 % are expected


@pytest.mark.slow
def test_test_of_one_order_holds_its_level_and_finds_reversals():
    rng = np.random.default_rng(8)
    spread = np.linspace(0, 1, 8)
    found = {}
    for name, inside, outside in (
        ("one order", 0.85 + 0.05 * spread, 0.6 + 0.2 * spread),
        ("all equal", 0.85 + 0 * spread, 0.6 + 0 * spread),
        ("two groups of equals", np.repeat([0.8, 0.88], 4), np.repeat([0.6, 0.7], 4)),
        ("reversal", 0.85 + 0.05 * spread, 0.7 - 0.1 * spread),
    ):
        draws = [draw_both(*two_sets(rng, inside, outside), resamples=200, seed=seed) for seed in range(60)]
        found[name] = np.mean([one_order_p_value(*pair) < 0.05 for pair in draws])
    for name in ("one order", "all equal", "two groups of equals"):
        assert found[name] <= 0.13, name  # 5 % and 3 standard errors
    assert found["reversal"] > 0.8


def test_a_full_reversal_of_three_models_is_significant_whatever_tau_could_be_by_chance():
    """With three models a tau of -1 is one order of six: only the size of the violations tells."""
    sets = two_sets(np.random.default_rng(1), [0.9, 0.7, 0.5], [0.4, 0.6, 0.8])
    assert one_order_p_value(*draw_both(*sets, resamples=999)) == 0.001


def test_expected_tau_is_near_the_tau_of_data_with_one_order():
    rng, spread = np.random.default_rng(9), np.linspace(0, 1, 8)
    observed, expected = [], []
    for seed in range(60):
        draws = draw_both(*two_sets(rng, 0.85 + 0.05 * spread, 0.6 + 0.2 * spread), resamples=200, seed=seed)
        observed.append(kendall_tau(*(d.estimates[None] for d in draws))[0])
        expected.append(same_order_taus(*draws).mean())
    assert np.mean(observed) - 0.15 < np.mean(expected) < np.mean(observed) + 0.05
    assert 0.4 < np.mean(expected) < 0.9


def test_noise_alone_explains_the_disagreement_of_equal_models():
    sets = two_sets(np.random.default_rng(10), [0.8] * 8, [0.6] * 8)
    agreement = analyze_rank_change(*sets, resamples=1000).agreement
    assert abs(agreement.expected_tau) < 0.3 and agreement.noise_share > 0.6 and agreement.p_one_order > 0.05
    assert agreement.same_winner < 0.5


def test_retest_tau_of_a_firm_ranking_is_one_and_of_a_loose_one_lower():
    firm = analyze_rank_change(*two_sets(np.random.default_rng(0), [0.9, 0.6, 0.3], [0.9, 0.6, 0.3]), resamples=500)
    loose = analyze_rank_change(*two_sets(np.random.default_rng(0), [0.8, 0.8, 0.8], [0.6] * 3), resamples=500)
    assert firm.agreement.retest_inside == 1 == firm.agreement.retest_outside
    assert loose.agreement.retest_inside < 0.9


def test_rank_change_repeats_with_its_seed_and_goes_into_json():
    sets = two_sets(np.random.default_rng(4), [0.8, 0.79, 0.81], [0.6, 0.62, 0.61])
    content = [
        json.dumps(analyze_rank_change(*sets, resamples=300, seed=s).content(), allow_nan=False) for s in (1, 1, 2)
    ]
    assert content[0] == content[1] != content[2]
    kept = json.loads(content[0])
    assert kept["titles"] == ["in", "out"] and kept["models"] == ["m0", "m1", "m2"]
    assert sum(kept["tau_histogram"]["draws"]) == 300 == sum(kept["tau_histogram"]["same_order"])
    assert kept["agreement"] == agreement_row(analyze_rank_change(*sets, resamples=300, seed=1).agreement)
    assert len(kept["pairs"]) == 3 and len(kept["rows"]) == 3


def test_one_model_or_other_models_have_no_ranking_to_compare():
    one = score_set({"a": [0.1, 0.2]})
    with pytest.raises(ValueError, match="at least two models"):
        analyze_rank_change(one, one)
    two = score_set({"a": [0.1, 0.2], "b": [0.3, 0.1]})
    with pytest.raises(ValueError, match="same models and seeds"):
        analyze_rank_change(two, score_set({"b": [0.1, 0.2], "a": [0.3, 0.1]}))


def test_one_clip_gives_ranks_but_no_interval_of_tau():
    inside = score_set({"a": [0.1, 0.2, 0.4], "b": [0.3, 0.1, 0.2]})
    outside = score_set({"a": [0.1, 0.2], "b": [0.3, 0.1]}, clusters=["x", "x"])
    assert analyze_rank_change(inside, outside, resamples=50).agreement.tau.low is None


def test_competition_ranks_share_ties():
    assert competition_ranks({"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}) == {"b": 1, "a": 2, "c": 2, "d": 4}


def test_results_do_not_depend_on_how_many_comparisons_are_held_at_once(monkeypatch):
    sets = two_sets(np.random.default_rng(0), [0.8, 0.7, 0.7, 0.6], [0.5, 0.6, 0.7, 0.4])
    at_once = analyze_rank_change(*sets, resamples=501).content()
    monkeypatch.setattr("polypseg.statistics.orders._BLOCK", 100)
    assert analyze_rank_change(*sets, resamples=501).content() == at_once
