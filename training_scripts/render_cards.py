"""Render model_cards/*.md from the table of models and their results, and docs/metric_conventions.md.

python training_scripts/render_cards.py
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.artifacts import write_text
from polypseg.cards import write_pages
from polypseg.cli import run_script
from polypseg.conventions import conventions_markdown
from polypseg.hub import ORGANISATION


def main(
    organisation: Annotated[str, Option(help="Owner of the models in the usage examples.")] = ORGANISATION,
) -> None:
    """Render model_cards/*.md from the table of models and the results, and docs/metric_conventions.md."""
    root = Path(__file__).resolve().parents[1]
    pages = write_pages(root / "model_cards", organisation=organisation)
    print(f"{len(pages)} files in {root / 'model_cards'}")
    print(write_text(root / "docs" / "metric_conventions.md", conventions_markdown()))


if __name__ == "__main__":
    run_script(main)
