"""The most memory that each job holds, against the way before it; each in a process of its own.

OMP_NUM_THREADS=1 python benchmarks/peak_memory.py --output runs/bench

Imports count: a user's process has them too. The ways before are those of the other benchmarks.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from commands import CARD, FRAME
from growth import COMMAND, draw_set, run_alone
from measures import FROZEN
from polypseg.cli.console import run_script
from polypseg.data.catalog import OWN_FOLDER
from polypseg.files import SAMPLE_FRAMES, environment_record, write_json, write_text
from polypseg.provenance.local import STARTER_FOLDER
from polypseg.tables import Column, Table
from side_by_side import BASELINE

FRAMES = 36
"""Of the jobs over several."""
SIZE = (512, 512)
"""Height and width of the frames that are evaluated."""
LOAD = """
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
import polypseg  # in the place of the code that a repository of the Hub brings
processor = AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil")
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1]).eval()

def probability(frame):
    with torch.inference_mode():
        logits = model(**processor(images=[frame], return_tensors="pt")).logits
        resized = torch.nn.functional.interpolate(logits, size=frame.size[::-1], mode="bilinear")
        return resized.softmax(dim=1)[0, 1].numpy()

frames = sorted(Path(sys.argv[2]).iterdir())
"""
SEGMENT = f"""{LOAD}
for path in frames:
    frame = Image.open(path).convert("RGB")
    mask = probability(frame) > 0.5
    Image.fromarray(mask.astype(np.uint8) * 255).save(Path(sys.argv[3]) / f"{{path.stem}}.png")
    shade = Image.blend(frame, Image.new("RGB", frame.size, (0, 255, 0)), 0.3)
    Image.composite(shade, frame, Image.fromarray(mask)).save(Path(sys.argv[3]) / f"{{path.stem}}.jpg", quality=90)
"""
EVALUATE = f"""{LOAD}
sys.path.insert(0, sys.argv[4])
from frozen_measures import measure_image
scores = []
for path in frames:
    mask = np.asarray(Image.open(Path(sys.argv[3]) / f"{{path.stem}}.png")) > 127
    scores.append(measure_image(probability(Image.open(path).convert("RGB")), mask))
"""
HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
STEP = HERE + "from training_step import stepping\nstep = stepping('RN-NA-NA', batch=16, ours={})\nstep(), step()"
DUPLICATES = HERE + "import near_duplicates as n\nn.{}(n.made_up(10_000))"
DISTANCE = (
    HERE
    + """
import numpy as np
import embedding_distance as e
rng = np.random.default_rng(0)
vectors, groups = [rng.normal(size=(800, 384)), 0.1 + rng.normal(size=(800, 384))], [np.arange(800)] * 2
e.{}(vectors, groups)
"""
)
VIEWS = (
    HERE
    + """
import pretraining_feed as p
from polypseg.files import SAMPLE_FRAMES
settings = tuple(view.settings() for view in p.load_pretraining_recipe(p.METHODS['moco_v3']).views)
read = p.{}(SAMPLE_FRAMES, settings)
for epoch in range(12):
    read(epoch, epoch % 3)
"""
)
COLUMNS = (
    Column(key="job", title="job", numeric=False),
    Column(key="way", title="way", numeric=False),
    Column(key="peak_mb", title="MB", format="{:.0f}".format),
    Column(key="before_mb", title="before", format="{:.0f}".format),
    Column(key="ratio", title="of it", format="{:.2f}".format),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something that is done in several ways."""

    name: str
    ways: Callable[[Path], Mapping[str, Sequence[str]]]
    """An empty folder -> way -> arguments of Python; BASELINE is one of them."""


def first_mask(folder: Path) -> dict[str, list[str]]:
    """One picture, from the shell."""
    return {
        BASELINE: ["-c", CARD, str(STARTER_FOLDER), str(FRAME), str(folder / "mask.png")],
        "polypseg segment": [*COMMAND, "segment", str(FRAME), "--output", str(folder / "ours")],
    }


