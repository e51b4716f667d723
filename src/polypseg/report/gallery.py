"""Pictures of telling cases, only of datasets whose terms allow showing them; of the others, ids and scores."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.catalog import DATASETS, is_synthetic_name, may_be_public
from polypseg.data.polyps import PolypDataset, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.metrics import pixel_counts, standard_scores
from polypseg.evaluation.receipt import Receipt, Test
from polypseg.report.receipts import Material, entry_of
from polypseg.report.wording import number

SIDE = 360
"""Longest side of a picture in pixels."""
QUALITY = 80
_SAME_IMAGES = (
    "Images: HyperKvasir, segmented images (Borgli et al., HyperKvasir, Scientific Data 7:283, 2020), CC BY 4.0; made "
    "smaller and outlined here. The same images are published as Kvasir-SEG for research and education only: the two "
    "statements conflict, and they are shown under the first."
)
ATTRIBUTIONS = {"kvasir_seg": _SAME_IMAGES, "hyperkvasir_segmented": _SAME_IMAGES}
"""Sets whose images are also published under terms that allow showing them -> what must stand beside the pictures."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A mask's outline on a picture, as an SVG path."""

    name: str
    kind: str
    """CSS class."""
    path: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image of a test that says something."""

    why: str
    id: str
    scores: Sequence[tuple[str, str]]
    """Model and Dice, as written."""
    width: int = 0
    height: int = 0
    picture: str = ""
    """JPEG as a data URI; empty where none may be shown."""
    outlines: Sequence[Outline] = ()


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The cases of one test."""

    title: str
    note: str
    """Attribution, or why there is no picture."""
    cases: Sequence[Case]


def permission(dataset: str) -> str | None:
    """What must stand beside pictures of a dataset; None where its terms do not allow them."""
    spec = DATASETS.get(dataset)
    if dataset in ATTRIBUTIONS:
        return ATTRIBUTIONS[dataset]
    if spec is None or not may_be_public(spec):
        return None
    return f"Images: {spec.title}{f' ({spec.citation})' if spec.citation else ''}, {spec.license}."


def build_galleries(
    material: Material,
    *,
    masks: Path | None,
    sources: Mapping[str, Path],
    mask_values: Mapping[str, str] | None = None,
    datasets: Mapping[str, PolypDataset] | None = None,
) -> list[Gallery]:
    """The telling cases of both tests of the comparison.

    Pictures need the predicted masks, the dataset (open, by its source, or synthetic) and its terms. Raises UsageError
    for a source of another dataset or masks of other predictions than the receipts'.
    """
    opened = dict(datasets or {})
    unknown = {*sources, *opened} - {test[0] for test in material.tests}
    if unknown:
        raise UsageError(f"no receipt is of the dataset {min(unknown)!r}, for which a source is given")
    tests = [test for test in (material.inside, material.outside) if test in material.tests]
    for name in {test[0] for test in tests} - set(opened):
        if masks is not None and permission(name) and (name in sources or is_synthetic_name(name)):
            values = (mask_values or {}).get(name)
            opened[name] = open_dataset(name, source=sources.get(name), allow_partial=True, mask_values=values)
    return [_gallery(material, test, masks=masks, dataset=opened.get(test[0])) for test in tests]


def _gallery(material: Material, test: Test, *, masks: Path | None, dataset: PolypDataset | None) -> Gallery:
    attribution = permission(test[0])
    chosen = [material.label(model) for model in chosen_models(material, test)]
    seeds = {material.label(m): material.used(m, test) for m in material.models if material.used(m, test)}
    dice = np.stack([np.mean([r.per_image("dice") for r in used], axis=0) for used in seeds.values()])  # (M, N)
    ids = [row.id for row in next(iter(seeds.values()))[0].images]
    drawn = attribution is not None and masks is not None and dataset is not None
    cases = []
    for why, place in telling_images(dice):
        case = Case(why=why, id=ids[place], scores=_scores(seeds, chosen, dice[:, place]))
        if drawn and dataset is not None and masks is not None:
            case = _with_picture(case, dataset, {m: seeds[m][0] for m in chosen}, masks=masks)
        cases.append(case)
    if attribution is None:
        title = material.test_title(test).split(",", maxsplit=1)[0]
        note = f"No pictures: the terms of {title} do not allow publishing its images."
    else:
        note = attribution if drawn else "No pictures: give the predicted masks and the dataset’s source to have them."
    return Gallery(title=material.test_title(test), note=note, cases=cases)


