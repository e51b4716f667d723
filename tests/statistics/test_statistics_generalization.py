"""Gaps and contrasts: recovered, covered, and surer where models share the images."""

import numpy as np
import pytest

from polypseg import zoo
from polypseg.errors import UsageError
from polypseg.statistics import (
    analyze_generalization,
    analyze_rank_change,
    generalization_gaps,
    group_contrasts,
    mean_intervals,
    score_set,
    study_groups,
)

CLIPS = np.repeat(range(30), [8] * 15 + [20] * 15)


def two_sets(rng, inside_means, outside_means, *, noise=0.05):
    """Sets of 100 images and of 30 clips in which the models share the images' difficulty."""
    names = [f"m{i}" for i in range(len(inside_means))]
    easy = rng.normal(scale=0.15, size=100)
    hard = rng.normal(scale=0.15, size=30)[CLIPS] + rng.normal(scale=0.15, size=len(CLIPS))
    inside = {n: m + easy + rng.normal(scale=noise, size=100) for n, m in zip(names, inside_means, strict=True)}
    outside = {
        n: m + hard + rng.normal(scale=noise, size=len(CLIPS)) for n, m in zip(names, outside_means, strict=True)
    }
    return score_set(inside), score_set(outside, clusters=CLIPS.tolist())


def test_gap_is_inside_minus_outside_and_relative_to_inside():
    inside, outside = score_set({"a": [0.8, 0.9, 0.7]}), score_set({"a": [0.6, 0.5, 0.7, 0.6]})
    (gap,) = generalization_gaps(inside, outside)
    assert gap.gap.estimate == pytest.approx(0.2) and gap.relative.estimate == pytest.approx(0.25)
    assert gap.inside.low < 0.8 < gap.inside.high and gap.relative.low < 0.25 < gap.relative.high
    row = gap.row()
    assert (
        row["model"] == "a" and row["gap_low"] < 0.2 < row["gap_high"] and row["relative_gap"] == gap.relative.estimate
    )


def test_gap_interval_adds_the_variances_of_both_sets():
    rng = np.random.default_rng(0)
    values = [rng.normal(0.8, 0.1, size=400), rng.normal(0.6, 0.2, size=300)]
    (gap,) = generalization_gaps(*(score_set({"a": v}) for v in values), resamples=20_000)
    error = np.sqrt(sum(v.var(ddof=1) / len(v) for v in values))
    assert gap.gap.high - gap.gap.low == pytest.approx(2 * 1.96 * error, rel=0.03)


def test_gap_of_a_model_tested_twice_on_the_same_scores_is_zero_but_not_certain():
    """The sets are drawn independently: equal scores in both are chance, not the same images."""
    scores = score_set({"a": np.random.default_rng(0).random(50)})
    (gap,) = generalization_gaps(scores, scores)
    assert gap.gap.estimate == 0 and gap.gap.low < -0.05 and gap.gap.high > 0.05


@pytest.mark.slow
def test_gap_and_contrast_cover_the_truth_in_95_of_100_cases():
    rng = np.random.default_rng(1)
    inside_means, outside_means = np.array([0.9, 0.88, 0.86, 0.84]), np.array([0.6, 0.62, 0.7, 0.72])
    groups = {"late - early": (("m2", "m3"), ("m0", "m1"))}
    gaps = contrasts = 0
    for case in range(150):
        sets = two_sets(rng, inside_means, outside_means)
        first = generalization_gaps(*sets, resamples=1000, seed=case)[0].gap
        gaps += first.low <= 0.3 <= first.high
        (contrast,) = group_contrasts(*sets, groups, resamples=1000, seed=case)
        contrasts += contrast.gap.low <= -0.14 <= contrast.gap.high
    assert 0.89 < gaps / 150 < 0.995
    assert 0.89 < contrasts / 150 < 0.995


def test_a_set_has_the_same_interval_alone_and_beside_another():
    rng = np.random.default_rng(5)
    inside = score_set({"a": rng.random(40), "b": rng.random(40)}, title="in")
    outside = score_set({"a": rng.random(60), "b": rng.random(60)}, title="out")
    for gap in generalization_gaps(inside, outside):
        for beside, scores in ((gap.inside, inside), (gap.outside, outside)):
            alone = mean_intervals(scores)[gap.model]
            assert (beside.low, beside.high) == pytest.approx((alone.low, alone.high), abs=1e-12)


