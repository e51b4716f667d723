"""Masks of frames: one forward pass, a folder of frames end to end, a set with its scores; against the plain loop.

OMP_NUM_THREADS=1 python benchmarks/inference.py

The way before is the reference's: an eager model in float32, Pillow, one image after the other. ``exact`` is the best
exact runtime at hand, which ``load()`` takes by itself; ``int8`` and, on CPUs that have it, ``bf16`` change the mean
Dice (benchmarks/export_table.py says by how much).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from transformers import pipeline
from typer import Option

import polypseg
from measures import frozen_measures
from polypseg import zoo
from polypseg.cli.console import run_script
from polypseg.data.polyps import SyntheticOptions, open_dataset
from polypseg.evaluation.conventions import CONVENTIONS
from polypseg.evaluation.evaluate import score_predictions
from polypseg.files import SAMPLE_FRAMES
from polypseg.hub.onnx import export_runtime
from polypseg.inference.model import build_image_processor, cpu_has_bf16, load_model
from polypseg.inference.open_model import open_model
from polypseg.inference.prediction_source import PredictionSource
from polypseg.inference.runtimes import ONNX_FILES, Precision, has_bf16
from polypseg.inference.segment_files import segment_files
from polypseg.provenance.local import STARTER_FOLDER
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side

ROUNDED: dict[str, tuple[str, Precision]] = {"bf16": ("openvino", "bf16")} if has_bf16() else {}
"""Way -> runtime and precision, where this CPU has it."""
ROUNDED_IN_TORCH: dict[str, tuple[str, Precision]] = {"bf16, torch": ("torch", "bf16")} if cpu_has_bf16() else {}
EXACT: dict[str, tuple[str, Precision]] = {"ONNX Runtime": ("onnxruntime", "fp32"), "OpenVINO": ("openvino", "fp32")}
"""The exact runtimes other than torch."""
FULL_SIZE = {"RN-NA-NA": 1, "VT-NA-NA": 8}
"""Row of the table -> frames per forward pass."""


def eager(model: Any, processor: Any, frames: list[Image.Image]) -> list[np.ndarray[Any, Any]]:
    """Probability maps (H, W) in [0, 1] at the frames' sizes, one frame after the other."""
    found = []
    for frame in frames:
        with torch.inference_mode():
            logits = model(**processor(images=[frame], return_tensors="pt")).logits
            resized = torch.nn.functional.interpolate(logits, size=(frame.height, frame.width), mode="bilinear")
        found.append(resized.softmax(dim=1)[0, 1].numpy())
    return found


def forward_rows(
    folder: Path,
    title: str,
    *,
    batch: int,
    ways: dict[str, tuple[str, Precision]],
    repeats: int,
    peers: Mapping[str, torch.nn.Module] | None = None,
) -> list[Row]:
    """One forward pass of prepared frames: eager torch against runtimes (way -> runtime, precision) and peers."""
    model, processor = load_model(str(folder))
    size = processor.size["height"]
    pixels = np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)
    tensor = torch.from_numpy(pixels)

    def before() -> None:
        with torch.inference_mode():
            model(pixel_values=tensor)

    timed: dict[str, Callable[[], object]] = {BASELINE: before}
    for way, (runtime, precision) in ways.items():
        loaded = polypseg.load(folder, runtime=runtime, precision=precision).runtime
        timed[way] = partial(loaded.polyp_logits, pixels)
    for way, network in (peers or {}).items():
        timed[way] = torch.inference_mode()(partial(network.eval(), tensor))
    return side_by_side(f"forward pass of {title}, batch {batch}", timed, repeats=repeats)


