"""Intervals that cover, clusters that weigh what they are worth, repeats that count once."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from polypseg.data.catalog import clinicdb_sequence
from polypseg.errors import UsageError
from polypseg.statistics import (
    design_effect,
    draw_means,
    intra_cluster_correlation,
    mean_intervals,
    mean_rows,
    sample_weights,
    score_set,
)
from polypseg.statistics.intervals import bca_interval_of, expanded_tails, interval_of
from polypseg.statistics.resampling import leave_one_out

CLIPS = [clinicdb_sequence(str(frame), "") for frame in range(1, 613)]
CLIP_NUMBERS = np.array([int(clip) - 1 for clip in CLIPS])


def clustered(cases: int, *, correlation: float, seed: int = 0):
    """(cases, 612) standard normal scores in CVC-ClinicDB's 29 clips with an intra-cluster correlation."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=(cases, 29))[:, CLIP_NUMBERS], rng.normal(size=(cases, 612))
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own


def named(values):
    return {f"m{i}": row for i, row in enumerate(values)}


# -- sets of scores ----------------------------------------------------------------------------------------------------


def test_score_set_without_labels_takes_each_image_for_itself():
    scores = score_set({"a": [0.2, 0.4, 0.9], "b": [0.1, 0.1, 0.1]})
    assert (scores.images, scores.observations, scores.cluster_count, scores.seeds) == (3, 3, 3, 1)
    assert scores.means == pytest.approx([0.5, 0.1])


def test_repeats_count_once_and_join_the_clips_that_share_them():
    scores = score_set({"a": [1.0, 0.0, 0.0, 0.6, 0.2]}, clusters=list("xyyzz"), repeats=list("ppqrs"))
    assert (scores.images, scores.observations) == (5, 4)
    assert scores.per_observation()[0] == pytest.approx([0.5, 0.0, 0.6, 0.2])
    assert scores.means == pytest.approx([1.3 / 4])
    assert scores.clusters.tolist() == [0, 0, 1, 1]  # clips x and y share a frame


def test_an_image_given_three_times_weighs_like_one():
    once, thrice = [0.3, 0.8, 0.6, 0.1], [0.3, 0.3, 0.3, 0.8, 0.6, 0.1]
    merged = score_set({"a": thrice}, repeats=[0, 0, 0, 1, 2, 3])
    assert mean_intervals(merged) == mean_intervals(score_set({"a": once}))


@pytest.mark.parametrize(
    ("scores", "labels", "found"),
    [
        ({}, None, "at least one model"),
        ({"a": [0.1, 0.2], "b": [0.1]}, None, "same images"),
        ({"a": [0.1, np.nan]}, None, "finite"),
        ({"a": []}, None, "at least one image"),
        ({"a": [0.1, 0.2]}, ["x"], "1 labels of clusters for 2 images"),
    ],
)
def test_score_set_refuses_what_cannot_be_compared(scores, labels, found):
    with pytest.raises(ValueError, match=found):
        score_set(scores, clusters=labels)


# -- resampling --------------------------------------------------------------------------------------------------------


def test_draws_repeat_with_their_seed_and_differ_without():
    scores = score_set(named(clustered(2, correlation=0.3)), clusters=CLIPS)
    assert np.array_equal(draw_means(scores, seed=3).values, draw_means(scores, seed=3).values)
    assert not np.array_equal(draw_means(scores, seed=3).values, draw_means(scores, seed=4).values)


def test_draws_take_clusters_whole():
    """Scores that are equal within clips of unequal size: every draw is a ratio of sums over whole clips."""
    scores = score_set({"a": [1.0] * 3 + [0.0]}, clusters=list("xxxy"))
    values, counts = np.unique(draw_means(scores, resamples=4000).values.round(9), return_counts=True)
    assert values == pytest.approx([0.0, 0.75, 1.0])  # yy, xy, xx
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_draws_of_two_equal_models_are_of_the_same_images():
    values = clustered(1, correlation=0.5)[0]
    draws = draw_means(score_set({"a": values, "b": values + 0.1}, clusters=CLIPS))
    assert draws.values[:, 1] - draws.values[:, 0] == pytest.approx(0.1)


def test_draws_spread_as_the_formula_for_the_mean_says():
    values = np.random.default_rng(0).normal(size=400)
    spread = draw_means(score_set({"a": values}), resamples=20_000).values.std()
    assert spread == pytest.approx(values.std() / 20, rel=0.02)


def test_draws_over_blocks_are_as_many_as_asked(monkeypatch):
    monkeypatch.setattr("polypseg.statistics.resampling._BLOCK", 700)
    draws = draw_means(score_set(named(np.random.default_rng(0).normal(size=(2, 2, 30)))), resamples=101)
    assert draws.values.shape == (101, 2) and np.isfinite(draws.values).all()


