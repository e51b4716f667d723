"""Evaluate any semantic segmentation model on a part of a dataset, at the masks' own size; leaves a receipt.

python training_scripts/evaluate.py --model runs/rn-in-sl/best --dataset cvc_clinicdb --split full --part full
"""

import re
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from polypseg.console import reported

with reported():  # of a Ctrl-C too, in the seconds that these take
    from polypseg.arguments import MaskValuesOption
    from polypseg.artifacts import sole_writer
    from polypseg.card_facts import cell_of, scores_of, seen_words, size_of
    from polypseg.cli import run_script
    from polypseg.data import open_dataset
    from polypseg.errors import UsageError, unknown_name
    from polypseg.evaluate_commands import Seen
    from polypseg.hub import fetch
    from polypseg.metrics import METRICS
    from polypseg.passport import kept_manifest, name_partial
    from polypseg.predictions import ModelPredictions
    from polypseg.processing import default_device, load_model, results_name
    from polypseg.provenance.local import local_folder
    from polypseg.receipts import read_receipt
    from polypseg.suite import SuitePlan, score_images

CONVENTIONS = {"standard": ("paper",), "ssl4gie": ("paper", "ssl4gie")}
"""Value of --convention -> conventions of the receipt."""


def main(
    model: Annotated[str, Option(help="Folder or Hub id of any AutoModelForSemanticSegmentation.")],
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")],
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    mask_values: MaskValuesOption = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "full",
    part: Annotated[str, Option(help="Part of the split.")] = "full",
    output: Annotated[Path, Option(help="Folder of results.")] = Path("results"),
    model_id: Annotated[str | None, Option(help="Name in the results; default: the recorded id.")] = None,
    convention: Annotated[
        str, Option(help="Metric formulas: standard, or ssl4gie for the reference's too.")
    ] = "standard",
    seen: Annotated[
        Seen, Option(help="Test images that the model's passport lists: refuse the test, report or exclude them.")
    ] = Seen.refuse,
    batch_size: Annotated[int, Option(min=1, help="Images per forward pass.")] = 8,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of the dataset.")] = False,
    revision: Annotated[str | None, Option(help="Commit of a Hub model; with its own code, all 40 digits.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run code from the Hub repo.")] = False,
) -> None:
    """Evaluate any semantic segmentation model on a part of a dataset and write a receipt."""
    if convention not in CONVENTIONS:
        raise unknown_name("metric convention", convention, CONVENTIONS)
    data = open_dataset(dataset, source=source, allow_partial=allow_partial, mask_values=mask_values)
    manifest = name_partial(kept_manifest(data, split=split, part=part, limit=limit), data)
    folder = local_folder(model)
    if trust_remote_code and folder is None and not (revision and re.fullmatch(r"[0-9a-f]{40}", revision)):
        raise UsageError("code from the Hub is run at a full commit only: give --revision with its 40 digits")
    network, processor = load_model(str(folder or model), revision=revision, trust_remote_code=trust_remote_code)
    predictions = ModelPredictions(
        name=model_id or results_name(network.config, model),
        model=network,
        processor=processor,
        batch_size=batch_size,
        device=default_device(),
    )
    with sole_writer(output / predictions.name):
        result = score_images(
            predictions,
            SuitePlan(output=output, conventions=CONVENTIONS[convention], rule=seen.value),
            data,
            manifest,
            model_folder=folder or fetch(model, revision=revision),
        )
        path = result.write(output)
    content = read_receipt(path)
    for name in METRICS:
        typer.echo(f"m{name:<10} {cell_of(scores_of(content)[name])}")
    typer.echo(f"n = {size_of(content)}; {seen_words(content)}")
    typer.echo(f"every image is in {path}")


if __name__ == "__main__":
    run_script(main)
