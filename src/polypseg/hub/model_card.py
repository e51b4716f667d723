"""Model cards: every fact from the table, the weights' record and the receipts; what was not measured says so.

The template, templates/model_card.md.jinja, knows no model by name.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from polypseg import __version__, zoo
from polypseg.data.catalog import DATASETS, POPULATIONS, DatasetSpec, is_synthetic, may_be_public, population_of
from polypseg.data.splits import DESCRIPTIONS, pinned_split
from polypseg.errors import PolypSegError
from polypseg.evaluation.receipt import CONVENTION, Receipt, Test
from polypseg.evaluation.receipt_reading import LIMITS, alarm_words, cell_of, seen_words, size_of
from polypseg.files import write_text
from polypseg.hub.card_facts import (
    PICTURES,
    CardFacts,
    ComputeFacts,
    measured_facts,
    planned_facts,
)
from polypseg.hub.dataset_card import load_references, load_template
from polypseg.hub.markdown import all_plain, plain, python_string
from polypseg.provenance.license import DISCLAIMER, ModelLicense, model_license
from polypseg.provenance.origin import WeightsOrigin
from polypseg.recipe import Recipe
from polypseg.statistics.scores import METRICS
from polypseg.zoo import ZooEntry

NOT_EVALUATED = "not evaluated"
NOT_RECORDED = "not recorded"
EXPECTED_TESTS = (
    ("kvasir_seg", "reference", "test"),
    ("cvc_clinicdb", "full", "full"),
    ("cvc_clinicdb", "reference", "test"),
)
"""Tests that a reader of the study looks for; a card that lacks one says so."""
WORST = 5
"""Images of each test that a card names as the worst."""

_ENCODER_TITLES = {"resnet50": "ResNet50", "vit_base_patch16_224": "ViT-B/16"}
_DECODER_TITLES = {"deeplabv3plus": "DeepLabV3+", "dpt": "DPT"}
_DECODER_REFERENCES = {"deeplabv3plus": "chen2018deeplabv3plus", "dpt": "ranftl2021dpt"}
_ENCODER_REFERENCES = {"resnet": "he2015resnet", "vit_": "dosovitskiy2020vit", "efficientnet": "tan2019efficientnet"}
_METHOD_REFERENCES = {"moco_v3": "chen2021mocov3", "barlow_twins": "zbontar2021barlow", "mae": "he2021mae"}
_RECIPE_REFERENCES = {"augreg": "steiner2021augreg"}
"""Part of the name of published weights -> the paper of their training recipe."""
_CORPUS_HUB_IDS = {
    "imagenet1k": "ILSVRC/imagenet-1k",
    "imagenet1k_only": "ILSVRC/imagenet-1k",
    "hyperkvasir": "SimulaMet-HOST/HyperKvasir",
}
"""Sets that their own publishers have put on the Hub. Kvasir-SEG and CVC-ClinicDB are not among them."""
_METRIC_TITLES = {"dice": "mDice", "iou": "mIoU", "precision": "mPrecision", "recall": "mRecall"}
_SAME_IMAGES = {"hyperkvasir_segmented": "kvasir_seg"}


def render_card(facts: CardFacts) -> ModelCard:
    """The card of a model: metadata and text. What the model's files say of themselves is shown as plain text."""
    facts = _plain_facts(facts)
    license = model_license(facts.origin)
    metadata = _metadata(facts, license)
    body = load_template("model_card.md.jinja").render(
        facts=facts,
        origin=facts.origin,
        entry=facts.origin.entry,
        disclaimer=DISCLAIMER,
        license=license,
        title=_architecture_title(facts),
        repo_literal=python_string(facts.repo_id),
        revision_literal=python_string(facts.revision),
        pretraining=_pretraining_lines(facts),
        data=_data_facts(facts),
        recipe_rows=_recipe_rows(facts.recipe),
        tests=[_test_row(facts, test) for test in _tests(facts)],
        alarms=_alarm_lines(facts),
        result_notes=[_result_notes(result) for result in facts.results],
        failures=[_failures(result) for result in facts.with_polyps],
        convention=CONVENTION,
        intervals=list(dict.fromkeys(result.bootstrap.by_cluster for result in facts.results)),
        saw=_saw_lines(facts),
        collision=_split_collision(facts.origin.finetuning_dataset),
        test_caveats=_test_caveats(facts),
        references=[load_references()[key] for key in _reference_keys(facts)],
        pictures=[(name, *PICTURES[name]) for name in facts.widget_pictures],
        compute_lines=_compute_lines(facts.compute),
        version=__version__,
        not_evaluated=NOT_EVALUATED,
        metric_titles=[_METRIC_TITLES[name] for name in METRICS],
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _plain_facts(facts: CardFacts) -> CardFacts:
    """The facts with every text that comes from a file made plain; see ``markdown.plain``."""
    seen = tuple(
        replace(seen, stage=plain(seen.stage), description=plain(seen.description))
        for seen in (facts.passport.seen if facts.passport else ())
    )
    return replace(
        facts,
        origin=WeightsOrigin.of(all_plain(facts.origin.content)),
        encoder=plain(facts.encoder),
        decoder=plain(facts.decoder),
        organization=plain(facts.organization),
        revision=plain(facts.revision),
        results=tuple(Receipt.of(all_plain(result.content), path=result.path) for result in facts.results),
        passport=replace(facts.passport, seen=seen) if facts.passport else None,
    )


def _architecture_title(facts: CardFacts) -> str:
    decoder = _DECODER_TITLES.get(facts.decoder, facts.decoder)
    return f"{_ENCODER_TITLES.get(facts.encoder, facts.encoder)} + {decoder}"


def _metadata(facts: CardFacts, license: ModelLicense) -> ModelCardData:
    origin, entry = facts.origin, facts.origin.pretrained_entry
    results = _indexed_results(facts)
    start = origin.encoder_initialisation or ""
    base = start.removeprefix("timm:") if start.startswith("timm:") else ""
    if origin.kind == "converted" and entry:
        base = entry.upstream.timm
    extra: dict[str, Any] = {}
    if facts.widget_pictures:
        extra["widget"] = [
            {"src": name, "example_title": PICTURES[name][1], "output": {"url": PICTURES[name][0]}}
            for name in facts.widget_pictures
        ]
    return ModelCardData(
        license=license.identifier,
        license_name=license.name,
        license_link=license.link,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        base_model=f"timm/{base}" if base else None,
        datasets=[_CORPUS_HUB_IDS[entry.corpus]] if entry and _corpus_is_published(origin) else None,
        metrics=["dice", "iou"] if results else None,
        tags=_tags(facts, entry),
        model_name=origin.repo_name if results else None,
        eval_results=results or None,
        **extra,
    )


def _corpus_is_published(origin: WeightsOrigin) -> bool:
    """Whether the encoder saw the row's corpus: a pretraining run of one's own records its frames instead."""
    return not origin.pretraining


def _tags(facts: CardFacts, entry: ZooEntry | None) -> list[str]:
    trained_on = facts.origin.finetuning_dataset
    tested = [result.dataset.name for result in facts.results]
    tags = ["polyp-segmentation", "colonoscopy", "endoscopy", "medical", "research-only", "semantic-segmentation"]
    tags += [facts.encoder, facts.decoder]
    tags += [entry.method, entry.corpus] if entry else ["random-initialization"]
    tags += [trained_on.name] if trained_on else []
    tags += tested
    tags += (
        ["out-of-distribution"] if trained_on and any(not _is_at_home(facts.origin, name) for name in tested) else []
    )
    tags += [] if facts.origin.official else ["not-one-of-the-twelve"]
    tags += [facts.stage] if facts.stage != "published" else []
    return list(dict.fromkeys(tag.replace("_", "-").lower() for tag in tags))


def _is_at_home(origin: WeightsOrigin, dataset: str) -> bool:
    """Whether a dataset is the one of fine-tuning, under this or another name."""
    trained_on = origin.finetuning_dataset
    return trained_on is not None and _SAME_IMAGES.get(dataset, dataset) == trained_on.name


def _indexed_results(facts: CardFacts) -> list[EvalResult]:
    """The model-index: complete parts of real datasets only, with the numbers of the receipts."""
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Polyp segmentation",
            dataset_type=result.dataset.name,
            dataset_name=_title(result.test, dataset=result.dataset.title),
            dataset_config=result.dataset.split,
            dataset_split=result.dataset.part,
            dataset_args={
                "n": result.n,
                "content_id": result.dataset.content_id,
                "manifest": result.dataset.manifest,
            },
            metric_type=name,
            metric_name=f"{_METRIC_TITLES[name]} (mean over images, convention {CONVENTION})",
            metric_value=round(mean, 4),
        )
        for result in facts.with_polyps
        if is_quotable(result)
        for name in METRICS
        if (mean := result.stated[name].mean) is not None
    ]