def test_seeds_are_a_second_level():
    """Networks whose means differ by far more than images do: only the draw of networks makes the spread."""
    rng = np.random.default_rng(1)
    offsets = np.array([-0.3, 0.0, 0.1, 0.2])
    several = score_set({"a": 0.5 + offsets[:, None] + rng.normal(scale=0.01, size=(4, 200))})
    spread = draw_means(several, resamples=20_000).values.std()
    assert spread == pytest.approx(offsets.std() / 2, rel=0.03)  # standard deviation over root of 4 networks
    assert draw_means(score_set({"a": several.per_observation()[0]})).values.std() < 0.001


def test_seeds_of_two_models_are_not_paired():
    offsets = np.array([-0.3, 0.0, 0.1, 0.2])[:, None] + np.zeros(10)
    draws = draw_means(score_set({"a": offsets, "b": offsets}), resamples=20_000).values
    assert (draws[:, 0] - draws[:, 1]).std() == pytest.approx(np.sqrt(2) * offsets.std() / 2, rel=0.03)


def test_leave_one_out_leaves_whole_clusters_out():
    scores = score_set({"a": [0.0, 0.2, 1.0]}, clusters=list("xxy"))
    assert leave_one_out(scores)[:, 0] == pytest.approx([1.0, 0.1])


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_cluster_interval_covers_in_95_of_100_cases_where_the_image_interval_may_not(correlation):
    cases = 2000
    data = named(clustered(cases, correlation=correlation))
    share = {}
    for name, clusters in (("clip", CLIPS), ("image", None)):
        found = mean_intervals(score_set(data, clusters=clusters), resamples=2000).values()
        share[name] = np.mean([i.low <= 0 <= i.high for i in found])
    assert share["clip"] == pytest.approx(0.95, abs=0.02)  # observed: 0.954 and 0.944; 4 standard errors are 0.02
    if correlation:
        assert share["image"] < 0.55  # observed: 0.416
    else:
        assert share["image"] == pytest.approx(0.95, abs=0.02)


def test_intervals_cover_skewed_scores_like_dice():
    rng = np.random.default_rng(5)
    z = np.sqrt(0.5) * rng.normal(size=(1000, 29))[:, CLIP_NUMBERS] + np.sqrt(0.5) * rng.normal(size=(1000, 612))
    grid = np.linspace(-5, 5, 2001)
    scores = score_set(named(np.interp(z, grid, stats.beta.ppf(ndtr(grid), 3, 0.6))), clusters=CLIPS)
    share = {
        method: np.mean([i.low <= 3 / 3.6 <= i.high for i in mean_intervals(scores, method=method).values()])
        for method in ("expanded", "percentile", "bca")
    }
    assert 0.91 < share["expanded"] < 0.965  # long tails are hard for 29 clips: 0.935 to 0.94 in larger simulations
    assert 0.89 < share["percentile"] < share["expanded"]  # 0.92 to 0.93
    assert 0.91 < share["bca"] < 0.965  # 0.93 to 0.94


def test_bca_equals_scipys_for_images_of_their_own():
    values = np.random.default_rng(3).beta(4, 0.8, size=60)
    (mine,) = mean_intervals(score_set({"a": values}), method="bca", resamples=40_000).values()
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_bca_reads_the_percentiles_of_its_formula():
    draws = (np.arange(100_000) + 0.5) / 100_000
    plain = bca_interval_of(draws, 0.5, left_out=[0.0, 0.0])
    assert (plain.low, plain.high) == pytest.approx((0.025, 0.975), abs=1e-4)
    biased = bca_interval_of(draws, 0.3, left_out=[0.0, 0.0])  # 30 % of the draws lie below: z0 = -0.5244
    assert (biased.low, biased.high) == pytest.approx(tuple(ndtr([-2 * 0.5244 - 1.96, -2 * 0.5244 + 1.96])), abs=1e-4)
    u = np.array([2.0, -1.0, -1.0])  # a = 6 / (6 * 6^1.5)
    skewed = bca_interval_of(draws, 0.5, left_out=-u)
    a = 6**-1.5
    assert skewed.high == pytest.approx(float(ndtr(1.96 / (1 - 1.96 * a))), abs=1e-4)
    assert skewed.low == pytest.approx(float(ndtr(-1.96 / (1 + 1.96 * a))), abs=1e-4)


