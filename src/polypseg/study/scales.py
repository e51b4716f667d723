"""The study's main job: train rows of the table, test them at home and elsewhere, and compare.

Resumes where it stopped: a finished run is not trained again, a receipt of the same weights is not computed again.
Tables, ranks and figures are made from the receipts only.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from accelerate.state import AcceleratorState
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from polypseg import plotting, zoo
from polypseg.data.polyps import PolypDataset, SyntheticOptions, open_dataset
from polypseg.errors import UsageError, unknown_name
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import BY_CLUSTER, CONVENTION, Receipt, read_receipt, read_score_set, receipt_path
from polypseg.files import environment_record, file_sha256, sole_writer, write_csv, write_json
from polypseg.inference.model import load_model, predict_masks
from polypseg.inference.predictors import ModelPredictions
from polypseg.provenance.passport import SplitManifest, check_seen, kept_manifest, name_partial
from polypseg.recipe import Recipe, load_recipe
from polypseg.report import write_report as write_page
from polypseg.statistics import (
    Gap,
    RankChange,
    ScoreSet,
    agreement_row,
    analyse_rank_change,
    generalisation_gaps,
)
from polypseg.statistics.scores import METRICS
from polypseg.tables import Column, Table
from polypseg.training.finetune import build_model, finetune, run_is_finished
from polypseg.training.run_folder import make_accelerator
from polypseg.weights.loading import STARTER_ENCODER, describe_source, starter_installed
from polypseg.zoo import RANDOM, ZooEntry

SAMPLES = 2
"""Frames of each dataset that the overlay figure shows."""
RANKED = 3
"""Models from which on a change of their ranking is analysed."""

Test: TypeAlias = tuple[PolypDataset, str, str]
"""Dataset, split and part on which models are compared."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale of the study means."""

    recipe: str
    encoders: dict[str, str] = field(default_factory=dict)
    """Short encoder name of a row -> timm name that stands in for it."""
    synthetic: SyntheticOptions = field(default_factory=SyntheticOptions)


