"""Commands that score: any source of predictions by every metric convention, receipts, published pairs of numbers."""

import re
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, Option

from polypseg.cli.console import print_json, print_table
from polypseg.cli.options import (
    GivesProbabilities,
    ImageSize,
    JsonOption,
    PrecisionOption,
    SourceOption,
    WideOption,
    named_mask_values,
    named_places,
    places,
    refuse_options,
)

if TYPE_CHECKING:
    from polypseg.evaluation.evaluate import SuiteResult
    from polypseg.evaluation.receipt import Receipt
    from polypseg.evaluation.suite import Outcome, SuitePlan
    from polypseg.inference.prediction_source import PredictionSource
    from polypseg.inference.runtimes import Precision

_SHOWN = 20
"""Differences of a receipt that are printed."""


class Seen(StrEnum):
    """What becomes of a test of which the model saw images; passport.Rule."""

    refuse = "refuse"
    report = "report"
    exclude = "exclude"


def evaluate(
    dataset: Annotated[str | None, Option(help="Dataset of the table; see `polypseg data list`.")] = None,
    model: Annotated[
        str | None,
        Option(help="Model folder (transformers or segmentation_models_pytorch), Hub id, id of the table, ONNX file."),
    ] = None,
    image_size: ImageSize = None,
    gives_probabilities: GivesProbabilities = False,
    operating_point: Annotated[
        Path | None, Option(help="File of `polypseg calibrate`, or `model` for the model's own.")
    ] = None,
    predictions: Annotated[
        Path | None, Option(help="Folder or archive of predicted masks or probability maps, named as the images.")
    ] = None,
    source: SourceOption = None,
    mask_values: Annotated[
        list[str] | None,
        Option(
            help="Values or colors of the mask files that are polyp: 1, 1-6 or '#ff0000,#00ff00'. Default: gray above "
            "127. With --suite NAME=VALUES for a set of --own or a dataset; repeat for several."
        ),
    ] = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "full",
    part: Annotated[str, Option(help="Part of the split.")] = "full",
    convention: Annotated[
        list[str] | None, Option(help="A convention of the receipt; repeat for several. Default: all.")
    ] = None,
    all_conventions: Annotated[
        bool, Option("--all-conventions", help="Print the scores of every convention, not only the paper's.")
    ] = False,
    allow_missing: Annotated[bool, Option("--allow-missing", help="Count images without file as empty.")] = False,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    seen: Annotated[
        Seen, Option(help="Test images that the model's passport lists: refuse the test, report or exclude them.")
    ] = Seen.refuse,
    suite: Annotated[bool, Option("--suite", help="Run every test of the suite whose images are at hand.")] = False,
    only: Annotated[list[str] | None, Option(help="With --suite: a test; repeat for several.")] = None,
    own: Annotated[
        list[str] | None, Option(help="With --suite: NAME=PATH of your own images and masks; repeat for several.")
    ] = None,
    negatives: Annotated[Path | None, Option(help="With --suite: folder of frames without polyps.")] = None,
    alarm_area: Annotated[
        int, Option(min=1, help="Pixels from which a component on a frame without polyp is a false alarm.")
    ] = 1,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of a dataset, and say so.")] = False,
    save_masks: Annotated[bool, Option("--save-masks", help="Keep the predicted masks as 1-bit PNG files.")] = False,
    name: Annotated[str | None, Option(help="Name in the results; default: the recorded id or the folder's.")] = None,
    batch_size: Annotated[
        int | None,
        Option(min=1, help="Images per forward pass. Default: 2 on a CPU, 8 on a GPU."),
    ] = None,
    runtime: Annotated[
        str | None,
        Option(help="onnxruntime, openvino, auto or torch. Default: torch, which computes the weights themselves."),
    ] = None,
    precision: PrecisionOption = "fp32",
    revision: Annotated[str | None, Option(help="Tag, branch or commit of a Hub model.")] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Run the code of the model's repository; only at a full commit.")
    ] = False,
    output: Annotated[Path, Option(help="Folder of results.")] = Path("results"),
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model, or anybody's predicted masks, by every metric convention, and write a receipt of each test."""
    from polypseg.data import open_dataset
    from polypseg.data.catalog import DATASETS
    from polypseg.errors import UsageError
    from polypseg.evaluation.conventions import CONVENTIONS, choose_conventions
    from polypseg.evaluation.receipt import CONVENTION, read_receipt
    from polypseg.evaluation.suite import SuitePlan, suite_datasets
    from polypseg.files import sole_writer
    from polypseg.provenance.local import local_folder
    from polypseg.provenance.passport import kept_manifest, name_partial

    if (model is None) == (predictions is None):
        raise UsageError("give either --model or --predictions")
    names = tuple(convention or CONVENTIONS)
    choose_conventions(names)
    if trust_remote_code and local_folder(str(model)) is None and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise UsageError("code from the Hub is run at a full commit only: give --revision with its 40 digits")
    if predictions is not None:
        model_only: dict[str, object] = {
            "--suite": suite,
            "--revision": revision,
            "--trust-remote-code": trust_remote_code,
        }
        model_only |= {
            "--operating-point": operating_point,
            "--image-size": image_size,
            "--gives-probabilities": gives_probabilities,
            "--runtime": runtime,
            "--precision": precision != "fp32",
        }
        refuse_options(model_only, because="it is of a --model, and --predictions are files")
    elif allow_missing:
        raise UsageError("--allow-missing does not apply: it is of --predictions")
    if suite:
        single = {"--dataset": dataset, "--limit": limit}
        refuse_options(single, because="--suite chooses the datasets")
    elif dataset is None:
        raise UsageError("name one test with --dataset, or run them all with --suite (and --only, --source, ...)")
    else:
        refuse_options({"--only": only, "--own": own, "--negatives": negatives}, because="it is of --suite")
        if len(mask_values or ()) > 1:
            raise UsageError("one test has one set: give --mask-values once, several values as 1,2")
    owned = named_places(own, option="--own")
    plan = SuitePlan(
        output=output,
        only=tuple(only or ()),
        sources=places(source, datasets=list(DATASETS)) if suite else {},
        own=owned,
        mask_values=named_mask_values(mask_values, names=(*owned, *suite_datasets())) if suite else None,
        negatives=negatives,
        conventions=names,
        rule=seen.value,
        allow_partial=allow_partial,
        save_masks=save_masks,
        alarm_area=alarm_area,
    )
    place = None if dataset is None else places(source, datasets=[dataset]).get(dataset)
    from polypseg.evaluation.suite import score_images
    from polypseg.inference.model_folder import model_folder

    folder = model_folder(model, revision=revision, with_code=trust_remote_code)

    def opened() -> "PredictionSource":
        if predictions is not None:
            return _files(predictions, allow_missing=allow_missing, name=name)
        from polypseg.inference.open_model import open_model

        chosen = open_model(
            str(model),
            folder=folder,
            name=name,
            image_size=image_size,
            gives_probabilities=gives_probabilities,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            runtime=runtime,
            precision=cast("Precision", precision),
        )
        return _at_point(chosen, operating_point, folder=folder)

    if dataset is None:
        _evaluate_suite(opened(), plan, folder=folder, wide=wide, as_json=as_json)
        return
    values = mask_values[0] if mask_values else None
    data = open_dataset(dataset, source=place, allow_partial=allow_partial, mask_values=values)
    manifest = name_partial(kept_manifest(data, split=split, part=part, limit=limit), data)
    chosen = opened()
    with sole_writer(output / chosen.name):
        result = score_images(chosen, plan, data, manifest, model_folder=folder)
        path = result.write(output)
    receipt = read_receipt(path)
    if as_json:
        print_json({"receipt": str(path)} | receipt.summary())
        return
    if all_conventions or convention or CONVENTION not in names:
        _print_scores(receipt, wide=wide)
    _print_seen(result, receipt)
    if CONVENTION in names:
        print(_headline(receipt))
    print(f"{'every convention, ' if len(names) > 1 else ''}definitions, intervals and every image: {path}")


