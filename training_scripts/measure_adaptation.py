#!/usr/bin/env python3
"""Measure `polypseg adapt` with few labeled clips: what each method gains on frames of others, and what is shipped.

Plans are chosen on `development` (another hospital's set and corrupted validation frames, no cross-validation);
`test` runs the command's own adaptation on clips of CVC-ClinicDB and scores what it ships on frames of other clips;
`ceiling` gives each method frames of the tested clips themselves, and more steps: what labels could gain at best.
Every line of the output is one draw, written when it is done.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from typer import Argument, Option

from polypseg.cli.console import run_script
from polypseg.data.catalog import CLIP_COLUMN
from polypseg.data.polyps import PolypDataset, corrupt_dataset, open_dataset
from polypseg.expectation.adapt import FOLDS, LABELED_PLANS, adapt_labeled, score_frames
from polypseg.expectation.calibrate import Labeled, open_pairs
from polypseg.expectation.intervals import group_means
from polypseg.files import file_sha256
from polypseg.hub.export import our_model
from polypseg.inference.runtimes import WEIGHTS
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.provenance.local import starter_folder
from polypseg.training.adaptation import Plan, StatisticsPlan, TuningPlan, adapt_model, resize_pairs

CORRUPTIONS = (("under_exposure", 4), ("smoke", 3))
CANDIDATES: tuple[Plan, ...] = (
    *(TuningPlan(part="network", steps=8, learning_rate=rate, reduction=0.75) for rate in (3e-5, 1e-4)),
    *(TuningPlan(part="decoder", steps=12, learning_rate=rate, reduction=0.75) for rate in (3e-4, 1e-3)),
    StatisticsPlan(prior=256),
)
CEILING: tuple[Plan, ...] = (
    *LABELED_PLANS,
    TuningPlan(part="network", steps=48, learning_rate=1e-4, reduction=0.75),
)
Draw = tuple[str, list[Labeled], list[Labeled]]


def read(dataset: PolypDataset, ids: Sequence[str], groups: Sequence[str]) -> list[Labeled]:
    """Frames with masks and the clips that they are of."""
    found = []
    for record_id, group in zip(ids, groups, strict=True):
        frame, truth = dataset.pair(dataset.by_id[record_id])
        found.append(Labeled(name=record_id, group=group, frame=frame, truth=truth.astype(bool)))
    return found


def development_draws(data: Path, *, draws: int, frames: int, tested: int) -> Iterator[Draw]:
    """Neighbors in PolypGen's third center as clips, and validation frames of Kvasir-SEG under corruptions."""
    center = open_pairs(data / "PolypGen-C3" / "images", data / "PolypGen-C3" / "masks")
    ids = sorted(center.ids, key=lambda name: int(name.rsplit("_", maxsplit=1)[1]))
    kvasir = open_dataset("kvasir_seg", source=data / "Kvasir-SEG")
    validation = list(kvasir.part("reference", "validation")[0])
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        side = frames // FOLDS
        blocks = [ids[start : start + side] for start in range(0, len(ids) - side, side)]
        order = rng.permutation(len(blocks))
        given = [name for block in order[:FOLDS] for name in blocks[block]]
        others = [name for block in order[FOLDS + 1 :] for name in blocks[block][:2]][:tested]
        yield f"PolypGen C3, {draw}", read(center, given, given), read(center, others, others)
        kind, severity = CORRUPTIONS[draw % len(CORRUPTIONS)]
        corrupted = corrupt_dataset(kvasir, kind, severity=severity)
        mixed = [validation[place] for place in rng.permutation(len(validation))]
        given, others = mixed[:frames], mixed[frames : frames + tested]
        yield f"Kvasir-SEG, {kind}, {draw}", read(corrupted, given, given), read(corrupted, others, others)


def test_draws(
    data: Path, *, draws: int, first: int, frames: int, tested: int, from_tested: bool = False
) -> Iterator[Draw]:
    """Five clips of CVC-ClinicDB with ``frames`` in all, and as many of each other clip as make up ``tested``.

    ``from_tested``: as many frames as are tested, of the tested clips, instead of those of the five.
    """
    cvc = open_dataset("cvc_clinicdb", source=data / "CVC-ClinicDB")
    clips: dict[str, list[str]] = {}
    for record in cvc.records:
        clips.setdefault(record.groups[CLIP_COLUMN], []).append(record.id)
    for draw in range(first, first + draws):
        rng = np.random.default_rng(draw)
        order = [sorted(clips)[place] for place in rng.permutation(len(clips))]
        rest = order[FOLDS:]
        each = max(1, tested // len(rest))
        others = [(name, clip) for clip in rest for name in _evenly(clips[clip], each)]
        if from_tested:
            left = {clip: [name for name in clips[clip] if (name, clip) not in others] for clip in rest}
            given = [(name, clip) for clip in rest for name in _evenly(left[clip], each)]
        else:
            given = [(name, clip) for clip in order[:FOLDS] for name in _evenly(clips[clip], frames // FOLDS)]
        shown, tried = (read(cvc, *zip(*chosen, strict=True)) for chosen in (given, others))
        yield f"CVC-ClinicDB, {draw}", shown, tried


def _evenly(names: list[str], count: int) -> list[str]:
    return [names[place] for place in dict.fromkeys(np.linspace(0, len(names) - 1, count).round().astype(int).tolist())]


def by_clip(model: PolypSegForSemanticSegmentation, tested: Sequence[Labeled]) -> float:
    """Mean over clips of the mean Dice."""
    return float(group_means(score_frames(model, tested), [one.group for one in tested]).mean())


def measure(
    purpose: Annotated[Literal["development", "test", "ceiling"], Argument(help="Which draws.")],
    data: Annotated[Path, Option(help="Folder of Kvasir-SEG, PolypGen-C3 and CVC-ClinicDB.")],
    output: Annotated[Path, Option(help="File of JSON lines, appended to.")],
    draws: Annotated[int, Option(min=1)] = 10,
    first: Annotated[int, Option(min=0, help="Number of the first draw of the test.")] = 0,
    frames: Annotated[int, Option(min=10, help="Labeled frames that are given.")] = 30,
    tested: Annotated[int, Option(min=10, help="Frames that are scored.")] = 48,
) -> None:
    """Write a line per draw with the Dice before and what was gained."""
    folder = starter_folder()
    model, digest = our_model(folder), file_sha256(folder / WEIGHTS)
    if purpose == "development":
        chosen = development_draws(data, draws=draws, frames=frames, tested=tested)
    else:
        chosen = test_draws(
            data, draws=draws, first=first, frames=frames, tested=tested, from_tested=purpose == "ceiling"
        )
    for name, given, others in chosen:
        began = time.process_time()
        before = by_clip(model, others)
        line: dict[str, object] = {"purpose": purpose, "draw": name, "given": len(given), "tested": len(others)}
        line |= {"before": before, "model": digest}
        if purpose != "test":
            pairs = resize_pairs(
                [one.frame for one in given], [one.truth for one in given], size=model.config.image_size
            )
            for plan in CANDIDATES if purpose == "development" else CEILING:
                line[repr(plan)] = by_clip(adapt_model(model, pairs, plan), others) - before
                print(name, before, plan, line[repr(plan)], flush=True)
        else:
            found = adapt_labeled(model, given, plans=LABELED_PLANS)
            line |= {"said": found.content()}
            line["gain"] = 0.0 if found.model is None else by_clip(found.model, others) - before
        line["cpu_seconds"] = time.process_time() - began
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line["draw"], line.get("gain", ""), flush=True)


if __name__ == "__main__":
    run_script(measure)
