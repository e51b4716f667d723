"""Where the time of a frame goes: the steps of a job one after the other, on one thread.

OMP_NUM_THREADS=1 python benchmarks/stages.py

The jobs themselves run their steps in threads of their own, so that a frame takes less than their sum where there are
cores. What no step can pass is in benchmarks/ceilings.py.
"""

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer import Option

import ceilings
import polypseg
from inference import EXACT, FULL_SIZE, ROUNDED, ROUNDED_IN_TORCH, exported
from polypseg.cli.console import run_script
from polypseg.data.corpus import open_frames
from polypseg.data.images import decode_frame, encode_png
from polypseg.data.polyps import SyntheticOptions, open_dataset
from polypseg.evaluation.conventions import CONVENTIONS, needed_measures
from polypseg.evaluation.image_metrics import measure_image
from polypseg.files import SAMPLE_FRAMES
from polypseg.inference.model import load_model
from polypseg.inference.predictors import probability_map
from polypseg.inference.runtimes import Precision
from polypseg.inference.segment_steps import OVERLAY_QUALITY
from polypseg.inference.segmenter import MIN_AREA, Segmenter, draw_onto
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.pretraining.views import augment, decode_for, draw_box, resized_crop
from polypseg.provenance.local import STARTER_FOLDER
from pretraining_feed import METHODS

Result = TypeVar("Result")
WAYS: dict[str, tuple[str, Precision]] = {"exact": ("auto", "fp32"), **ROUNDED}
SIZE = 224
"""Pixels a side of a view."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a job."""

    job: str
    way: str
    stage: str
    seconds: float
    """A frame."""
    gflop: float | None = None
    """A frame, where it is a network's."""


@dataclass
class Clock:
    """Adds up what the steps of a job take."""

    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, name: str, work: Callable[..., Result], /, *given: Any, **named: Any) -> Result:
        """What the work gives; its time is added to the step's."""
        start = time.perf_counter()
        result = work(*given, **named)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return result


def timed(
    job: str,
    way: str,
    frame: Callable[[Clock, int], object],
    *,
    frames: int,
    repeats: int,
    gflop: Mapping[str, float] | None = None,
) -> list[Stage]:
    """The steps of ``frame(clock, number)``: medians over repeats, after one that is not counted."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        clock = Clock()
        for number in range(frames):
            frame(clock, number)
        rounds.append(clock.seconds)
    return [
        Stage(
            job=job,
            way=way,
            stage=stage,
            seconds=statistics.median(each[stage] for each in rounds[1:]) / frames,
            gflop=(gflop or {}).get(stage),
        )
        for stage in rounds[0]
    ]


def network_gflop(folder: Path) -> float:
    """GFLOP of a frame's forward pass, two a multiplication with its addition."""
    model, processor = load_model(str(folder))
    size = processor.size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, size["height"], size["width"]))
    return counter.get_total_flops() / 1e9


def segment_stages(*, frames: int, repeats: int) -> Iterator[Stage]:
    """``segment`` of the sample frames with the shipped model."""
    files, gflop = sorted(SAMPLE_FRAMES.glob("*.jpg")), network_gflop(STARTER_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "written"
        for way, (runtime, precision) in WAYS.items():
            segmenter = polypseg.load(runtime=runtime, precision=precision)
            point = segmenter.point()

            def segment(clock: Clock, number: int, *, by: Segmenter = segmenter, point: Any = point) -> None:
                data = files[number % len(files)].read_bytes()
                image = clock.step("JPEG decoding", decode_frame, data, name="frame")
                pixels = clock.step("resizing and normalizing", by.prepare, [image])
                (logits,) = clock.step("network", by.runtime.polyp_logits, pixels)
                found = clock.step(
                    "mask, lesions, expected Dice",
                    by.read, image, pixels[0], logits, point=point, min_area=MIN_AREA, everywhere=False,
                )  # fmt: skip
                picture = clock.step("drawing", draw_onto, image, found, caption=by.caption)
                buffer = io.BytesIO()
                clock.step("JPEG encoding", picture.save, buffer, format="JPEG", **OVERLAY_QUALITY)
                mask = clock.step("PNG encoding", encode_png, found.mask * np.uint8(255))
                clock.step("writing", lambda: [target.write_bytes(part) for part in (mask, buffer.getvalue())])

            yield from timed(
                "segment a frame", way, segment,
                frames=frames, repeats=repeats, gflop={"network": gflop},
            )  # fmt: skip


def evaluation_stages(*, frames: int, repeats: int) -> Iterator[Stage]:
    """``evaluate`` of frames of 512x512 by the paper's metrics and by every convention, with the shipped model."""
    data = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=frames, size=(512, 512)))
    gflop = network_gflop(STARTER_FOLDER)
    for way, (runtime, precision) in WAYS.items():
        segmenter = polypseg.load(runtime=runtime, precision=precision)

        asked = tuple(CONVENTIONS) if way == "exact" else ("paper",)

        def evaluate(clock: Clock, number: int, *, by: Segmenter = segmenter, asked: Sequence[str] = asked) -> None:
            record = data.records[number]
            frame = clock.step("frame decoding", data.frame, record)
            pixels = clock.step("resizing and normalizing", by.prepare, [frame])
            (logits,) = clock.step("network", by.runtime.polyp_logits, pixels)
            size = (frame.height, frame.width)
            probability = clock.step("enlarging the map", probability_map, torch.from_numpy(logits), size)
            mask = clock.step("mask decoding", data.mask, record).astype(bool)
            for name in asked:
                clock.step(f"measures of {name}", measure_image, probability, mask, measures=needed_measures([name]))

        yield from timed(
            "evaluate a frame", way, evaluate,
            frames=frames, repeats=repeats, gflop={"network": gflop},
        )  # fmt: skip


