"""Learn a model's expected Dice, margin and operating point, and write them into its folder and onto its page.

python training_scripts/fit_expectation.py src/polypseg/starter --page docs/estimate.md
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli import run_script
from polypseg.provenance.local import STARTER_FOLDER


def main(
    model: Annotated[Path, Argument(help="Model folder with an ONNX file.")] = STARTER_FOLDER,
    data: Annotated[Path | None, Option(envvar="POLYPSEG_DATA", help="Folder of the datasets.")] = None,
    cache: Annotated[Path, Option(help="Folder of measured cells; a second call continues.")] = Path(
        "runs/expectation"
    ),
) -> None:
    """Measure cells."""
    from polypseg.expectation.fit import gather

    cells = gather(model, data_dir=data, cache=cache, echo=typer.echo)
    typer.echo(f"{len(cells)} cells, {sum(len(cell.rows) for cell in cells)} frames")


if __name__ == "__main__":
    run_script(main)
