"""What a report may say of trained models: rows by their names, contrasts of what happened, and the noise of runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from polypseg import zoo
from polypseg.report import write_report
from polypseg.report.analysis import Analysis, analyse
from polypseg.report.answer import answer_sentences
from polypseg.report.receipts import parse_test, read_material
from polypseg.statistics import RunVariation, run_variation, study_groups, widened
from polypseg.statistics.intervals import Interval
from receipt_factory import INSIDE, OUTSIDE, SKILLS, TESTS, DrawnDataset, rendered_report, smoke_origin, write_receipt


def write_rows(folder: Path, rows: dict[str, dict | None], *, seeds: tuple[int, ...] = (0,)) -> Path:
    """Receipts of equally skilled rows on both tests; ``rows``: short name -> weights_origin, None for the usual."""
    for name, split, part, count in TESTS:
        for short, origin in rows.items():
            for seed in seeds:
                entry = zoo.get(short)
                write_receipt(
                    folder if len(seeds) == 1 else folder / str(seed),
                    entry,
                    seed=seed,
                    dataset=DrawnDataset(name, min(count, 12)),
                    split=split,
                    part=part,
                    skill=0.8,
                    conventions=("paper",),
                    origin=origin,
                )
    return folder


def analysed(folder: Path) -> Analysis:
    return analyse(read_material(folder, inside=parse_test(INSIDE), outside=parse_test(OUTSIDE)), resamples=200)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The twelve rows as `polypseg study --scale smoke` leaves them: small encoders, all random, one seed each."""
    rows = {row.short_name: smoke_origin(row, seed=42 + k) for k, row in enumerate(zoo.ZOO)}
    rows = {
        name: origin | {"sha256": f"{k:064x}", "row": zoo.get(name).model_id}
        for k, (name, origin) in enumerate(rows.items())
    }
    return write_rows(tmp_path_factory.mktemp("smoke"), rows)


@pytest.fixture(scope="module")
def smoke_analysis(smoke) -> Analysis:
    return analysed(smoke)


def test_twelve_random_rows_keep_twelve_names_and_say_that_they_are_random(smoke_analysis):
    material = smoke_analysis.material
    labels = [material.label(model) for model in material.models]
    assert len(set(labels)) == 12
    assert labels[0] == "resnet18-HK-MC*" and {"resnet18-NA-NA", "vit_tiny-NA-NA"} <= set(labels)
    assert sum(label.endswith("*") for label in labels) == 10


def test_no_contrast_of_pretrainings_between_random_starts(smoke_analysis):
    assert [contrast.name for contrast in smoke_analysis.contrasts] == ["vit_tiny - resnet18"]


def test_rows_of_one_random_start_are_the_repeated_runs_that_measure_the_noise(smoke, smoke_analysis):
    analysis = smoke_analysis
    means = {}
    for path in smoke.rglob("kvasir_seg*.receipt.json"):
        content = json.loads(path.read_text())
        means.setdefault(content["name"][:3], []).append(content["scores_by_cluster"]["paper"]["dice"]["mean"])
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in means.values())
    runs = analysis.runs["inside"]
    assert (runs.runs, runs.groups, runs.freedom) == (12, 2, 10)
    assert runs.deviation == pytest.approx(np.sqrt(squares / 10))


def test_one_run_a_row_claims_nothing_on_the_page(smoke, tmp_path):
    page = write_report(smoke, tmp_path / "o.html", title="S", inside=INSIDE, outside=OUTSIDE, resamples=200)
    text = page.read_text(encoding="utf-8")
    assert (
        "Each row was trained once, so nothing is claimed" in text and "Not claimed: there is one training run" in text
    )
    assert "from 12 runs of 2 recipes" in text and "Rows marked * started at random" in text
    for claim in ("p = ", "p &lt; ", "Yes", 'id="table-pairs"', "flip-probabilities", "rank-probabilities"):
        assert claim not in text[text.index("<body>") : text.index('id="methods"')], claim
    answer = re.search(r'<div class="answer".*?</div>', text, flags=re.DOTALL)
    assert answer is not None and answer[0].count("<p>") == 3
    (record,) = json.loads((tmp_path / "o_files" / "contrasts.json").read_text())
    assert record["seeds"] == 1 and not any(record[f"{which}_shown"] for which in ("inside", "outside", "gap"))


