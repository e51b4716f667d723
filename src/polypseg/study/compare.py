"""A study at a scale: train and test the rows that a grid lists on two sets, then compare them in one report."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from polypseg.data.catalog import is_synthetic_name
from polypseg.data.polyps import SyntheticOptions, open_dataset
from polypseg.files import bundled_folder, sole_writer
from polypseg.provenance.origin import describe_start
from polypseg.recipe import changes_from_bundled
from polypseg.report.comparison import ComparedSet, write_comparison
from polypseg.study.cells import grid_cells
from polypseg.study.schema import Grid
from polypseg.study.tasks import CompareTask, FinetuneTask, GridData, Task, grid_tasks
from polypseg.study.workers import claims_folder, work_together


def open_sets(
    grid: Grid,
    *,
    output: Path,
    split: str = "reference",
    sources: tuple[Path | None, Path | None] = (None, None),
    mask_values: Mapping[str, str] | None = None,
) -> GridData:
    """The two sets of a grid's comparison. Raises the errors of ``open_dataset``.

    ``sources``: where they lie; ``mask_values``: ``in`` and ``out`` -> which values of their masks are polyp.
    """
    assert grid.comparison is not None, "of a grid that compares"
    plan, values = grid.comparison, mask_values or {}
    drawn = SyntheticOptions(count=plan.synthetic_frames, size=plan.synthetic_size)
    how: dict[str, Any] = {"synthetic_options": drawn, "allow_partial": plan.allow_partial}
    inside = open_dataset(plan.in_distribution, source=sources[0], mask_values=values.get("in"), **how)
    outside = open_dataset(plan.out_of_distribution, source=sources[1], mask_values=values.get("out"), **how)
    return GridData(output=output, training=inside, split=split, elsewhere=outside)


def run_study(
    grid: Grid,
    *,
    output: Path,
    split: str = "reference",
    sources: tuple[Path | None, Path | None] = (None, None),
    mask_values: Mapping[str, str] | None = None,
    workers: int = 1,
) -> Path:
    """Run a grid that compares to its report; return the report's path. A second call continues an interrupted study.

    Places and values as for ``open_sets``; ``workers``: processes of this machine that share the rows and its cores.
    Raises UsageError for a wrong grid or several launched processes, and whatever training and evaluation raise.
    """
    grid_cells(grid)  # what is wrong fails here or at the tasks, before any work
    data = open_sets(grid, output=output, split=split, sources=sources, mask_values=mask_values)
    tasks = grid_tasks(grid, data)
    with sole_writer(output):
        return _run(grid, data, tasks, workers=workers)


def _run(grid: Grid, data: GridData, tasks: list[Task], *, workers: int) -> Path:
    console = Console()
    _print_plan(grid, tasks, console=console)
    claims = claims_folder(data)
    shutil.rmtree(claims, ignore_errors=True)  # of a killed study: nobody else writes here
    work_together(grid, data, tasks, console=console, workers=workers)
    shutil.rmtree(claims, ignore_errors=True)
    compared = [task for task in tasks if isinstance(task, CompareTask)]
    report = write_comparison(
        {task.trained.label: task.receipts() for task in compared},
        [ComparedSet(dataset=test.dataset, masks=test.masks) for test in compared[0].tests],
        results=compared[0].results,
        output=data.output,
        scale=grid.name,
        grid=grid.model_dump(mode="json"),
        console=console,
    )
    console.print(
        f"\nmodels:  {data.output / 'runs'}\nfigures: {data.output / 'figures'}\nreport:  {report}\n"
        f"next:    {next_step(grid, compared[0].trained, report)}",
        soft_wrap=True,
        highlight=False,
    )
    return report


def _print_plan(grid: Grid, tasks: list[Task], *, console: Console) -> None:
    """What differs from the bundled grid, and what each row starts from."""
    changes = changes_from_bundled(grid, folder=bundled_folder("grids"))
    told = f" with {', '.join(changes)}" if changes else ""
    console.print(f"grid {grid.name}{told}", highlight=False, soft_wrap=True, markup=False)
    for task in tasks:
        if isinstance(task, FinetuneTask):
            start = describe_start(task.cell.entry, task.start_record())
            console.print(f"{task.label}  start: {start}", highlight=False, soft_wrap=True, markup=False)


def next_step(grid: Grid, first: FinetuneTask, report: Path) -> str:
    """What to do after this study, in one line; ``first``: the first of its rows."""
    opened = f"open {report} in a browser; then "
    if grid.comparison is not None and is_synthetic_name(grid.comparison.in_distribution):
        return opened + (
            "do the same on real frames: `polypseg data list` says where they are, and `polypseg study --scale small "
            "--in-distribution kvasir_seg --out-of-distribution cvc_clinicdb --output runs/small` continues"
        )
    return opened + f"outline your own frames: `polypseg segment FRAMES --model {first.folder / 'best'} --output masks`"