def shipped_rows(*, frames: int, segmented: int, repeats: int) -> Iterator[Row]:
    """The shipped model: forward pass, ``segment`` of ``segmented`` frames, ``evaluate`` of ``frames``."""
    ways: dict[str, tuple[str, Precision]] = {
        "exact": ("auto", "fp32"),
        "int8": ("onnxruntime", "int8"),
        **ROUNDED,
    }
    yield from forward_rows(STARTER_FOLDER, "the shipped model", batch=1, ways=ways, repeats=repeats)
    model, processor = load_model(str(STARTER_FOLDER))
    with tempfile.TemporaryDirectory() as name:
        folder, samples = Path(name), sorted(SAMPLE_FRAMES.glob("*.jpg"))
        inputs = folder / "frames"
        inputs.mkdir()
        for number in range(segmented):
            (inputs / f"{number:03d}.jpg").write_bytes(samples[number % len(samples)].read_bytes())

        numbers = count()

        def plain() -> None:
            written = folder / f"plain-{next(numbers)}"  # as below: removing earlier results is no part of the job
            written.mkdir()
            for path in sorted(inputs.iterdir()):
                frame = Image.open(path).convert("RGB")
                mask = eager(model, processor, [frame])[0] > 0.5
                Image.fromarray(mask.astype(np.uint8) * 255).save(written / f"{path.stem}.png")
                shade = Image.new("RGB", frame.size, (0, 255, 0))
                overlay = Image.composite(Image.blend(frame, shade, 0.3), frame, Image.fromarray(mask))
                overlay.save(written / f"{path.stem}.jpg", quality=90)

        transformers_own = pipeline("image-segmentation", model=model, image_processor=processor)
        timed: dict[str, Callable[[], object]] = {
            BASELINE: plain,
            "transformers' pipeline, masks alone": lambda: transformers_own([str(path) for path in inputs.iterdir()]),
        }
        for way, (runtime, precision) in ways.items():
            segmenter = polypseg.load(runtime=runtime, precision=precision)
            timed[way] = lambda by=segmenter, way=way: segment_files(  # type: ignore[misc]
                by, [str(inputs)], folder / f"{way}-{next(numbers)}"
            )
        yield from side_by_side(f"segment {segmented} frames, with overlays and tables", timed, repeats=repeats)
    yield from evaluation_rows(STARTER_FOLDER, "the shipped model", frames=frames, repeats=repeats)


def evaluation_rows(folder: Path, title: str, *, frames: int, repeats: int) -> list[Row]:
    """Scores of a model on drawn frames of 512x512, receipt included; before: every measure in the loop."""
    data = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=frames, size=(512, 512)))
    source, plain = open_model(str(folder)), frozen_measures()
    model, processor = load_model(str(folder))
    asked: tuple[Precision, ...] = ("fp32", "int8")
    others = [("onnxruntime", precision) for precision in asked if (folder / ONNX_FILES[precision]).is_file()]
    others += [*ROUNDED.values(), *ROUNDED_IN_TORCH.values()]

    def before() -> None:
        for record in data.records:
            frame, mask = data.pair(record)
            plain.measure_image(eager(model, processor, [frame])[0], mask.astype(bool))

    def scored(conventions: tuple[str, ...], *, by: PredictionSource = source) -> None:
        score_predictions(by, data, conventions=conventions).content()

    ways: dict[str, Callable[[], object]] = {
        BASELINE: before,
        "paper's metrics": lambda: scored(("paper",)),
        **{
            f"paper's metrics, {runtime} {precision}": partial(
                scored, ("paper",), by=open_model(str(folder), runtime=runtime, precision=precision)
            )
            for runtime, precision in others
        },
        "every convention": lambda: scored(tuple(CONVENTIONS)),
        **{
            f"every convention, {runtime} {precision}": partial(
                scored, tuple(CONVENTIONS), by=open_model(str(folder), runtime=runtime, precision=precision)
            )
            for runtime, precision in others[:1]
        },
    }
    return side_by_side(f"evaluate {title} on {frames} frames", ways, repeats=repeats)


def same_architecture(short: str) -> dict[str, torch.nn.Module]:
    """Library -> its network of a row's architecture."""
    if short != "RN-NA-NA":
        return {}
    return {"segmentation_models_pytorch": smp.DeepLabV3Plus("resnet50", encoder_weights=None)}


@contextmanager
def exported(short: str) -> Iterator[Path]:
    """A folder with a row of the table at full size, its weights random, and its files for the runtimes."""
    model = build_model(zoo.get(short), load_recipe("finetune"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        build_image_processor(model.config).save_pretrained(folder)
        export_runtime(folder)
        yield folder


def full_size_rows(*, repeats: int) -> Iterator[Row]:
    """Both full-size architectures with random weights, in the exact runtimes."""
    for short, batch in FULL_SIZE.items():
        with exported(short) as folder:
            title, peers = f"{short} at full size", same_architecture(short)
            ways = {**EXACT, **ROUNDED, **ROUNDED_IN_TORCH}
            yield from forward_rows(folder, title, batch=batch, ways=ways, repeats=repeats, peers=peers)
            yield from evaluation_rows(folder, title, frames=8, repeats=repeats)


def rows(*, frames: int = 36, segmented: int = 100, repeats: int = 5) -> list[Row]:
    """The shipped model; ``full_size_rows`` has the full-size architectures."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    return list(shipped_rows(frames=frames, segmented=segmented, repeats=repeats))


def main(
    frames: Annotated[int, Option(help="Frames that are evaluated.")] = 36,
    segmented: Annotated[int, Option(help="Frames that are segmented.")] = 100,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
    full: Annotated[bool, Option(help="Also the full-size architectures (minutes).")] = False,
) -> None:
    """Time masks of frames against the plain loop."""
    neighbors = Neighbors()
    found = rows(frames=frames, segmented=segmented, repeats=repeats)
    if full:
        found += full_size_rows(repeats=repeats)
    print(show(found, neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