def _headline(receipt: "Receipt") -> str:
    """One line: the paper's four metrics with intervals, by clip where clips are known."""
    from polypseg.evaluation.receipt_reading import cell_of, size_of

    scores = "; ".join(f"m{name.capitalize()} {cell_of(value)}" for name, value in receipt.stated.items())
    return f"{receipt.name}: {scores.replace('mIou', 'mIoU')}; n = {size_of(receipt)}"


def _at_point(source: "PredictionSource", file: Path | None, *, folder: Path | None) -> "PredictionSource":
    """The source itself, or cut at the operating point of a file."""
    from polypseg.inference.operating_point import find_operating_point
    from polypseg.inference.prediction_source import PointedPredictions

    if file is None:
        return source
    return PointedPredictions(source=source, point=find_operating_point(folder or Path(), file))


_DONE = {Seen.report: "They were tested all the same.", Seen.exclude: "They were left out."}


def _print_scores(receipt: "Receipt", *, wide: bool) -> None:
    from polypseg.tables import Column, Table, bounds

    columns = [
        Column("convention", "convention"),
        Column("score", "score"),
        Column("mean", "mean", _mean),
        Column("95 % interval over images", "", lambda row: bounds(row["low"], row["high"])),
        Column("n", "n", optional=True),
    ]
    title = f"{receipt.name}: {receipt.dataset.title}, {receipt.dataset.split} {receipt.dataset.part}"
    records = [
        {
            "convention": convention,
            "score": score,
            "mean": value.mean,
            "low": value.low,
            "high": value.high,
            "n": value.n,
        }
        for convention, scores in receipt.scores.items()
        for score, value in scores.items()
    ]
    print_table(Table(columns=columns, records=records, title=title), wide=wide)


