"""Commands that use models: list them, tell their license, segment files, run the app, measure robustness."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, Option

from polypseg.cli.console import print_json, print_table
from polypseg.cli.options import JsonOption, MaskValuesOption, PrecisionOption, SourceOption, WideOption, places

if TYPE_CHECKING:
    from polypseg.evaluation.receipt import Test
    from polypseg.inference.runtimes import Precision
    from polypseg.zoo import ZooEntry

NOT_EVALUATED = "not evaluated"
TESTS = {
    "Kvasir-SEG test, mDice": ("kvasir_seg", "reference", "test"),
    "CVC-ClinicDB, mDice": ("cvc_clinicdb", "full", "full"),
}
"""Columns of the table of models -> dataset, split and part."""
ModelOption = Annotated[
    str,
    Option("--model", help="starter (ships with the package), model folder, Hub id, id of the table."),
]
RuntimeOption = Annotated[
    str, Option(help="auto (the fastest exact one at hand, and says which), onnxruntime, openvino or torch.")
]


def models(
    results: Annotated[
        Path | None, Option(help="Folder of evaluation receipts. Default: those that come with the package.")
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the models: id, license, results where there are any, where the pretraining weights come from."""
    from polypseg import zoo
    from polypseg.tables import Column, Table

    scores = _dice_by_model(results)
    columns = TESTS if scores else {}
    if as_json:
        print_json([_row_of(entry, scores) for entry in zoo.rows()])
        return
    results_of = [Column(title, title, lambda shown: shown or NOT_EVALUATED) for title in columns]
    headings = [
        Column("short", "short_name", optional=True),
        Column("model id", "model_id"),
        Column("pretraining", "pretraining"),
        Column("corpus", "corpus"),
        Column("license", "licence", optional=True),
        *results_of,
        Column("weights", "weights", optional=True),
        Column("license stated at", "licence_stated_at", optional=True),
    ]
    for title, rows in (("The twelve models", zoo.ZOO), ("Extra models, not of the study", zoo.EXTRA)):
        records = [row | row["results"] for row in (_row_of(entry, scores) for entry in rows)]
        print_table(Table(columns=headings, records=records, title=title), wide=wide)
    for entry in zoo.EXTRA:
        print(f"{entry.short_name}: {entry.notes}")
    print("\n".join(_shipped_model()))
    if results is not None and not scores:
        print(f"no receipts in {results}: name a folder of them with --results")
    others = sorted({name for name, _ in scores} - {row.model_id for row in zoo.rows()})
    if others:
        records = [
            {"model_id": name} | {title: scores.get((name, test)) for title, test in columns.items()} for name in others
        ]
        more = [Column("model id", "model_id"), *results_of]
        print_table(Table(columns=more, records=records, title="Other models with results"), wide=wide)


def _row_of(entry: "ZooEntry", scores: "dict[tuple[str, Test], str]") -> dict[str, Any]:
    """A row of the table with its results, as plain values."""
    from polypseg import zoo

    upstream = entry.upstream
    return {
        "model_id": entry.model_id,
        "short_name": entry.short_name,
        "pretraining": zoo.METHODS[entry.method],
        "corpus": zoo.CORPORA[entry.corpus],
        "licence": upstream.license,
        "licence_stated_at": upstream.license_source,
        "weights": upstream.location,
        "results": {title: scores.get((entry.model_id, test)) for title, test in TESTS.items()},
        "of_the_study": entry in zoo.ZOO,
    }


def _shipped_model() -> list[str]:
    """Lines about the model that ships with the package; its results come with it."""
    from polypseg.errors import UsageError
    from polypseg.inference.quality import read_quality
    from polypseg.provenance.license import model_license
    from polypseg.provenance.local import STARTER, starter_folder
    from polypseg.provenance.origin import WeightsOrigin

    try:
        folder = starter_folder()
    except UsageError as error:
        return [f"{STARTER}: {error}"]
    origin = WeightsOrigin.of_folder(folder)
    terms = model_license(origin)
    return [
        f"{STARTER}: ships with the package, works offline, taken where no model is named; {origin.model_id}, "
        f"license {terms.name or terms.identifier}; {read_quality(folder).words}",
        f"{STARTER}: {origin.summary}",
    ]


def _dice_by_model(results: Path | None) -> "dict[tuple[str, Test], str]":
    """(model id, test) -> mean Dice with its interval and n, as the receipts in a folder say; None for the package's.

    Those of a row of the table count only if their weights earned its id. Empty where the light installation lacks what
    reads the package's receipts.
    """
    import importlib.util

    from polypseg.provenance.local import vouched_results

    if results is None and importlib.util.find_spec("pydantic") is None:
        return {}
    results = results or vouched_results()
    if not results.is_dir():
        return {}
    from polypseg import zoo
    from polypseg.evaluation.receipt_reading import cell_of, read_results, size_of

    ids = {row.model_id for row in zoo.rows()}
    return {
        (receipt.name, receipt.test): f"{cell_of(receipt.stated['dice'])}, n = {size_of(receipt)}"
        for receipt in read_results(results)
        if receipt.name not in ids or receipt.origin.official
    }


