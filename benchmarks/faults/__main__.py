"""The campaign of faults: kills, disks, hostile inputs; a table of what was tried, survived and lost.

make faults; or, of some kinds only, the command of that target with --only "full disk"
"""

import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import disks
import inputs
import numpy as np
import torch
import trainings
from PIL import Image
from table import to_markdown
from trial import Kind
from typer import Option

from polypseg.cli.console import run_script
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import git_revision, write_json, write_text


def write_frames(folder: Path) -> tuple[Path, Path]:
    """Frames to pretrain on and the grid's two classes of toys, drawn."""
    frames, toys = folder / "frames", folder / "toys"
    rng = np.random.default_rng(0)
    for place in (frames, toys):
        place.mkdir()
    for index in range(40):
        noise = rng.integers(0, 99, size=(40, 40, 3), dtype=np.uint8) + np.uint8(index % 2 * 100)
        Image.fromarray(noise).save(frames / f"{index:03d}.png")
        if index < 20:
            Image.fromarray(noise).save(toys / f"n0000000{index % 2}_{index}.png")
    return frames, toys


def main(
    output: Annotated[Path, Option(help="The table; its JSON goes beside it.")] = Path("docs/reliability.md"),
    only: Annotated[list[str] | None, Option(help="Kinds whose name begins so; others keep their rows.")] = None,
    scale: Annotated[float, Option(min=0.05, max=10, help="Number of tries, as a multiple of the campaign's.")] = 1.0,
) -> None:
    """Try every kind of fault and write the table; the exit code is 1 where anything was lost."""
    torch.set_num_threads(1)  # processes are forked
    place = output.with_suffix(".json")
    before = {row["name"]: Kind(**row) for row in json.loads(place.read_text())["kinds"]} if place.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="polypseg-faults-") as name:
        folder = Path(name)
        os.environ["POLYPSEG_CACHE"] = str(folder / "cache")
        frames, toys = write_frames(folder)
        every = [
            *trainings.kinds(folder, frames, toys, scale=scale),
            *disks.kinds(folder, scale=scale),
            *inputs.kinds(folder),
        ]
        wanted = [kind.name for kind, _ in every if not only or any(kind.name.startswith(word) for word in only)]
        if not wanted:
            raise UsageError(f"no kind of fault begins with {' or '.join(only or [])}")
        for kind, attempt in every:
            if kind.name not in wanted:
                continue
            print(kind.name, flush=True)
            begun = time.monotonic()
            attempt(kind)
            kind.seconds = round(time.monotonic() - begun, 1)
            kind.revision = git_revision() or kind.revision
            before[kind.name] = kind
            rows = [before[other.name] for other, _ in every if other.name in before]
            write_json(place, {"kinds": [asdict(row) for row in rows]})
            write_text(output, to_markdown(rows))
    lost = sum(len(before[name].lost) for name in wanted)
    if lost:
        raise PolypSegError(f"{lost} tries were lost: {output} lists them")


if __name__ == "__main__":
    run_script(main)
