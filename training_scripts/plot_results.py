"""Draw the per-image Dice distributions of one model's receipts, in and out of distribution.

python training_scripts/plot_results.py \
    --results model_cards/results/tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Option

from polypseg import plotting
from polypseg.cli.console import run_script
from polypseg.evaluation.receipt_reading import CONVENTION, no_results, read_results, scores_of


def main(results: Annotated[Path, Option(help="Folder with one model's receipts.")]) -> None:
    """Draw the per-image Dice distributions of one model's results."""
    contents = read_results(results)[::-1]
    if not contents:
        raise no_results(results)
    name = contents[0]["name"]
    titles = [f"{c['dataset']['title']}, {c['dataset']['split']} {c['dataset']['part']}" for c in contents]
    means = [f"{scores_of(c)['dice']['mean']:.3f}" for c in contents]
    plotting.plot_dice_distributions(
        {name: [np.array([image[f"{CONVENTION}.dice"] for image in c["images"]]) for c in contents]},
        labels={name: "small model"},
        titles=titles,
        note=f"{name}: a small model, none of the twelve; one seed. Mean Dice {' and '.join(means)}.",
        path=results / "dice_distributions.png",
    )
    print(results / "dice_distributions.png")


if __name__ == "__main__":
    run_script(main)
