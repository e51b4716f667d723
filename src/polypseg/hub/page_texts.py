"""What README and docs say between two marks each, rendered from receipts and records that lie in the repository."""

from pathlib import Path

from polypseg.files import write_text
from polypseg.hub.export import RESULTS
from polypseg.hub.full_size_tables import finished_text, in_training_text
from polypseg.hub.precision_tables import precision_text
from polypseg.hub.starter_tables import (
    averages_table,
    exports_table,
    flicker_table,
    robustness_table,
    runs_table,
    search_table,
    shift_table,
    starter_table,
)
from polypseg.provenance.local import STARTER_FOLDER

STARTER_MARKS = ("<!-- starter -->", "<!-- /starter -->")
RUNS_MARKS = ("<!-- runs -->", "<!-- /runs -->")
AVERAGES_MARKS = ("<!-- averages -->", "<!-- /averages -->")
SEARCH_MARKS = ("<!-- search -->", "<!-- /search -->")
ROBUSTNESS_MARKS = ("<!-- robustness -->", "<!-- /robustness -->")
SHIFT_MARKS = ("<!-- shift -->", "<!-- /shift -->")
FLICKER_MARKS = ("<!-- flicker -->", "<!-- /flicker -->")
FINISHED_MARKS = ("<!-- full size -->", "<!-- /full size -->")
IN_TRAINING_MARKS = ("<!-- in training -->", "<!-- /in training -->")
PRECISION_MARKS = ("<!-- precision -->", "<!-- /precision -->")
EXPORTS_MARKS = ("<!-- exports -->", "<!-- /exports -->")
"""Between two marks of a page stands the text that these functions render."""


def put_between(page: Path, marks: tuple[str, str], text: str) -> Path:
    """Put a text between two marks of a page and return its path."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    after = rest.partition(marks[1])[2]
    return write_text(page, f"{before}{marks[0]}\n{text}\n{marks[1]}{after}")


def page_texts(root: Path) -> list[tuple[Path, tuple[str, str], str]]:
    """Page, marks and text of everything that README and docs/results.md of a clone say of what was trained."""
    readme, results, kept = root / "README.md", root / "docs" / "results.md", root / "docs" / "starter"
    scores = starter_table(STARTER_FOLDER / RESULTS)
    texts = [(readme, STARTER_MARKS, scores), (results, STARTER_MARKS, scores), (results, RUNS_MARKS, runs_table(kept))]
    for marks, name, table in (
        (AVERAGES_MARKS, "averages.json", averages_table),
        (ROBUSTNESS_MARKS, "robustness.json", robustness_table),
        (SHIFT_MARKS, "attribution.json", shift_table),
        (FLICKER_MARKS, "flicker.csv", flicker_table),
    ):
        if (kept / name).is_file():
            texts.append((results, marks, table(kept / name)))
    if (kept / "search").is_dir():
        texts.append((results, SEARCH_MARKS, search_table(kept / "search")))
    if any(kept.glob("exports.*.json")):
        texts.append((results, EXPORTS_MARKS, exports_table(kept)))
    full_size = root / "docs" / "full_size"
    texts.append((results, IN_TRAINING_MARKS, in_training_text(full_size)))
    finished = finished_text(
        full_size,
        results=root / "model_cards" / "results",
        small=root / "docs" / "study" / "twelve_small_files" / "gaps.json",
    )
    texts.append((results, FINISHED_MARKS, finished))
    texts.append((results, PRECISION_MARKS, precision_text(root / "docs" / "precision")))
    return texts
