"""What ``polypseg segment`` does once its arguments are read, on the shortest way from a photo to a mask."""

from collections.abc import Sequence
from pathlib import Path

from polypseg.inference.memory import share_one_arena
from polypseg.inference.quality import RESEARCH
from polypseg.inference.runtimes import AUTO, TORCH, Precision
from polypseg.inference.segment_files import segment_files
from polypseg.inference.segmenter import MIN_AREA, load
from polypseg.provenance.local import STARTER

OUTPUT = Path("segmented")
"""Where results go that nobody asked for elsewhere."""


def run_segment(
    inputs: Sequence[str],
    output: Path = OUTPUT,
    *,
    model: str = STARTER,
    runtime: str = AUTO,
    precision: Precision = "fp32",
    revision: str | None = None,
    threshold: float | None = None,
    min_area: int = MIN_AREA,
    every: int = 1,
    save_probability: bool = False,
    smooth: float | None = None,
    overlay_video: str | None = None,
    margin: float | None = None,
    operating_point: Path | None = None,
    batch_size: int = 1,
    overwrite: bool = False,
    device: str | None = None,
) -> list[str]:
    """Segment files with a model by name and return the lines to print; see ``segment_files`` for the rest.

    A ``device`` other than the CPU is torch's: with ``runtime`` auto it chooses torch.
    """
    share_one_arena()
    if device not in (None, "cpu") and runtime == AUTO:
        runtime = TORCH
    segmenter = load(model, revision=revision, runtime=runtime, precision=precision, operating_point=operating_point)
    if device is None and segmenter.runtime.name == TORCH:
        from polypseg.inference.model import default_device

        device = default_device()
    report = segment_files(
        segmenter.to(device or "cpu"),
        inputs,
        output,
        threshold=threshold,
        min_area=min_area,
        every=every,
        save_probability=save_probability,
        smooth=smooth,
        overlay_video=overlay_video,
        margin=margin,
        batch_size=batch_size,
        overwrite=overwrite,
    )
    return [
        *report.lines(),
        f"model {model}, computed by {segmenter.runtime.description}",
        f"{segmenter.quality.words}; {RESEARCH}, not a medical device",
    ]
