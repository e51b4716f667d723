"""Commands between a weights file and the Hub: convert, export, push, verify."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, Option

from polypseg.cli.console import print_json, print_table
from polypseg.cli.options import JsonOption

if TYPE_CHECKING:
    from polypseg.hub.push import PublishPlan
    from polypseg.inference.runtimes import Precision
    from polypseg.provenance.checksums import Verification


def convert(
    file: Annotated[
        Path, Argument(help="Published weights: MoCo v3, Barlow Twins, MAE, AugReg, torchvision, SSL4GIE.")
    ],
    output: Annotated[Path | None, Option("--output", help="Folder to write: an encoder, or a whole model.")] = None,
    model: Annotated[str | None, Option(help="Row that the file is of, where its name does not say.")] = None,
    inspect: Annotated[bool, Option("--inspect", help="Only say what the file is.")] = False,
) -> None:
    """Turn a published checkpoint into this package's format, proven by its outputs before anything is written."""
    from polypseg.errors import UsageError
    from polypseg.weights.convert import convert_file, inspect_file

    if inspect:
        print("\n".join(inspect_file(file).lines()))
        return
    if output is None:
        raise UsageError("say where to write with --output, or only --inspect the file")
    written = convert_file(file, output, model=model)
    print(f"{written} is written; its outputs equal those of {file.name}")


def export(
    model: Annotated[str, Argument(help="Model folder, such as runs/rn-in-sl/best or a converted one; or starter.")],
    output: Annotated[
        Path | None, Option(help="Folder to write. With --format, default: into the model's own folder.")
    ] = None,
    format_: Annotated[
        str | None, Option("--format", help="onnx or openvino: write the network for that runtime instead.")
    ] = None,
    precision: Annotated[str | None, Option(help="With --format: fp32 (default), fp16 or int8.")] = None,
    calibration: Annotated[
        str | None, Option(help="With int8: folder of training frames, or a dataset whose training part is taken.")
    ] = None,
    results: Annotated[
        Path | None, Option(help="Results folder of evaluate.py; those of these weights go along.")
    ] = None,
    organization: Annotated[
        str | None, Option("--organisation", help="Owner named in the card's usage examples.")
    ] = None,
) -> None:
    """Write the folder that is published (weights, processor, code, card, results, checksums), or a file for a runtime.

    With --format onnx or openvino the network is written for that runtime, checked by its outputs against torch.
    """
    from polypseg.errors import UsageError
    from polypseg.provenance.local import local_folder

    folder = local_folder(model) or Path(model)
    if format_ is not None:
        if results is not None or organization is not None:
            raise UsageError("--results and --organisation belong to the published folder, not to --format")
        from polypseg.hub.onnx import export_runtime

        written = export_runtime(
            folder,
            format=format_,
            precision=cast("Precision", precision or "fp32"),
            calibration=calibration,
            output=output,
        )
        print("\n".join(written.lines()))
        return
    if precision is not None or calibration is not None:
        raise UsageError("--precision and --calibration belong to --format onnx or openvino")
    if output is None:
        raise UsageError("say with --output which folder to write, or with --format for which runtime")
    from polypseg.hub.export import export_model

    done = export_model(folder, output, results=results, organization=organization)
    print(f"{done.folder}: {done.origin.repo_name}; logits equal the source's to {done.largest_difference:.1g}")
    print(f"results taken along: {', '.join(done.results) or 'none'}")
    for reason in done.left_out:
        print(f"left out: {reason}")
    if done.origin.shortcomings:
        print(f"not one of the twelve: {'; '.join(done.origin.shortcomings)}")


