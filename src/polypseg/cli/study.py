"""Commands of a study: fill it, and render its report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from polypseg.cli.options import (
    NamedMaskValues,
    SourceOption,
    named_mask_values,
    named_places,
    named_values,
    places,
    refuse_options,
    two_places,
)

if TYPE_CHECKING:
    from polypseg.study.schema import Grid


def study(
    output: Annotated[Path, Option(help="Folder of the study; a second call continues it.")],
    scale: Annotated[
        str | None, Option(help="full, small (small encoders) or smoke (minutes on a laptop, the default).")
    ] = None,
    models: Annotated[list[str] | None, Option("--model", help="A row; repeat for several. Default: all.")] = None,
    in_distribution: Annotated[str | None, Option(help="Dataset to train and test on. Default: synthetic_a.")] = None,
    out_of_distribution: Annotated[
        str | None, Option(help="Dataset to test on only. Default: synthetic_b; a grid names its own.")
    ] = None,
    source: SourceOption = None,
    mask_values: NamedMaskValues = None,
    split: Annotated[str, Option(help="Split of the first dataset.")] = "reference",
    set_: Annotated[list[str] | None, Option("--set", help="Recipe override, e.g. training.epochs=2.")] = None,
    encoder_weights: Annotated[
        list[str] | None,
        Option(help="MODEL=WEIGHTS for a row; weights as for `polypseg finetune`. Repeat for several."),
    ] = None,
    start_from_available: Annotated[
        bool, Option("--start-from-available", help="At full scale, start rows without weights at random.")
    ] = False,
    limit: Annotated[int | None, Option(min=1, help="Test on the first N images of each set only.")] = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of a dataset.")] = False,
    grid: Annotated[
        str | None, Option(help="Fill a matrix instead: a grid file, or the name of a bundled one. Run it many times.")
    ] = None,
    frames: Annotated[list[str] | None, Option(help="CORPUS=PATH of a grid's corpus. Repeat for several.")] = None,
    negatives: Annotated[Path | None, Option(help="Folder of frames without polyps, for a grid's tests.")] = None,
    plan: Annotated[bool, Option("--plan", help="Of a grid: print what is left and its cost, and stop.")] = False,
    workers: Annotated[
        int, Option(min=1, help="Processes of this machine that share the rows and its cores; small models gain.")
    ] = 1,
) -> None:
    """Train and evaluate rows of the table on two datasets and write the paper's comparison; or fill a grid."""
    from polypseg.study.schema import load_grid, scale_grid

    of_grids = {"--plan": plan, "--frames": frames, "--negatives": negatives}
    if grid is not None:
        of_scales: dict[str, object] = {
            "--scale": scale,
            "--model": models,
            "--out-of-distribution": out_of_distribution,
            "--set": set_,
        }
        of_scales |= {"--encoder-weights": encoder_weights, "--start-from-available": start_from_available}
        told = "--grid says what is trained and tested"
        refuse_options(of_scales | {"--limit": limit}, because=told)
        chosen = load_grid(grid)
        if chosen.comparison is not None:
            refuse_options({"--in-distribution": in_distribution, "--allow-partial": allow_partial}, because=told)
            refuse_options(of_grids, because=f"it is of a grid without a comparison, and {chosen.name} has one")
            _compare(chosen, output=output, split=split, source=source, mask_values=mask_values, workers=workers)
            return
        _fill_grid(
            chosen,
            output=output,
            dataset=in_distribution or "synthetic_a",
            sources=source,
            mask_values=mask_values,
            split=split,
            frames=named_places(frames, option="--frames", form="CORPUS=PATH"),
            negatives=negatives,
            allow_partial=allow_partial,
            only_plan=plan,
            workers=workers,
        )
        return
    refuse_options(of_grids, because="it is of a grid (--grid)")
    chosen = scale_grid(
        scale or "smoke",
        models=models or (),
        overrides=set_ or (),
        encoder_weights=named_values(encoder_weights, option="--encoder-weights", form="MODEL=WEIGHTS"),
        start_from_available=start_from_available,
        in_distribution=in_distribution,
        out_of_distribution=out_of_distribution,
        limit=limit,
        allow_partial=allow_partial,
    )
    _compare(chosen, output=output, split=split, source=source, mask_values=mask_values, workers=workers)