def test_percentile_interval_equals_scipys_for_images_of_their_own():
    values = np.random.default_rng(3).beta(4, 0.8, size=60)
    (mine,) = mean_intervals(score_set({"a": values}), method="percentile", resamples=40_000).values()
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=40_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_expanded_tails_widen_to_students_t_and_vanish_for_many_clusters():
    draws = np.random.default_rng(0).normal(scale=np.sqrt(9 / 10), size=400_000)  # a bootstrap of 10 clusters
    found = interval_of(draws, 0.0, freedom=9)
    assert (found.low, found.high) == pytest.approx((-stats.t.ppf(0.975, 9), stats.t.ppf(0.975, 9)), rel=0.02)
    assert expanded_tails(1e6) == pytest.approx([0.025, 0.975], abs=1e-5)


def test_equal_scores_have_an_interval_without_width_and_one_cluster_none():
    (equal,) = mean_intervals(score_set({"a": [0.7] * 9})).values()
    assert equal.low == pytest.approx(0.7) and equal.high == pytest.approx(0.7)
    for method in ("expanded", "percentile", "bca"):
        (single,) = mean_intervals(score_set({"a": [0.1, 0.9]}, clusters=["x", "x"]), method=method).values()
        assert (single.estimate, single.low, single.high) == (0.5, None, None)
    assert not single.excludes_zero


def test_mean_intervals_refuses_unknown_methods_and_bca_of_seeds():
    with pytest.raises(UsageError, match="unknown interval method 'bcca'"):
        mean_intervals(score_set({"a": [0.1, 0.2]}), method="bcca")
    with pytest.raises(ValueError, match="one seed"):
        mean_intervals(score_set({"a": [[0.1, 0.2], [0.3, 0.4]]}), method="bca")


# -- effective size ----------------------------------------------------------------------------------------------------


def test_effective_size_of_equal_clusters_follows_the_closed_form():
    """k images a cluster: N for correlation 0, C for correlation 1, N / (1 + (k - 1) r) between."""
    for correlation, expected in ((0.0, 120), (1.0, 12), (0.25, 120 / 3.25)):
        assert 120 / design_effect([10] * 12, correlation) == pytest.approx(expected)
    same_within = score_set({"a": np.repeat(np.linspace(0, 1, 12), 10)}, clusters=np.repeat(range(12), 10).tolist())
    weight = sample_weights(same_within)["a"]
    assert weight.correlation == pytest.approx(1) and weight.effective_size == pytest.approx(12)


def test_a_negative_correlation_does_not_add_images():
    scores = score_set({"a": [0.0, 1.0] * 6}, clusters=np.repeat(range(6), 2).tolist())
    weight = sample_weights(scores)["a"]
    assert weight.correlation == pytest.approx(-1) and weight.effective_size == 12


def test_clinicdbs_frames_weigh_like_53_at_a_correlation_of_a_half():
    sizes = np.bincount(CLIP_NUMBERS)
    assert design_effect(sizes, 0.5) == pytest.approx(11.58, abs=0.01)
    assert 612 / design_effect(sizes, 0.5) == pytest.approx(52.8, abs=0.1)


def test_correlation_estimator_is_right_on_average():
    found = [intra_cluster_correlation(row, CLIPS) for row in clustered(400, correlation=0.4, seed=2)]
    assert np.mean(found) == pytest.approx(0.4, abs=0.03)


def test_correlation_equals_a_hand_computation():
    # Means 1 and 4 around 2.2: MSB = 3 * 1.44 + 2 * 3.24 = 10.8; MSW = (2 + 2) / 3; n0 = 5 - 13 / 5 = 2.4
    assert intra_cluster_correlation([0, 1, 2, 3, 5], list("xxxyy")) == pytest.approx(
        (10.8 - 4 / 3) / (10.8 + 1.4 * 4 / 3)
    )


def test_correlation_is_undefined_without_pairs_and_one_clip_weighs_like_one_image():
    assert intra_cluster_correlation([0.1, 0.2, 0.3], [1, 2, 3]) is None
    alone = sample_weights(score_set({"a": [0.1, 0.2, 0.3]}))["a"]
    assert alone.correlation is None and alone.effective_size == 3
    one_clip = sample_weights(score_set({"a": [0.1, 0.2, 0.3]}, clusters=["x"] * 3))["a"]
    assert one_clip.correlation is None and one_clip.effective_size == 1


def test_mean_rows_show_both_intervals_and_what_the_images_weigh():
    scores = score_set(named(clustered(1, correlation=0.5)), clusters=CLIPS)
    (row,) = mean_rows(scores)
    assert (row["images"], row["clusters"], row["seeds"]) == (612, 29, 1)
    assert row["mean_high"] - row["mean_low"] > 2.5 * (row["image_high"] - row["image_low"])
    assert row["effective_size"] == pytest.approx(612 / row["design_effect"]) and 30 < row["effective_size"] < 110
