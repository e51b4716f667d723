"""Margins around masks that hold most of the true polyp, by conformal prediction; NumPy alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.errors import PolypSegError, UsageError
from polypseg.inference.predictor import Steps
from polypseg.inference.regions import grow_mask

COVERED = 0.9
"""Share of a polyp's true pixels that a margin must hold."""


@dataclass(frozen=True, kw_only=True)
class Margin:
    """The margins that frames with a polyp needed, and when their guarantee cannot be expected to hold."""

    needs: tuple[float | None, ...]
    """Of each calibration frame, least first, in units of the square root of the mask's area; None: no margin did."""
    holds: Steps
    """Expected Dice -> probability that the margin of ``level`` holds."""
    level: float
    """Of ``holds`` and the alarm."""
    usual: float
    spread: float
    """Mean and standard deviation of that probability over frames like those calibrated on."""

    def factor(self, level: float) -> float:
        """Margin in units of the square root of the mask's area that is wide enough for a share ``level`` of frames.

        Frames with a polyp, exchangeable with those calibrated on. Raises UsageError for a level outside 0 to 1, and
        for one that so few frames, or so many missed polyps, do not allow.
        """
        if not 0 < level < 1:
            raise UsageError(f"the margin's level is a share of frames between 0 and 1, both excluded; got {level}")
        rank = ceil(round(level * (len(self.needs) + 1), 9))
        need = self.needs[rank - 1] if rank <= len(self.needs) else None
        if need is None:
            most = sum(value is not None for value in self.needs) / (len(self.needs) + 1)
            raise UsageError(
                f"no margin holds {COVERED:.0%} of the polyp in {level:.0%} of the frames, as some polyps are missed: "
                f"ask for {np.floor(100 * most) / 100:g} at most"
            )
        return need

    def grow(self, mask: NDArray[np.bool_], *, level: float) -> NDArray[np.bool_]:
        """A mask (H, W) with its margin; an empty mask stays empty, and nothing is guaranteed of it."""
        reach = ceil(self.factor(level) * float(np.sqrt(mask.sum())))
        return grow_mask(mask, reach) if reach else mask

    def expected_coverage(self, expected: Sequence[float | None]) -> float:
        """Share of frames whose margin holds, from their expected Dice; None (an empty or unlike frame) counts as 0."""
        known = np.array([value for value in expected if value is not None])
        return float(self.holds(known[:, None]).sum() / len(expected)) if len(known) else 0.0

    def alarm(self, expected: Sequence[float | None]) -> str:
        """Why the guarantee cannot be expected to hold on frames of these expected Dice; empty where it can."""
        coverage = self.expected_coverage(expected)
        limit = min(self.level - 0.05, self.usual - 1.645 * self.spread / float(np.sqrt(len(expected))))
        if coverage >= limit:
            return ""
        return (
            f"the margin can be expected to hold in {coverage:.0%} of these {len(expected)} frames only, not in "
            f"{self.level:.0%}: they are not like those that it was calibrated on"
        )

    def content(self) -> dict[str, Any]:
        """For JSON."""
        needs = [None if need is None else round(need, 6) for need in self.needs]
        return {
            "covered": COVERED, "needs": needs, "holds": self.holds.content(), "level": self.level,
            "usual": self.usual, "spread": self.spread,
        }  # fmt: skip


def read_margin(content: Mapping[str, Any]) -> Margin:
    """What ``content()`` gave. Raises PolypSegError for anything else."""
    try:
        holds = content["holds"]
        return Margin(
            needs=tuple(content["needs"]),
            holds=Steps(feature=holds["feature"], x=tuple(holds["x"]), y=tuple(holds["y"])),
            **{name: float(content[name]) for name in ("level", "usual", "spread")},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PolypSegError(f"what was learned of this model is damaged ({error!r}): get the model again") from error
