"""Draw the per-image Dice distributions of one model's receipts, in and out of distribution, and a run's course.

python training_scripts/plot_results.py \
    --results model_cards/results/tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k
python training_scripts/plot_results.py --epochs docs/full_size/RN-NA-NA.100/epochs.csv
python training_scripts/plot_results.py --epochs model_cards/results/resnet50_deeplabv3plus.random/epochs.csv \
    --curve-folder docs/full_size/RN-NA-NA
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg import plotting
from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.evaluation.receipt_reading import no_results, read_results, tested_on
from polypseg.hub.card_facts import read_epochs
from polypseg.hub.full_size_tables import CURVE


def main(
    results: Annotated[Path | None, Option(help="Folder with one model's receipts.")] = None,
    epochs: Annotated[Path | None, Option(help="epochs.csv of a run, for its learning curve.")] = None,
    curve_folder: Annotated[Path | None, Option(help="Where the curve goes; default: beside epochs.csv.")] = None,
) -> None:
    """Draw the per-image Dice distributions of one model's results, and a run's learning curve."""
    if results is None and epochs is None:
        raise UsageError("nothing to draw: give --results or --epochs")
    if results is not None:
        print(draw_distributions(results))
    if epochs is not None:
        print(draw_course(epochs, folder=curve_folder or epochs.parent))


def draw_course(epochs: Path, *, folder: Path) -> Path:
    """The learning curve of a run in ``folder``, by whose name it is called. Raises UsageError where there is none."""
    rows = read_epochs(epochs)
    if not rows:
        raise UsageError(f"{epochs} holds no epochs: give the epochs.csv of a run")
    loss, dice, rates = ([float(row[key]) for row in rows] for key in ("loss", "validation_dice", "learning_rate"))
    return plotting.plot_learning_curve(
        loss=loss,
        dice=dice,
        rates=rates,
        title=f"{folder.stem}, {len(rows)} epochs",
        note="Mean Dice of the validation part after each epoch; one run.",
        path=folder / CURVE,
    )


def draw_distributions(results: Path) -> Path:
    """Dice of every image on each test that has polyps. Raises UsageError for a folder without receipts."""
    receipts = [receipt for receipt in read_results(results)[::-1] if not receipt.without_polyps]
    if not receipts:
        raise no_results(results)
    name, origin = receipts[0].name, receipts[0].origin
    kind = "full size" if origin.full_size else "small model"
    means = " and ".join(f"{receipt.mean_dice:.3f}" for receipt in receipts)
    of = "" if origin.full_size else " a small model, none of the twelve;"
    return plotting.plot_dice_distributions(
        {name: [receipt.per_image("dice") for receipt in receipts]},
        labels={name: kind},
        titles=[tested_on(receipt) for receipt in receipts],
        note=f"{name}:{of} one seed. Mean Dice {means}.",
        path=results / "dice_distributions.png",
    )


if __name__ == "__main__":
    run_script(main)