SCALES = {
    "full": Scale(recipe="finetune", synthetic=SyntheticOptions(count=1000, size=None)),
    "small": Scale(
        recipe="finetune_small",
        encoders={"resnet50": STARTER_ENCODER, "vit_base": "vit_tiny_patch16_224"},
        synthetic=SyntheticOptions(count=1000),
    ),
    "smoke": Scale(
        recipe="smoke",
        encoders={"resnet50": "resnet18", "vit_base": "vit_tiny_patch16_224"},
        synthetic=SyntheticOptions(count=150, size=(192, 192)),
    ),
}


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What to compare, on what, and where to put it."""

    output: Path
    scale: str = "smoke"
    models: tuple[str, ...] = ()
    """Rows; none means all twelve."""
    in_distribution: str = "synthetic_a"
    out_of_distribution: str = "synthetic_b"
    in_source: Path | None = None
    out_source: Path | None = None
    in_mask_values: str | None = None
    """Which values of the masks are polyp, as ``open_dataset`` takes them."""
    out_mask_values: str | None = None
    split: str = "reference"
    overrides: tuple[str, ...] = ()
    encoder_weights: Mapping[str, str] = field(default_factory=dict)
    """Model id or short name -> weights, as ``build_model`` takes them."""
    start_from_available: bool = False
    allow_partial: bool = False
    """Whether parts of the datasets will do."""
    limit: int | None = None
    """Test on the first so many images of each set only."""


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """What a row's encoder starts from, and how the tables say it."""

    source: str
    as_published: bool
    """Whether it is the row's own pretraining."""
    label: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the plan, ready to run."""

    entry: ZooEntry
    recipe: Recipe
    start: Initialisation


def plan_jobs(plan: StudyPlan) -> list[Job]:
    """Rows, recipes and starting weights of a plan. Raises UsageError before any work for whatever is wrong."""
    if plan.scale not in SCALES:
        raise unknown_name("scale", plan.scale, SCALES)
    scale = SCALES[plan.scale]
    rows = [zoo.get(name) for name in plan.models] or list(zoo.ZOO)
    given = _given_weights(plan.encoder_weights)
    unused = set(given) - {row.model_id for row in rows}
    if unused:
        raise UsageError(f"--encoder-weights for {', '.join(sorted(unused))}, which this study does not include")
    jobs = []
    for row in rows:
        stand_in = [f"model.encoder={scale.encoders[row.encoder]}"] if row.encoder in scale.encoders else []
        recipe = load_recipe(scale.recipe, overrides=[*stand_in, *plan.overrides])
        start = _choose_start(row, recipe, given.get(row.model_id))
        # Rows that share a start would otherwise be copies of each other.
        if scale.encoders:
            recipe = recipe.model_copy(update={"seed": recipe.seed + zoo.rows().index(row)})
        elif not start.as_published and row.model_id not in given:
            recipe = recipe.model_copy(update={"seed": recipe.seed + 1 + zoo.rows().index(row)})
        jobs.append(Job(entry=row, recipe=recipe, start=start))
    missing = [job.entry.model_id for job in jobs if not job.start.as_published]
    if plan.scale == "full" and missing and not plan.start_from_available:
        raise UsageError(
            f"no pretraining weights for {', '.join(missing)}: give each by --encoder-weights MODEL=FILE, or accept a "
            "random start, which the tables will state, with --start-from-available. `polypseg models` says where each "
            "is published"
        )
    return jobs


def _given_weights(pairs: Mapping[str, str]) -> dict[str, str]:
    return {zoo.get(name).model_id: weights for name, weights in pairs.items()}


def _choose_start(row: ZooEntry, recipe: Recipe, given: str | None) -> Initialisation:
    """The weights that a row starts from at this scale; never a silent substitute."""
    wanted = f"{zoo.METHODS[row.method]}, {zoo.CORPORA[row.corpus]}"
    if given is not None:
        return Initialisation(source=given, as_published=given != RANDOM, label=f"{wanted} (given: {Path(given).name})")
    if row.method == "none":
        return Initialisation(source=RANDOM, as_published=True, label="random, as the row says")
    if recipe.model.encoder is None and row.upstream.timm:
        return Initialisation(source=f"timm:{row.upstream.timm}", as_published=True, label=wanted)
    starter = recipe.model.encoder == STARTER_ENCODER and (row.method, row.corpus) == (
        "supervised",
        "imagenet1k",
    )
    if starter and starter_installed(STARTER_ENCODER):
        return Initialisation(source="starter", as_published=True, label=f"{wanted} (starter package)")
    return Initialisation(source=RANDOM, as_published=False, label=f"RANDOM: no {wanted} at this scale")


def run_study(plan: StudyPlan) -> Path:
    """Run a plan to its report; return the report's path. A second call continues an interrupted study.

    Raises UsageError for a wrong plan or several processes, and whatever training and evaluation raise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "a study runs in one process. At full scale on real frames, train rows in several with `accelerate launch "
            f"training_scripts/finetune.py --output {plan.output}/runs/<model id>` and the study's dataset, split, "
            "--set and weights; the study then continues from them"
        )
    jobs = plan_jobs(plan)
    options = SCALES[plan.scale].synthetic
    how: dict[str, Any] = {"synthetic_options": options, "allow_partial": plan.allow_partial}
    inside = open_dataset(plan.in_distribution, source=plan.in_source, mask_values=plan.in_mask_values, **how)
    outside = open_dataset(plan.out_of_distribution, source=plan.out_source, mask_values=plan.out_mask_values, **how)
    tests = _tests(plan, inside, outside)  # a wrong split fails here, before any work
    with sole_writer(plan.output):
        return _run_jobs(jobs, plan, tests)


def _run_jobs(jobs: Sequence[Job], plan: StudyPlan, tests: Sequence[Test]) -> Path:
    console = Console()
    for number, job in enumerate(jobs, start=1):
        console.print(
            f"[bold]{number}/{len(jobs)} {job.entry.model_id}[/bold]  start: {job.start.label}",
            highlight=False,
        )
        _run_job(job, plan, tests)
    report = write_report(plan, jobs, tests, console=console)
    console.print(
        f"\nmodels:  {plan.output / 'runs'}\nfigures: {plan.output / 'figures'}\nreport:  {report}\n"
        f"next:    {_next_step(plan, jobs, report)}",
        soft_wrap=True,
        highlight=False,
    )
    return report