def _print_seen(result: "SuiteResult", receipt: "Receipt") -> None:
    """Whether the model saw tested images, and false alarms where frames show no polyp."""
    collisions = result.seen.collisions
    if collisions is None:
        print(f"not checked against what the model saw: {result.seen.reason}")
    elif collisions.found:
        print(f"{collisions.summary} {_DONE[Seen(result.seen.rule)]}")
    if receipt.false_alarms is not None:
        rate = receipt.false_alarms.per_100_frames
        print(f"false alarms: {rate.mean:.1f} per 100 frames without polyp [{rate.low:.1f}, {rate.high:.1f}]")


def _mean(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _evaluate_suite(
    chosen: "PredictionSource", plan: "SuitePlan", *, folder: Path | None, wide: bool, as_json: bool
) -> None:
    from polypseg.errors import PolypSegError
    from polypseg.evaluation.suite import run_suite

    outcomes = run_suite(chosen, plan, model_folder=folder)
    if as_json:
        print_json([asdict(outcome) for outcome in outcomes])
    else:
        _print_suite(chosen.name, outcomes, wide=wide)
        print(f"receipts and summary: {plan.output / chosen.name}")
    lost = [outcome for outcome in outcomes if outcome.status in ("refused", "failed")]
    if lost:
        first = f"{lost[0].test}: {lost[0].reason}"
        raise PolypSegError(f"{len(lost)} of {len(outcomes)} tests were refused or failed, first {first}")


def _print_suite(name: str, outcomes: "list[Outcome]", *, wide: bool) -> None:
    from polypseg.tables import Column, Table, bounds

    def of_tested(words: Callable[["Outcome"], str]) -> Callable[["Outcome"], str]:
        return lambda o: words(o) if o.status == "tested" else ""

    columns = [
        Column("test", "test"),
        Column("n", "", of_tested(lambda o: str(o.n))),
        Column("clusters", "", of_tested(lambda o: str(o.clusters or "")), optional=True),
        Column("Dice", "", _suite_dice),
        Column("95 % interval by cluster", "", of_tested(lambda o: bounds(o.dice_low, o.dice_high))),
        Column("false alarms per 100 frames", "", of_tested(_alarms)),
        Column(
            "seen", "", of_tested(lambda o: "unknown" if o.seen_images is None else str(o.seen_images)), optional=True
        ),
    ]
    print_table(Table(columns=columns, records=outcomes, title=f"{name}: the generalization suite"), wide=wide)
    for o in outcomes:
        if o.status != "tested":
            print(f"{o.test}: {o.status}: {o.reason}")


def _suite_dice(outcome: "Outcome") -> str:
    """Mean Dice of a test; what became of a test that was not made."""
    if outcome.status != "tested":
        return outcome.status
    return "" if outcome.dice is None else f"{outcome.dice:.4f}"


def _alarms(outcome: "Outcome") -> str:
    if outcome.false_alarms_per_100 is None:
        return ""
    bounds = f"[{outcome.false_alarms_low:.1f}, {outcome.false_alarms_high:.1f}]"
    return f"{outcome.false_alarms_per_100:.1f} {bounds}"


def _files(predictions: Path, *, allow_missing: bool, name: str | None) -> "PredictionSource":
    from polypseg.inference.prediction_files import FilePredictions
    from polypseg.inference.prediction_source import RenamedPredictions

    files = FilePredictions(path=predictions, allow_missing=allow_missing)
    return files if name is None else RenamedPredictions(name=name, source=files)


PathsArgument = Annotated[list[Path], Argument(help="Receipts, or folders that hold them.")]


def check_receipts(
    paths: PathsArgument,
    public_key: Annotated[
        Path | None, Option(help="PEM file of an ed25519 public key: each receipt must bear a signature by it.")
    ] = None,
) -> None:
    """Compute every score and interval of evaluation receipts again from their images; exit 1 for any difference."""
    from polypseg.errors import PolypSegError, UsageError
    from polypseg.evaluation.receipt import check_receipt

    if public_key is not None:
        from polypseg.evaluation.signatures import check_signature
    files = _receipt_files(paths)
    wrong: dict[Path, str] = {}
    for file in files:
        try:
            found = check_receipt(file)
            if public_key is not None:
                found += check_signature(file, public_key=public_key)
        except UsageError:  # a key that is none
            raise
        except PolypSegError as error:
            found = [str(error)]
        fine = "as computed again" + (f", signed by the key of {public_key}" if public_key else "")
        print(f"{file}: {fine if not found else f'{len(found)} difference(s)'}", flush=True)
        for line in found[:_SHOWN]:
            print(f"  {line}")
        if len(found) > _SHOWN:
            print(f"  and {len(found) - _SHOWN} more")
        if found:
            wrong[file] = found[0]
    if wrong:
        file, first = next(iter(wrong.items()))
        raise PolypSegError(
            f"{len(wrong)} of {len(files)} receipts are not what their images give, first {file}: {first}"
            if public_key is None
            else f"{len(wrong)} of {len(files)} receipts are not what their images give and their signer stands by, "
            f"first {file}: {first}"
        )


def sign_receipts(
    paths: PathsArgument,
    key: Annotated[Path, Option(help="PEM file of your ed25519 private key; keep it to yourself.")],
) -> None:
    """Sign evaluation receipts that recompute with your ed25519 key; a .sig file is written beside each."""
    from polypseg.evaluation.signatures import sign_receipt

    for file in _receipt_files(paths):
        print(f"{file}: signed, {sign_receipt(file, key=key).name}", flush=True)


def _receipt_files(paths: list[Path]) -> list[Path]:
    """The receipts among files and in folders. Raises UsageError for a path that is not there, and for none."""
    from polypseg.errors import UsageError
    from polypseg.evaluation.receipt import SUFFIX

    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise UsageError(f"{absent[0]} does not exist: give receipts of `polypseg evaluate`, or folders of them")
    files = [file for path in paths for file in (sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"no *{SUFFIX} in {', '.join(map(str, paths))}: run `polypseg evaluate` first")
    return files


def diagnose(
    dice: Annotated[str, Argument(help="Published Dice with all its digits, as fraction or percent.")],
    iou: Annotated[str, Argument(help="Published IoU of the same experiment.")],
    n: Annotated[int | None, Option("--images", "-n", min=1, help="Number of test images.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which metric conventions a published pair of Dice and IoU can come from."""
    from polypseg.evaluation.diagnose import diagnose as diagnose_pair

    numbers = [_number(text) for text in (dice, iou)]
    # One unit of the last digit that both numbers have covers rounding as well as cutting off.
    digits = min(-int(number.as_tuple().exponent) for number in numbers)
    found = diagnose_pair(float(numbers[0]), float(numbers[1]), n, tolerance=10.0**-digits)
    if as_json:
        print_json({"verdict": found.verdict, "words": found.words, "possible": list(found.possible)})
        return
    print(f"{found.verdict}: {found.words}")
    print(f"possible conventions: {', '.join(found.possible) or 'none'}")


def _number(text: str) -> Decimal:
    from polypseg.errors import UsageError

    try:
        return Decimal(text.strip().rstrip("%"))
    except InvalidOperation:
        raise UsageError(f"{text!r} is not a number: give it as published, such as 0.8231 or 82.31") from None