def test_contrast_is_surer_than_its_groups_because_they_share_the_images():
    sets = two_sets(np.random.default_rng(2), [0.9, 0.9], [0.6, 0.7], noise=0.02)
    (contrast,) = group_contrasts(*sets, {"x": (("m1",), ("m0",))})
    gap = generalization_gaps(*sets)[0].gap
    assert contrast.gap.high - contrast.gap.low < (gap.high - gap.low) / 4
    assert contrast.gap.high < 0 and contrast.outside.low > 0.05  # the first group loses less
    assert contrast.row()["models_a"] == 1 and contrast.row()["gap"] == pytest.approx(contrast.gap.estimate)


def test_contrast_of_identical_groups_is_zero():
    values = np.random.default_rng(0).random((2, 40))
    sets = [score_set({"a": v, "b": v}) for v in values]
    (contrast,) = group_contrasts(*sets, {"x": (("a",), ("b",))})
    for interval in (contrast.inside, contrast.outside, contrast.gap):
        assert (interval.estimate, interval.low, interval.high) == pytest.approx((0, 0, 0), abs=1e-12)
        assert not interval.excludes_zero


def test_several_seeds_are_the_same_networks_in_both_sets():
    """A network that is better by as much in both sets has no part in the gap's uncertainty."""
    rng = np.random.default_rng(3)
    offsets = np.array([-0.1, 0.0, 0.1])[:, None]
    sets = [score_set({"a": mean + offsets + rng.normal(scale=0.001, size=100)}) for mean in (0.9, 0.6)]
    (gap,) = generalization_gaps(*sets)
    assert gap.inside.high - gap.inside.low > 0.1 and gap.gap.high - gap.gap.low < 0.002


def test_relative_gap_is_left_out_where_it_has_no_meaning():
    (gap,) = generalization_gaps(score_set({"a": [0.0, 0.0, 0.3]}), score_set({"a": [0.1, 0.2]}))
    assert gap.relative is None and gap.row()["relative_gap"] is None and gap.row()["relative_gap_low"] is None


def test_one_clip_gives_no_interval_of_the_gap():
    outside = score_set({"a": [0.1, 0.5]}, clusters=["x", "x"])
    (gap,) = generalization_gaps(score_set({"a": [0.8, 0.9]}), outside)
    assert gap.gap.estimate == pytest.approx(0.55) and gap.gap.low is None and gap.inside.low is not None


def test_group_contrasts_refuse_wrong_groups_and_sets():
    sets = two_sets(np.random.default_rng(0), [0.9, 0.8], [0.6, 0.7])
    for groups in (((), ("m0",)), (("m0", "m1"), ("m1",))):
        with pytest.raises(UsageError, match="'x' needs two groups"):
            group_contrasts(*sets, {"x": groups})
    with pytest.raises(UsageError, match="unknown model 'm7'"):
        group_contrasts(*sets, {"x": (("m7",), ("m0",))})
    with pytest.raises(ValueError, match="same models and seeds"):
        generalization_gaps(sets[0], score_set({"other": [0.1, 0.2]}))


def test_study_groups_divide_the_twelve_rows_by_the_studys_questions():
    groups = study_groups([entry.model_id for entry in zoo.ZOO])
    assert {name: tuple(map(len, sides)) for name, sides in groups.items()} == {
        "ViT-B - ResNet50": (6, 6),
        "self-supervised - supervised, ImageNet-1k": (4, 2),
        "ImageNet-1k - Hyperkvasir, self-supervised": (4, 4),
        "pretrained - random": (10, 2),
    }
    assert all(model.startswith("vit") for model in groups["ViT-B - ResNet50"][0])
    only_resnets = [entry.model_id for entry in zoo.ZOO if entry.encoder == "resnet50"]
    assert "ViT-B - ResNet50" not in study_groups(only_resnets)


def test_generalization_is_the_gaps_and_the_change_of_ranking_of_two_models_or_more():
    inside, outside = two_sets(np.random.default_rng(4), [0.9, 0.8], [0.6, 0.7])
    found = analyze_generalization(inside, outside, resamples=300, seed=2)
    assert list(found.gaps) == generalization_gaps(inside, outside, resamples=300, seed=2)
    assert found.change.content() == analyze_rank_change(inside, outside, resamples=300, seed=2).content()
    one = score_set({"a": [0.8, 0.9, 0.7]})
    alone = analyze_generalization(one, one, resamples=300)
    assert alone.change is None and [gap.model for gap in alone.gaps] == ["a"]