def segmenting(folder: Path) -> dict[str, list[str]]:
    """Frames of a camera, with overlays."""
    samples, frames, masks = sorted(SAMPLE_FRAMES.glob("*.jpg")), folder / "frames", folder / "masks"
    frames.mkdir()
    masks.mkdir()
    for number in range(FRAMES):
        (frames / f"{number:03d}.jpg").write_bytes(samples[number % len(samples)].read_bytes())
    segment = [*COMMAND, "segment", str(frames)]
    return {
        BASELINE: ["-c", SEGMENT, str(STARTER_FOLDER), str(frames), str(masks)],
        "polypseg segment": [*segment, "--output", str(folder / "exact")],
        "polypseg segment, int8": [*segment, "--precision", "int8", "--output", str(folder / "int8")],
    }


def evaluating(folder: Path) -> dict[str, list[str]]:
    """Every measure of drawn frames."""
    drawn = draw_set(folder / "set", FRAMES, size=SIZE)
    evaluate = [*COMMAND, "evaluate", "--model", "starter", "--dataset", OWN_FOLDER, "--source", str(drawn)]
    images, masks = str(drawn / "images"), str(drawn / "masks")
    return {
        BASELINE: ["-c", EVALUATE, str(STARTER_FOLDER), images, masks, str(FROZEN.parent)],
        "polypseg evaluate": [*evaluate, "--output", str(folder / "exact")],
        "polypseg evaluate, onnxruntime": [
            *evaluate, "--runtime", "onnxruntime", "--output", str(folder / "onnx"),
        ],
    }  # fmt: skip


def both(code: str, before: object, ours: object) -> Callable[[Path], dict[str, list[str]]]:
    """Two ways that differ in one word of a program."""
    return lambda _: {BASELINE: ["-c", code.format(before)], "polypseg": ["-c", code.format(ours)]}


JOBS = (
    Job(name="import", ways=lambda _: {BASELINE: ["-c", "import torch"], "polypseg": ["-c", "import polypseg"]}),
    Job(name="first mask of one picture, from the shell", ways=first_mask),
    Job(name=f"segment {FRAMES} frames, with overlays", ways=segmenting),
    Job(name=f"evaluate the shipped model on {FRAMES} frames, every convention", ways=evaluating),
    Job(name="two steps of fine-tuning RN-NA-NA on 16 images", ways=both(STEP, before=False, ours=True)),
    Job(name="2 views of moco_v3", ways=both(VIEWS, before="official_reader", ours="feed_reader")),
    Job(name="near-duplicates of 10,000 frames", ways=both(DUPLICATES, before="before", ours="near_duplicates")),
    Job(name="embedding distance of 800 clusters", ways=both(DISTANCE, before="before", ours="kernel_distance")),
)


def measured(job: Job) -> list[dict[str, Any]]:
    """A row for each way but the one before. Raises PolypSegError with the words of one that fails."""
    with tempfile.TemporaryDirectory() as name:
        peaks = {way: run_alone(words, of=f"{job.name}, {way}")[1] for way, words in job.ways(Path(name)).items()}
    before = peaks.pop(BASELINE)
    return [
        {"job": job.name, "way": way, "peak_mb": peak, "before_mb": before, "ratio": peak / before}
        for way, peak in peaks.items()
    ]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of a record (``peak_memory.json``) as a table."""
    return Table(columns=COLUMNS, records=rows).markdown()


def main(
    output: Annotated[Path, Option(help="Folder that receives peak_memory.json and .md.")] = Path("runs/bench"),
) -> None:
    """Measure the most memory of each job and of the way before it."""
    found = []
    for job in JOBS:
        found += measured(job)
        print(to_markdown(found[-1:]), flush=True)
    write_json(output / "peak_memory.json", {"rows": found, "environment": environment_record()})
    print(f"written: {write_text(output / 'peak_memory.md', to_markdown(found))}")


if __name__ == "__main__":
    run_script(main)
