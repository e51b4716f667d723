"""Commands that score: any source of predictions by every metric convention, and published pairs of numbers."""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from polypseg.predictions import PredictionSource


def evaluate(
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")],
    model: Annotated[str | None, Option(help="Model folder, Hub id, or id of the table.")] = None,
    predictions: Annotated[
        Path | None, Option(help="Folder or archive of predicted masks or probability maps, named as the images.")
    ] = None,
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "full",
    part: Annotated[str, Option(help="Part of the split.")] = "full",
    convention: Annotated[list[str] | None, Option(help="A convention; repeat for several. Default: all.")] = None,
    allow_missing: Annotated[bool, Option("--allow-missing", help="Count images without file as empty.")] = False,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    output: Annotated[Path, Option(help="Folder of results.")] = Path("results"),
) -> None:
    """Score a model, or anybody's predicted masks, by every metric convention by name, from one pass."""
    from rich.table import Table

    from polypseg.cli import print_whole
    from polypseg.conventions import CONVENTIONS, choose_conventions
    from polypseg.data import open_dataset
    from polypseg.errors import UsageError
    from polypseg.scoring import score_predictions

    if (model is None) == (predictions is None):
        raise UsageError("give either --model or --predictions")
    names = tuple(convention or CONVENTIONS)
    choose_conventions(names)
    data = open_dataset(dataset, source=source)
    chosen = _source(model, predictions, allow_missing=allow_missing)
    result = score_predictions(chosen, data, split=split, part=part, conventions=names, limit=limit)
    table = Table("convention", "score", "mean", "95 % interval", "n", title=f"{result.name}: {result.title}")
    for name, scores in result.summary().items():
        for score, value in scores.items():
            bounds = "" if value["low"] is None else f"{value['low']:.4f} to {value['high']:.4f}"
            mean = "not defined" if value["mean"] is None else f"{value['mean']:.4f}"
            table.add_row(name, score, mean, bounds, str(value["n"]))
    print_whole(table)
    print(f"definitions, intervals and every image: {result.write(output)}")


def _source(model: str | None, predictions: Path | None, *, allow_missing: bool) -> "PredictionSource":
    from polypseg.prediction_files import FilePredictions
    from polypseg.predictions import ModelPredictions

    if predictions is not None:
        return FilePredictions(path=predictions, allow_missing=allow_missing)
    from polypseg.hub import load
    from polypseg.processing import default_device, results_name

    segmenter = load(str(model))
    return ModelPredictions(
        name=results_name(segmenter.model.config, str(model)),
        model=segmenter.model,
        processor=segmenter.processor,
        device=default_device(),
    )


def diagnose(
    dice: Annotated[str, Argument(help="Published Dice with all its digits, as fraction or percent.")],
    iou: Annotated[str, Argument(help="Published IoU of the same experiment.")],
    n: Annotated[int | None, Option("--images", "-n", min=1, help="Number of test images.")] = None,
) -> None:
    """Say which metric conventions a published pair of Dice and IoU can come from."""
    from polypseg.diagnose import diagnose as examine

    numbers = [_number(text) for text in (dice, iou)]
    # One unit of the last digit that both numbers have covers rounding as well as cutting off.
    digits = min(-int(number.as_tuple().exponent) for number in numbers)
    found = examine(float(numbers[0]), float(numbers[1]), n, tolerance=10.0**-digits)
    print(f"{found.verdict}: {found.words}")
    print(f"possible conventions: {', '.join(found.possible) or 'none'}")


def _number(text: str) -> Decimal:
    from polypseg.errors import UsageError

    try:
        return Decimal(text.strip().rstrip("%"))
    except InvalidOperation:
        raise UsageError(f"{text!r} is not a number: give it as published, such as 0.8231 or 82.31") from None
