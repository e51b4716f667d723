"""How long ``polypseg estimate`` takes on a folder of frames, from the shell; a record that docs/estimate.md shows.

python benchmarks/estimate_time.py FRAMES --output docs/estimate/time.json

Each repeat is a process of its own; the median counts.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from commands import run
from polypseg.cli.console import run_script
from polypseg.data.sources import IMAGE_SUFFIXES
from polypseg.errors import UsageError
from polypseg.files import environment_record, file_sha256, processor_name, write_json
from polypseg.inference.runtimes import WEIGHTS
from polypseg.provenance.local import starter_folder


def main(
    frames: Annotated[Path, Argument(help="Folder of frames; the first ones by name are taken.")],
    output: Annotated[Path, Option(help="JSON file of the record.")],
    count: Annotated[int, Option(min=30, help="Frames to estimate from.")] = 100,
    repeats: Annotated[int, Option(min=1, help="Repeats; the median counts.")] = 3,
) -> None:
    """Time the command with the shipped model."""
    found = sorted(path for path in frames.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)[:count]
    if len(found) < count:
        raise UsageError(f"{frames} holds {len(found)} frames: {count} are needed")
    seconds = []
    with tempfile.TemporaryDirectory() as name:
        chosen = Path(name) / "frames"
        chosen.mkdir()
        for path in found:
            shutil.copyfile(path, chosen / path.name)
        for repeat in range(repeats):
            began = time.perf_counter()
            run("-m", "polypseg_command", "estimate", str(chosen), "--output", f"{name}/{repeat}")
            seconds.append(round(time.perf_counter() - began, 2))
            print(f"{seconds[-1]} s", flush=True)
    record = {
        "frames": count,
        "folder": frames.resolve().parent.name,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "model": file_sha256(starter_folder() / WEIGHTS),
        "environment": environment_record(),
    }
    print(write_json(output, record))


if __name__ == "__main__":
    run_script(main)