def chosen_models(material: Material, test: Test) -> tuple[str, ...]:
    """The best model of each kind of encoder by mean Dice on the test: those whose outlines are drawn."""
    means = {
        model: float(np.mean([r.per_image("dice").mean() for r in material.used(model, test)]))
        for model in material.models
        if material.used(model, test)
    }
    best: dict[str, str] = {}
    for model in sorted(means, key=lambda m: -means[m]):
        entry = entry_of(model)
        best.setdefault(entry.encoder if entry else model, model)
    return tuple(best.values())[:2]


def telling_images(dice: NDArray[np.float64]) -> list[tuple[str, int]]:
    """Scores (M, N) -> reason and image: two each of the best, the middle, the worst and the most disputed.

    One model disputes nothing: of it the four worst are told.
    """
    mean, spread = dice.mean(axis=0), dice.std(axis=0)
    order, middle = np.argsort(-mean, kind="stable"), dice.shape[1] // 2
    groups = {
        "best": order[:2],
        "median": order[max(0, middle - 1) : middle + 1],
        "worst": order[::-1][: 2 if len(dice) > 1 else 4],
        "most disputed": np.argsort(-spread, kind="stable")[: 2 if len(dice) > 1 else 0],
    }
    found: dict[int, str] = {}
    for why, places in groups.items():
        for place in places.tolist():
            found[place] = f"{found[place]}, {why}" if place in found else why
    return [(why, place) for place, why in found.items()]


def _scores(
    seeds: Mapping[str, Sequence[Receipt]], chosen: Sequence[str], dice: NDArray[np.float64]
) -> list[tuple[str, str]]:
    by_model = dict(zip(seeds, dice, strict=True))
    shown = [(model, number(by_model[model], digits=2)) for model in chosen]
    if len(by_model) < 2:
        return shown
    return [*shown, (f"all {len(by_model)}", f"{number(dice.mean(), digits=2)} ± {number(dice.std(), digits=2)}")]


def _with_picture(case: Case, dataset: PolypDataset, chosen: Mapping[str, Receipt], *, masks: Path) -> Case:
    if case.id not in dataset.by_id:
        raise UsageError(f"{dataset.source.path} has no image {case.id}: give the source that the receipts are of")
    frame, truth = dataset.pair(dataset.by_id[case.id])
    factor = min(1.0, SIDE / max(frame.size))
    width, height = (max(1, round(side * factor)) for side in frame.size)
    jpeg = io.BytesIO()
    frame.resize((width, height), Image.Resampling.LANCZOS).save(jpeg, format="JPEG", quality=QUALITY, optimize=True)
    outlines = [Outline(name="truth", kind="truth", path=outline(truth, factor))]
    for kind, (model, receipt) in zip(("first", "second"), chosen.items(), strict=False):
        mask = read_mask(masks / receipt.name / "masks" / dataset.spec.name / f"{case.id}.png", truth, case.id, receipt)
        seed = "" if receipt.seed is None else f", seed {receipt.seed}"
        outlines.append(Outline(name=model + seed, kind=kind, path=outline(mask, factor)))
    return Case(
        why=case.why,
        id=case.id,
        scores=case.scores,
        width=width,
        height=height,
        picture="data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(),
        outlines=outlines,
    )


def read_mask(path: Path, truth: NDArray[np.uint8], record_id: str, receipt: Receipt) -> NDArray[np.uint8]:
    """The predicted mask (H, W) of a receipt's image. Raises UsageError unless its Dice is the receipt's."""
    try:
        with Image.open(path) as image:
            mask = np.asarray(image.convert("1"), dtype=np.uint8)
    except OSError as error:
        raise PolypSegError(f"cannot read {path}: evaluate again with --save-masks") from error
    stated = dict(zip((row.id for row in receipt.images), receipt.per_image("dice"), strict=True))[record_id]
    counts = pixel_counts(mask.astype(bool), truth.astype(bool)) if mask.shape == truth.shape else None
    if counts is None or abs(float(standard_scores(*counts)["dice"]) - stated) > 1e-6:
        raise UsageError(f"{path} is not the mask that {receipt.path} scored: give the masks of the same evaluation")
    return mask


def outline(mask: NDArray[np.uint8], factor: float) -> str:
    """The outlines of a 0/1 mask (H, W), scaled, as an SVG path; simplified by at most half a pixel of the picture."""
    contours, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for contour in contours:
        points = (cv2.approxPolyDP(contour, 0.5 / factor, True)[:, 0] + 0.5) * factor
        parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)
