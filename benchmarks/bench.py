"""Every job against the way before it, as JSON and as a Markdown table that may be quoted or says why not.

OMP_NUM_THREADS=1 python benchmarks/bench.py --output runs/bench
"""

import platform
import statistics
from pathlib import Path
from typing import Annotated, Any

from typer import Option

import commands
import embedding_distance
import inference
import measures
import near_duplicates
import pretraining_feed
import synthetic_frames
from polypseg.cli.console import run_script
from polypseg.files import environment_record, write_json, write_text
from side_by_side import Neighbors, Row, why_not_quotable

BENCHMARKS = (
    commands.rows,
    inference.rows,
    measures.rows,
    pretraining_feed.rows,
    near_duplicates.rows,
    embedding_distance.rows,
    synthetic_frames.rows,
)
FULL = (inference.full_size_rows,)
"""Those that take minutes more."""


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    facts = Path("/proc/cpuinfo")
    names = (
        [line for line in facts.read_text().splitlines() if line.startswith("model name")] if facts.is_file() else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def to_markdown(rows: list[Row], *, reasons: list[str]) -> str:
    """The table; without ratios where the machine was not quiet."""
    lines = [f"Measured on {processor()}; medians, in turn with the way before, whose time is 1.", ""]
    if reasons:
        return "\n".join(["**Not to be quoted:**", *(f"- {reason}" for reason in reasons), ""])
    lines += ["| job | way | times as fast | seconds | before |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{row.ratio:.1f}", *(f"{statistics.median(times):.3g}" for times in (row.seconds, row.before)))
        lines.append(f"| {row.job} | {row.way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path, Option(help="Folder that receives bench.json and bench.md.")] = Path("runs/bench"),
    repeats: Annotated[int, Option(help="Repeats of each way, alternating.", min=2)] = 5,
    full: Annotated[bool, Option(help="Also the full-size architectures, which takes minutes more.")] = False,
) -> None:
    """Run all benchmarks and write their rows; on a busy machine the table says that it may not be quoted."""
    neighbors, rows = Neighbors(), list[Row]()
    for benchmark in (*BENCHMARKS, *(FULL if full else ())):
        found = list(benchmark(repeats=repeats))
        for row in found:
            print(f"{row.job}: {row.way} {row.ratio:.1f}", flush=True)
        rows += found
    others = neighbors.cores()
    reasons = why_not_quotable(rows, others)
    content: dict[str, Any] = {
        "processor": processor(),
        "other_processes_cores": others,
        "quotable": not reasons,
        "reasons": reasons,
        "rows": [row.content() for row in rows],
        "environment": environment_record(),
    }
    write_json(output / "bench.json", content)
    table = write_text(output / "bench.md", to_markdown(rows, reasons=reasons))
    for reason in reasons:
        print(f"NOT TO BE QUOTED: {reason}")
    print(f"written: {table}")


if __name__ == "__main__":
    run_script(main)
