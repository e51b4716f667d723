"""``polypseg study --grid``: from what was typed to the work."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from polypseg.data.polyps import open_dataset
from polypseg.errors import UsageError, unknown_name
from polypseg.grid.cost import cost_table, plan_cost
from polypseg.grid.schema import Grid, load_grid
from polypseg.grid.tasks import GridData, grid_tasks
from polypseg.grid.work import run_grid


def fill_grid(
    name: str,
    *,
    output: Path,
    dataset: str,
    source: Path | None,
    split: str,
    frames: Sequence[str],
    allow_partial: bool,
    only_plan: bool,
) -> None:
    """Print what is left of a grid and its cost, and do it unless ``only_plan``.

    Raises UsageError for a wrong grid, corpus or dataset before any work.
    """
    grid = load_grid(name)
    data = GridData(
        output=output,
        training=open_dataset(dataset, source=source, allow_partial=allow_partial),
        split=split,
        corpora=_places(grid, frames),
    )
    console = Console()
    waiting = [task for task in grid_tasks(grid, data) if not task.is_done()]
    if waiting:
        console.print(cost_table(plan_cost(waiting)))
    if not only_plan:
        run_grid(grid, data, console=console)


def _places(grid: Grid, frames: Sequence[str]) -> dict[str, Path]:
    """``CORPUS=PATH`` pairs as a table."""
    places = {}
    for pair in frames:
        corpus, separator, path = pair.partition("=")
        if not separator or not path:
            raise UsageError(f"--frames {pair!r} must look like CORPUS=PATH")
        if corpus not in grid.corpora:
            raise unknown_name("corpus", corpus, grid.corpora)
        places[corpus] = Path(path)
    return places
