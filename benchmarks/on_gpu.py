"""Forward passes and training steps of the full-size rows on a GPU, against the reference's way in float32.

python benchmarks/on_gpu.py

Before: eager, channels first, float32. Without a GPU there is nothing to measure; `bench.py --full` includes it where
there is one. Whether training holds there: training_scripts/gpu_check.sh.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch.optim import AdamW
from typer import Option

from polypseg import zoo
from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

SIZE = 224
MODELS = ("RN-NA-NA", "VT-NA-NA")
WAYS: dict[str, torch.dtype | None] = {BASELINE: None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Way -> what autocast rounds to, None for float32."""


def predicting(model_id: str, dtype: torch.dtype | None, *, batch: int, device: str) -> Callable[[], object]:
    """Forward passes of one batch of noise, each waited for."""
    layout: Any = torch.contiguous_format if dtype is None else torch.channels_last
    model = build_model(zoo.get(model_id), load_recipe("finetune")).eval().to(device).to(memory_format=layout)
    pixels = torch.randn(batch, 3, SIZE, SIZE, device=device).to(memory_format=layout)

    def predict() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            model(pixel_values=pixels).logits.float().cpu()

    return predict


def stepping(model_id: str, dtype: torch.dtype | None, *, batch: int, device: str) -> Callable[[], object]:
    """Steps of fine-tuning on one batch of noise, each waited for; gradients are scaled in fp16."""
    recipe = load_recipe("finetune")
    layout: Any = torch.contiguous_format if dtype is None else torch.channels_last
    model = build_model(zoo.get(model_id), recipe).train().to(device).to(memory_format=layout)
    pixels = torch.randn(batch, 3, SIZE, SIZE, device=device).to(memory_format=layout)
    labels = (torch.rand(batch, SIZE, SIZE, device=device) > 0.9).float()
    rate, decay = recipe.training.learning_rate, recipe.training.weight_decay
    optimizer = AdamW(model.parameters(), lr=rate, weight_decay=decay, fused=dtype is not None)
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = model(pixel_values=pixels, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def rows(
    *,
    repeats: int = 5,
    batch: int = 48,
    models: Sequence[str] = MODELS,
    ways: Sequence[str] = tuple(WAYS),
    device: str = "cuda",
) -> list[Row]:
    """Both jobs of each row, in each of the ways; none where there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    name = torch.cuda.get_device_name() if device == "cuda" else device
    found = []
    for model_id in models:
        for job, made in (("forward pass", predicting), ("a step of fine-tuning", stepping)):
            timed = {way: made(model_id, WAYS[way], batch=batch, device=device) for way in ways}
            found += side_by_side(f"{job} of {model_id}, {batch} images, on {name}", timed, repeats=repeats)
    return found


def main(
    batch: Annotated[int, Option(help="Images a pass.", min=2)] = 48,
    repeats: Annotated[int, Option(help="Repeats, alternating.", min=2)] = 5,
) -> None:
    """Time forward passes and training steps on a GPU."""
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here: benchmarks/inference.py and benchmarks/training_step.py measure CPUs")
    neighbors = Neighbors()
    print(show(rows(batch=batch, repeats=repeats), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
