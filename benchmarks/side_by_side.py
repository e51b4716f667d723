"""Ways of doing one job, timed in turn within one run, and whether the machine was quiet enough to quote the ratios.

Each benchmark gives rows (see ``Row``); benchmarks/bench.py runs them all.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINE = "before"
"""The name of the way whose time is 1."""
QUIET_CORES = 0.1
"""Cores that other processes may use on average while ratios are measured."""
QUIET_SPREAD = 0.25
"""How far the middle half of a way's times may reach, as a fraction of their median."""
RESTLESS_SHARE = 0.25
"""Share of rows with restless repeats from which the machine counts as noisy, and no row is quoted."""
SHORTEST = 0.1
"""Seconds that a repeat takes at least: what is faster is done several times in it, and its time divided."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of one job."""

    job: str
    way: str
    seconds: tuple[float, ...]
    """Of each repeat."""
    before: tuple[float, ...]
    """Of each repeat of the baseline, which alternated with this one."""

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline, by medians."""
        return statistics.median(self.before) / statistics.median(self.seconds)

    @property
    def steady(self) -> bool:
        """Whether the repeats of both agree well enough."""
        return all(spread(times) <= QUIET_SPREAD for times in (self.seconds, self.before))

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "job": self.job,
            "way": self.way,
            "seconds": list(self.seconds),
            "before_seconds": list(self.before),
            "ratio": self.ratio,
            "steady": self.steady,
        }


def spread(times: Sequence[float]) -> float:
    """Distance of the quartiles as a fraction of the median; 0 for fewer than two times."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / statistics.median(times)


def side_by_side(job: str, ways: Mapping[str, Callable[[], object]], *, repeats: int = 5) -> list[Row]:
    """Run the ways in turn, ``repeats`` times after a first round that is not counted; a row for each but BASELINE."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    times = dict.fromkeys(ways, 1)
    for repeat in range(-1, repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(times[name]):
                way()
            taken = (time.perf_counter() - start) / times[name]
            if repeat >= 0:
                seconds[name].append(taken)
            else:
                times[name] = max(1, math.ceil(SHORTEST / max(taken, 1e-6)))
    before = tuple(seconds[BASELINE])
    return [
        Row(job=job, way=name, seconds=tuple(taken), before=before)
        for name, taken in seconds.items()
        if name != BASELINE
    ]


class Neighbors:
    """How many cores other processes use between the start and a question."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """On average so far; None where the system does not tell."""
        begin, end = self._start, self._now()
        if begin is None or end is None:
            return None
        (wall, busy, own), (wall_now, busy_now, own_now) = begin, end
        return max(0.0, (busy_now - busy - (own_now - own)) / max(wall_now - wall, 1e-9))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Wall time, and the seconds of work of all cores and of this process with its children."""
        statistics_file = Path("/proc/stat")
        if not statistics_file.is_file():
            return None
        user, nice, system, _, _, irq, soft_irq, steal, *_ = map(
            int, statistics_file.read_text().splitlines()[0].split()[1:]
        )
        ticks = user + nice + system + irq + soft_irq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def why_not_quotable(rows: Sequence[Row], others: float | None) -> list[str]:
    """Reasons for which no ratio may be quoted, none on a quiet machine; one restless row is left out by itself."""
    reasons = []
    if others is None:
        reasons.append("what else the machine did is not known here")
    elif others > QUIET_CORES:
        reasons.append(f"other processes used {others:.1f} cores")
    restless = [f"{row.job}, {row.way}" for row in rows if not row.steady]
    if len(restless) > RESTLESS_SHARE * len(rows):
        reasons.append(f"the repeats differ by more than {QUIET_SPREAD:.0%}: {'; '.join(restless)}")
    return reasons


def show(rows: Sequence[Row], others: float | None) -> str:
    """The rows for a terminal, with what speaks against quoting them."""
    lines = [
        f"{row.job}: {row.way} {row.ratio:.1f} times as fast as before "
        f"({statistics.median(row.seconds):.3g} s against {statistics.median(row.before):.3g} s)"
        + ("" if row.steady else "; NOT TO BE QUOTED: its repeats differ")
        for row in rows
    ]
    return "\n".join([*lines, *(f"NOT TO BE QUOTED: {reason}" for reason in why_not_quotable(rows, others))])
