"""Memory of a pretraining run over 100,000 generated frames in tar shards: it must not grow with the images.

python benchmarks/pretraining_memory.py --folder /tmp/polypseg-memory

Draws frames, shards them with `polypseg data shard`, trains a small MAE for one epoch and prints the process's memory
at every tenth of it. Read the last line.
"""

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import psutil
from accelerate import Accelerator
from tqdm import tqdm
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data.corpus import open_frames
from polypseg.data.shards import write_shards
from polypseg.pretraining.loop import build_method, pretrain
from polypseg.pretraining.recipe import load_pretraining_recipe

OVERRIDES = [
    "encoder=test_vit",
    "data.image_size=32",
    "mae.decoder_width=16",
    "mae.decoder_depth=1",
    "mae.decoder_heads=2",
    "training.epochs=1",
    "training.total_batch_size=500",
    "training.checkpoint_steps=1000",
    "optimiser.warmup_epochs=0",
]


def draw_frames(folder: Path, *, count: int) -> None:
    """``count`` different JPEG frames of 64x48 pixels, a thousand a folder."""
    rng = np.random.default_rng(0)
    for index in tqdm(range(count), desc="drawing frames", unit="frame", mininterval=5):
        path = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blobs = rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(blobs, (64, 48), interpolation=cv2.INTER_CUBIC))


def main(
    folder: Annotated[Path, Option(help="Working folder; frames and shards that are there are used again.")],
    count: Annotated[int, Option(min=1000, help="Frames.")] = 100_000,
) -> None:
    """Memory of a pretraining run over generated frames in tar shards."""
    if not (folder / "frames").is_dir():
        draw_frames(folder / "frames", count=count)
    write_shards(open_frames(folder / "frames"), folder / "shards")
    recipe = load_pretraining_recipe("pretrain_mae_small", overrides=OVERRIDES)
    accelerator = Accelerator(log_with="tensorboard", project_dir=folder / "run")
    process, samples = psutil.Process(), []

    class Watched(type(accelerator)):  # type: ignore[misc]
        """Notes the memory whenever the loop logs."""

        def log(self, values: dict[str, object], step: int | None = None, **rest: object) -> None:
            samples.append(process.memory_info().rss / 2**20)
            super().log(values, step=step, **rest)

    accelerator.__class__ = Watched
    store = open_frames(folder / "shards")
    progress = pretrain(build_method(recipe), store, recipe, accelerator, run_dir=folder / "run")
    every = max(1, len(samples) // 10)
    for step in range(every - 1, len(samples), every):
        print(f"after {(step + 1) * recipe.training.total_batch_size:7d} frames: {samples[step]:.0f} MB")
    print(
        f"{len(store)} frames in shards, {progress.step} steps; growth over the last nine tenths: "
        f"{samples[-1] - samples[every - 1]:.0f} MB"
    )


if __name__ == "__main__":
    run_script(main)
