"""Render model_cards/*.md from the table of models and their results, docs/metric_conventions.md, and README's table.

python training_scripts/render_cards.py
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.cli.console import run_script
from polypseg.evaluation.conventions import conventions_markdown
from polypseg.files import write_text
from polypseg.hub.model_card import write_pages
from polypseg.hub.page_texts import page_texts, put_between
from polypseg.provenance.fetch import ORGANIZATION


def main(
    organization: Annotated[
        str, Option("--organisation", help="Owner of the models in the usage examples.")
    ] = ORGANIZATION,
) -> None:
    """Render model_cards/*.md from the table of models and the results, and docs/metric_conventions.md."""
    root = Path(__file__).resolve().parents[1]
    pages = write_pages(root / "model_cards", organization=organization)
    print(f"{len(pages)} files in {root / 'model_cards'}")
    print(write_text(root / "docs" / "metric_conventions.md", conventions_markdown()))
    for page, marks, text in page_texts(root):
        print(put_between(page, marks, text))


if __name__ == "__main__":
    run_script(main)