def _next_step(plan: StudyPlan, jobs: Sequence[Job], report: Path) -> str:
    """What to do after this study, in one line."""
    opened = f"open {report} in a browser; then "
    if plan.in_distribution.startswith("synthetic_"):
        return opened + (
            "do the same on real frames: `polypseg data list` says where they are, and `polypseg study --scale small "
            "--in-distribution kvasir_seg --out-of-distribution cvc_clinicdb --output runs/small` continues"
        )
    best = plan.output / "runs" / jobs[0].entry.model_id / "best"
    return opened + f"outline your own frames: `polypseg segment FRAMES --model {best} --output masks`"


def _tests(plan: StudyPlan, inside: PolypDataset, outside: PolypDataset) -> list[Test]:
    """The in- and the out-of-distribution test."""
    parts = inside.split(plan.split)
    if not {"train", "validation", "test"} <= set(parts):
        raise UsageError(
            f"split {plan.split!r} has the parts {', '.join(parts)}: a study needs train, validation and test"
        )
    return [(inside, plan.split, "test"), (outside, "full", "full")]


def _manifest(plan: StudyPlan, test: Test) -> SplitManifest:
    dataset, split, part = test
    return name_partial(kept_manifest(dataset, split=split, part=part, limit=plan.limit), dataset)


def _receipt_path(plan: StudyPlan, job: Job, test: Test) -> Path:
    return receipt_path(plan.output / "results", job.entry.model_id, _manifest(plan, test), at_operating_point=False)


def _run_job(job: Job, plan: StudyPlan, tests: Sequence[Test]) -> None:
    """Train one row and test it on both sets, skipping what is done already."""
    run_dir = plan.output / "runs" / job.entry.model_id
    finished = run_is_finished(run_dir, job.recipe, start=describe_source(job.start.source))
    if finished and all(_is_current(plan, job, test) for test in tests):
        return
    AcceleratorState._reset_state()
    accelerator = make_accelerator(job.recipe.training.precision, run_dir=run_dir)
    network = build_model(job.entry, job.recipe, encoder_weights=job.start.source)
    finetune(network, tests[0][0], job.recipe, accelerator, run_dir=run_dir, split=plan.split, resume=True)
    del network
    pending = [test for test in tests if not _is_current(plan, job, test)]
    if not pending:
        return
    model, processor = load_model(str(run_dir / "best"))
    source = ModelPredictions(name=job.entry.model_id, model=model, processor=processor, device=accelerator.device)
    for test in pending:
        manifest, seen = check_seen(run_dir / "best", _manifest(plan, test), rule="report")
        masks = plan.output / "results" / job.entry.model_id / "masks" / test[0].spec.name
        result = score_predictions(
            source, test[0], conventions=(CONVENTION,), manifest=manifest, seen=seen, masks=masks
        )
        result.write(plan.output / "results")


def _weights_digest(plan: StudyPlan, job: Job) -> str:
    weights = plan.output / "runs" / job.entry.model_id / "best" / "model.safetensors"
    return file_sha256(weights)


def _is_current(plan: StudyPlan, job: Job, test: Test) -> bool:
    """Whether a receipt exists for just these weights and just these images."""
    path = _receipt_path(plan, job, test)
    if not path.is_file():
        return False
    receipt = read_receipt(path)
    same_weights = receipt.model_sha256 == _weights_digest(plan, job)
    return same_weights and receipt.dataset.manifest == _manifest(plan, test).digest


# -- the report -------------------------------------------------------------------------------------------------------