def license_(
    model: Annotated[str, Argument(help="Id or short name of the table, model folder, or Hub id.")],
    revision: Annotated[str | None, Option(help="Tag, branch or commit of a Hub model.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Derive a model's license step by step from code, weights and images, and say what you may do with it."""
    import json

    from polypseg.provenance.license import report_license

    report = report_license(model, revision=revision)
    print(json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.lines()))


def segment(
    inputs: Annotated[list[str], Argument(help="Images, folders, globs or videos.")],
    model: ModelOption = "starter",
    output: Annotated[Path, Option(help="Folder of the results; a second call completes it.")] = Path("segmented"),
    runtime: RuntimeOption = "auto",
    precision: PrecisionOption = "fp32",
    revision: Annotated[str | None, Option(help="Tag, branch or commit of a Hub model.")] = None,
    threshold: Annotated[
        float | None, Option(help="A pixel is polyp where its probability exceeds this; default 0.5.")
    ] = None,
    min_area: Annotated[int, Option(help="Pixels that a lesion of the table has at least.")] = 64,
    every: Annotated[int, Option(min=1, help="Take every N-th frame of a video.")] = 1,
    save_probability: Annotated[bool, Option("--save-probability", help="Keep the probability maps too.")] = False,
    smooth: Annotated[
        float | None, Option(help="Average a video's probabilities over this time in seconds, looking back; try 0.1.")
    ] = None,
    overlay_video: Annotated[
        str | None,
        Option(help="Overlays of videos: mp4 (by the ffmpeg on PATH, the default with one), webm, avi, jpg or none."),
    ] = None,
    operating_point: Annotated[
        Path | None, Option(help="File of `polypseg calibrate`, or `model` for the model's own.")
    ] = None,
    margin: Annotated[
        float | None,
        Option(help="Also write masks grown to hold 90 % of the polyp in this share of frames; try 0.9."),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Frames that go through the model together.")] = 1,
    overwrite: Annotated[bool, Option("--overwrite", help="Start again in a folder of other settings.")] = False,
    device: Annotated[str | None, Option(help="cpu, or cuda (of torch); default: torch takes cuda if it can.")] = None,
) -> None:
    """Segment images and videos: masks, overlays, tables of area, boxes and scores. For research only."""
    from polypseg.inference.segment import run_segment

    lines = run_segment(
        inputs,
        output,
        model=model,
        runtime=runtime,
        precision=cast("Precision", precision),
        revision=revision,
        threshold=threshold,
        min_area=min_area,
        every=every,
        save_probability=save_probability,
        smooth=smooth,
        overlay_video=overlay_video,
        margin=margin,
        operating_point=operating_point,
        batch_size=batch_size,
        overwrite=overwrite,
        device=device,
    )
    print("\n".join(lines))


def demo_app(
    models: Annotated[
        list[str] | None,
        Option("--model", help="starter (default), model folder, Hub id, id of the table; repeat for more."),
    ] = None,
    host: Annotated[str, Option(help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to serve at.")] = 7860,
    open_browser: Annotated[bool, Option(help="Open the app in the browser.")] = True,
) -> None:
    """Run the app on this machine: choose a model, drop a frame, compare two models. Ctrl-C ends it."""
    from polypseg.hub.space import describe_model, run_demo_app

    run_demo_app(
        [describe_model(name) for name in models or ["starter"]], host=host, port=port, open_browser=open_browser
    )


def export_space(
    output: Annotated[Path, Option(help="Folder to write.")],
    models: Annotated[list[str], Option("--model", help="Model folder or Hub id; repeat for more.")],
    title: Annotated[str, Option(help="Title of the Space, at most 60 characters.")] = "Polyp segmentation",
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="Let the Space run the code that CNN models bring along.")
    ] = False,
) -> None:
    """Write the app as a Hugging Face Space that needs no polypseg."""
    from polypseg.hub.space import describe_model
    from polypseg.hub.space import export_space as write_space

    chosen = [describe_model(name) for name in models]
    folder = write_space(output, models=chosen, title=title, trust_remote_code=trust_remote_code)
    print(f"{folder}: upload it with `hf upload OWNER/NAME {folder} --repo-type space`")


def robustness(
    model: ModelOption,
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")],
    source: SourceOption = None,
    mask_values: MaskValuesOption = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "full",
    part: Annotated[str, Option(help="Part of the split.")] = "full",
    kinds: Annotated[list[str] | None, Option("--corruption", help="A kind; repeat for more. Default: all.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    output: Annotated[Path, Option(help="Folder of results.")] = Path("results"),
) -> None:
    """Measure a model under endoscopy corruptions at five severities: curves and drops."""
    place = places(source, datasets=[dataset]).get(dataset)
    from polypseg.data import open_dataset
    from polypseg.evaluation.metrics import mean_with_interval
    from polypseg.evaluation.robustness import measure_robustness
    from polypseg.files import sole_writer
    from polypseg.inference.open_model import open_model

    predictor = open_model(model)
    with sole_writer(output / predictor.name):
        result = measure_robustness(
            predictor,
            open_dataset(dataset, source=place, mask_values=mask_values),
            split=split,
            part=part,
            kinds=kinds or (),
            limit=limit,
        )
        path = result.write(output)
    drop = result.mean_relative_drop()
    print(f"clean mDice {mean_with_interval(result.clean_dice)['mean']:.4f}, n = {len(result.clean.ids)}")
    print("mean relative drop: " + ("not defined, the clean mean is 0" if drop is None else f"{drop:.3f}"))
    print(f"curves and tables: {path.with_suffix('.png')}, {path.with_suffix('.csv')}")
