"""Keep the reports of finished pretraining runs in the repository, with one table of them all.

python training_scripts/keep_pretraining_reports.py runs/moco_v3_small runs/barlow_twins_small runs/mae_small
"""

import shutil
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.files import atomic_path, read_json, write_text
from polypseg.pretraining.export import render_index


def main(
    runs: Annotated[list[Path], Argument(help="Folders of finished runs of pretrain.py with --labelled.")],
    output: Annotated[Path, Option(help="Folder of the kept reports.")] = Path("docs/pretraining"),
) -> None:
    """Keep the reports of finished pretraining runs in the repository, with one table of them all."""
    for run in runs:
        if not (run / "report" / "representation.json").is_file():
            raise UsageError(f"{run} has no representation report: run pretrain.py with --resume and --labelled")
        name = read_json(run / "run.json")["recipe"]["name"]
        with atomic_path(output / name) as temporary:
            shutil.copytree(run / "report", temporary)
            for record in ("run.json", "losses.csv"):
                shutil.copy(run / record, temporary / record)
    print(write_text(output / "README.md", render_index(output)))


if __name__ == "__main__":
    run_script(main)
