"""Evaluate any semantic segmentation model on a part of a dataset, at the masks' own size.

python training_scripts/evaluate.py --model runs/rn-in-sl/best --dataset cvc_clinicdb --split full --part full
"""

import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from polypseg.cli import run_script
from polypseg.data import open_dataset
from polypseg.errors import UsageError
from polypseg.evaluation import evaluate_model
from polypseg.metrics import METRICS
from polypseg.processing import default_device, load_model, results_name


def main(
    model: Annotated[str, Option(help="Folder or Hub id of any AutoModelForSemanticSegmentation.")],
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")],
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "full",
    part: Annotated[str, Option(help="Part of the split.")] = "full",
    output: Annotated[Path, Option(help="Folder of results.")] = Path("results"),
    model_id: Annotated[str | None, Option(help="Name in the results; default: the recorded id.")] = None,
    convention: Annotated[str, Option(help="Metric formulas: standard, or ssl4gie as the reference.")] = "standard",
    batch_size: Annotated[int, Option(min=1, help="Images per forward pass.")] = 8,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of the dataset.")] = False,
    revision: Annotated[str | None, Option(help="Commit of a Hub model; with its own code, all 40 digits.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run code from the Hub repo.")] = False,
) -> None:
    """Evaluate any semantic segmentation model on a part of a dataset."""
    data = open_dataset(dataset, source=source, allow_partial=allow_partial)
    pinned = Path(model).is_dir() or (revision and re.fullmatch(r"[0-9a-f]{40}", revision))
    if trust_remote_code and not pinned:
        raise UsageError("code from the Hub is run at a full commit only: give --revision with its 40 digits")
    network, processor = load_model(model, revision=revision, trust_remote_code=trust_remote_code)
    result = evaluate_model(
        network,
        processor,
        data,
        model_id=model_id or results_name(network.config, model),
        split=split,
        part=part,
        limit=limit,
        batch_size=batch_size,
        convention=convention,
        device=default_device(),
    )
    path = result.write(output)
    for name in METRICS:
        value = result.summary()[name]
        interval = "" if value["low"] is None else f"  [{value['low']:.4f}, {value['high']:.4f}]"
        typer.echo(f"m{name:<10} {value['mean']:.4f}{interval}")
    typer.echo(f"n = {len(result.ids)}; every image is in {path}")


if __name__ == "__main__":
    run_script(main)
