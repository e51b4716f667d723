"""Any source of predictions on any part of a dataset, measured once and scored by every convention by name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polypseg.artifacts import environment_record, write_csv, write_json
from polypseg.conventions import CONVENTIONS, choose_conventions
from polypseg.data.polyps import PolypDataset
from polypseg.evaluation import INTERVAL, dataset_record
from polypseg.measures import TOLERANCE, ImageMeasures, measure_image
from polypseg.predictions import PredictionSource


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The measures of one source of predictions on one part of one dataset, and its scores by every convention."""

    name: str
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the predictions come from."""
    dataset: str
    title: str
    split: str
    part: str
    content_id: str
    ids: tuple[str, ...]
    images: tuple[ImageMeasures, ...]
    conventions: tuple[str, ...] = tuple(CONVENTIONS)

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """convention -> output -> {"mean", "low", "high", "n"}."""
        return {c.name: c.summary(self.images) for c in choose_conventions(self.conventions)}

    def rows(self) -> list[dict[str, Any]]:
        """One row an image: id, measures, and ``convention.output`` where a convention scores images one by one.

        None where an image has no such score.
        """
        rows: list[dict[str, Any]] = [
            {"id": record_id, **image.row()} for record_id, image in zip(self.ids, self.images, strict=True)
        ]
        for convention in choose_conventions(self.conventions):
            for output, values in (convention.per_image(self.images) or {}).items():
                for row, value in zip(rows, values, strict=True):
                    row[f"{convention.name}.{output}"] = float(value) if value == value else None
        return rows

    def write(self, folder: Path) -> Path:
        """Write ``<folder>/<name>/<dataset>.<split>.<part>.suite.json`` and its rows as CSV; return the JSON's path."""
        rows = self.rows()
        path = folder / self.name / f"{self.dataset}.{self.split}.{self.part}.suite.json"
        write_csv(path.with_suffix(".csv"), rows)
        return write_json(
            path,
            {
                "name": self.name,
                "predictions": self.origin,
                "dataset": dataset_record(self),
                "n": len(rows),
                "interval": INTERVAL,
                "surface_tolerance_pixels": self.images[0].tolerance,
                "definitions": {
                    c.name: {"title": c.title, "formula": c.formula, "empty": c.empty, "source": c.source}
                    for c in choose_conventions(self.conventions)
                },
                "scores": self.summary(),
                "images": rows,
                "environment": environment_record(),
            },
        )


def score_predictions(
    source: PredictionSource,
    dataset: PolypDataset,
    *,
    split: str = "full",
    part: str = "full",
    conventions: Sequence[str] = tuple(CONVENTIONS),
    limit: int | None = None,
    tolerance: float = TOLERANCE,
) -> SuiteResult:
    """Measure a source's predictions on one part of a split; ``limit`` takes only the first images of it.

    ``tolerance`` is the surface Dice's, in pixels. Raises UsageError for an unknown part or convention and for
    predictions that do not fit the dataset, PolypSegError for a broken file.
    """
    choose_conventions(conventions)  # an unknown name fails before the work
    ids, label = dataset.part(split, part, limit=limit)
    images = []
    progress = tqdm(
        source.predict(dataset, ids),
        total=len(ids),
        desc=f"scoring on {dataset.spec.title}",
        unit="image",
        leave=False,
        disable=None,
    )
    for wanted, (record_id, probability) in zip(ids, progress, strict=True):
        if record_id != wanted:
            raise ValueError(f"{source.name} predicts {record_id} where {wanted} was asked for")
        mask = dataset.mask(dataset.by_id[record_id]).astype(bool)
        images.append(measure_image(probability, mask, tolerance=tolerance))
    return SuiteResult(
        name=source.name,
        origin=source.origin,
        dataset=dataset.spec.name,
        title=dataset.spec.title,
        split=split,
        part=label,
        content_id=dataset.content_id,
        ids=ids,
        images=tuple(images),
        conventions=tuple(conventions),
    )