def test_interval_of_a_contrast_with_one_run_holds_the_noise_floor(smoke_analysis):
    (contrast,) = smoke_analysis.contrasts
    floor, value = smoke_analysis.floor("inside", 6, 6), contrast.inside
    assert floor == pytest.approx(smoke_analysis.runs["inside"].floor(6, 6, seeds=1))
    assert value.high - value.estimate > floor < value.estimate - value.low


def test_without_a_repeated_run_a_contrast_has_no_interval_and_the_page_says_why(tmp_path):
    analysis = analysed(write_rows(tmp_path / "r", {"RN-IN-MC": None, "RN-NA-NA": None}))
    (contrast,) = analysis.contrasts
    assert contrast.name == "pretrained - random" and contrast.inside.low is None and not analysis.runs
    assert "was not measured here" in answer_sentences(analysis)[1]


def test_pretrained_rows_are_contrasted_with_random_ones_of_their_own_encoder():
    ids = {name: zoo.get(name).model_id for name in ("RN-IN-MC", "RN-NA-NA", "VT-IN-MA", "VT-IN-SL")}
    groups = study_groups(list(ids.values()), random_starts={ids["VT-IN-MA"]})
    assert groups["pretrained - random"] == (
        (ids["RN-IN-MC"], ids["VT-IN-SL"]),
        (ids["RN-NA-NA"], ids["VT-IN-MA"]),
    )
    assert "self-supervised - supervised, ImageNet-1k" not in groups
    unknown = study_groups(list(ids.values()), unknown_starts={ids["RN-IN-MC"], ids["VT-IN-SL"]})
    assert list(unknown) == ["ViT-B - ResNet50"]


def test_seeds_of_a_row_measure_the_noise_and_it_is_in_the_answer():
    analysis = analysed(rendered_report().parent / "receipts")
    assert (analysis.runs["gap"].runs, analysis.runs["gap"].groups) == (2 * len(SKILLS), len(SKILLS))
    assert analysis.claims
    scores, ranking, contrasts = answer_sentences(analysis)
    assert "Mean Dice is" in scores and "Does the ranking change" in ranking and "contrasts" in contrasts
    assert all(sentence.endswith(".") for sentence in (scores, ranking, contrasts))


# -- the numbers -------------------------------------------------------------------------------------------------------


def test_noise_floor_is_exceeded_by_identical_recipes_in_five_of_a_hundred_cases():
    rng = np.random.default_rng(0)
    exceeded = []
    for means in rng.normal(0.7, 0.02, size=(4000, 6, 2)):  # six rows of two seeds, all the same recipe
        runs = run_variation(means)
        exceeded.append(abs(means[0].mean() - means[1].mean()) > runs.floor(1, 1, seeds=2))
    assert np.mean(exceeded) == pytest.approx(0.05, abs=0.01)


def test_noise_floor_shrinks_with_models_and_seeds():
    runs = RunVariation(deviation=0.01, freedom=10, groups=2, runs=12)
    assert runs.floor(1, 1, seeds=1) == pytest.approx(2.228139 * 0.01 * np.sqrt(2))
    assert runs.floor(4, 4, seeds=2) == pytest.approx(runs.floor(1, 1, seeds=1) / np.sqrt(8))
    assert run_variation([[0.5], [0.7]]) is None


def test_widened_adds_in_quadrature_and_knows_nothing_without_a_floor():
    interval = widened(Interval(estimate=0.5, low=0.47, high=0.54), 0.04)
    assert (interval.low, interval.high) == pytest.approx((0.45, 0.5 + 0.04 * np.sqrt(2)))
    assert widened(interval, None) == Interval(estimate=0.5, low=None, high=None)
