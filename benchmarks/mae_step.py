"""What a MAE step costs, against a forward and backward pass of the same encoder over all patches.

python benchmarks/mae_step.py --encoder vit_base_patch16_224 --batch-size 8

The sides alternate within one run; figures are medians over repeats, and the ratios may be quoted.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
from typer import Option

from polypseg.cli.console import run_script
from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.mae import MAE


def main(
    encoder: Annotated[str, Option(help="timm ViT.")] = "vit_base_patch16_224",
    image_size: Annotated[int, Option(min=32, help="Side in pixels.")] = 224,
    batch_size: Annotated[int, Option(min=1, help="Images a step.")] = 8,
    repeats: Annotated[int, Option(min=1, help="Repeats, alternating.")] = 5,
    decoder_width: Annotated[int, Option(help="Of MAE's decoder; 512 in the paper.")] = 512,
    decoder_depth: Annotated[int, Option(help="Blocks of MAE's decoder; 8 in the paper.")] = 8,
) -> None:
    """What a MAE step costs, against a forward and backward pass of the same encoder over all patches."""
    torch.manual_seed(0)
    heads = decoder_width // 32
    method = MAE(
        build_encoder(encoder),
        image_size=image_size,
        decoder_width=decoder_width,
        decoder_depth=decoder_depth,
        decoder_heads=heads,
    ).train()
    images = torch.randn(batch_size, 3, image_size, image_size)
    noise = torch.rand(batch_size, method.patches)

    def whole() -> None:
        method.encoder(images).mean().backward()

    def visible() -> None:
        method.encode(images, noise)[0].mean().backward()

    def step() -> None:
        method(images[:, None], noise).loss.backward()

    sides: dict[str, Callable[[], None]] = {
        "encoder, all patches": whole,
        "encoder, kept patches": visible,
        "MAE step (encoder and decoder)": step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            method.zero_grad(set_to_none=True)
            start = time.perf_counter()
            side()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    baseline = statistics.median(seconds["encoder, all patches"])
    print(f"{encoder}, {image_size} px, batch {batch_size}, forward and backward, {torch.get_num_threads()} thread(s)")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:32} {median:7.2f} s ({spread})  ratio {median / baseline:.2f}")


if __name__ == "__main__":
    run_script(main)
