"""A test input that travels with a model, and what each of its files gives for it: proof on the machine where it runs.

``replay/frame.png`` is a synthetic frame, ``replay/expected.json`` the logits of every exported file on a grid of it.
That a file runs here and that it reproduces its numbers are two answers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.errors import PolypSegError, UsageError, first_line
from polypseg.files import atomic_path, read_json, write_json
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.runtimes import (
    ONNX_FILES,
    OPENVINO_FILES,
    WEIGHTS,
    OnnxRuntime,
    OpenVinoRuntime,
    Runtime,
    open_runtime,
)

FRAME, EXPECTED = "replay/frame.png", "replay/expected.json"
FORMAT = 1
_GRID = 24
"""Rows and columns of the logits that are kept."""
_TOLERANCE = {"fp32": 1e-3, "fp16": 0.05, "int8": 0.25}
"""Largest difference that is still the same, relative to the largest logit: fp16 and int8 depend on the CPU's units."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What became of one file of a model on this machine."""

    file: str
    runs: str
    """Which runtime computed it; empty where none did."""
    difference: float | None
    """Largest difference of a logit from the kept ones, relative to the largest of these; None where nothing ran."""
    tolerance: float
    problem: str
    """Why it does not run; empty where it does."""

    @property
    def reproduces(self) -> bool:
        """Whether the file gives here what it gave where it was written."""
        return self.difference is not None and self.difference <= self.tolerance

    def line(self) -> str:
        """One line to print."""
        if not self.runs:
            return f"{self.file}: does not run here ({self.problem}); not known whether it reproduces"
        verdict = "reproduces its output" if self.reproduces else "DOES NOT REPRODUCE its output"
        measured = f"differs by {self.difference:.1g}, allowed {self.tolerance:g}"
        return f"{self.file}: runs here ({self.runs}); {verdict}: {measured}"


def add_replay(folder: Path, file: str, *, runtime: Runtime | None = None) -> None:
    """Record what a file of a model folder gives for the test frame; the frame is drawn where there is none yet.

    ``runtime`` computes the file; without, it is opened.
    """
    from polypseg.data.synthetic import CAMERAS, synthesize_frame

    if not (folder / FRAME).is_file():
        frame, _ = synthesize_frame(CAMERAS["a"], seed=0, index=1, size=(200, 224))
        with atomic_path(folder / FRAME) as temporary:
            Image.fromarray(frame).save(temporary, format="PNG", optimize=True)
    kept: dict[str, Any] = {"format": FORMAT, "outputs": {}}
    if (folder / EXPECTED).is_file():
        kept = _read(folder)
    logits = _logits(folder, runtime or _open(folder, file))
    rows, columns = _grid(logits)
    kept["outputs"][file] = {
        "size": list(logits.shape),
        "tolerance": _TOLERANCE[_precision(file)],
        "logits": [[round(float(value), 5) for value in row] for row in logits[np.ix_(rows, columns)]],
    }
    kept["outputs"] = dict(sorted(kept["outputs"].items()))
    write_json(folder / EXPECTED, kept)


def replay(folder: Path) -> list[Replayed]:
    """Compute the test frame with every file that a model folder keeps outputs of, and compare.

    Raises UsageError for a folder without a test frame.
    """
    if not (folder / EXPECTED).is_file() or not (folder / FRAME).is_file():
        raise UsageError(f"{folder} has no test frame ({EXPECTED}): it was not written by `polypseg export`")
    return [_replay_file(folder, file, kept) for file, kept in _read(folder)["outputs"].items()]


def _replay_file(folder: Path, file: str, kept: dict[str, Any]) -> Replayed:
    common: dict[str, Any] = {"file": file, "tolerance": float(kept["tolerance"])}
    try:
        runtime = _open(folder, file)
        logits = _logits(folder, runtime)
    except Exception as error:  # whatever a runtime raises on this machine is the answer
        return Replayed(**common, runs="", difference=None, problem=first_line(error))
    expected = np.array(kept["logits"], dtype=np.float32)
    difference = np.inf
    if list(logits.shape) == kept["size"]:
        off = np.abs(logits[np.ix_(*_grid(logits))] - expected).max()
        difference = float(off / max(np.abs(expected).max(), 1e-12))
    return Replayed(**common, runs=runtime.description, difference=difference, problem="")


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / EXPECTED)
    if content.get("format") != FORMAT:
        raise PolypSegError(f"{folder / EXPECTED} is of another version of polypseg: export the model again")
    return content


def _precision(file: str) -> str:
    known = {name: precision for files in (ONNX_FILES, OPENVINO_FILES) for precision, name in files.items()}
    return known.get(file, "fp32")


def _open(folder: Path, file: str) -> Runtime:
    if file == WEIGHTS:
        return open_runtime(folder, runtime="torch")
    return OnnxRuntime(folder / file) if file.endswith(".onnx") else OpenVinoRuntime(folder / file)


def _logits(folder: Path, runtime: Runtime) -> NDArray[np.float32]:
    """Polyp logits (h, w) of the test frame at the model's own size."""
    with Image.open(folder / FRAME) as frame:
        pixels = FrameProcessor.from_pretrained(folder)([frame.convert("RGB")])["pixel_values"]
    return runtime.polyp_logits(pixels)[0]


def _grid(logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    height, width = logits.shape
    rows, columns = (np.unique(np.linspace(0, side - 1, _GRID).round().astype(int)) for side in (height, width))
    return rows, columns
