"""``polypseg study --grid``: from what was typed to the work."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from polypseg.data.polyps import open_dataset
from polypseg.errors import UsageError, unknown_name
from polypseg.grid.cost import cost_table, plan_cost
from polypseg.grid.schema import load_grid
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
    tests: Sequence[str],
    negatives: Path | None,
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
        corpora=named_places(frames, option="--frames", known=grid.corpora),
        tests=named_places(tests, option="--test-source"),
        negatives=negatives,
    )
    console = Console()
    waiting = [task for task in grid_tasks(grid, data) if not task.is_done()]
    if waiting:
        console.print(cost_table(plan_cost(waiting)))
    if not only_plan:
        run_grid(grid, data, console=console)


def named_places(pairs: Sequence[str], *, option: str, known: Iterable[str] | None = None) -> dict[str, Path]:
    """``NAME=PATH`` arguments as a table. Raises UsageError for another form and a name that is not ``known``."""
    places = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise UsageError(f"{option} {pair!r} must look like NAME=PATH")
        if known is not None and name not in known:
            raise unknown_name(f"name in {option}:", name, known)
        places[name] = Path(path)
    return places
