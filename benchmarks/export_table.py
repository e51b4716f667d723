"""Size, latency and Dice of every file that a model folder holds for a runtime, against torch in fp32.

python benchmarks/export_table.py --model starter --dataset kvasir_seg --split reference --part test

Latency is of the network alone, batch 1; the sides alternate within one run, figures are medians, and the ratios may be
quoted. Dice is the mean per image at the masks' own size, and its change the mean of the differences per image.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from typer import Option

from polypseg.cli.console import print_table, run_script
from polypseg.data import open_dataset
from polypseg.errors import UsageError
from polypseg.evaluation.metrics import pixel_counts, score
from polypseg.files import write_json
from polypseg.inference.runtimes import (
    BF16,
    ONNX_FILES,
    ONNXRUNTIME,
    OPENVINO,
    OPENVINO_FILES,
    TORCH,
    WEIGHTS,
    has_bf16,
    is_installed,
    thread_count,
)
from polypseg.inference.segmenter import Segmenter, load
from polypseg.provenance.fetch import fetch
from polypseg.provenance.local import local_folder
from polypseg.tables import Column, Table


def main(
    model: Annotated[str, Option(help="Model folder, starter, or Hub id.")],
    dataset: Annotated[str, Option(help="Dataset of the table; see `polypseg data list`.")],
    source: Annotated[Path | None, Option(help="Folder or archive of the dataset.")] = None,
    split: Annotated[str, Option(help="Named split; `full` is every image.")] = "reference",
    part: Annotated[str, Option(help="Part of the split.")] = "test",
    limit: Annotated[int | None, Option(min=1, help="Only the first N images.")] = None,
    repeats: Annotated[int, Option(min=1, help="Timed runs of each side, alternating.")] = 15,
    output: Annotated[Path | None, Option(help="Also write the rows as JSON.")] = None,
) -> None:
    """Print size, latency ratio and Dice change of every format and precision of a model folder."""
    folder = local_folder(model) or fetch(model)
    data = open_dataset(dataset, source=source)
    ids, label = data.part(split, part, limit=limit)
    sides = {name: load(folder, runtime=name[0], precision=name[1]) for name in _present(folder)}  # type: ignore[arg-type]
    if (TORCH, "fp32") not in sides:
        raise UsageError(f"{folder} has no {WEIGHTS}: there is nothing to compare its exports with")
    counts: dict[tuple[str, str], list[tuple[int, int, int]]] = {name: [] for name in sides}
    for record_id in tqdm(ids, unit="image", disable=None):
        frame, mask = data.pair(data.by_id[record_id])
        for name, segmenter in sides.items():
            counts[name].append(pixel_counts(segmenter.predict([frame])[0].mask, mask.astype(bool)))
    dice = {name: score(np.array(found))["dice"] for name, found in counts.items()}
    milliseconds = _time(sides, data.frame(data.by_id[ids[0]]), repeats=repeats)
    rows = [
        {
            "runtime": name[0],
            "precision": name[1],
            "description": segmenter.runtime.description,
            "megabytes": round(_size(folder, name) / 1e6, 3),
            "latency_ratio": round(milliseconds[TORCH, "fp32"] / milliseconds[name], 3),
            "dice": round(float(dice[name].mean()), 5),
            "dice_change": round(float((dice[name] - dice[TORCH, "fp32"]).mean()), 5),
            "largest_change": round(float(np.abs(dice[name] - dice[TORCH, "fp32"]).max()), 5),
        }
        for name, segmenter in sides.items()
    ]
    what = f"{folder.name} on {data.spec.title}, {split} {label}, n = {len(ids)}, {thread_count()} thread(s)"
    print_table(Table(columns=[Column(key.replace("_", " "), key, str) for key in rows[0]], records=rows, title=what))
    print(f"latency ratio: times faster than torch fp32, of which one frame takes {milliseconds[TORCH, 'fp32']:.1f} ms")
    if output is not None:
        write_json(output, {"title": what, "torch_milliseconds": milliseconds[TORCH, "fp32"], "rows": rows})


def _present(folder: Path) -> list[tuple[str, str]]:
    """(runtime, precision) of every file that is there and every runtime that is installed."""
    found = []
    if (folder / WEIGHTS).is_file() and is_installed(TORCH):
        from polypseg.inference.model import cpu_has_bf16

        found = [(TORCH, "fp32"), *([(TORCH, BF16)] if cpu_has_bf16() else [])]
    for precision, file in ONNX_FILES.items():
        if (folder / file).is_file() and is_installed(ONNXRUNTIME):
            found.append((ONNXRUNTIME, precision))
        if ((folder / OPENVINO_FILES[precision]).is_file() or (folder / file).is_file()) and is_installed(OPENVINO):
            found.append((OPENVINO, precision))
    return [*found, (OPENVINO, BF16)] if (OPENVINO, "fp32") in found and has_bf16() else found


def _size(folder: Path, name: tuple[str, str]) -> int:
    """Bytes of the file or files that a runtime reads."""
    runtime, precision = name[0], "fp32" if name[1] == BF16 else name[1]
    if runtime == TORCH:
        return (folder / WEIGHTS).stat().st_size
    own = folder / OPENVINO_FILES[precision]
    if runtime == OPENVINO and own.is_file():
        return own.stat().st_size + own.with_suffix(".bin").stat().st_size
    return (folder / ONNX_FILES[precision]).stat().st_size


def _time(sides: dict[tuple[str, str], Segmenter], frame: object, *, repeats: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of a forward pass of one prepared frame."""
    inputs: dict[tuple[str, str], NDArray[np.float32]] = {
        name: np.ascontiguousarray(segmenter.processor(images=[frame], return_tensors="np")["pixel_values"])
        for name, segmenter in sides.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):
        for name, segmenter in sides.items():
            start = time.perf_counter()
            segmenter.runtime.polyp_logits(inputs[name])
            if repeat > 1:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    run_script(main)
