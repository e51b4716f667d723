"""Make the shipped model's folder (src/polypseg/starter) from a finished run of the recipe `starter`.

python training_scripts/pack_starter.py runs/starter/best --calibration kvasir_seg
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli.console import run_script
from polypseg.hub.pack import add_results, pack_model
from polypseg.provenance.local import STARTER_FOLDER


def main(
    source: Annotated[Path, Argument(help="The run's best/ folder.")],
    calibration: Annotated[str, Option(help="Training frames of the int8 file: a folder or a dataset.")] = "kvasir_seg",
    output: Annotated[Path, Option(help="Folder to write.")] = STARTER_FOLDER,
    results: Annotated[Path | None, Option(help="Only add the receipts of these weights from this folder.")] = None,
) -> None:
    """Make the folder of the model that ships with the package, or add its results to it."""
    if results is not None:
        typer.echo(f"{output}: {len(add_results(output, results))} receipts of its weights")
        return
    packed = pack_model(source, output, calibration=calibration)
    typer.echo(f"{packed.folder}: {packed.parameters / 1e6:.2f} M parameters, {packed.size / 1e6:.2f} MB of weights")
    for file in packed.files:
        typer.echo("\n".join(file.lines()))


if __name__ == "__main__":
    run_script(main)
