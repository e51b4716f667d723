"""``polypseg study --grid``: from what was typed to the work."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from polypseg.arguments import named_mask_values, named_places
from polypseg.data.polyps import open_dataset
from polypseg.errors import unknown_name
from polypseg.grid.cost import cost_table, plan_cost
from polypseg.grid.schema import load_grid
from polypseg.grid.tasks import GridData, grid_tasks
from polypseg.grid.work import run_grid
from polypseg.suite import suite_datasets


def fill_grid(
    name: str,
    *,
    output: Path,
    dataset: str,
    source: Path | None,
    mask_values: Sequence[str],
    split: str,
    frames: Sequence[str],
    tests: Sequence[str],
    negatives: Path | None,
    allow_partial: bool,
    only_plan: bool,
) -> None:
    """Print what is left of a grid and its cost, and do it unless ``only_plan``.

    ``mask_values``: ``in=VALUES`` of the training set, ``DATASET=VALUES`` of a test set.

    Raises UsageError for a wrong grid, corpus or dataset before any work.
    """
    grid = load_grid(name)
    corpora = named_places(frames, option="--frames", form="CORPUS=PATH")
    for corpus in corpora:
        if corpus not in grid.corpora:
            raise unknown_name("corpus", corpus, grid.corpora)
    values = named_mask_values(mask_values, names=("in", *suite_datasets()))
    data = GridData(
        output=output,
        training=open_dataset(dataset, source=source, allow_partial=allow_partial, mask_values=values.pop("in", None)),
        split=split,
        corpora=corpora,
        tests=named_places(tests, option="--test-source", form="DATASET=PATH"),
        mask_values=values,
        negatives=negatives,
    )
    console = Console()
    waiting = [task for task in grid_tasks(grid, data) if not task.is_done()]
    if waiting:
        console.print(cost_table(plan_cost(waiting)))
    if not only_plan:
        run_grid(grid, data, console=console)