def _title(test: Test, *, dataset: str | None = None) -> str:
    """A test in words; ``dataset`` where the table of datasets does not have it."""
    name, split, part = test
    title = DATASETS[name].title if name in DATASETS else dataset or name
    return f"{title}, all images" if (split, part) == ("full", "full") else f"{title}, {split} split, {part}"


def is_quotable(result: Receipt) -> bool:
    """Whether a result may stand where leaderboards read: real images, a whole part, not the training images."""
    part = result.dataset.part
    is_whole = not any(f"-{word}" in part for word in LIMITS)
    return not result.dataset.synthetic and is_whole and part not in ("train", "validation")


def _pretraining_lines(facts: CardFacts) -> list[str]:
    """Where the encoder's weights come from, one line a fact."""
    origin, entry = facts.origin, facts.origin.pretrained_entry
    if entry is None:
        return ["Pretraining: none; the encoder started from random weights."]
    if origin.own_pretraining:
        return [origin.own_pretraining]
    lines = [f"Pretraining: {zoo.METHODS[entry.method]} on {zoo.CORPORA[entry.corpus]}."]
    if origin.full_size:
        lines += [
            f"Published weights: {entry.upstream.location} ({entry.upstream.file_format}).",
            f"Their license: {entry.upstream.license}, stated at {entry.upstream.license_source}.",
        ]
        lines += [f"To know: {entry.notes}"] if entry.notes else []
        if entry.position_embedding != "learned":
            frozen = "" if entry.position_embedding_trainable else ", not moved by fine-tuning"
            lines.append(
                f"Position embedding: sine-cosine, as the pretraining had it (`{entry.position_embedding}`{frozen})."
            )
    else:
        lines.append(f"Start of the encoder, as recorded: {origin.encoder_initialisation}.")
    return lines