def _compare(
    grid: "Grid",
    *,
    output: Path,
    split: str,
    source: list[str] | None,
    mask_values: list[str] | None,
    workers: int,
) -> None:
    """Train and test the rows of a grid and write their comparison."""
    from polypseg.errors import UsageError
    from polypseg.study.compare import run_study

    assert grid.comparison is not None
    inside, outside = grid.comparison.in_distribution, grid.comparison.out_of_distribution
    sources = two_places(source, inside, outside)
    if outside == inside and sources[0] == sources[1]:
        raise UsageError(f"a study of {outside} against itself compares nothing: name another --out-of-distribution")
    values = named_mask_values(mask_values, names=("in", "out"))
    run_study(grid, output=output, split=split, sources=sources, mask_values=values, workers=workers)


def _fill_grid(
    grid: "Grid",
    *,
    output: Path,
    dataset: str,
    sources: list[str] | None,
    mask_values: list[str] | None,
    split: str,
    frames: dict[str, Path],
    negatives: Path | None,
    allow_partial: bool,
    only_plan: bool,
    workers: int,
) -> None:
    """Print what is left of a grid and its cost, and do it unless ``only_plan``.

    ``mask_values``: ``in=VALUES`` of the training set, ``DATASET=VALUES`` of a test set.
    """
    from rich.console import Console

    from polypseg.data.catalog import DATASETS
    from polypseg.data.polyps import open_dataset
    from polypseg.errors import unknown_name
    from polypseg.evaluation.suite import suite_datasets
    from polypseg.study.cost import cost_table, plan_cost
    from polypseg.study.tasks import GridData, grid_tasks
    from polypseg.study.workers import run_grid

    for corpus in frames:
        if corpus not in grid.corpora:
            raise unknown_name("corpus", corpus, grid.corpora)
    given = places(sources, datasets=[dataset, *DATASETS])
    values = named_mask_values(mask_values, names=("in", *suite_datasets()))
    how: dict[str, Any] = {"allow_partial": allow_partial, "mask_values": values.pop("in", None)}
    data = GridData(
        output=output,
        training=open_dataset(dataset, source=given.get(dataset), **how),
        split=split,
        corpora=frames,
        tests=given,
        mask_values=values,
        negatives=negatives,
    )
    console = Console()
    waiting = [task for task in grid_tasks(grid, data) if not task.is_done()]
    if waiting:
        console.print(cost_table(plan_cost(waiting)).rich())
    if not only_plan:
        run_grid(grid, data, console=console, workers=workers)


def report(
    receipts: Annotated[Path, Argument(help="Folder of receipts, as `polypseg evaluate --suite` writes them.")],
    output: Annotated[Path, Option(help="The page; figures and tables go beside it.")] = Path("report.html"),
    title: Annotated[str, Option(help="Heading of the page.")] = "Polyp segmentation on another hospital’s data",
    in_distribution: Annotated[
        str, Option(help="Test in distribution, DATASET.SPLIT.PART.")
    ] = "kvasir_seg.reference.test",
    out_of_distribution: Annotated[str, Option(help="Test out of distribution.")] = "cvc_clinicdb.full.full",
    masks: Annotated[
        Path | None, Option(help="Folder of predicted masks, as `evaluate --save-masks` writes them.")
    ] = None,
    source: Annotated[
        list[str] | None, Option(help="NAME=PATH of a dataset, for pictures where its terms allow; repeatable.")
    ] = None,
    mask_values: NamedMaskValues = None,
    shift: Annotated[list[Path] | None, Option(help="JSON file of a shift measurement; repeat for several.")] = None,
    robustness: Annotated[list[Path] | None, Option(help="JSON file of `polypseg robustness`; may repeat.")] = None,
    reading: Annotated[
        Path | None, Option(help="Markdown with your interpretation; its numbers may come from the receipts.")
    ] = None,
) -> None:
    """Render one self-contained HTML page about a study from its receipts."""
    from polypseg.report import write_report

    sources = named_places(source, option="--source", form="NAME=PATH")
    written = write_report(
        receipts,
        output,
        title=title,
        inside=in_distribution,
        outside=out_of_distribution,
        masks=masks,
        sources=sources,
        mask_values=named_mask_values(mask_values, names=sources),
        shift=shift or (),
        robustness=robustness or (),
        reading=reading,
    )
    print(f"report: {written}; figures and tables: {written.with_name(written.stem + '_files')}")
