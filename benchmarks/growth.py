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
from polypseg.data.polyps import PolypDataset, SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.files import environment_record, write_json, write_text
from polypseg.tables import Column, Table

SIZE = (96, 128)
"""Height and width of the made-up frames."""
FRAMES, MODELS = (250, 500, 1000), (12, 48)
"""Sizes of the jobs over frames, and over models."""
DUPLICATES = "from near_duplicates import made_up, near_duplicates; near_duplicates(made_up({}))"
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


def draw_set(folder: Path, count: int) -> Path:
    """``count`` JPEG frames in images/ and their masks in masks/, a round polyp each."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        top, left, radius = rng.uniform(30, 66), rng.uniform(30, 98), rng.uniform(10, 28)
        mask = np.hypot(y - top, x - left) < radius
        blobs = rng.integers(60, 200, size=(6, 8, 3), dtype=np.uint8)
        frame = cv2.resize(blobs, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "images" / f"{index:06d}.jpg"), np.where(mask[..., None], 255 - frame, frame))
        cv2.imwrite(str(folder / "masks" / f"{index:06d}.png"), mask.astype(np.uint8) * 255)
    return folder


def segmenting(folder: Path, count: int) -> list[str]:
    """``segment`` of a folder of frames."""
    frames = draw_set(folder / "set", count) / "images"
    return ["-m", "polypseg_command", "--quiet", "segment", str(frames), "--output", str(folder / "segmented")]


def evaluating(folder: Path, count: int) -> list[str]:
    """``evaluate`` of somebody's masks, receipt included."""
    drawn = draw_set(folder / "set", count)
    data = ["--dataset", "kvasir_seg", "--source", str(drawn), "--allow-partial"]  # its layout is the drawn one's
    given = ["--predictions", str(drawn / "masks"), "--output", str(folder / "results")]
    return ["-m", "polypseg_command", "--quiet", "evaluate", *data, *given]


def searching(_: Path, count: int) -> list[str]:
    """The search for near-duplicates, of ten times as many frames."""
    return ["-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {DUPLICATES.format(10 * count)}"]


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
    return ["-m", "polypseg_command", "--quiet", "report", str(folder / "results"), *named]


JOBS = (
    Job(name="segment frames", sizes=FRAMES, prepare=segmenting),
    Job(name="evaluate masks of frames, every convention", sizes=FRAMES, prepare=evaluating),
    Job(name="near-duplicates, of 10 n frames", sizes=FRAMES, prepare=searching),
    Job(name="report on models", sizes=MODELS, prepare=reporting),
)


LAUNCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(done.returncode)
"""
"""A small process between: a child's peak memory counts that of the process that starts it."""


def measured(job: Job, count: int) -> dict[str, Any]:
    """Seconds and most memory of the job's process. Raises PolypSegError with its words where it fails."""
    with tempfile.TemporaryDirectory() as name:
        arguments = job.prepare(Path(name), count)
        launched = [sys.executable, "-c", LAUNCH, *arguments]
        done = subprocess.run(launched, capture_output=True, text=True, check=False, cwd=name)
    if done.returncode:
        raise PolypSegError(f"{job.name}, {count}: {done.stderr[-2000:]}")
    seconds, peak = map(float, done.stdout.split())
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
    times: Annotated[int, Option(help="Each job over as many times more frames.", min=1)] = 1,
) -> None:
    """Measure how time and memory grow."""
    found = []
    for job in JOBS:
        sizes = [size * times if job.sizes is FRAMES else size for size in job.sizes]
        rows = [measured(job, size) for size in sizes]
        found += with_exponents(rows)
        print(to_markdown(found[-len(rows) :]), flush=True)
    write_json(output / "growth.json", {"rows": found, "environment": environment_record()})
    print(f"written: {write_text(output / 'growth.md', to_markdown(found))}")


if __name__ == "__main__":
    run_script(main)
