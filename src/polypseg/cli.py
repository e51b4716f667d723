"""The ``polypseg`` command, and how every command and script reports an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from polypseg import (
    estimate_commands,
    evaluate_commands,
    hub_commands,
    report_commands,
    shift_commands,
    use_commands,
    web_commands,
)
from polypseg.arguments import MaskValuesOption
from polypseg.console import reported

app = typer.Typer(
    help="Polyp segmentation whose behaviour on other hospitals' data is known. Not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Find, fetch and check datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(shift_commands.shift_app, name="shift")
for command in (
    hub_commands.convert,
    hub_commands.export,
    hub_commands.push,
    hub_commands.verify,
    use_commands.models,
    evaluate_commands.evaluate,
    estimate_commands.estimate,
    estimate_commands.calibrate,
    evaluate_commands.check_receipts,
    evaluate_commands.sign_receipts,
    evaluate_commands.diagnose,
    report_commands.report,
    use_commands.segment,
    web_commands.web,
    use_commands.demo_app,
    use_commands.export_space,
    use_commands.robustness,
):
    app.command()(command)
app.command("license")(use_commands.license_)


def run_app(command: typer.Typer) -> None:
    """Run a command; a PolypSegError becomes one line on stderr and its exit code: 2 for usage, 1 for failure."""
    with reported():
        command(standalone_mode=True)


def run_script(function: Callable[..., Any]) -> None:
    """Run a script's ``main`` with its arguments taken from the command line."""
    script = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    script.command()(function)
    run_app(script)


def print_whole(table: Any) -> None:
    """Print a table without cutting any cell: names and addresses are there to be copied."""
    from rich.console import Console

    for column in table.columns:
        column.no_wrap = True
    console = Console()
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table, soft_wrap=True)


@data_app.command("list")
def list_datasets() -> None:
    """List the datasets: size, terms, and whether they can be fetched or must be requested."""
    from rich.table import Table

    from polypseg.data.catalog import DATASETS

    table = Table("name", "dataset", "images", "terms", "how to get it", title="Datasets")
    for spec in DATASETS.values():
        built_in = spec.name.startswith("synthetic_")
        how = spec.url or spec.request or ("built in" if built_in else "your own files")
        table.add_row(spec.name, spec.title, str(spec.count or "any"), spec.license, how)
    print_whole(table)


@data_app.command("get")
def get_dataset(
    name: Annotated[str, Argument(help="Dataset of the table; see `polypseg data list`.")],
    to: Annotated[Path, Option(envvar="POLYPSEG_DATA", help="Folder that receives the archive.")] = Path("data"),
) -> None:
    """Download a published archive, resumable and verified; or say where a set must be requested."""
    from polypseg.data.catalog import get_spec
    from polypseg.data.download import download
    from polypseg.errors import UsageError

    spec = get_spec(name)
    if spec.url is None:
        raise UsageError(f"{spec.title} cannot be downloaded by a program. {spec.request or 'It needs no download.'}")
    destination = to / Path(spec.url).name
    print(f"{spec.title}: {spec.license}. Cite {spec.citation}.")
    if spec.archive_sha256 is None:
        print("No checksum of this archive has been published; only the transfer itself is verified.")
    path = download(spec.url, destination=destination, sha256=spec.archive_sha256, size=spec.archive_size)
    print(f"{path} is complete; it is read as it is, no extraction needed. Next: polypseg data check {name} {path}")


@data_app.command("check")
def check(
    name: Annotated[str, Argument(help="Dataset of the table.")],
    path: Annotated[Path, Argument(help="Extracted folder or archive.")],
    mask_values: MaskValuesOption = None,
    report: Annotated[Path, Option(help="Folder that receives the report.")] = Path("reports"),
) -> None:
    """Verify files, counts, pairing, sizes and masks; find duplicates inside and across splits; write a report."""
    from polypseg.data.check import check_dataset
    from polypseg.errors import PolypSegError

    result = check_dataset(name, path, mask_values=mask_values)
    written = result.write(report)
    print(result.to_markdown())
    print(f"report: {written}")
    if not result.ok:
        raise PolypSegError(f"{path} has {len(result.problems)} problem(s), first: {result.problems[0]}")


