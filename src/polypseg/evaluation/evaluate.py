"""Any source of predictions on any part of a dataset, measured once and scored by every convention by name."""

from collections import deque
from collections.abc import Collection, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from polypseg import zoo
from polypseg.data.catalog import is_synthetic_name
from polypseg.data.polyps import PolypDataset
from polypseg.errors import PolypSegError
from polypseg.evaluation.conventions import CONVENTIONS, choose_conventions, needed_measures
from polypseg.evaluation.image_metrics import TOLERANCE, ImageMeasures, largest_component, measure_image
from polypseg.evaluation.receipt import (
    BOOTSTRAP,
    RECEIPT,
    Layout,
    cluster_scores,
    describe,
    false_alarms,
    image_rows,
    pack_tables,
    receipt_path,
    save_receipt,
)
from polypseg.files import atomic_path, environment_record, write_csv
from polypseg.inference.operating_point import OPERATING_POINT_KEY
from polypseg.inference.prediction_source import PredictionSource, Probability
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin
from polypseg.provenance.passport import SeenCheck, SplitManifest, kept_manifest


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The measures of one source of predictions on one part of one dataset, and its scores by every convention."""

    name: str
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the predictions come from."""
    title: str
    """Of the dataset."""
    manifest: SplitManifest
    """The tested images, in order."""
    images: tuple[ImageMeasures, ...]
    largest: tuple[int, ...]
    """Pixels of each prediction's largest component."""
    conventions: tuple[str, ...] = tuple(CONVENTIONS)
    seen: SeenCheck = field(default_factory=lambda: SeenCheck(rule="refuse"))
    alarm_area: int = 1
    """Pixels from which a component on a frame without polyp is a false alarm."""

    @property
    def dataset(self) -> str:
        return self.manifest.dataset

    @property
    def split(self) -> str:
        return self.manifest.split

    @property
    def part(self) -> str:
        return self.manifest.part

    @property
    def content_id(self) -> str:
        return self.manifest.content_id

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(image.id for image in self.manifest.images)

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """convention -> output -> {"mean", "low", "high", "n"}."""
        return {c.name: c.summary(self.images) for c in choose_conventions(self.conventions)}

    def rows(self) -> list[dict[str, Any]]:
        """One row an image; see ``receipts.image_rows``."""
        return image_rows(self.images, self.manifest, choose_conventions(self.conventions), largest=self.largest)

    def content(self) -> dict[str, Any]:
        """The receipt: docs/receipts.md describes its fields. Computed once, so that nothing is drawn twice."""
        return self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        rows = self.rows()
        pixels = [image.pixels for image in self.manifest.images]
        conventions, layout = choose_conventions(self.conventions), Layout.of(self.manifest)
        origin = {key: value for key, value in self.origin.items() if key != WEIGHTS_ORIGIN}
        collisions = self.seen.collisions
        return {
            "receipt": RECEIPT,
            "name": self.name,
            "model": model_record(WeightsOrigin.within(self.origin)) if WEIGHTS_ORIGIN in self.origin else None,
            "predictions": origin,
            "dataset": {
                "name": self.dataset,
                "title": self.title,
                "split": self.split,
                "part": self.part,
                "content_id": self.content_id,
                "synthetic": is_synthetic_name(self.dataset),
                "manifest": self.manifest.digest,
                "clips_known": layout.clips is not None,
            },
            "n": len(self.images),
            "seen": self.seen.content(),
            "collisions": None if collisions is None else collisions.content(),
            "surface_tolerance_pixels": self.images[0].tolerance,
            "bootstrap": BOOTSTRAP,
            "clusters": layout.record(),
            "scores": self.summary(),
            "scores_by_cluster": cluster_scores(self.images, layout, conventions),
            "false_alarms": false_alarms(rows, pixels, minimal_area=self.alarm_area),
            "definitions": describe(conventions),
            "images": rows,
            "manifest": self.manifest.content(),
            "tables": pack_tables(self.images, conventions),
            "environment": environment_record(),
        }

    def write(self, folder: Path) -> Path:
        """Write the receipt at ``receipt_path`` and a CSV of its rows; return the path."""
        path = receipt_path(folder, self.name, self.manifest, at_operating_point=OPERATING_POINT_KEY in self.origin)
        write_csv(path.with_suffix(".csv"), self.rows())
        return save_receipt(path, self.content())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is kept of one prediction."""

    image: ImageMeasures
    largest: int
    """Pixels of its largest component."""

    def has(self, measures: Collection[str]) -> bool:
        """Whether these of ``measures.MEASURES`` were made."""
        return all(getattr(self.image, name) is not None for name in measures)


_WAITING = 16
"""Maps that wait to be measured."""


def model_record(origin: WeightsOrigin) -> dict[str, Any]:
    """What a receipt says of a model: digest of its weights, its row of the table and its recipe's seed where known."""
    recipe, row = origin.bundled_recipe, origin.row or origin.model_id
    return {
        "sha256": origin.sha256,
        "row": row if row in {entry.model_id for entry in zoo.ZOO} else None,
        "seed": None if recipe is None else recipe.seed,
        WEIGHTS_ORIGIN: origin.content,
    }


