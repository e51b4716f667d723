"""docs/full_study.md: every command parses as its program would parse it, and the batch scripts start what they say."""

import csv
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from PIL import Image
from torch import nn

from polypseg.cli.app import app
from polypseg.cli.options import named_values
from polypseg.data.catalog import DATASETS, get_spec
from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.recipe import load_recipe
from polypseg.study.cells import grid_cells
from polypseg.study.schema import scale_grid
from polypseg.study.tasks import FinetuneTask
from polypseg.zoo import ZOO, get

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "full_study.md").read_text()
SLURM = REPOSITORY / "hub_configs" / "slurm"


def page_commands() -> list[str]:
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].split("    #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = page_commands()


@cache
def load_module(path: Path) -> ModuleType:
    name = f"script_{path.stem}"  # `evaluate` is a package of its own
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_script(words: list[str]) -> dict[str, Any]:
    """What a training script's own parser makes of its arguments."""
    script = typer.Typer()
    module = load_module(REPOSITORY / words[0])
    script.command()(getattr(module, Path(words[0]).stem))
    return typer.main.get_command(script).make_context(words[0], words[1:]).params


def parse_polypseg(words: list[str]) -> dict[str, Any]:
    """What the command's own parser makes of its arguments."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("polypseg", words).params


def parse_launch(words: list[str]) -> Namespace:
    """What ``accelerate launch`` makes of its arguments, with its config file."""
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return launch


def finetuning_commands() -> dict[str, dict[str, Any]]:
    lines = [line for line in COMMANDS if "training_scripts/finetune.py" in line]
    found = [parse_script(words[words.index("training_scripts/finetune.py") :]) for words in map(shlex.split, lines)]
    return {get(params["model"]).model_id: params for params in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses_and_names_what_exists(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command)
    if words[0] == "accelerate":
        launch = parse_launch(words[2:])
        params = parse_script([launch.training_script, *launch.training_script_args])
        assert params["num_processes"] in (None, launch.num_processes)
    elif words[0] == "sbatch":
        assert (REPOSITORY / words[1]).is_file()
        script = re.search(r"run_and_requeue (\S+\.py)", Path(words[1]).read_text())
        given = [] if "pretrain" in words[1] else ["--model", "RN-HK-MC", "--output", "x"]
        params = parse_script([script[1], *words[2:], *given])
    else:
        params = parse_script(words[1:]) if words[0] == "python" else parse_polypseg(words[1:])
    if "frames" in params and params.get("recipe"):
        batch = load_pretraining_recipe(params["recipe"], overrides=params["set_"] or []).training.total_batch_size
        assert batch % (params["num_processes"] or 1) == 0
    for key in ("dataset", "in_distribution", "out_of_distribution"):
        if isinstance(params.get(key), str):
            get_spec(params[key])


def test_there_are_four_pretraining_and_twelve_finetuning_commands():
    recipes = {word for line in COMMANDS for word in line.split() if word.startswith("pretrain_")}
    table = load_module(REPOSITORY / "benchmarks" / "study_cost.py")
    assert recipes == set(table.PRETRAINING)
    assert sorted(finetuning_commands()) == sorted(entry.model_id for entry in ZOO)


def test_pretraining_writes_the_encoders_that_finetuning_reads():
    made = set()
    for line in COMMANDS:
        words = shlex.split(line)
        if "training_scripts/pretrain.py" in words or "hub_configs/slurm/pretrain.sbatch" in words:
            output, recipe = (words[words.index(option) + 1] for option in ("--output", "--recipe"))
            entry = get(Path(output).name)
            assert recipe == f"pretrain_{entry.method}_{entry.encoder}" and entry.corpus == "hyperkvasir"
            made.add(f"{output}/encoder/model.safetensors")
        elif words[:2] == ["polypseg", "convert"]:
            made.add(f"{words[words.index('--output') + 1]}/model.safetensors")
    read = {params["encoder_weights"] for params in finetuning_commands().values()}
    assert made == {weights for weights in read if weights.startswith("runs/")}


def test_table_of_encoders_is_that_of_the_commands():
    rows = re.findall(r"^\| ((?:RN|VT)-\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert [(get(short).model_id, model) for short, model, _ in rows] == [(e.model_id, e.model_id) for e in ZOO]
    commands = finetuning_commands()
    assert {model: weights for _, model, weights in rows} == {m: p["encoder_weights"] for m, p in commands.items()}


def test_study_continues_from_the_finetuning_runs():
    """It looks for just these folders, recipes and encoders."""
    line = next(line for line in COMMANDS if line.startswith("polypseg study"))
    params = parse_polypseg(shlex.split(line)[1:])
    weights = named_values(params["encoder_weights"], option="--encoder-weights")
    grid = scale_grid(params["scale"], encoder_weights=weights)
    runs = finetuning_commands()
    for cell in grid_cells(grid):
        run = runs[cell.entry.model_id]
        task: Any = FinetuneTask(grid=grid, cell=cell, seed=None, data=SimpleNamespace(output=params["output"]))  # type: ignore[arg-type]
        assert not cell.lacks_weights and task.encoder_weights() == run["encoder_weights"]
        assert run["output"] == task.folder
        assert task.recipe == load_recipe(run["recipe"])
        assert (run["dataset"], run["split"]) == (params["in_distribution"], params["split"])


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "hub_configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.name
)
def test_accelerate_config_is_one_for_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no" and config.num_processes >= config.num_machines
    assert parse_launch(["--config_file", str(path), "x.py"]).num_processes == config.num_processes


# -- cost ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    return load_module(REPOSITORY / "benchmarks" / "study_cost.py")


def kept_rows() -> list[dict[str, str]]:
    with (REPOSITORY / "docs" / "full_study_cost.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_cost_table_has_the_steps_and_images_of_the_recipes():
    corpus = DATASETS["hyperkvasir_unlabelled"].count
    rows = kept_rows()
    assert len(rows) == 6
    for row in rows:
        finetuning = row["recipe"].startswith("finetune,")
        recipe = load_recipe("finetune") if finetuning else load_pretraining_recipe(row["recipe"])
        batch, epochs = recipe.training.total_batch_size, recipe.training.epochs
        steps = epochs * ((800 if finetuning else corpus) // batch)
        assert (int(row["steps"]), int(row["batch"]), int(row["images"])) == (steps, batch, steps * batch)
        flops = float(row["gflops_per_image"]) * 1e9 * steps * batch
        for bound, share in (("low", 0.20), ("high", 0.05)):
            assert float(row[f"a100_hours_{bound}"]) == pytest.approx(
                flops / (312e12 * share) / 3600, rel=5e-3, abs=0.01
            )


def test_page_shows_the_cost_table(costs):
    assert costs.cost_markdown(kept_rows()) in PAGE


@pytest.mark.slow
def test_cost_of_finetuning_a_resnet_recomputes(costs):
    name = "finetune, ResNet50 + DeepLabV3+"
    kept = next(row for row in kept_rows() if row["recipe"] == name)
    module, inputs, _ = costs._full_size(name)
    flops, _ = costs._run_empty(module, inputs, images=2, half=True)
    assert flops / 2 / 1e9 == pytest.approx(float(kept["gflops_per_image"]), abs=0.06)


def test_counter_knows_the_groups_of_a_convolution(costs):
    """Forward, gradient of the weights, and for the second layer gradient of its input, by hand."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, images: torch.Tensor) -> Namespace:
            return Namespace(loss=self.second(self.first(images)).sum())

    cost = costs.pass_cost(Pair(), lambda _, n: {"images": torch.randn(n, 3, 16, 16)}, half=False)
    first, second = 2 * 256 * 3 * 8, 2 * 256 * 8 * 9
    assert cost.flops == 2 * first + 3 * second
    assert cost.kept_bytes == 4 * 256 * (3 + 8)


@pytest.mark.slow
def test_flops_of_a_masked_autoencoder_are_those_of_its_matrices(costs):
    method = MAE(build_encoder("test_vit"), image_size=64, decoder_width=32, decoder_depth=1, decoder_heads=2)
    cost = costs.pass_cost(method, lambda m, n: costs.view_inputs(m, n, size=64), half=False)

    def matrices(module: nn.Module, tokens: int) -> int:
        """Forward and backward pass of every linear layer."""
        return 3 * 2 * tokens * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

    def attention(tokens: int, width: int) -> int:
        """Two products forward; four backward and the scores once more."""
        return (2 + 5) * 2 * tokens * tokens * width

    encoder, seen, painted = method.encoder, method.kept + 1, method.patches + 1
    expected = (
        2 * 2 * method.patches * encoder.patch_embed.proj.weight.numel()  # images need no gradient
        + matrices(encoder, seen)
        + len(encoder.blocks) * attention(seen, encoder.embed_dim)
        + matrices(method.decoder_embed, seen)
        + matrices(method.decoder_blocks, painted)
        + attention(painted, 32)
        + matrices(method.decoder_pred, painted)
    )
    assert cost.flops == expected


# -- Slurm ----------------------------------------------------------------------------------------------------

FAKES = {
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        steps=()
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & steps+=($!); done
        status=0
        for step in "${steps[@]}"; do wait "$step" || status=$?; done
        exit "$status"
    """,
    "scontrol": """
        if [[ $1 == show ]]; then printf '127.0.0.1\\nother\\n'; else echo "$*" >>"$FAKES/scontrol.log"; fi
    """,
    "accelerate": 'printf "%s\\n" "$*" >>"$FAKES/accelerate.log"',
}


def fake_cluster(folder: Path, *names: str, **variables: str) -> dict[str, str]:
    """An environment in which the named programs of a cluster are stand-ins that run things here."""
    for name in names:
        path = folder / name
        path.write_text(f"#!/bin/bash\n{FAKES[name]}")
        path.chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NNODES": "2", "GPUS_ON_NODE": "4", "CPUS_PER_TASK": "64"}
    paths = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    cluster = {f"SLURM_{key}": value for key, value in slurm.items()}
    return {**os.environ, **cluster, "PATH": paths, "FAKES": str(folder), "TMPDIR": str(folder), **variables}


def batch(script: str, *options: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = ["bash", f"hub_configs/slurm/{script}", *options]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=240)


def launched(folder: Path) -> list[tuple[Namespace, dict[str, Any]]]:
    """Each started launcher, and what the training script understands of its arguments."""
    found = []
    for line in sorted((folder / "accelerate.log").read_text().splitlines()):
        launch = parse_launch(shlex.split(line)[1:])
        assert [launch.training_script, *launch.training_script_args[:1]] == ["bash", "hub_configs/slurm/process.sh"]
        assert launch.no_python
        found.append((launch, parse_script(launch.training_script_args[1:])))
    return found


@pytest.mark.parametrize("path", sorted(SLURM.iterdir()), ids=lambda p: p.name)
def test_batch_script_is_sound(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC1091", path], check=True)


def test_pretraining_job_starts_one_launcher_a_node(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    env = fake_cluster(tmp_path, "srun", "scontrol", "accelerate")
    options = ["--recipe", "pretrain_mae_vit_base", "--frames", "shards", "--output", "run"]
    result = batch("pretrain.sbatch", *options, env=env)
    assert result.returncode == 0, result.stderr
    started = launched(tmp_path)
    assert [launch.machine_rank for launch, _ in started] == [0, 1]
    for launch, params in started:
        assert (launch.num_machines, launch.num_processes, launch.multi_gpu) == (2, 8, True)
        assert (launch.main_process_ip, launch.main_process_port) == ("127.0.0.1", 20007)
        assert (params["recipe"], params["output"]) == ("pretrain_mae_vit_base", Path("run"))
        assert (params["resume"], params["workers"], params["num_processes"]) == (True, 15, 8)
    assert not (tmp_path / "scontrol.log").exists()


def test_array_job_takes_row_and_encoder_from_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    alone = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "8"}
    places = {"ENCODERS": str(tmp_path / "encoders"), "STUDY": "study"}
    env = fake_cluster(tmp_path, "srun", "scontrol", "accelerate", **alone, **places)
    file = tmp_path / "encoders" / "RN-HK-MC" / "encoder" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    for task, weights in ((0, str(file)), (4, "timm:resnet50.tv_in1k"), (5, "random")):
        (tmp_path / "accelerate.log").unlink(missing_ok=True)
        result = batch("finetune_array.sbatch", "--dataset", "kvasir_seg", env=env | {"SLURM_ARRAY_TASK_ID": str(task)})
        assert result.returncode == 0, result.stderr
        ((launch, params),) = launched(tmp_path)
        assert (launch.num_processes, bool(launch.multi_gpu)) == (1, False)
        assert (params["model"], params["encoder_weights"]) == (ZOO[task].model_id, weights)
        assert (params["output"], params["workers"]) == (Path("study/runs") / ZOO[task].model_id, 7)
    missing = batch("finetune_array.sbatch", env=env | {"SLURM_ARRAY_TASK_ID": "2"})
    assert missing.returncode == 2 and "RN-IN-MC" in missing.stderr


def test_array_covers_the_table():
    assert f"#SBATCH --array=0-{len(ZOO) - 1}\n" in (SLURM / "finetune_array.sbatch").read_text()


@pytest.mark.skipif("POLYPSEG_LONG" not in os.environ, reason="six launches: `make test-long` runs it")
@pytest.mark.slow
def test_job_saves_requeues_and_continues_on_two_nodes(tmp_path):
    """Two launchers of one process, with data workers, as on two nodes; SIGUSR1, as before a time limit."""
    rng = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    for number in range(16):
        frame = rng.integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.jpg")
    here = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "2"}
    env = fake_cluster(tmp_path, "srun", "scontrol", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", **here)
    settings = ["encoder=test_resnet", "data.image_size=32", "training.total_batch_size=4", "training.epochs=4"]
    settings += ["training.checkpoint_steps=1", "moco_v3.hidden_width=16", "moco_v3.output_width=8"]
    options = [word for setting in settings for word in ("--set", setting)]
    options += ["--recipe", "pretrain_moco_v3_small", "--frames", f"{tmp_path}/frames", "--output", f"{tmp_path}/run"]
    command = ["bash", "hub_configs/slurm/pretrain.sbatch", *options]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None and not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            time.sleep(0.05)
        job.send_signal(10)  # SIGUSR1
        assert job.wait(240) != 0
    said = (tmp_path / "log").read_text()
    step = re.search(r"error: interrupted at step (\d+); continue with --resume", said)
    assert step and int(step[1]) < 16, said[-2000:]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {here['SLURM_JOB_ID']}\n"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{int(step[1]):08d}"]
    again = batch("pretrain.sbatch", *options, env=env)
    assert again.returncode == 0, again.stderr[-2000:]
    assert len((tmp_path / "run" / "losses.csv").read_text().splitlines()) == 1 + 16
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
    assert len((tmp_path / "scontrol.log").read_text().splitlines()) == 1