@data_app.command("shard")
def shard(
    source: Annotated[Path, Argument(help="Extracted folder, zip archive, or shards of others.")],
    to: Annotated[Path, Option(help="Folder that receives the shards; a second call completes it.")],
    images_per_shard: Annotated[int, Option(min=1, help="Images of each tar file.")] = 1000,
    verify: Annotated[bool, Option("--verify", help="Read the shards again and compare checksums.")] = False,
) -> None:
    """Pack a corpus for pretraining into WebDataset tar shards; every image is decoded first, damaged ones stay out."""
    from polypseg.data.frames import open_frames
    from polypseg.data.shards import verify_shards, write_shards

    report = write_shards(open_frames(source), to, images_per_shard=images_per_shard)
    if verify:
        verify_shards(to)
    print(
        f"{report.frames} images in {report.shards} shards, {report.bytes / 1e9:.2f} GB, in {report.folder}; "
        f"{report.written} written now{', all checksums right' if verify else ''}"
    )
    if report.unreadable:
        first = ", ".join(report.unreadable[:3])
        print(f"{len(report.unreadable)} unreadable images were left out, first {first}; shards.json lists them all")


@data_app.command("push")
def push_prepared(
    name: Annotated[str, Argument(help="Dataset of the table.")],
    repo_id: Annotated[str, Argument(help="Dataset repository on the Hub, OWNER/NAME.")],
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    mask_values: MaskValuesOption = None,
    split: Annotated[str, Option(help="Named split that becomes the repository's splits.")] = "reference",
    public: Annotated[bool, Option("--public", help="Make the repository public; only where the terms allow.")] = False,
    override_terms: Annotated[
        bool, Option("--override-terms", help="You hold the owners' permission to publish the set.")
    ] = False,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of the dataset.")] = False,
) -> None:
    """Push your own prepared copy of a dataset with a card; private unless the set's terms allow more."""
    from polypseg.dataset_cards import push_dataset

    commit = push_dataset(
        name,
        repo_id,
        source=source,
        split=split,
        private=not public,
        override=override_terms,
        allow_partial=allow_partial,
        mask_values=mask_values,
    )
    print(f"{repo_id}: {'public' if public else 'private'}, commit {commit}")


@app.command()
def study(
    output: Annotated[Path, Option(help="Folder of the study; a second call continues it.")],
    scale: Annotated[str, Option(help="full, small (small encoders) or smoke (minutes on a laptop).")] = "smoke",
    models: Annotated[list[str] | None, Option("--model", help="A row; repeat for several. Default: all.")] = None,
    in_distribution: Annotated[str, Option(help="Dataset to train and test on.")] = "synthetic_a",
    out_of_distribution: Annotated[str, Option(help="Dataset to test on only.")] = "synthetic_b",
    in_source: Annotated[Path | None, Option(help="Folder or archive of the first dataset.")] = None,
    out_source: Annotated[Path | None, Option(help="Folder or archive of the second dataset.")] = None,
    split: Annotated[str, Option(help="Split of the first dataset.")] = "reference",
    set_: Annotated[list[str] | None, Option("--set", help="Recipe override, e.g. training.epochs=2.")] = None,
    encoder_weights: Annotated[
        list[str] | None,
        Option(help="MODEL=WEIGHTS for a row; weights as in finetune.py. Repeat for several."),
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
    test_source: Annotated[
        list[str] | None, Option(help="DATASET=PATH of a grid's test set. Default: looked for in the data folder.")
    ] = None,
    negatives: Annotated[Path | None, Option(help="Folder of frames without polyps, for a grid's tests.")] = None,
    plan: Annotated[bool, Option("--plan", help="With --grid: print what is left and its cost, and stop.")] = False,
) -> None:
    """Train and evaluate rows of the table on two datasets and write the paper's comparison; or fill a grid."""
    if grid is not None:
        from polypseg.grid.command import fill_grid

        fill_grid(
            grid,
            output=output,
            dataset=in_distribution,
            source=in_source,
            split=split,
            frames=frames or [],
            tests=test_source or [],
            negatives=negatives,
            allow_partial=allow_partial,
            only_plan=plan,
        )
        return
    from polypseg.study import StudyPlan, run_study

    chosen = StudyPlan(
        output=output,
        scale=scale,
        models=tuple(models or ()),
        in_distribution=in_distribution,
        out_of_distribution=out_of_distribution,
        in_source=in_source,
        out_source=out_source,
        split=split,
        overrides=tuple(set_ or ()),
        encoder_weights=tuple(encoder_weights or ()),
        start_from_available=start_from_available,
        limit=limit,
        allow_partial=allow_partial,
    )
    run_study(chosen)


def main() -> None:
    """Entry point."""
    run_app(app)
