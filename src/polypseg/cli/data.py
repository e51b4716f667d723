"""``polypseg data``: find, fetch, check, pack and push datasets."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from polypseg.cli.console import print_json, print_table
from polypseg.cli.options import JsonOption, MaskValuesOption, WideOption

data_app = typer.Typer(help="Find, fetch and check datasets.", no_args_is_help=True)


@data_app.command("list")
def list_datasets(wide: WideOption = False, as_json: JsonOption = False) -> None:
    """List the datasets: size, terms, and whether they can be fetched or must be requested."""
    from polypseg.data.catalog import DATASETS, is_synthetic

    rows = [
        {
            "name": spec.name,
            "dataset": spec.title,
            "images": spec.count,
            "terms": spec.license,
            "how to get it": spec.url or spec.request or ("built in" if is_synthetic(spec) else "your own files"),
        }
        for spec in DATASETS.values()
    ]
    if as_json:
        print_json(rows)
        return
    from polypseg.tables import Column, Table

    columns = [
        Column("name", "name"),
        Column("dataset", "dataset"),
        Column("images", "images", lambda count: "any" if count is None else str(count)),
        Column("terms", "terms", optional=True),
        Column("how to get it", "how to get it", optional=True),
    ]
    print_table(Table(columns=columns, records=rows, title="Datasets"), wide=wide)


@data_app.command("get")
def get_dataset(
    name: Annotated[str, Argument(help="Dataset of the table; see `polypseg data list`.")],
    output: Annotated[Path, Option(envvar="POLYPSEG_DATA", help="Folder that receives the archive.")] = Path("data"),
) -> None:
    """Download a published archive, resumable and verified; or say where a set must be requested."""
    from polypseg.data.catalog import get_spec
    from polypseg.data.download import download
    from polypseg.errors import UsageError

    spec = get_spec(name)
    if spec.url is None:
        raise UsageError(f"{spec.title} cannot be downloaded by a program. {spec.request or 'It needs no download.'}")
    destination = output / Path(spec.url).name
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
    output: Annotated[Path, Option(help="Folder that receives the report.")] = Path("reports"),
    as_json: JsonOption = False,
) -> None:
    """Verify files, counts, pairing, sizes and masks; find duplicates inside and across splits; write a report."""
    from polypseg.data.check import check_dataset
    from polypseg.errors import PolypSegError

    result = check_dataset(name, path, mask_values=mask_values)
    written = result.write(output)
    if as_json:
        print_json(asdict(result) | {"report": str(written)})
    else:
        print(result.to_markdown())
        print(f"report: {written}")
    if not result.ok:
        raise PolypSegError(f"{path} has {len(result.problems)} problem(s), first: {result.problems[0]}")


@data_app.command("shard")
def shard(
    source: Annotated[Path, Argument(help="Extracted folder, zip archive, or shards of others.")],
    output: Annotated[Path, Option(help="Folder that receives the shards; a second call completes it.")],
    images_per_shard: Annotated[int, Option(min=1, help="Images of each tar file.")] = 1000,
    verify: Annotated[bool, Option("--verify", help="Read the shards again and compare checksums.")] = False,
) -> None:
    """Pack a corpus for pretraining into WebDataset tar shards; every image is decoded first, damaged ones stay out."""
    from polypseg.data.corpus import open_frames
    from polypseg.data.shards import verify_shards, write_shards

    report = write_shards(open_frames(source), output, images_per_shard=images_per_shard)
    if verify:
        verify_shards(output)
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
    from polypseg.hub.dataset_card import push_dataset

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