def rank(values: dict[str, float]) -> dict[str, int]:
    """Rank of each key by value, 1 for the greatest; ties share the better rank."""
    return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the receipts of several models on both sets say."""

    results: Mapping[str, Sequence[Receipt]]
    """Model id -> its (in-distribution, out-of-distribution) receipts."""
    gaps: tuple[Gap, ...]
    """Of the Dice, one a model, in the order of ``results``."""
    change: RankChange | None
    """Of the ranking by Dice; None for fewer than RANKED models."""

    @classmethod
    def of(cls, results: Mapping[str, Sequence[Receipt]]) -> "Comparison":
        """Compare receipts of the same images. Raises UsageError where they are of different ones."""
        inside, outside = (_dice(results, where) for where in (0, 1))
        change = analyse_rank_change(inside, outside) if len(results) >= RANKED else None
        return cls(results=results, gaps=tuple(generalisation_gaps(inside, outside)), change=change)

    def rows(self, starts: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row a model: start, both sets' four means, the Dice's effective n, its gap, both ranks and the change.

        Every mean and gap has its interval by cluster. A positive change of rank is a rise.
        """
        dice = {name: [result.mean_dice for result in pair] for name, pair in self.results.items()}
        inside, outside = (rank({name: pair[k] for name, pair in dice.items()}) for k in (0, 1))
        rows = []
        for (name, pair), gap in zip(self.results.items(), self.gaps, strict=True):
            row: dict[str, Any] = {"model": name, "start": starts[name]}
            for where, result in zip(("in", "out"), pair, strict=True):
                for metric in METRICS:
                    value = result.stated[metric]
                    row |= {f"{where}_m{metric}": value.mean}
                    row |= {f"{where}_m{metric}_low": value.low, f"{where}_m{metric}_high": value.high}
                row[f"{where}_effective_n"] = result.stated["dice"].effective_size
            row |= gap.gap.cells("gap_mdice")
            row |= {"rank_in": inside[name], "rank_out": outside[name], "rank_change": inside[name] - outside[name]}
            rows.append(row)
        return rows


def _dice(results: Mapping[str, Sequence[Receipt]], where: int) -> ScoreSet:
    return read_score_set({name: [pair[where]] for name, pair in results.items()}, metric=f"{CONVENTION}.dice")


def write_report(plan: StudyPlan, jobs: Sequence[Job], tests: Sequence[Test], *, console: Console) -> Path:
    """Tables, figures and ``report.html`` from the receipts on disk; prints the table too."""
    results = {job.entry.model_id: [read_receipt(_receipt_path(plan, job, test)) for test in tests] for job in jobs}
    comparison = Comparison.of(results)
    labels = {job.entry.model_id: job.entry.short_name for job in jobs}
    rows = comparison.rows({job.entry.model_id: job.start.label for job in jobs})
    manifests = [_manifest(plan, test) for test in tests]
    titles = [f"{dataset.spec.title}, {split} {part}" for dataset, split, part in tests]
    note = _caveat(plan, jobs, tests)
    figures = plan.output / "figures"
    dice = {name: [result.per_image("dice") for result in pair] for name, pair in results.items()}
    short = [dataset.spec.title for dataset, _, _ in tests]
    plotting.plot_dice_distributions(
        dice, labels=labels, titles=short, note=note, path=figures / "dice_distributions.png"
    )
    ranks = {row["model"]: (row["rank_in"], row["rank_out"]) for row in rows}
    plotting.plot_rank_changes(ranks, labels=labels, titles=short, note=note, path=figures / "rank_changes.png")
    _draw_overlays(plan, _drawn_jobs(jobs, rows), tests, labels=labels, note=note)
    _print_table(console, rows, labels, titles=titles, note=note)
    write_csv(plan.output / "comparison.csv", rows)
    write_json(
        plan.output / "study.json",
        {
            "scale": plan.scale,
            "tests": titles,
            "rows": rows,
            "interval": BY_CLUSTER,
            "rank_change": None if comparison.change is None else agreement_row(comparison.change.agreement),
            "caveat": note,
            "environment": environment_record(),
        },
    )
    inside, outside = (f"{m.dataset}.{m.split}.{m.part}" for m in manifests)
    return write_page(
        plan.output / "results",
        plan.output / "report.html",
        title=f"{len(jobs)} model{'s' if len(jobs) != 1 else ''} at {plan.scale} scale",
        inside=inside,
        outside=outside,
        masks=plan.output / "results",
        datasets={dataset.spec.name: dataset for dataset, _, _ in tests},
    )


