"""The report's page: what the template is given, and the template rendered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from polypseg import zoo
from polypseg.evaluation.receipt import ClusterCounts, Receipt, Test
from polypseg.evaluation.receipt_reading import seen_words
from polypseg.provenance.license import ModelLicense, model_license
from polypseg.provenance.origin import RANDOM_MARK, WeightsOrigin
from polypseg.report.analysis import Analysis
from polypseg.report.answer import answer_sentences, noise_sentences
from polypseg.report.document import render_document
from polypseg.report.figures import Picture
from polypseg.report.gallery import Gallery
from polypseg.report.other_results import Document
from polypseg.report.receipts import Material, entry_of
from polypseg.report.tables import METRIC_TITLES, metric_cell, slug
from polypseg.report.wording import no_verdict, number, rank_change_verdict
from polypseg.tables import Cell, Column, Table

WORST = 5
"""Images of each test named as the worst of a model."""
_ENCODERS = {"resnet50": "ResNet50", "vit_base": "ViT-B"}
_UNKNOWN = "Predictions of weights that the receipt does not record."
_DECODERS = {"deeplabv3plus": "DeepLabV3+", "dpt": "DPT"}


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What the page says of one row."""

    anchor: str
    name: str
    title: str
    summary: str
    shortcomings: Sequence[str]
    license: ModelLicense | None
    weights: Sequence[tuple[str, str]]
    """Seed and digest."""
    seen: Sequence[tuple[str, str]]
    """Test, and what the model saw of it."""
    scores: Table
    worst: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """Test, and the images with the least Dice, as written."""


def render_page(
    analysis: Analysis,
    *,
    title: str,
    tables: Mapping[str, Table],
    pictures: Mapping[str, Picture],
    galleries: Sequence[Gallery],
    reading: str,
    documents: Mapping[str, Sequence[Document]],
) -> str:
    """The whole report as one HTML document without any reference to another file."""
    material = analysis.material
    verdict, sentences = _verdict(analysis)
    return render_document(
        "report.html.jinja",
        title=title,
        scale=scale_sentences(material),
        small=any(r.origin.scale == "small" for r in material.receipts),
        answer=answer_sentences(analysis),
        noise=noise_sentences(analysis),
        samples=sample_table(analysis),
        counts={
            "models": len(material.models),
            "receipts": len(material.receipts),
            "seeds": sorted({len(material.used(m, t)) for m in material.models for t in material.tests} - {0}),
        },
        bootstrap=material.receipts[0].bootstrap,
        compared_seeds=analysis.seeds,
        tables=tables,
        pictures=pictures,
        verdict=verdict,
        sentences=[sentence for sentence in sentences if sentence],
        galleries=galleries,
        reading=reading,
        documents=documents,
        models=[model_section(analysis, model) for model in material.models],
        missing=material.missing(),
        definitions=material.receipts[0].definitions,
    )


def _verdict(analysis: Analysis) -> tuple[str, tuple[str, ...]]:
    """Whether the ranking changes, and why; that nothing is claimed, for one training run a row; empty for one row."""
    if analysis.change is None:
        return "", ()
    if not analysis.claims:
        return no_verdict(analysis.change)
    return rank_change_verdict(analysis.change, label=analysis.material.label, certain=analysis.certain_flips())


def scale_sentences(material: Material) -> list[str]:
    """What stands in for the study's encoders and corpora, where the weights are not of full size."""
    marked = [material.label(model) for model in material.models if model in material.random_starts]
    stars = (
        [f"Rows marked {RANDOM_MARK} started at random, for lack of the weights that they are named after."]
        if marked
        else []
    )
    small = [r for r in material.receipts if r.origin.content and not r.origin.full_size]
    if not small:
        return stars
    stand_ins = [f"{material.names[key]} for {title}" for key, title in _ENCODERS.items() if key in material.names]
    corpora = dict.fromkeys(_corpus(receipt.origin) for receipt in small)
    pretrained = [corpus for corpus in corpora if corpus]
    return [
        f"Small encoders stand in for the study’s: {', '.join(stand_ins)}." if stand_ins else "Small encoders.",
        f"Their encoders started from: {'; '.join(pretrained)}." if pretrained else "All encoders started at random.",
        *stars,
        "No number here is one of the full-size models of the same name.",
    ]


def _corpus(origin: WeightsOrigin) -> str:
    """What an encoder was pretrained on, in words; empty for a random start."""
    run = origin.pretraining
    if run:
        name = run.corpus or run.source or "frames not recorded"
        return f"pretraining on {name}" + (f" ({run.frames:,} frames)" if run.frames else "")
    return "" if origin.random_start else origin.encoder_initialisation or "weights not recorded"


