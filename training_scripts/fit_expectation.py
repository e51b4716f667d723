"""Learn a model's expected Dice, margin and operating point; write them into its folder and onto the page of docs.

python training_scripts/fit_expectation.py src/polypseg/starter --page docs/estimate.md --measured docs/estimate

``--only-page`` renders what was learned before; ``--only-point`` chooses the operating point anew.
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.files import read_json, write_text
from polypseg.inference.expected import EXPECTATION
from polypseg.inference.operating_point import OPERATING_POINT
from polypseg.provenance.local import STARTER_FOLDER


def main(
    model: Annotated[Path, Argument(help="Model folder with an ONNX file.")] = STARTER_FOLDER,
    data: Annotated[Path | None, Option(envvar="POLYPSEG_DATA", help="Folder of the datasets.")] = None,
    cache: Annotated[Path, Option(help="Folder of measured cells; a second call continues.")] = Path(
        "runs/expectation"
    ),
    page: Annotated[Path | None, Option(help="Also render the page of what was learned.")] = None,
    measured: Annotated[Path | None, Option(help="With --page: folder of measured adaptations and time.")] = None,
    only_point: Annotated[bool, Option("--only-point", help="Choose the operating point anew, nothing else.")] = False,
    only_page: Annotated[bool, Option("--only-page", help="Learn nothing: render the page.")] = False,
) -> None:
    """Measure the model under many conditions, learn what to expect of it, and check that on what was held out."""
    from polypseg.expectation.fit import learn_model, learn_model_point
    from polypseg.expectation.page import render_page

    if page is None and (only_page or measured is not None):
        raise UsageError("say with --page where the page is to be written")
    if only_point and only_page:
        raise UsageError("give either --only-point or --only-page")
    learned, point = model / EXPECTATION, model / OPERATING_POINT
    if only_point:
        typer.echo(learn_model_point(model, data_dir=data, echo=typer.echo))
    elif not only_page:
        learned, point = learn_model(model, data_dir=data, cache=cache, echo=typer.echo)
        typer.echo(f"{learned}\n{point}")
    if page is not None:
        typer.echo(write_text(page, render_page(read_json(learned), read_json(point), measured=measured)))


if __name__ == "__main__":
    run_script(main)
