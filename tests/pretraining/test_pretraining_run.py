"""Pretraining runs: what they leave, resuming to the same result, several processes, what they refuse."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import processes
from marks import first_fast
from polypseg import zoo
from polypseg.data.corpus import open_frames
from polypseg.errors import PolypSegError, UsageError
from polypseg.pretraining.export import export_encoder, write_run_report
from polypseg.pretraining.loop import build_method, pretrain
from polypseg.pretraining.probes.labeled import load_labeled
from polypseg.pretraining.recipe import RECIPES, load_pretraining_recipe, parse_pretraining_recipe
from polypseg.recipe import load_recipe, recipe_folder
from polypseg.training.finetune import build_model

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED = sorted(path.stem for path in recipe_folder().glob("pretrain_*.yaml"))
TINY = ["data.image_size=64", "training.total_batch_size=8", "training.epochs=2", "training.checkpoint_steps=100"]
METHODS = {
    "moco_v3": ["encoder=test_resnet", "moco_v3.hidden_width=32", "moco_v3.output_width=16"],
    "barlow_twins": ["encoder=test_resnet", "barlow_twins.projector_width=32"],
    "mae": ["encoder=test_vit", "mae.decoder_width=16", "mae.decoder_depth=1", "mae.decoder_heads=2"],
    "supervised": ["encoder=test_resnet", "supervised.classes=2"],
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """Forty frames in two classes."""
    folder = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for index in range(40):
        path = folder / ("bright" if index % 2 else "dark") / f"{index:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        level = 60 if index % 2 == 0 else 160
        noise = rng.integers(0, 80, size=(12, 14, 3), dtype=np.uint8) + np.uint8(level)
        Image.fromarray(noise).resize((112, 96), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def recipe_of(method: str, *overrides: str):
    return load_pretraining_recipe(f"pretrain_{method}_small", overrides=[*TINY, *METHODS[method], *overrides])


def run(method: str, frames: Path, run_dir: Path, *overrides: str, resume: bool = False, workers: int = 0):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = recipe_of(method, *overrides)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=run_dir)
    network, store = build_method(recipe), open_frames(frames)
    progress = pretrain(network, store, recipe, accelerator, run_dir=run_dir, resume=resume, workers=workers)
    return progress, network, recipe, store


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run_dir / "checkpoints").glob("step-*")) / "model.safetensors")


def command(method: str, frames: Path, output: Path, *more: str) -> list[str]:
    overrides = [word for override in [*TINY, *METHODS[method]] for word in ("--set", override)]
    script = str(REPOSITORY / "training_scripts" / "pretrain.py")
    recipe = f"pretrain_{method}_small"
    return [script, "--recipe", recipe, "--frames", str(frames), "--output", str(output), *overrides, *more]


@pytest.mark.parametrize("method", first_fast(METHODS))
def test_run_leaves_everything_that_explains_it(method, frames, tmp_path):
    progress, network, recipe, store = run(method, frames, tmp_path)
    assert progress.step == 10 and len(progress.losses) == len(progress.spreads) == 10 and progress.epoch == 2
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["recipe"]["method"] == method and record["data"]["frames"] == 40 and record["data"]["content_id"]
    assert record["environment"]["versions"]["torch"] and "git_revision" in record["environment"]
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [float(row["loss"]) for row in rows] == progress.losses
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["images_per_second"] > 0 and 0.1 < cost["peak_memory_gb"] < 20 and cost["processes"] == 1
    path = export_encoder(network, recipe, progress, store, folder=tmp_path / "encoder")
    plain = timm.create_model(recipe.encoder, num_classes=0)
    plain.load_state_dict(load_file(path), strict=True)
    whole = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
    for other in (plain, whole):
        assert all(torch.equal(value, network.encoder.state_dict()[key]) for key, value in other.state_dict().items())
    labeled = load_labeled(frames, image_size=64)
    written = write_run_report(network, recipe, progress, store, folder=tmp_path / "report", labeled=labeled)
    assert all(path.is_file() for path in written) and (tmp_path / "report" / "neighbours.png").is_file()
    assert (tmp_path / "report" / "reconstructions.png").is_file() == (method == "mae")
    numbers = json.loads((tmp_path / "report" / "representation.json").read_text())
    assert numbers["n"] == 40 and numbers["facts"]["seen_in_pretraining"] is True


@pytest.mark.parametrize("method", first_fast(METHODS))
def test_resume_after_sigint_continues_to_the_same_weights(method, frames, tmp_path, monkeypatch):
    run(method, frames, tmp_path / "whole")
    from polypseg.pretraining import loop as module

    original, calls = module._Run._train_step, []

    def step_then_signal(self, batch):
        calls.append(1)
        if len(calls) == 3:
            processes.interrupt()
        return original(self, batch)

    monkeypatch.setattr(module._Run, "_train_step", step_then_signal)
    with pytest.raises(PolypSegError, match="interrupted at step 3; continue with --resume"):
        run(method, frames, tmp_path / "parts")
    torch.manual_seed(7)  # whatever happens between the two
    progress, *_ = run(method, frames, tmp_path / "parts", resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert progress.step == 10 and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert (tmp_path / "whole" / "losses.csv").read_text() == (tmp_path / "parts" / "losses.csv").read_text()


@pytest.mark.slow
def test_sigterm_to_the_whole_process_group_still_saves(frames, tmp_path):
    """As launchers and Slurm send it: the workers that make views hear it too."""
    long = ("--set", "training.epochs=500", "--set", "training.checkpoint_steps=2", "--workers", "1")
    words = [sys.executable, *command("barlow_twins", frames, tmp_path / "run", *long)]
    process = processes.start(words, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "continue with --resume" in errors and "killed by signal" not in errors


@pytest.mark.slow
def test_resume_after_sigkill_continues_to_the_same_weights(frames, tmp_path):
    """The process dies without warning after a checkpoint; the run goes on from it."""
    every = ("--set", "training.checkpoint_steps=2")
    for name in ("whole", "killed"):
        process = processes.start([sys.executable, *command("moco_v3", frames, tmp_path / name, *every)])
        if name == "killed":
            deadline = time.time() + 120
            while not list((tmp_path / name / "checkpoints").glob("step-*")) and time.time() < deadline:
                time.sleep(0.02)
            process.kill()
        process.wait(timeout=200)
    killed_at = max((tmp_path / "killed" / "checkpoints").glob("step-*")).name
    again = [sys.executable, *command("moco_v3", frames, tmp_path / "killed", *every, "--resume")]
    processes.run(again, check=True, timeout=200)
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole), killed_at


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moco_v3", "mae"])
def test_two_processes_give_the_curve_of_one(method, frames, tmp_path):
    """On gloo; float32 rounding grows with the steps: 1e-3 after ten, observed 1e-5."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = command(method, frames, tmp_path / "two", "--num-processes", "2")
    processes.run_together([sys.executable, *two], count=2, env=environment)
    progress, *_ = run(method, frames, tmp_path / "one")
    rows = list(csv.DictReader((tmp_path / "two" / "losses.csv").open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(progress.losses, rel=1e-3)
    assert [float(row["spread"]) for row in rows] == pytest.approx(progress.spreads, rel=1e-2)


@pytest.mark.slow
def test_workers_change_no_result(frames, tmp_path):
    run("moco_v3", frames, tmp_path / "none", "training.epochs=1")
    run("moco_v3", frames, tmp_path / "two", "training.epochs=1", workers=2)
    none, two = weights(tmp_path / "none"), weights(tmp_path / "two")
    assert all(torch.equal(none[key], two[key]) for key in none)


@pytest.mark.slow
def test_accumulation_is_exact_for_mae(frames, tmp_path):
    """Four micro-batches against one batch; float32 sums in another order, and AdamW divides by small numbers."""
    once, *_ = run("mae", frames, tmp_path / "once")
    four, *_ = run("mae", frames, tmp_path / "four", "training.accumulation_steps=4")
    assert four.losses == pytest.approx(once.losses, rel=1e-4)


@pytest.mark.parametrize("method", ["moco_v3", "barlow_twins"])
def test_accumulation_is_refused_where_the_batch_meets_in_the_loss(method):
    with pytest.raises(UsageError, match=f"accumulation_steps must be 1: {method} takes its"):
        recipe_of(method, "training.accumulation_steps=2")


def test_unreadable_frames_are_replaced_counted_and_listed(frames, tmp_path):
    damaged = tmp_path / "frames"
    for path in sorted(frames.rglob("*.jpg")):
        (damaged / path.parent.name).mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        (damaged / path.parent.name / path.name).write_bytes(data[:200] if path.stem == "007" else data)
    progress, *_ = run("mae", damaged, tmp_path / "run", "data.max_unreadable=0.1")
    assert len(progress.unreadable) == 1
    assert json.loads((tmp_path / "run" / "unreadable.json").read_text()) == ["bright/007.jpg"]
    with pytest.raises(PolypSegError, match=r"1 of 40 frames of .* cannot be read, first bright/007.jpg"):
        run("mae", damaged, tmp_path / "strict", "data.max_unreadable=0.01")


def test_collapse_is_reported(frames, tmp_path, monkeypatch, capsys):
    from polypseg.pretraining import loop as module

    monkeypatch.setattr(module, "WARN_EVERY", 5)
    monkeypatch.setattr(module, "embedding_spread", lambda z: torch.tensor(0.001))
    run("barlow_twins", frames, tmp_path)
    assert "warning: the embeddings have collapsed (spread 0.0010 at step 5)" in "".join(capsys.readouterr())


def test_wild_loss_stops_the_run_and_keeps_the_checkpoint(frames, tmp_path):
    wild = ("optimiser.base_learning_rate=1.0e+30", "optimiser.warmup_epochs=0", "training.checkpoint_steps=1")
    with pytest.raises(PolypSegError, match=r"the loss is nan at step .*base_learning_rate"):
        run("mae", frames, tmp_path, *wild)
    assert weights(tmp_path)


def test_another_run_in_the_folder_is_refused(frames, tmp_path):
    run("mae", frames, tmp_path, "training.max_steps=1")
    with pytest.raises(UsageError, match="already holds a run: continue it with --resume"):
        run("mae", frames, tmp_path, "training.max_steps=1")
    with pytest.raises(UsageError, match="holds a run with another recipe"):
        run("mae", frames, tmp_path, "training.max_steps=2", resume=True)


def test_too_large_a_batch_is_refused(frames, tmp_path):
    with pytest.raises(UsageError, match="larger than the training split of 40 images"):
        run("mae", frames, tmp_path, "training.total_batch_size=64")


# -- recipes and hand-over to fine-tuning -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes_load_and_are_restored_from_a_record(name):
    recipe = load_pretraining_recipe(name)
    assert recipe.name == name and recipe.method in RECIPES
    record = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert parse_pretraining_recipe(record, source="run.json") == recipe
    header = (recipe_folder() / f"{name}.yaml").read_text().split("name:")[0]
    assert "hosen here" in header or "this project's choice" in header


def test_recipe_mistakes_are_named():
    for override, message in {
        "method=moco_v2": "unknown method",
        "training.epoch=3": "Did you mean 'training.epochs'",
        "mae.mask_ratio=1.5": "'mae.mask_ratio'",
        "views=[]": "mae takes 1 view",
    }.items():
        with pytest.raises(UsageError, match=message):
            recipe_of("mae", override)
    with pytest.raises(UsageError, match="no key 'method': it is no pretraining recipe"):
        load_pretraining_recipe("finetune")


@pytest.mark.slow
def test_pretrained_encoder_goes_into_the_matching_row_and_no_other(frames, tmp_path):
    progress, network, recipe, store = run("barlow_twins", frames, tmp_path, "training.max_steps=2", "encoder=resnet18")
    path = export_encoder(network, recipe, progress, store, folder=tmp_path / "encoder")
    finetuning = load_recipe("smoke", overrides=["model.encoder=resnet18", "model.decoder_channels=16"])
    model = build_model(zoo.get("RN-HK-BT"), finetuning, encoder_weights=str(path))
    theirs, ours = load_file(path), model.encoder.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    origin = model.config.weights_origin["pretraining"]
    assert (origin["method"], origin["steps"], origin["frames"]) == ("barlow_twins", 2, 40)
    assert len(origin["sha256"]) == 64 and origin["content_id"] == store.content_id
    with pytest.raises(UsageError, match="pretrained with barlow_twins, but RN-HK-MC stands for moco_v3"):
        build_model(zoo.get("RN-HK-MC"), finetuning, encoder_weights=str(path))


def test_supervised_pretraining_refuses_another_number_of_classes(frames, tmp_path):
    with pytest.raises(UsageError, match="has 2 classes, not 3"):
        run("supervised", frames, tmp_path / "run", "supervised.classes=3")


@pytest.mark.slow
def test_supervised_pretraining_learns_the_labels(frames, tmp_path):
    longer = ("training.epochs=8", "optimiser.base_learning_rate=0.05", "supervised.label_smoothing=0.0")
    progress, *_ = run("supervised", frames, tmp_path / "run", *longer)
    assert np.mean(progress.losses[-5:]) < 0.35 < 0.5 < np.mean(progress.losses[:3])
