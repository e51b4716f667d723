"""All twelve models from the reference's file format to a Hub and back, compared with an independent implementation.

python tests/hub_round_trip.py --output runs/hub-round-trip

For each row: a file with the reference's keys and random weights, converted, exported, pushed to a Hub that runs here,
fetched and verified, loaded by plain transformers in a process that cannot import polypseg, by AutoModel (both weight
files) and by pipeline("image-segmentation") on a frame of another size. Prints and writes a table of sizes, times and
largest differences. Needs about 2 GB of memory and 12 GB of disk; files of one row are deleted before the next.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from typer import Option

from local_hub.process import HubProcess, running_hub
from polypseg import zoo
from polypseg.cli.console import print_table, run_script
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.files import environment_record, write_json
from polypseg.inference.model import build_image_processor, predicted_mask
from polypseg.tables import Column, Table
from reference_files import write_reference_file

TESTS = Path(__file__).resolve().parent
LOGITS_TOLERANCE = 1e-5
"""Of the logits' largest value, or absolute below 1."""


@contextlib.contextmanager
def timed(row: dict[str, Any], step: str) -> Iterator[None]:
    """Put the seconds of a step into the row."""
    started = time.perf_counter()
    yield
    row[f"{step} s"] = round(time.perf_counter() - started, 1)


def command(hub: HubProcess, home: Path, *words: object) -> None:
    """Run one polypseg command as a user would; its error ends the benchmark."""
    line = [sys.executable, "-m", "polypseg_command", *map(str, words)]
    done = subprocess.run(line, env=hub.environment(home), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr}{done.stdout}")


def round_trip(entry: zoo.ZooEntry, hub: HubProcess, folder: Path, *, seed: int) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"model": entry.short_name}
    source = write_reference_file(entry, folder, seed=seed)
    row["file MB"] = round(source.path.stat().st_size / 1e6, 1)
    frame, _ = synthesize_frame(CAMERAS["b"], seed=seed, index=0, size=(288, 384))
    processor = build_image_processor(entry.config())
    prepared = processor(images=[Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
    images = torch.cat([prepared, torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(seed))])
    expected = source.oracle(images)  # (2, 1, 224, 224)
    with timed(row, "convert"):
        command(hub, folder / "home", "convert", source.path, "--output", folder / "model", "--model", entry.short_name)
    with timed(row, "export"):
        command(
            hub, folder / "home", "export", folder / "model", "--output", folder / "hub", "--organisation", "polypseg"
        )
    row["folder MB"] = round(
        sum(path.stat().st_size for path in (folder / "hub").rglob("*") if path.is_file()) / 1e6, 1
    )
    with timed(row, "push and verify"):
        command(hub, folder / "home", "push", folder / "hub", "--organisation", "polypseg")
    np.savez(folder / "in.npz", pixel_values=images.numpy(), frame=frame)
    trust = "trust" if entry.decoder == "deeplabv3plus" else "native"
    line = [sys.executable, str(TESTS / "plain_client.py"), f"polypseg/{entry.model_id}", "v0.1.0", trust]
    environment = hub.environment(folder / "fresh")
    with timed(row, "fresh process"):
        done = subprocess.run(
            [*line, str(folder / "in.npz"), str(folder / "out.npz")], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{entry.short_name}: {done.stderr}")
    with np.load(folder / "out.npz") as found:
        names = ("logits", "half_logits", "mask", "background", "bare_mask")
        logits, half, mask, background, bare = (found[name] for name in names)
    scale = max(1.0, float(expected.abs().max()))
    row["largest logit"] = round(float(expected.abs().max()), 2)
    row["difference"] = float(np.abs(logits[:, 1:] - expected.numpy()).max()) / scale
    row["fp16 difference"] = float(np.abs(half[:, 1:] - expected.numpy()).max()) / scale
    right = predicted_mask(expected[0, 0], frame.shape[:2])
    row["polyp share"] = round(float(right.mean()), 3)
    row["mask pixels wrong"] = int((mask != right).sum())
    row["bare pipeline"] = int((bare != right).sum())  # its processor resizes by torchvision: one gray level off
    row["ok"] = bool(
        row["difference"] <= LOGITS_TOLERANCE
        and row["mask pixels wrong"] <= 1e-4 * right.size
        and row["bare pipeline"] <= 1e-3 * right.size
        and (mask ^ background).all()
        and np.abs(logits[:, 0]).max() == 0
    )
    return row


def main(
    output: Annotated[Path, Option(help="Folder for the table; work files are deleted.")],
    model: Annotated[list[str] | None, Option(help="A row; repeat for several. Default: all twelve.")] = None,
    xet: Annotated[bool, Option("--xet", help="Transfer by Xet, the client's default, instead of LFS.")] = False,
) -> None:
    """All twelve models from the reference's file format to a Hub and back."""
    torch.set_num_threads(1)
    rows = []
    for seed, entry in enumerate([zoo.get(name) for name in model or []] or list(zoo.ZOO)):
        work = output / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with running_hub(work / "hub-data", xet=xet) as hub:
            rows.append(round_trip(entry, hub, work, seed=seed))
        shutil.rmtree(work)
        Console(stderr=True).print(rows[-1])
    write_json(output / "hub_round_trip.json", {"rows": rows, "environment": environment_record()})
    columns = [
        Column(key, key, lambda v: f"{v:.1e}" if isinstance(v, float) and 0 < v < 1e-2 else str(v)) for key in rows[0]
    ]
    print_table(Table(columns=columns, records=rows))
    if not all(row["ok"] for row in rows):
        raise SystemExit("at least one row did not come back as it was")


if __name__ == "__main__":
    run_script(main)
