"""Render model_cards/*.md from the table of models and their results, docs/metric_conventions.md, and README's table.

python training_scripts/render_cards.py
"""

from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.cli.console import run_script
from polypseg.evaluation.conventions import conventions_markdown
from polypseg.files import write_text
from polypseg.hub.export import RESULTS
from polypseg.hub.model_card import RUNS_MARKS, STARTER_MARKS, put_between, runs_table, starter_table, write_pages
from polypseg.provenance.fetch import ORGANIZATION
from polypseg.provenance.local import STARTER_FOLDER


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
    results = root / "docs" / "results.md"
    for page in (root / "README.md", results):
        print(put_between(page, STARTER_MARKS, starter_table(STARTER_FOLDER / RESULTS)))
    put_between(results, RUNS_MARKS, runs_table(root / "docs" / "starter"))


if __name__ == "__main__":
    run_script(main)
