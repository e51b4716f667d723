"""How a model holds up under the endoscopy corruption kit: curves over severities, drops against clean frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from polypseg.data.corruptions import CORRUPTIONS, SEVERITIES
from polypseg.data.polyps import PolypDataset, corrupt_dataset
from polypseg.errors import unknown_name
from polypseg.evaluation.evaluate import SuiteResult, score_predictions
from polypseg.evaluation.metrics import mean_with_interval
from polypseg.evaluation.receipt import CONVENTION
from polypseg.files import environment_record, write_csv, write_json
from polypseg.inference.prediction_source import PredictionSource
from polypseg.plotting import add_note, save_figure
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin
from polypseg.provenance.passport import kept_manifest, name_partial

matplotlib.use("Agg")
import matplotlib.pyplot as plt

INTERVAL = "95 % percentile bootstrap over images, 5000 resamples, seed 0"


@dataclass(frozen=True, kw_only=True)
class RobustnessResult:
    """Dice of one model on one set, clean and under each corruption."""

    clean: SuiteResult
    corrupted: Mapping[tuple[str, int], NDArray[np.float64]]
    """(kind, severity) -> Dice (N,) of the same images in the same order."""

    @cached_property
    def clean_dice(self) -> NDArray[np.float64]:
        """Dice (N,) of the frames as they are."""
        return _dice(self.clean)

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind and severity: mean Dice with interval, and the paired drop against clean with interval.

        ``relative_drop`` is the drop divided by the clean mean; intervals are over images. Computed once.
        """
        return self._rows

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        clean = self.clean_dice
        rows = []
        for (kind, severity), dice in self.corrupted.items():
            mean, drop = mean_with_interval(dice), mean_with_interval(clean - dice)
            rows.append(
                {
                    "corruption": kind,
                    "severity": severity,
                    **{f"dice_{key}": value for key, value in mean.items()},
                    **{f"drop_{key}": value for key, value in drop.items()},
                    "relative_drop": drop["mean"] / clean.mean() if clean.mean() > 0 else None,
                }
            )
        return rows

    def mean_relative_drop(self) -> float | None:
        """Of all kinds and severities; None where the clean mean is 0."""
        drops = [row["relative_drop"] for row in self.rows()]
        return None if None in drops else float(np.mean(drops))

    def write(self, folder: Path) -> Path:
        """Write JSON, CSV and the curves below ``folder/<model_id>``; return the JSON's path."""
        clean = self.clean
        path = folder / clean.name / f"{clean.dataset}.{clean.split}.{clean.part}.robustness.json"
        write_csv(path.with_suffix(".csv"), self.rows())
        plot_robustness(
            {clean.name: self},
            note=f"{clean.title}, split {clean.split}, part {clean.part}, n = {len(clean.ids)}. {INTERVAL}.",
            path=path.with_suffix(".png"),
        )
        return write_json(
            path,
            {
                "model_id": clean.name,
                WEIGHTS_ORIGIN: WeightsOrigin.within(clean.origin).content,
                "dataset": {"name": clean.dataset, "split": clean.split, "part": clean.part}
                | {"content_id": clean.content_id, "n": len(clean.ids)},
                "interval": INTERVAL,
                "strengths": {kind: CORRUPTIONS[kind][1] for kind in {k for k, _ in self.corrupted}},
                "clean": mean_with_interval(self.clean_dice),
                "mean_relative_drop": self.mean_relative_drop(),
                "rows": self.rows(),
                "images": [
                    {"id": record_id, "clean": float(self.clean_dice[i])}
                    | {f"{kind}.{severity}": float(dice[i]) for (kind, severity), dice in self.corrupted.items()}
                    for i, record_id in enumerate(clean.ids)
                ],
                "environment": environment_record(),
            },
        )


def measure_robustness(
    source: PredictionSource,
    dataset: PolypDataset,
    *,
    split: str = "full",
    part: str = "full",
    kinds: Sequence[str] = (),
    severities: Sequence[int] = SEVERITIES,
    limit: int | None = None,
) -> RobustnessResult:
    """Evaluate a model clean and under every kind (default: all thirteen) at every severity.

    Raises UsageError for an unknown kind, split or part, PolypSegError for a broken image.
    """
    for kind in kinds:
        if kind not in CORRUPTIONS:
            raise unknown_name("corruption", kind, CORRUPTIONS)
    manifest = name_partial(kept_manifest(dataset, split=split, part=part, limit=limit), dataset)

    def evaluate(images: PolypDataset) -> SuiteResult:
        return score_predictions(source, images, conventions=(CONVENTION,), manifest=manifest)

    clean = evaluate(dataset)
    conditions = [(kind, severity) for kind in kinds or CORRUPTIONS for severity in severities]
    corrupted = {
        (kind, severity): _dice(evaluate(corrupt_dataset(dataset, kind, severity=severity)))
        for kind, severity in tqdm(conditions, desc=f"corrupting {dataset.spec.title}", unit="condition", disable=None)
    }
    return RobustnessResult(clean=clean, corrupted=corrupted)


def _dice(result: SuiteResult) -> NDArray[np.float64]:
    return np.array([row[f"{CONVENTION}.dice"] for row in result.rows()], dtype=np.float64)


def plot_robustness(results: Mapping[str, RobustnessResult], *, note: str, path: Path) -> Path:
    """One panel a corruption: mean Dice over severities, 0 being clean, with the interval; one line a model."""
    kinds = list(dict.fromkeys(kind for result in results.values() for kind, _ in result.corrupted))
    columns = min(5, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns, 2.1 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for name, result in results.items():
            clean = mean_with_interval(result.clean_dice)
            points = [(0, clean)] + [
                (severity, mean_with_interval(dice)) for (k, severity), dice in result.corrupted.items() if k == kind
            ]
            x, means = [severity for severity, _ in points], [value["mean"] for _, value in points]
            (line,) = axis.plot(x, means, "o-", ms=3, lw=1.4, label=name)
            bounds = [[value[side] or value["mean"] for _, value in points] for side in ("low", "high")]
            axis.fill_between(x, *bounds, alpha=0.2, color=line.get_color(), lw=0)
        axis.set_title(kind.replace("_", " "), fontsize=9)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("mean Dice", fontsize=8)
    for column in range(columns):
        axes[-1][column].set_xlabel("severity", fontsize=8)
    if len(results) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=3, fontsize=8)
    figure.tight_layout()
    add_note(figure, note)
    return save_figure(figure, path)
