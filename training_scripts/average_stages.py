"""Average a model's weights with those its run began with, by the share that validation frames find best.

python training_scripts/average_stages.py runs/starter-finish/best runs/starter-alarms/best --output runs/averaged
"""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli.console import run_script


def main(
    before: Annotated[Path, Argument(help="Model that the run began with.")],
    after: Annotated[Path, Argument(help="The run's best/ folder.")],
    output: Annotated[Path, Option(help="Folder of the averaged model.")],
    judged: Annotated[Path | None, Option(help="JSON file that receives what each share is worth.")] = None,
    share: Annotated[float | None, Option(help="Of the later weights; default: the best of several.")] = None,
    data: Annotated[Path | None, Option(envvar="POLYPSEG_DATA", help="Folder of the datasets.")] = None,
) -> None:
    """Average two stages of one model's training, judged on validation frames."""
    from polypseg.expectation.averages import average_models, choose_share, judge_shares
    from polypseg.files import write_json

    if share is None:
        found = judge_shares(before, after, data_dir=data, echo=typer.echo)
        if judged is not None:
            write_json(judged, found)
        share = choose_share(found)["share"]
    typer.echo(f"{average_models(before, after, output, share=share)}: {share:.0%} of {after}")


if __name__ == "__main__":
    run_script(main)
