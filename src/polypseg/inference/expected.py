"""What may be expected of a model on a frame, from a file of plain numbers in its folder; NumPy alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import read_json
from polypseg.inference.features import Plane, describe, to_colors
from polypseg.inference.gate import Gate, describe_place, read_gate
from polypseg.inference.margin import Margin, read_margin
from polypseg.inference.operating_point import check_weights
from polypseg.inference.predictor import Predictor, read_predictor

EXPECTATION = "expectation.json"
FORMAT = 1
THRESHOLD = 0.5
"""Of the masks whose Dice is expected."""
DOUBTFUL, UNLIKE, EMPTY = "doubtful", "unlike", "no mask"
FLAGS: Mapping[str, str] = {
    DOUBTFUL: "look at it: most masks that are wrong (Dice below .5) are flagged, and some that are right",
    UNLIKE: "the frame is unlike those that the estimate was learned from: nothing is said of it",
    EMPTY: "no polyp was found: whether there is one cannot be told from this",
}


@dataclass(frozen=True, kw_only=True)
class FrameExpectation:
    """What may be expected of one mask."""

    expected_dice: float | None
    """Against an expert's mask, if there is a polyp; None for a frame that is unlike those learned from, and for an
    empty mask."""
    flag: str
    """A key of FLAGS, or empty."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What was learned of one model."""

    one_pass: Predictor
    """From the answer to the frame itself."""
    three_passes: Predictor
    """From the answers to the frame and two changed views of it."""
    gate: Gate
    margin: Margin
    doubtful_below: float
    """Expected Dice below which a mask is flagged."""
    content: Mapping[str, Any] = field(repr=False)
    """The whole file."""

    @property
    def digest(self) -> str:
        """16 hex digits that tell what was learned from anything else."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]

    def of_frame(self, logits: Plane, pixels: Plane, processor: Any) -> FrameExpectation:
        """Of the logits (h, w) of a prepared frame (3, h, w)."""
        colors = to_colors(pixels, processor)
        if self.gate.unlike(describe_place(colors)[None])[0]:
            return FrameExpectation(expected_dice=None, flag=UNLIKE)
        if not (logits > 0).any():
            return FrameExpectation(expected_dice=None, flag=EMPTY)
        features = describe(logits, colors, features=self.one_pass.features)
        expected = float(self.one_pass(np.array([[features[name] for name in self.one_pass.features]]))[0])
        return FrameExpectation(expected_dice=expected, flag=DOUBTFUL if expected < self.doubtful_below else "")


def read_expectation(folder: Path) -> Expectation | None:
    """What was learned of the model in a folder; None where there is no such file.

    Raises UsageError for a file of other weights or of a later version, PolypSegError for a damaged one.
    """
    path = folder / EXPECTATION
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise PolypSegError(f"{path} is damaged: get the model again")
    if content["format"] != FORMAT:
        raise UsageError(f"{path} is of format {content['format']}, this version reads {FORMAT}: learn it again")
    try:
        check_weights(folder, content["model"]["sha256"], path)
        return Expectation(
            one_pass=read_predictor(content["one_pass"]),
            three_passes=read_predictor(content["three_passes"]),
            gate=read_gate(content["gate"]),
            margin=read_margin(content["margin"]),
            doubtful_below=float(content["flag"]["below"]),
            content=content,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PolypSegError(f"{path} is damaged ({error!r}): get the model again") from error
