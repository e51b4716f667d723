"""Models whose answer is known, without weights: a frame's red disc is the polyp, and they find it or do not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.inference.expected import FORMAT, Expectation, read_expectation
from polypseg.inference.gate import describe_place, learn_gate
from polypseg.inference.operating_point import weights_digests
from polypseg.inference.predictor import Steps
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.runtimes import WHOLE, Box, resize_bilinear
from polypseg.inference.segmenter import Segmenter

SIDE = 48
PROCESSOR = FrameProcessor(
    size={"height": SIDE, "width": SIDE}, image_mean=[0.0] * 3, image_std=[1.0] * 3, resample=int(Image.Resampling.BOX)
)


def draw_frame(seed: int, *, polyp: bool = True, side: int = 96) -> tuple[Image.Image, NDArray[np.bool_]]:
    """Pinkish ground with a soft shadow, and a red disc; the frame and its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    ground = (
        np.array([150, 90, 80]) + rng.normal(0, 4, (side, side, 3)) - 20 * (np.hypot(y - 48, x - 48) / 68)[..., None]
    )
    mask = np.hypot(y - rng.uniform(35, 60), x - rng.uniform(35, 60)) < rng.uniform(12, 22)
    if not polyp:
        mask[:] = False
    ground[mask] = np.array([240, 60, 60]) + rng.normal(0, 4, (int(mask.sum()), 3))
    return Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8)), mask


@dataclass(frozen=True, kw_only=True)
class RedFinder:
    """A runtime that finds what is red; ``wrong``: everything else instead."""

    wrong: bool = False
    sharpness: float = 40.0
    name: str = "constructed"
    description: str = "constructed"

    def polyp_logits(self, pixels: NDArray[np.float32], *, names: Sequence[str] = ()) -> NDArray[np.float32]:
        values = self.sharpness * (pixels[:, 0] - pixels[:, 1] - 0.4)
        return np.ascontiguousarray(-values if self.wrong else values, dtype=np.float32)

    def resize(self, logits: NDArray[np.float32], size: tuple[int, int], *, box: Box = WHOLE) -> NDArray[np.float32]:
        return resize_bilinear(logits, size, box=box)

    def update_digest(self, update) -> None:
        update(f"{self}".encode())


def constructed(*, wrong: bool = False, expectation: Expectation | None = None, **options) -> Segmenter:
    return Segmenter(
        runtime=RedFinder(wrong=wrong), processor=PROCESSOR, name="constructed", expectation=expectation, **options
    )


def expectation_content(folder: Path) -> dict:
    """An expectation file: the expected Dice is the soft Dice; like the first sixty drawn frames is what is like."""
    drawn = [draw_frame(seed, polyp=seed % 3 > 0)[0].resize((SIDE, SIDE), Image.Resampling.BOX) for seed in range(90)]
    places = [describe_place(np.moveaxis(np.asarray(frame), 2, 0) / np.float32(255)) for frame in drawn]
    steps = Steps(feature="soft_dice", x=(0.0, 1.0), y=(0.0, 1.0)).content()
    falling = Steps(feature="expected_dice", x=(0.4, 0.6), y=(1.0, 0.0)).content()
    rising = Steps(feature="expected_dice", x=(0.0, 1.0), y=(0.0, 1.0)).content()
    cell = {"model": "m", "set": "s", "corruption": "none", "severity": 0, "n": 9, "dice": 0.9, "expected": 0.9}
    return {
        "format": FORMAT,
        "model": {"id": "constructed", "sha256": weights_digests(folder), "convention": "Dice"},
        "one_pass": steps, "three_passes": steps,
        "gate": learn_gate(places, list(range(90))).content(),
        "margin": {
            "covered": 0.9, "needs": [k / 100 for k in range(40)], "holds": rising, "level": 0.9, "usual": 0.9,
            "spread": 0.05,
        },
        "flag": {"below": 0.5}, "failure": falling,
        "interval": {"half_width": 0.05, "frames": 60, "spread": 0.2},
        "seen": {"lab_l_mean": [50.0, 5.0], "lab_a_mean": [20.0, 5.0]},
        "learnt_from": [cell],
        "evidence": {"greatest_error_of_sets": 0.02, "coverage": {"covered": 1, "families": 1}},
    }  # fmt: skip


def write_expectation(folder: Path, **changes) -> Expectation:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expectation.json").write_text(json.dumps(expectation_content(folder) | changes))
    found = read_expectation(folder)
    assert found is not None
    return found
