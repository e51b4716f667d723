"""Draw the per-image Dice distributions of one model's results, in and out of distribution.

python training_scripts/plot_results.py \
    --results model_cards/results/tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Option

from polypseg import plots
from polypseg.artifacts import read_json
from polypseg.cli import run_script
from polypseg.errors import UsageError


def main(results: Annotated[Path, Option(help="Folder with one model's result files.")]) -> None:
    """Draw the per-image Dice distributions of one model's results."""
    contents = [read_json(path) for path in sorted(results.glob("*.json"), reverse=True)]
    if not contents:
        raise UsageError(f"no results in {results}: run training_scripts/evaluate.py first")
    model_id = contents[0]["model_id"]
    titles = [f"{c['dataset']['title']}, {c['dataset']['split']} {c['dataset']['part']}" for c in contents]
    means = [f"{c['metrics']['dice']['mean']:.3f}" for c in contents]
    plots.plot_dice_distributions(
        {model_id: [np.array([image["dice"] for image in c["images"]]) for c in contents]},
        labels={model_id: "small model"},
        titles=titles,
        note=f"{model_id}: a small model, none of the twelve; one seed. Mean Dice {' and '.join(means)}.",
        path=results / "dice_distributions.png",
    )
    print(results / "dice_distributions.png")


if __name__ == "__main__":
    run_script(main)