def score_predictions(
    source: PredictionSource,
    dataset: PolypDataset,
    *,
    split: str = "full",
    part: str = "full",
    conventions: Sequence[str] = tuple(CONVENTIONS),
    limit: int | None = None,
    tolerance: float = TOLERANCE,
    manifest: SplitManifest | None = None,
    seen: SeenCheck | None = None,
    measured: MutableMapping[str, Measured] | None = None,
    masks: Path | None = None,
    alarm_area: int = 1,
) -> SuiteResult:
    """Measure a source's predictions on one part of a split; ``limit`` takes only the first images of it.

    Only what the conventions need is measured, beside the thread that predicts. ``tolerance`` is the surface Dice's, in
    pixels. ``manifest``: the images instead of a part, with ``seen`` as ``passport.check_seen`` gives them.
    ``measured``: measures by id from an earlier call with the same source and dataset, which are used and added to.
    ``masks``: folder that receives each predicted mask as ``<id>.png``, 1 bit. ``alarm_area``: pixels from which a
    component on a frame without polyp is a false alarm.

    Raises UsageError for an unknown part or convention and for predictions that do not fit the dataset, PolypSegError
    for a broken file.
    """
    needed = needed_measures(conventions)  # an unknown name fails before the work
    if manifest is None:
        manifest = kept_manifest(dataset, split=split, part=part, limit=limit)
    known = {} if measured is None else measured
    ids = [image.id for image in manifest.images]
    new = [record_id for record_id in ids if record_id not in known or not known[record_id].has(needed)]
    progress = tqdm(
        source.predict(dataset, new) if new else (),
        total=len(new),
        desc=f"scoring on {dataset.spec.title}",
        unit="image",
        leave=False,
        disable=None,
    )

    def measure(record_id: str, probability: Probability) -> Measured:
        mask = dataset.mask(dataset.by_id[record_id]).astype(bool)
        if mask.shape != probability.shape:
            raise PolypSegError(
                f"{dataset.spec.title}: the mask of {record_id} is {mask.shape[1]}x{mask.shape[0]}, its prediction "
                f"{probability.shape[1]}x{probability.shape[0]}: give the mask in the image's size"
            )
        if masks is not None:
            save_mask(probability, masks / f"{record_id}.png")
        return Measured(
            image=measure_image(probability, mask, tolerance=tolerance, measures=needed),
            largest=largest_component(probability > np.float32(0.5)),
        )

    waiting: deque[tuple[str, Future[Measured]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as beside:  # the model goes on while an image is measured
        for wanted, (record_id, probability) in zip(new, progress, strict=True):
            if record_id != wanted:
                raise ValueError(f"{source.name} predicts {record_id} where {wanted} was asked for")
            waiting.append((record_id, beside.submit(measure, record_id, probability)))
            while len(waiting) > _WAITING or (waiting and waiting[0][1].done()):
                measured_id, done = waiting.popleft()
                known[measured_id] = done.result()
        for measured_id, done in waiting:
            known[measured_id] = done.result()
    return SuiteResult(
        name=source.name,
        origin=source.origin,
        title=dataset.spec.title,
        manifest=manifest,
        images=tuple(known[record_id].image for record_id in ids),
        largest=tuple(known[record_id].largest for record_id in ids),
        conventions=tuple(conventions),
        seen=seen or SeenCheck(rule="refuse"),
        alarm_area=alarm_area,
    )


def save_mask(probability: Probability, path: Path) -> Path:
    """Write where a map (H, W) exceeds 0.5 as a 1-bit PNG, in one step."""
    with atomic_path(path) as temporary:
        Image.fromarray(probability > np.float32(0.5)).save(temporary, format="PNG")
    return path