def sample_table(analysis: Analysis) -> Table:
    """What was tested on: images, independent units, what they are worth."""
    material = analysis.material

    def name(test: Test) -> Cell:
        inside, outside = test == material.inside, test == material.outside
        role = "in distribution" if inside else "out of distribution" if outside else ""
        return Cell(material.test_title(test), role)

    def clusters(test: Test) -> ClusterCounts:
        return next(receipt for receipt in material.receipts if receipt.test == test).clusters

    def images(test: Test) -> Cell:
        merged = clusters(test).repeats_merged
        return Cell(str(clusters(test).images), f"{merged} repeats merged" if merged else "")

    def drawn_as(test: Test) -> str:
        unit = "video clips" if clusters(test).by == "clip" else "images"
        return f"{clusters(test).clusters} {unit}"

    def worth(test: Test) -> str:
        means = [mean for (_, t, metric), mean in analysis.means.items() if t == test and metric == "dice"]
        sizes = [mean["effective_size"] for mean in means]
        return "–".join(dict.fromkeys(f"{value:.0f}" for value in (min(sizes), max(sizes)))) if sizes else "–"

    def models(test: Test) -> str:
        return str(sum(bool(material.used(model, test)) for model in material.models))

    return Table(
        name="samples",
        caption="What was tested on. Worth: effective sample size for mean Dice, least to greatest over models. "
        "Seen: images that a model saw in training or whose near-duplicate or clip it saw, at most.",
        columns=[
            Column("Test", "", name, numeric=False),
            Column("Images", "", images),
            Column("Drawn as", "", drawn_as),
            Column("Worth", "", worth),
            Column("Models", "", models),
            Column("Seen", "", lambda test: _seen_most(material, test)),
        ],
        records=material.tests,
    )


def _seen_most(material: Material, test: Test) -> str:
    """The greatest number of a test's images that a model's passport collides with."""
    counts = [receipt.seen_images for receipt in material.receipts if receipt.test == test]
    known = [count for count in counts if count is not None]
    if not known:
        return "not checked"
    return str(max(known)) if len(known) == len(counts) else f"{max(known)}, partly not checked"


def model_section(analysis: Analysis, model: str) -> ModelSection:
    """Start, recipe, license, weights, what it saw, its scores on every test and its worst images."""
    material = analysis.material
    receipts = material.of(model)
    first = receipts[0]
    origin = first.origin if first.origin.content else None
    weights = dict.fromkeys((str(r.seed), r.model_sha256 or "not recorded") for r in receipts)
    tests = [test for test in material.tests if material.used(model, test)]
    scored = [test for test in tests if test in material.polyp_tests]
    return ModelSection(
        anchor=slug("model", model),
        name=material.label(model),
        title=_row_title(first),
        summary=f"{origin.summary} {origin.own_pretraining}".replace("`", "").strip() if origin else _UNKNOWN,
        shortcomings=origin.shortcomings if origin else (),
        license=model_license(origin) if origin else None,
        weights=list(weights),
        seen=[(material.test_title(test), _seen(material.of(model, test))) for test in tests],
        scores=_scores_table(analysis, model, scored),
        worst=[(material.test_title(test), _worst(material.used(model, test))) for test in scored[:2]],
    )


def _row_title(receipt: Receipt) -> str:
    """The row in words, and the id of the weights that stand for it."""
    entry, model_id = entry_of(receipt.row), receipt.origin.model_id
    if entry is None:
        return "not a row of the table"
    corpus = "" if entry.corpus == "none" else f" on {zoo.CORPORA[entry.corpus]}"
    title = f"{_ENCODERS.get(entry.encoder, entry.encoder)} + {_DECODERS.get(entry.decoder, entry.decoder)}"
    stand_in = "" if receipt.origin.full_size else f"; in its place {model_id}"
    return f"{title}, {zoo.METHODS[entry.method]}{corpus}{stand_in}"


def _seen(receipts: Sequence[Receipt]) -> str:
    """What the weights are known to have seen of a test, once for all seeds that agree."""
    return ". ".join(dict.fromkeys(seen_words(receipt) for receipt in receipts))


def _scores_table(analysis: Analysis, model: str, tests: Sequence[Test]) -> Table:
    material = analysis.material

    def name(test: Test) -> Cell:
        used = material.used(model, test)
        return Cell(material.test_title(test), f"n = {len(used[0].images)}, seeds {len(used)}")

    def score(metric: str, test: Test) -> Cell:
        return metric_cell(analysis, test, metric, model)

    return Table(
        name=slug("scores", model),
        columns=[
            Column("Test", "", name, numeric=False),
            *(Column(title, "", partial(score, metric)) for metric, title in METRIC_TITLES.items()),
        ],
        records=tests,
    )


def _worst(used: Sequence[Receipt]) -> list[tuple[str, str]]:
    dice = np.mean([receipt.per_image("dice") for receipt in used], axis=0)
    places = np.argsort(dice, kind="stable")[:WORST]
    return [(used[0].images[place].id, number(float(dice[place]), digits=2)) for place in places.tolist()]
