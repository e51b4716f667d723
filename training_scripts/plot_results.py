"""Draw the per-image Dice distributions of one model's receipts, in and out of distribution.

python training_scripts/plot_results.py \
    --results model_cards/results/tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg import plotting
from polypseg.cli.console import run_script
from polypseg.evaluation.receipt_reading import no_results, read_results


def main(results: Annotated[Path, Option(help="Folder with one model's receipts.")]) -> None:
    """Draw the per-image Dice distributions of one model's results."""
    receipts = read_results(results)[::-1]
    if not receipts:
        raise no_results(results)
    name = receipts[0].name
    titles = [f"{r.dataset.title}, {r.dataset.split} {r.dataset.part}" for r in receipts]
    means = [f"{receipt.mean_dice:.3f}" for receipt in receipts]
    plotting.plot_dice_distributions(
        {name: [receipt.per_image("dice") for receipt in receipts]},
        labels={name: "small model"},
        titles=titles,
        note=f"{name}: a small model, none of the twelve; one seed. Mean Dice {' and '.join(means)}.",
        path=results / "dice_distributions.png",
    )
    print(results / "dice_distributions.png")


if __name__ == "__main__":
    run_script(main)
