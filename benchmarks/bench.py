"""Every job against the way before it, as JSON and as a Markdown table that may be quoted or says why not.

OMP_NUM_THREADS=1 python benchmarks/bench.py --output runs/bench

``--page`` renders a page from kept records (this one, growth.py's and peak_memory.py's) instead of measuring; those of
other sittings, ``bench.REVISION.json``, give a column for each kind of machine.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Option

import ceilings
import commands
import embedding_distance
import feed
import growth
import inference
import measures
import near_duplicates
import on_gpu
import peak_memory
import pretraining_feed
import stages
import synthetic_frames
import training_step
from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.files import environment_record, processor_name, read_json, write_json, write_text
from polypseg.tables import Column, Table
from side_by_side import Neighbors, Row, why_not_quotable

BENCHMARKS = (
    commands.rows,
    inference.rows,
    measures.rows,
    feed.rows,
    pretraining_feed.rows,
    near_duplicates.rows,
    embedding_distance.rows,
    synthetic_frames.rows,
    training_step.rows,
)
FULL = (inference.full_size_rows, on_gpu.rows)
"""Those that take minutes more."""
SECONDS = {"seconds": "seconds", "before": "before_seconds"}
"""Title of a column -> the repeats that it is the median of."""


PAGE = """# How fast

Each job, as this package does it, against the way before it: the reference study's, or what a user would otherwise
write (eager float32 in PyTorch, Pillow, one image after the other). Both run in turn on one machine, a network on one
thread each, the steps of `segment` and `evaluate` in threads of their own; medians of {repeats} repeats. Ratios hold
for this machine; `make bench` measures them on yours, in some minutes, and says so where it was not quiet enough. A way
that is named after another library is that library, doing the same job. What other sittings gave, of earlier revisions
or on another kind of machine, stands beside it.

{table}
## Where the time of a frame goes

The steps of a job one after the other, on one thread; the jobs themselves run them in threads of their own. The last
column is how much of the machine's matrix products (above) a network reaches: what no other runtime could pass.

{stages}
## What it holds in memory

The most that a process of each job holds, with all that it imports, against that of the way before:

{memory}

## How it grows

Small made-up frames, each job and size in a process of its own; `make bench-full` measures it anew:

{growth}

How long a frame takes in each runtime and precision, and what that costs in Dice: [what was trained here](results.md).
"""


def to_markdown(content: Mapping[str, Any], *, others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table of a record (``bench.json``), with the ratios of others; none if it was not quiet."""
    lines = [f"Measured on {content['processor']}; medians, in turn with the way before, whose time is 1.", ""]
    if content["reasons"]:
        return "\n".join(["**Not to be quoted:**", *(f"- {reason}" for reason in content["reasons"]), ""])
    elsewhere: dict[str, list[Mapping[str, Any]]] = {}
    for record in others:
        elsewhere.setdefault(record["processor"], []).append(record)
    here = elsewhere.pop(content["processor"], [])
    columns = [
        Column("job", "job"),
        Column("way", "way"),
        Column("times as fast", "", lambda row: f"{row['ratio']:.1f}" if row["steady"] else "repeats differ"),
        *([Column("earlier", "", partial(_ratios_in, here))] if here else []),
        *(Column(f"on {name}", "", partial(_ratios_in, records)) for name, records in elsewhere.items()),
        *(Column(title, "", partial(_seconds, key=key)) for title, key in SECONDS.items()),
    ]
    lines += [Table(columns=columns, records=content["rows"]).markdown(), ""]
    lines += [f"What this machine does at best, on {_threads(content)}: {ceilings.told(content['ceilings'])}."]
    lines += [f"{name}: {ceilings.told(latest['ceilings'])}." for name, (latest, *_) in elsewhere.items()]
    return "\n".join(lines) + "\n"


def _seconds(row: Mapping[str, Any], *, key: str) -> str:
    return f"{statistics.median(row[key]):.3g}" if row["steady"] else ""


def _ratios_in(records: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    """The ratios of the row's job and way in other records, but for those that are not steady."""
    rows = (other for record in records for other in record["rows"])
    found = (other for other in rows if (other["job"], other["way"]) == (row["job"], row["way"]) and other["steady"])
    return ", ".join(f"{other['ratio']:.1f}" for other in found)


def _threads(content: Mapping[str, Any]) -> str:
    threads = content["ceilings"]["threads"]
    return "one thread" if threads == 1 else f"{threads} threads"


def render_page(
    content: Mapping[str, Any],
    *,
    grown: Sequence[dict[str, Any]],
    held: Sequence[dict[str, Any]],
    others: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A page from a record, the rows of ``growth.json`` and ``peak_memory.json``, and records of other sittings.

    Raises UsageError for a record that may not be quoted.
    """
    if content["reasons"]:
        raise UsageError(f"this record may not be quoted: {content['reasons'][0]}: measure again on a quiet machine")
    repeats = len(content["rows"][0]["seconds"])
    told = stages.to_markdown(content["stages"], best=content["ceilings"])
    return PAGE.format(
        repeats=repeats,
        table=to_markdown(content, others=others),
        stages=told,
        memory=peak_memory.to_markdown(held),
        growth=growth.to_markdown(grown),
    )


def other_records(folder: Path) -> list[dict[str, Any]]:
    """Records of other sittings, ``bench.REVISION.json``, the latest first."""
    records = [read_json(path) for path in folder.glob("bench.*.json")]
    return sorted(records, key=lambda record: record["environment"]["created"], reverse=True)


def main(
    output: Annotated[Path, Option(help="Folder that receives bench.json and bench.md.")] = Path("runs/bench"),
    repeats: Annotated[int, Option(help="Repeats of each way, alternating.", min=2)] = 5,
    full: Annotated[bool, Option(help="Also the full-size architectures, which takes minutes more.")] = False,
    page: Annotated[Path | None, Option(help="Measure nothing: render this page from the records in --output.")] = None,
) -> None:
    """Run all benchmarks and write their rows; on a busy machine the table says that it may not be quoted."""
    if page is not None:
        grown, held = (read_json(output / f"{name}.json")["rows"] for name in ("growth", "peak_memory"))
        record, others = read_json(output / "bench.json"), other_records(output)
        print(write_text(page, render_page(record, grown=grown, held=held, others=others)))
        return
    neighbors, rows, best = Neighbors(), list[Row](), ceilings.ceilings()
    for benchmark in (*BENCHMARKS, *(FULL if full else ())):
        found = list(benchmark(repeats=repeats))
        for row in found:
            print(f"{row.job}: {row.way} {row.ratio:.1f}", flush=True)
        rows += found
    steps = [asdict(stage) for stage in stages.stages(repeats=repeats, full=full)]
    busy = neighbors.cores()
    reasons = why_not_quotable(rows, busy)
    content: dict[str, Any] = {
        "processor": processor_name(),
        "other_processes_cores": busy,
        "quotable": not reasons,
        "reasons": reasons,
        "ceilings": best,
        "rows": [row.content() for row in rows],
        "stages": steps,
        "environment": environment_record(),
    }
    write_json(output / "bench.json", content)
    table = write_text(output / "bench.md", to_markdown(content))
    for reason in reasons:
        print(f"NOT TO BE QUOTED: {reason}")
    print(f"written: {table}")


if __name__ == "__main__":
    run_script(main)
