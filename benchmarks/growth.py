"""How time and memory of a job grow with its frames or models: near-linear and flat is what is asked.

OMP_NUM_THREADS=1 python benchmarks/growth.py --output runs/bench

Frames and masks are made up and small (128x96), so that what grows is not drowned by decoding. Each size runs in a
process of its own; its wall time and the most memory it held are kept.
"""

import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data.catalog import OWN_FOLDER
from polypseg.data.polyps import PolypDataset, SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.files import environment_record, write_json, write_text
from polypseg.tables import Column, Table

SIZE = (96, 128)
"""Height and width of the made-up frames."""
FRAMES, MODELS = (100, 1000, 10_000), (12, 100)
"""Sizes of the jobs over frames, and over models."""
COMMAND = ("-m", "polypseg_command", "--quiet")
LOAD = """
import sys
from pathlib import Path
from polypseg.data.polyps import open_dataset
data = open_dataset(sys.argv[1], source=Path(sys.argv[2]))
for record in data.records:
    data.pair(record)
"""
DUPLICATES = """
import sys
sys.path.insert(0, sys.argv[1])
from near_duplicates import made_up, near_duplicates
near_duplicates(made_up(int(sys.argv[2])))
"""
GRID = """
name: growth
title: Rows of one start
architectures:
  - {{family: resnet50, encoder: resnet10t, decoder: deeplabv3plus}}
  - {{family: vit_base, encoder: vit_tiny_patch16_224, decoder: dpt}}
corpora: {{}}
pretraining: []
starts:
  - {{method: none, corpus: none, families: [resnet50, vit_base]}}
image_sizes: [96]
seeds: {seeds}
finetuning: {{recipe: finetune_tiny}}
evaluation: {{conventions: [paper]}}
"""
COLUMNS = (
    Column(key="job", title="job", numeric=False),
    Column(key="n", title="n"),
    Column(key="seconds", title="seconds", format="{:.3g}".format),
    Column(key="peak_mb", title="peak MB", format="{:.0f}".format),
    Column(
        key="exponent",
        title="time grows as n to the power",
        format=lambda power: "–" if power is None else f"{power:.2f}",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something that is done to n things by a command of its own."""

    name: str
    sizes: tuple[int, ...]
    prepare: Callable[[Path, int], list[str]]
    """An empty folder and n -> arguments of Python."""


def draw_set(folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """``count`` JPEG frames in images/ and their masks in masks/, a round polyp each."""
    rng, least = np.random.default_rng(seed), min(size)
    y, x = np.mgrid[: size[0], : size[1]]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        top, left = (rng.uniform(0.3, 0.7) * side for side in size)
        mask = np.hypot(y - top, x - left) < rng.uniform(0.1, 0.3) * least
        blobs = rng.integers(60, 200, size=(6, 8, 3), dtype=np.uint8)
        frame = cv2.resize(blobs, size[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "images" / f"{index:06d}.jpg"), np.where(mask[..., None], 255 - frame, frame))
        cv2.imwrite(str(folder / "masks" / f"{index:06d}.png"), mask.astype(np.uint8) * 255)
    return folder


def checking(folder: Path, count: int) -> list[str]:
    """``data check`` of frames and masks."""
    drawn = draw_set(folder / "set", count)
    return [*COMMAND, "data", "check", OWN_FOLDER, str(drawn), "--output", str(folder / "report")]


def loading(folder: Path, count: int) -> list[str]:
    """Every frame with its mask, one after the other."""
    return ["-c", LOAD, OWN_FOLDER, str(draw_set(folder / "set", count))]


def segmenting(folder: Path, count: int) -> list[str]:
    """``segment`` of a folder of frames."""
    frames = draw_set(folder / "set", count) / "images"
    return [*COMMAND, "segment", str(frames), "--output", str(folder / "segmented")]


def evaluating(folder: Path, count: int) -> list[str]:
    """``evaluate`` of somebody's masks, receipt included."""
    drawn = draw_set(folder / "set", count)
    data = ["--dataset", OWN_FOLDER, "--source", str(drawn)]
    return [*COMMAND, "evaluate", *data, "--predictions", str(drawn / "masks"), "--output", str(folder / "results")]


def comparing(folder: Path, count: int) -> list[str]:
    """``shift measure`` of two sets, embedding included."""
    sets = [str(draw_set(folder / side, count, seed=seed)) for seed, side in enumerate("ab")]
    named = [text for side, drawn in zip("ab", sets, strict=True) for text in (f"--{side}", OWN_FOLDER)]
    given = [text for drawn in sets for text in ("--source", drawn)]
    return [*COMMAND, "shift", "measure", *named, *given, "--output", str(folder / "shift")]


def searching(_: Path, count: int) -> list[str]:
    """The search for near-duplicates."""
    return ["-c", DUPLICATES, str(Path(__file__).parent), str(count)]


def planning(folder: Path, count: int) -> list[str]:
    """What is left of a grid of as many models, and what it costs."""
    grid = write_text(folder / "grid.yaml", GRID.format(seeds=list(range(1, count // 2 + 1))))
    return [*COMMAND, "study", "--grid", str(grid), "--output", str(folder / "study"), "--plan"]


@dataclass(frozen=True, kw_only=True)
class NoisyMasks:
    """Predictions of an invented model: the masks, blurred and noisy by a seed."""

    seed: int

    @property
    def name(self) -> str:
        return f"invented-{self.seed}"

    @property
    def origin(self) -> dict[str, Any]:
        return {"source": "invented", "seed": self.seed}

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(id, probability (H, W)) for each id, in order."""
        rng = np.random.default_rng(self.seed)
        for record_id in ids:
            mask = dataset.mask(dataset.by_id[record_id]).astype(np.float32)
            noise = rng.uniform(-0.6, 0.6, size=[-(-side // 8) for side in mask.shape])
            soft = cv2.resize(noise, mask.shape[::-1]) + cv2.GaussianBlur(mask, (0, 0), 1 + self.seed % 7)
            yield record_id, np.clip(soft, 0, 1).astype(np.float32)


def reporting(folder: Path, count: int) -> list[str]:
    """``report`` on two tests of as many models."""
    options = SyntheticOptions(count=40, size=(128, 96))
    tests = [open_dataset(name, synthetic_options=options) for name in ("synthetic_a", "synthetic_b")]
    for seed in range(count):
        for data in tests:
            score_predictions(NoisyMasks(seed=seed), data, conventions=("paper",)).write(folder / "results")
    inside, outside = (f"{data.spec.name}.full.full" for data in tests)
    named = ["--in-distribution", inside, "--out-of-distribution", outside, "--output", str(folder / "report.html")]
    return [*COMMAND, "report", str(folder / "results"), *named]


JOBS = (
    Job(name="check a dataset", sizes=FRAMES, prepare=checking),
    Job(name="load frames and masks", sizes=FRAMES, prepare=loading),
    Job(name="segment frames", sizes=FRAMES, prepare=segmenting),
    Job(name="evaluate masks of frames, every convention", sizes=FRAMES, prepare=evaluating),
    Job(name="measure the shift between two sets of frames", sizes=FRAMES[:2], prepare=comparing),
    Job(name="find near-duplicates", sizes=(*FRAMES[1:], 10 * FRAMES[-1]), prepare=searching),
    Job(name="report on models", sizes=MODELS, prepare=reporting),
    Job(name="plan a grid of models", sizes=MODELS, prepare=planning),
)


LAUNCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)
"""
"""A small process between: a child's peak memory counts that of the process that starts it."""


def run_alone(arguments: Sequence[str], *, of: str) -> tuple[float, float]:
    """Python with these arguments, in a process of its own: its seconds and the most MB that it held.

    ``of``: what is done, for errors. Raises PolypSegError with the words of one that fails.
    """
    with tempfile.TemporaryDirectory() as name:
        launched = [sys.executable, "-c", LAUNCH, *arguments]
        done = subprocess.run(launched, capture_output=True, text=True, check=False, cwd=name)
    if done.returncode:
        raise PolypSegError(f"{of}: {done.stderr[-2000:]}")
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def measured(job: Job, count: int) -> dict[str, Any]:
    """Seconds and most memory of the job's process. Raises PolypSegError with its words where it fails."""
    with tempfile.TemporaryDirectory() as name:
        seconds, peak = run_alone(job.prepare(Path(name), count), of=f"{job.name}, {count}")
    return {"job": job.name, "n": count, "seconds": seconds, "peak_mb": peak}


def with_exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one job by size, each with the power by which its time grew from the smaller one (None for the first)."""
    found = [dict(rows[0], exponent=None)]
    for before, row in itertools.pairwise(rows):
        grown = math.log(row["seconds"] / before["seconds"]) / math.log(row["n"] / before["n"])
        found.append(dict(row, exponent=grown))
    return found


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a record (``growth.json``) as a table."""
    return Table(columns=COLUMNS, records=rows).markdown()


def main(
    output: Annotated[Path, Option(help="Folder that receives growth.json and growth.md.")] = Path("runs/bench"),
    most: Annotated[int, Option(help="Leave out sizes beyond this one.", min=1)] = 10**6,
) -> None:
    """Measure how time and memory grow."""
    found = []
    for job in JOBS:
        sizes = [size for size in job.sizes if size <= most]
        if not sizes:
            continue
        rows = [measured(job, size) for size in sizes]
        found += with_exponents(rows)
        print(to_markdown(found[-len(rows) :]), flush=True)
    write_json(output / "growth.json", {"rows": found, "environment": environment_record()})
    print(f"written: {write_text(output / 'growth.md', to_markdown(found))}")


if __name__ == "__main__":
    run_script(main)