def _data_facts(facts: CardFacts) -> dict[str, Any]:
    """The training set and the corpus of pretraining, with what is known of their patients."""
    spec, entry = facts.origin.finetuning_dataset, facts.origin.pretrained_entry
    corpus = DATASETS["hyperkvasir_unlabelled"] if entry and entry.corpus == "hyperkvasir" else None
    return {
        "spec": spec,
        "population": population_of(spec) if spec else None,
        "synthetic": bool(spec and is_synthetic(spec)),
        "corpus": corpus if corpus and _corpus_is_published(facts.origin) else None,
        "corpus_population": population_of(corpus) if corpus else None,
    }


def _saw_lines(facts: CardFacts) -> list[str]:
    """What the passport lists, one line a stage."""
    return [
        f"{seen.stage}: {seen.description}"
        + (" (not listed)" if seen.manifest is None else f" ({len(seen.manifest.images)} images)")
        for seen in (facts.passport.seen if facts.passport else ())
    ]


def _recipe_rows(recipe: Recipe | None) -> list[tuple[str, str]]:
    """Setting -> value, for a table."""
    if recipe is None:
        return []
    training, schedule, augmentation = recipe.training, recipe.schedule, recipe.augmentation
    schedules = {
        "plateau": f"x {schedule.factor:g} after {schedule.patience} epochs without gain in validation Dice, "
        f"not below {schedule.min_learning_rate:g}",
        "one_cycle": f"one cycle, warm-up over {schedule.warmup:.0%} of the steps",
    }
    loss = f"{training.dice_weight:g} x soft Dice" + (
        f" + {training.bce_weight:g} x cross-entropy" if training.bce_weight else ""
    )
    if training.alarm_weight:
        loss += f" + {training.alarm_weight:g} x cross-entropy of the worst pixels of frames without polyp"
    return [
        ("recipe", f"`{recipe.name}`, seed {recipe.seed}"),
        ("epochs", str(training.epochs)),
        ("batch size", f"{training.total_batch_size} images a step, over all processes"),
        ("optimizer", f"AdamW, learning rate {training.learning_rate:g}, weight decay {training.weight_decay:g}"),
        ("schedule", schedules[schedule.kind]),
        ("loss", loss),
        ("precision asked for", {"no": "float32"}.get(training.precision, training.precision)),
        ("average of weights", f"decay {training.ema_decay:g}" if training.ema_decay else "none"),
        (
            "augmentation",
            f"flips, rotation to {augmentation.rotation:g} degrees, zoom {augmentation.scale[0]:g} to "
            f"{augmentation.scale[1]:g}, shift, shear, color jitter, blur",
        ),
        ("choice of the model", "best mean Dice on the validation part; test images play no part in it"),
    ]