def _drawn_jobs(jobs: Sequence[Job], rows: Sequence[Mapping[str, Any]]) -> list[Job]:
    """The best row of each kind of encoder on the second test: as many masks as a picture shows at legible size."""
    places = {row["model"]: row["rank_out"] for row in rows}
    best: dict[str, Job] = {}
    for job in sorted(jobs, key=lambda job: places[job.entry.model_id]):
        best.setdefault(job.entry.encoder, job)
    return list(best.values())


def _caveat(plan: StudyPlan, jobs: Sequence[Job], tests: Sequence[Test]) -> str:
    """What every table and figure must say about itself."""
    parts = [f"{plan.scale} scale, {jobs[0].recipe.name} recipe, one training run per row: no claim of differences"]
    if any(dataset.spec.name.startswith("synthetic_") for dataset, _, _ in tests):
        parts.append("SYNTHETIC frames: no statement about patients")
    if SCALES[plan.scale].encoders:
        parts.append("small encoders stand in for ResNet50 and ViT-B")
    substituted = sum(not job.start.as_published for job in jobs)
    if substituted:
        parts.append(
            f"{substituted} of {len(jobs)} rows start at random for want of weights: pretraining is not compared"
        )
    return "; ".join(parts) + "."


def _draw_overlays(
    plan: StudyPlan,
    jobs: Sequence[Job],
    tests: Sequence[Test],
    *,
    labels: dict[str, str],
    note: str,
) -> None:
    """Masks of every model on the first test frames of each set."""
    chosen = [
        (dataset, record_id) for dataset, split, part in tests for record_id in dataset.split(split)[part][:SAMPLES]
    ]
    pairs = [dataset.pair(dataset.by_id[record_id]) for dataset, record_id in chosen]
    frames = [frame for frame, _ in pairs]
    predictions = {}
    for job in jobs:
        model, processor = load_model(str(plan.output / "runs" / job.entry.model_id / "best"))
        predictions[labels[job.entry.model_id]] = predict_masks(model, processor, frames)
    shown = [_shrink(frame, truth) for frame, truth in pairs]
    small = {
        name: [np.asarray(Image.fromarray(mask).resize(shown[i][0].size)) for i, mask in enumerate(masks)]
        for name, masks in predictions.items()
    }
    plotting.plot_overlays(
        [frame for frame, _ in shown],
        [truth for _, truth in shown],
        small,
        captions=[f"{dataset.spec.title}\n{record_id[:14]}" for dataset, record_id in chosen],
        note=f"Line: truth. Filled: prediction. {note}",
        path=plan.output / "figures" / "overlays.png",
    )


def _shrink(frame: Image.Image, truth: NDArray[np.uint8]) -> tuple[Image.Image, NDArray[np.uint8]]:
    """At most 256 pixels a side, for figures."""
    factor = min(1.0, 256 / max(frame.size))
    size = (max(1, round(frame.width * factor)), max(1, round(frame.height * factor)))
    return frame.resize(size), np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))


def _print_table(
    console: Console,
    rows: Sequence[dict[str, Any]],
    labels: dict[str, str],
    *,
    titles: Sequence[str],
    note: str,
) -> None:
    ranked = sorted(rows, key=lambda row: row["rank_out"])
    columns = [
        Column("model", "model", labels.__getitem__),
        *(
            Column(title, key, "{:.3f}".format)
            for title, key in (
                ("mDice in", "in_mdice"),
                ("mIoU in", "in_miou"),
                ("mDice out", "out_mdice"),
                ("mIoU out", "out_miou"),
            )
        ),
        Column("rank in", "rank_in"),
        Column("out", "rank_out"),
        Column("diff", "rank_change", "{:+d}".format),
    ]
    table = Table(columns=columns, records=ranked, title=f"in: {titles[0]}   out: {titles[1]}", caption=note)
    console.print(table.rich(no_wrap=True))