def view_stages(*, frames: int, repeats: int) -> Iterator[Stage]:
    """The views of a frame for pretraining, from JPEG."""
    found = open_frames(SAMPLE_FRAMES)
    for method, recipe in METHODS.items():
        settings = tuple(view.settings() for view in load_pretraining_recipe(recipe).views)

        def views(clock: Clock, number: int, *, settings: Any = settings) -> None:
            rng, data = np.random.default_rng(number), found.read(number % len(found))

            def draw(height: int, width: int) -> list[Any]:
                return [draw_box(rng, height=height, width=width, scale=view.crop_scale) for view in settings]

            image, boxes = clock.step("JPEG decoding", decode_for, data, name="frame", draw=draw, size=SIZE)
            for view, box in zip(settings, boxes, strict=True):
                crop = clock.step(
                    "cropping and resizing",
                    resized_crop, image, box, size=SIZE, interpolation=view.interpolation,
                )  # fmt: skip
                clock.step("colors, blur, flip", augment, crop, view, rng)

        yield from timed(f"{len(settings)} view(s) of {method}", "the feed", views, frames=frames, repeats=repeats)


def network_stages(*, repeats: int) -> Iterator[Stage]:
    """The full-size architectures with random weights in each runtime, at the batch size of ``inference``."""
    runtimes = {"torch, eager": ("torch", "fp32"), **EXACT, **ROUNDED, **ROUNDED_IN_TORCH}
    for short, batch in FULL_SIZE.items():
        with exported(short) as folder:
            gflop = network_gflop(folder)
            for way, (runtime, precision) in runtimes.items():
                loaded = polypseg.load(folder, runtime=runtime, precision=precision)
                size = loaded.processor.size
                pixels = np.zeros((batch, 3, size["height"], size["width"]), dtype=np.float32)

                def predict(clock: Clock, _: int, *, by: Segmenter = loaded, pixels: Any = pixels) -> None:
                    clock.step("network", by.runtime.polyp_logits, pixels)

                for stage in timed(f"{short}, batch {batch}", way, predict, frames=1, repeats=repeats):
                    yield replace(stage, seconds=stage.seconds / batch, gflop=gflop)


def stages(*, frames: int = 12, repeats: int = 5, full: bool = False) -> list[Stage]:
    """All jobs' steps; ``full``: the full-size networks too, which takes minutes."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    jobs = (segment_stages, evaluation_stages, view_stages)
    found = [stage for job in jobs for stage in job(frames=frames, repeats=repeats)]
    return [*found, *(network_stages(repeats=repeats) if full else ())]


def to_markdown(found: Sequence[Mapping[str, Any]], *, best: Mapping[str, Any]) -> str:
    """A table of steps (as ``asdict`` gives them), with a network's share of the machine's matrix products."""
    lines = ["| job | way | step | ms a frame | share | of matrix products |", "|---|---|---|---|---|---|"]
    total: dict[tuple[str, str], float] = {}
    for stage in found:
        key = (stage["job"], stage["way"])
        total[key] = total.get(key, 0.0) + stage["seconds"]
    for stage in found:
        share = stage["seconds"] / total[stage["job"], stage["way"]]
        limit = best.get("bf16_gflops" if "bf16" in stage["way"] else "fp32_gflops")
        reached = f"{stage['gflop'] / stage['seconds'] / limit:.0%}" if stage["gflop"] and limit else ""
        cells = (stage["job"], stage["way"], stage["stage"], f"{1e3 * stage['seconds']:.3g}", f"{share:.0%}", reached)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    frames: Annotated[int, Option(help="Frames a repeat.", min=1)] = 12,
    repeats: Annotated[int, Option(help="Repeats.", min=1)] = 5,
    full: Annotated[bool, Option(help="Also the full-size networks, which takes minutes.")] = False,
) -> None:
    """Time the steps of a frame."""
    found = stages(frames=frames, repeats=repeats, full=full)
    print(to_markdown([asdict(stage) for stage in found], best=ceilings.ceilings()))


if __name__ == "__main__":
    run_script(main)