def push(
    folders: Annotated[list[Path] | None, Argument(help="Exported model folders.")] = None,
    all_in: Annotated[Path | None, Option("--all", help="Push every exported folder in this one.")] = None,
    organization: Annotated[
        str | None, Option("--organisation", help="Hub user or organization; default: the token's user.")
    ] = None,
    private: Annotated[bool, Option("--private", help="Create repositories and collection as private.")] = False,
    tag: Annotated[str | None, Option(help="Version tag; default: the package's version.")] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, the folders without a network too; send nothing.")
    ] = False,
    collection: Annotated[bool, Option(help="Put the models of the table into the owner's collection.")] = True,
) -> None:
    """Publish exported models: checked first, one commit each, tagged, collected, fetched back and compared."""
    from polypseg.errors import PolypSegError, UsageError
    from polypseg.hub.push import check_folders, exported_folders, plan_pushes, update_collection
    from polypseg.hub.push import push as push_model

    found = exported_folders(folders or [], everything_in=all_in)
    try:
        plans = plan_pushes(found, organization=organization, private=private, tag=tag)
    except UsageError:
        raise
    except PolypSegError as error:
        if not dry_run:
            raise
        for one in check_folders(found):
            size = f"{one.files} files, {one.size / 1e6:.1f} MB"
            place = f"not one of the twelve: {one.shortcomings[0]}" if one.shortcomings else "one of the twelve"
            print(f"{one.folder}: {one.repo_name}, {size}, {one.license}; {place}")
        print(f"dry run: every folder passes; not compared with the Hub ({error}); nothing was sent")
        return
    _print_plans(plans)
    if dry_run:
        print("dry run: nothing was sent")
        return
    for plan in plans:
        done = push_model(plan)
        what = "published" if done.new_commit else "already there"
        size = f"{done.verified_files} files, {done.verified_bytes / 1e6:.1f} MB"
        print(f"{done.repo_id}: {what}, commit {done.commit[:12]}, tag {done.tag}; fetched back and equal: {size}")
        sys.stdout.flush()
    official = [plan.repo_id for plan in plans if plan.origin.official]
    if collection and official:
        slug = update_collection(official, owner=official[0].split("/")[0], private=private)
        print(f"collection {slug}: {len(official)} of the table's models are in it")


def _print_plans(plans: "list[PublishPlan]") -> None:
    from polypseg.tables import Column, Table

    columns = [
        Column("repository", "", lambda plan: plan.repo_id + (" (private)" if plan.private else "")),
        Column(
            "state", "", lambda plan: ("changes" if plan.changes_anything else "unchanged") if plan.exists else "new"
        ),
        Column("license", "license"),
        Column("tag", "tag"),
        Column("to upload", "", lambda plan: f"{len(plan.uploads)} files, {plan.upload_bytes / 1e6:.1f} MB"),
        Column("to delete", "deletions", lambda names: ", ".join(names) or "-"),
        Column("official", "origin", lambda origin: "yes" if origin.official else f"no: {origin.shortcomings[0]}"),
    ]
    print_table(Table(columns=columns, records=plans, title="Publish plan"))


def verify(
    model: Annotated[str, Argument(help="Model folder, Hub id, or id of the table.")],
    revision: Annotated[str | None, Option(help="Tag, branch or commit.")] = None,
    run: Annotated[
        bool, Option("--run", help="Also compute the model's test frame with each of its files, and compare.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every file of a model with its checksums, and on request what it computes here with what it should.

    A Hub model is downloaded whole.
    """
    from polypseg.errors import PolypSegError, UsageError
    from polypseg.provenance.checksums import verify_folder
    from polypseg.provenance.local import local_folder

    folder = local_folder(model)
    if folder is None:
        from polypseg.provenance.fetch import verify as verify_model

        found = verify_model(model, revision=revision)
    elif revision is not None:
        raise UsageError(f"{folder} is a folder: a revision belongs to a Hub id")
    else:
        found = verify_folder(folder)
    if as_json:
        _print_verification(found, run=run)
        return
    for name in sorted({*found.digests, *found.problems}):
        print(f"{found.problems.get(name, 'ok'):<22} {name}")
    at = f" at commit {found.revision}" if found.revision else ""
    if found.problems:
        raise PolypSegError(
            f"{model}{at}: {len(found.problems)} file(s) differ from the checksums; get the model again"
        )
    print(f"{model}{at}: all {len(found.digests)} files are right")
    if run:
        _replay(found.folder, model)


def _print_verification(found: "Verification", *, run: bool) -> None:
    """As JSON; the exit code is 1 where a file differs or computes something else."""
    from dataclasses import asdict

    from polypseg.inference.replay import replay

    outcomes = replay(found.folder) if run and not found.problems else []
    print_json(
        {
            "revision": found.revision,
            "right": sorted(found.digests.keys() - found.problems.keys()),
            "problems": found.problems,
            "runs": [asdict(outcome) for outcome in outcomes],
        }
    )
    if found.problems or any(outcome.runs and not outcome.reproduces for outcome in outcomes):
        raise SystemExit(1)


def _replay(folder: Path, model: str) -> None:
    from polypseg.errors import PolypSegError
    from polypseg.inference.replay import replay

    outcomes = replay(folder)
    print("\n".join(outcome.line() for outcome in outcomes))
    wrong = [outcome.file for outcome in outcomes if outcome.runs and not outcome.reproduces]
    if wrong:
        raise PolypSegError(
            f"{model}: {', '.join(wrong)} compute(s) something else here: do not use it on this machine"
        )
    if not any(outcome.runs for outcome in outcomes):
        raise PolypSegError(f"{model}: none of its files runs here; the lines above say what is missing")
