"""Flicker of a model's masks on CVC-ClinicDB's 29 clips, with and without causal smoothing, and what it costs in Dice.

python benchmarks/flicker.py MODEL --source ../shared/data/CVC-ClinicDB --output flicker.csv

The frames of a clip are taken in order, 1/25 s apart. Flicker and change are those of the masks that `segment` would
write; the row "truth" holds those of the annotated masks. The flicker index is defined in polypseg.inference.video;
false_flicker is the same
of the pixels whose annotation does not change over the three frames, over all clips: the set's frames are seconds of
motion apart, so that the annotated masks have a flicker index too. change is 1 - IoU of consecutive masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from typer import Argument, Option

from polypseg.cli.console import print_table, run_script
from polypseg.data import PolypDataset, open_dataset
from polypseg.data.catalog import CLIP_COLUMN
from polypseg.data.polyps import Record
from polypseg.errors import UsageError
from polypseg.evaluation.metrics import pixel_counts, score
from polypseg.files import write_csv
from polypseg.inference.model import default_device
from polypseg.inference.segmenter import load
from polypseg.inference.video import RATE, CausalSmoother, FlickerIndex
from polypseg.tables import Column, Table

Mask = NDArray[np.bool_]


@dataclass
class Series:
    """What is measured of one way to make masks."""

    dice: dict[str, list[float]] = field(default_factory=dict)
    """Clip -> Dice of its frames."""
    flicker: dict[str, float] = field(default_factory=dict)
    """Clip -> flicker index, where it is defined."""
    change: list[float] = field(default_factory=list)
    """1 - IoU of every two consecutive masks of which one has polyp."""
    flips: int = 0
    """Pixels that change and change back although their annotation stays the same over the three frames."""
    still_pixels: int = 0
    """Pixels that are polyp in any of three masks, of those whose annotation stays the same."""

    def add(self, clip: str, masks: list[Mask], truth: list[Mask]) -> None:
        """The masks of a clip, in order."""
        index = FlickerIndex()
        for mask in masks:
            index.add(mask)
        if index.value is not None:
            self.flicker[clip] = index.value
        for at in range(1, len(masks) - 1):
            self._add_flips(masks[at - 1 : at + 2], truth[at - 1 : at + 2])
        for before, after in pairwise(masks):
            either = int((before | after).sum())
            if either:
                self.change.append(1 - int((before & after).sum()) / either)
        counts = [pixel_counts(mask, wanted) for mask, wanted in zip(masks, truth, strict=True)]
        self.dice[clip] = score(counts)["dice"].tolist()

    def _add_flips(self, masks: list[Mask], truth: list[Mask]) -> None:
        still = (truth[0] == truth[1]) & (truth[1] == truth[2])
        first, second, third = masks
        self.flips += int(np.count_nonzero(still & (first != second) & (second != third)))
        self.still_pixels += int(np.count_nonzero(still & (first | second | third)))

    def row(self, name: str) -> dict[str, str | int]:
        """The figures: means over frames, pairs and clips."""
        scores = [score for values in self.dice.values() for score in values]
        return {
            "masks": name,
            "dice": f"{np.mean(scores):.4f}",
            "dice_by_clip": f"{np.mean([np.mean(values) for values in self.dice.values()]):.4f}",
            "flicker": f"{np.mean(list(self.flicker.values())):.4f}" if self.flicker else "",
            "false_flicker": f"{self.flips / self.still_pixels:.4f}" if self.still_pixels else "",
            "change": f"{np.mean(self.change):.4f}" if self.change else "",
            "frames": len(scores),
            "clips": len(self.dice),
        }


def clips_of(data: PolypDataset) -> Iterator[tuple[str, list[Record]]]:
    """The clips, each with its frames in order. Raises UsageError for a dataset without clips."""
    known = [record for record in data.records if CLIP_COLUMN in record.groups]
    if not known:
        raise UsageError(f"{data.spec.title} has no clips: give cvc_clinicdb")
    ordered = sorted(known, key=lambda record: (int(record.groups[CLIP_COLUMN]), int(record.id)))
    for clip, records in groupby(ordered, key=lambda record: record.groups[CLIP_COLUMN]):
        yield clip, list(records)


def main(
    model: Annotated[str, Argument(help="Model folder, Hub id, or id of the table.")],
    source: Annotated[Path | None, Option(help="Folder or archive of CVC-ClinicDB.")] = None,
    smooth: Annotated[list[float] | None, Option(help="Smoothing time in seconds; repeat for more.")] = None,
    threshold: Annotated[float, Option(help="A pixel is polyp where its probability exceeds this.")] = 0.5,
    clips: Annotated[int | None, Option(min=1, help="Only the first N clips.")] = None,
    output: Annotated[Path | None, Option(help="CSV file of the table.")] = None,
) -> None:
    """Measure flicker and Dice on CVC-ClinicDB's clips, with and without causal smoothing."""
    segmenter = load(model).to(default_device())
    data = open_dataset("cvc_clinicdb", source=source)
    times: tuple[float | None, ...] = (None, *(smooth or (0.02, 0.04, 0.08, 0.16)))
    series = {time: Series() for time in times}
    annotated = Series()
    for clip, records in tqdm(list(clips_of(data))[:clips], unit="clip", disable=None):
        truth = [data.mask(record) > 0 for record in records]
        maps = [segmenter.predict([data.frame(record)], threshold=threshold)[0] for record in records]
        annotated.add(clip, truth, truth)
        for time, measured in series.items():
            if time is None:
                measured.add(clip, [prediction.mask for prediction in maps], truth)
                continue
            smoother = CausalSmoother(time)
            smoothed = [smoother(prediction.probability, time=n / RATE) for n, prediction in enumerate(maps)]
            measured.add(clip, [probability > threshold for probability in smoothed], truth)
    rows = [
        annotated.row("truth"),
        *(made.row("as they are" if time is None else f"smoothed, {time:g} s") for time, made in series.items()),
    ]
    columns = [Column(key.replace("_", " "), key, str) for key in rows[0]]
    print_table(Table(columns=columns, records=rows, title=f"{segmenter.name} on CVC-ClinicDB's clips"))
    if output is not None:
        print(f"written to {write_csv(output, rows)}")


if __name__ == "__main__":
    run_script(main)