def _tests(facts: CardFacts) -> list[Test]:
    """The tests of the card's table: those that the study has, then the others that there are results of."""
    trained_on = facts.origin.finetuning_dataset
    expected = [] if trained_on and is_synthetic(trained_on) else list(EXPECTED_TESTS)
    found = [result.test for result in facts.with_polyps]
    return list(dict.fromkeys([*expected, *found]))


def _test_row(facts: CardFacts, test: Test) -> dict[str, Any]:
    """One test for the table: its results, or none."""
    where = "in distribution" if _is_at_home(facts.origin, test[0]) else "out of distribution"
    matching = [result for result in facts.results if result.test == test]
    return {
        "title": _title(test, dataset=matching[0].dataset.title if matching else None),
        "where": where if facts.origin.finetuning_dataset else "not fine-tuned",
        "results": [
            {
                "n": result.n,
                "size": size_of(result),
                "cells": [cell_of(result.stated[metric]) for metric in METRICS],
                "seen": _seen_images(facts.origin, result),
            }
            for result in matching
        ],
    }


def _alarm_lines(facts: CardFacts) -> list[str]:
    """What is marked on frames without polyp, one line a test."""
    return [
        f"False alarms on {result.false_alarms.frames} {result.dataset.title}: {alarm_words(result.false_alarms)}."
        for result in facts.results
        if result.without_polyps and result.false_alarms is not None
    ]


def _seen_images(origin: WeightsOrigin, result: Receipt) -> int:
    """How many images of a result were training images, by the committed split lists."""
    if not _is_at_home(origin, result.dataset.name):
        return 0
    spec, stated = origin.finetuning_dataset, origin.finetuned_on or ""
    split = next((name for name in DESCRIPTIONS if name in re.split(r"[ /]", stated)), "")
    lists = pinned_split(spec.name, split) if spec else None
    training = set((lists or {}).get("train", []))
    return sum(image.id in training for image in result.images)


def _test_caveats(facts: CardFacts) -> list[tuple[str, str]]:
    """(title, caveat) of the test sets, but for the training set's, whose caveats stand with the training data."""
    names = [name for name in dict.fromkeys(test[0] for test in _tests(facts)) if not _is_at_home(facts.origin, name)]
    return [(DATASETS[n].title, caveat) for n in names if n in POPULATIONS for caveat in POPULATIONS[n].caveats]


def _result_notes(result: Receipt) -> dict[str, Any]:
    """How one receipt was made, and what the model saw of its images."""
    dataset, environment, repeats = result.dataset, result.environment, result.clusters.repeats_merged
    return {
        "title": _title(result.test, dataset=dataset.title),
        "repeats": f"; {repeats} of the images repeat another pixel by pixel and count once" if repeats else "",
        "saw": seen_words(result),
        "date": environment.created[:10],
        "revision": (environment.git_revision or NOT_RECORDED)[:12],
        "versions": ", ".join(
            f"{name} {environment.versions[name]}"
            for name in ("polypseg", "torch", "transformers")
            if name in environment.versions
        ),
        "weights": (result.model_sha256 or NOT_RECORDED)[:12],
        "images": dataset.manifest[:12],
        "receipt": result.digest[:12],
    }


def _failures(result: Receipt) -> dict[str, Any]:
    """What the per-image scores of one receipt, of frames with polyps, say about failures."""
    dice = dict(zip((image.id for image in result.images), result.per_image("dice").tolist(), strict=True))
    dataset = result.dataset
    return {
        "title": _title(result.test, dataset=dataset.title),
        "n": result.n,
        "worst": [(name, f"{dice[name]:.3f}") for name in sorted(dice, key=lambda name: (dice[name], name))[:WORST]],
        "missed": sum(image.true > 0 and image.intersection == 0 for image in result.images),
        "below_half": sum(value < 0.5 for value in dice.values()),
        "closed": dataset.name not in DATASETS or not may_be_public(DATASETS[dataset.name]),
    }


def _split_collision(spec: DatasetSpec | None) -> dict[str, Any] | None:
    """How the study's test part lies in the official training list, counted from the committed lists."""
    reference = pinned_split(spec.name, "reference") if spec else None
    official = pinned_split(spec.name, "official") if spec else None
    if spec is None or reference is None or official is None:
        return None
    shared = set(reference["test"]) & set(official["train"])
    return {"title": spec.title, "test": len(reference["test"]), "in_official_training": len(shared)}


