"""One step of fine-tuning a full-size row on CPU, against the reference's step in float32.

OMP_NUM_THREADS=1 python benchmarks/training_step.py

The way before: channels first, float32. The other: the step of ``polypseg finetune``, in bf16 where the CPU
has it. Both in one process, so that the memory which it keeps serves both.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch.optim import AdamW
from typer import Option

from polypseg import zoo
from polypseg.cli.console import run_script
from polypseg.inference.memory import keep_freed_memory
from polypseg.recipe import load_recipe
from polypseg.training.fast_layers import fast_layers
from polypseg.training.finetune import build_model
from polypseg.training.run_folder import usable_precision
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

SIZE = 224


def stepping(model_id: str, *, batch: int, ours: bool) -> Callable[[], object]:
    """Steps on one batch of noise (B, 3, 224, 224) with masks of ones in a tenth of the pixels."""
    torch.manual_seed(0)
    recipe = load_recipe("finetune").training
    layout: Any = torch.channels_last if ours else torch.contiguous_format
    model: Any = build_model(zoo.get(model_id), load_recipe("finetune")).train().to(memory_format=layout)
    pixels = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=layout)
    labels = (torch.rand(batch, SIZE, SIZE) > 0.9).float()
    optimizer = AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=ours)
    lower = ours and usable_precision("bf16", device="cpu") == "bf16"

    def step() -> None:
        with fast_layers(model, bf16=lower, enabled=ours):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
                loss = model(pixel_values=pixels, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rows(*, repeats: int = 5, model_id: str = "RN-NA-NA", batch: int = 16) -> list[Row]:
    """A step as ``polypseg finetune`` makes it, against the reference's."""
    torch.set_num_threads(1)
    keep_freed_memory()
    ways = {name: stepping(model_id, batch=batch, ours=ours) for name, ours in ((BASELINE, False), ("bf16", True))}
    return side_by_side(f"a step of fine-tuning {model_id} on {batch} images", ways, repeats=repeats)


def main(
    model_id: Annotated[str, Option("--model", help="Row of the table.")] = "RN-NA-NA",
    batch: Annotated[int, Option(help="Images a step.", min=2)] = 16,
    repeats: Annotated[int, Option(help="Repeats, alternating.", min=2)] = 5,
) -> None:
    """Time a step of fine-tuning."""
    neighbors = Neighbors()
    print(show(rows(repeats=repeats, model_id=model_id, batch=batch), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
