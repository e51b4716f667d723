"""Render model_cards/*.md from the table of models and the results in model_cards/results.

python training_scripts/render_cards.py
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.cards import write_pages
from polypseg.cli import run_script
from polypseg.hub import ORGANISATION


def main(
    organisation: Annotated[str, Option(help="Owner of the models in the usage examples.")] = ORGANISATION,
) -> None:
    """Render model_cards/*.md from the table of models and the results."""
    folder = Path(__file__).resolve().parents[1] / "model_cards"
    print(f"{len(write_pages(folder, organisation=organisation))} files in {folder}")


if __name__ == "__main__":
    run_script(main)