def _reference_keys(facts: CardFacts) -> list[str]:
    """The works that a user of the model should cite: the study, data, pretraining, architecture."""
    entry, spec = facts.origin.pretrained_entry, facts.origin.finetuning_dataset
    keys = ["sanderson2024generalisability"]
    keys += (
        ["sanderson2024study"] if facts.origin.kind == "converted" or (entry and entry.corpus == "hyperkvasir") else []
    )
    names = [*([spec.name] if spec else []), *(test[0] for test in _tests(facts))]
    keys += [POPULATIONS[name].reference for name in names if name in POPULATIONS]
    if entry:
        keys += [_METHOD_REFERENCES[entry.method]] if entry.method in _METHOD_REFERENCES else []
        keys += [POPULATIONS["hyperkvasir_unlabelled"].reference] if entry.corpus == "hyperkvasir" else []
        if facts.origin.full_size:
            keys += [key for part, key in _RECIPE_REFERENCES.items() if part in entry.upstream.location]
    keys += [key for part, key in _ENCODER_REFERENCES.items() if part in facts.encoder]
    keys += [_DECODER_REFERENCES[facts.decoder]] if facts.decoder in _DECODER_REFERENCES else []
    return list(dict.fromkeys(keys))


def _compute_lines(compute: ComputeFacts) -> list[str]:
    hours = (
        NOT_RECORDED
        if compute.hours is None
        else f"{compute.hours:.1f} h, without validation (from the images a second of every epoch)"
    )
    return [
        f"Time of training: {hours}.",
        f"Hardware: {compute.hardware or NOT_RECORDED}; platform: {compute.platform or NOT_RECORDED}; computed in: "
        f"{compute.precision or NOT_RECORDED}.",
        f"Energy and carbon: {NOT_RECORDED}.",
    ]


# -- the repository's pages -------------------------------------------------------------------------------------------


def render_pages(results: Path, *, organization: str) -> dict[str, str]:
    """File name -> text: a card for every row of the table and for every model with results, and their index."""
    rows, extra = (
        [_facts_of_row(entry, results=results, organization=organization) for entry in table]
        for table in (zoo.ZOO, zoo.EXTRA)
    )
    known = {facts.origin.model_id for facts in [*rows, *extra]}
    folders = sorted(path for path in results.iterdir() if path.is_dir() and path.name not in known)
    measured = [measured_facts(folder, organization=organization) for folder in folders]
    pages = {f"{facts.origin.repo_name}.md": str(render_card(facts)) for facts in [*rows, *extra, *measured]}
    index = load_template("index.md.jinja").render(
        rows=[_index_row(facts) for facts in rows],
        extra=[_index_row(facts) for facts in extra],
        measured=[_index_row(facts) for facts in measured],
        tests=[_title(test) for test in EXPECTED_TESTS],
        disclaimer=DISCLAIMER,
    )
    return pages | {"README.md": index}


def _facts_of_row(entry: ZooEntry, *, results: Path, organization: str) -> CardFacts:
    """A row as it was measured, else as it is planned. Raises PolypSegError for results that may not bear its id."""
    folder = results / entry.model_id
    if not folder.is_dir():
        return planned_facts(entry, organization=organization)
    facts = measured_facts(folder, organization=organization)
    if facts.origin.suffix:
        what = "; ".join(facts.origin.shortcomings)
        raise PolypSegError(f"{folder} bears the id of a row but holds results of another model: {what}")
    return facts


def _index_row(facts: CardFacts) -> dict[str, Any]:
    entry = facts.origin.entry
    results = {result.test: result for result in facts.results}
    return {
        "name": facts.origin.repo_name,
        "short": entry.short_name if entry else "",
        "license": model_license(facts.origin).name or model_license(facts.origin).identifier,
        "title": _architecture_title(facts),
        "start": _pretraining_lines(facts)[0].removeprefix("Pretraining: ").rstrip("."),
        "cells": [
            f"{cell_of(results[test].stated['dice'])}, n = {size_of(results[test])}"
            if test in results
            else NOT_EVALUATED
            for test in EXPECTED_TESTS
        ],
    }


def write_pages(folder: Path, *, organization: str) -> list[Path]:
    """Write every page into ``folder`` (whose ``results`` they come from) and remove those of models that are gone."""
    pages = render_pages(folder / "results", organization=organization)
    for stale in folder.glob("*.md"):
        if stale.name not in pages:
            stale.unlink()
    return [write_text(folder / name, text) for name, text in pages.items()]
