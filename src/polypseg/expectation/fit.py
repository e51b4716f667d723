"""What is learnt of a model: its cells gathered, the learner chosen by held-out folds, one JSON file written."""

from collections.abc import Callable, Sequence
from pathlib import Path

from polypseg.corruptions import CORRUPTIONS
from polypseg.data.polyps import open_dataset
from polypseg.expectation.cells import (
    CLEAN,
    Cell,
    FrameSet,
    SwappedColours,
    add_noise,
    choose_frames,
    measure_cells,
)
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.runtimes import ONNX_FILES, OnnxRuntime
from polypseg.segmentation import Segmenter, load

SHIPPED = "the model"
SEVERITIES = (3, 5)
PER_SET, PER_CORRUPTED_SET, PER_OTHER_MODEL = 116, 20, 30
"""Frames of each set as it is; of each set in a corrupted cell; of each set for models other than the one."""
NOISE = (0.08, 0.12)
VALIDATION = "kvasir_seg.validation"


def open_sets(data_dir: Path | None) -> dict[str, FrameSet]:
    """Name -> frames of the labelled sets at hand, Kvasir-SEG's validation part first.

    Raises UsageError where Kvasir-SEG or CVC-ClinicDB is absent.
    """
    kvasir = open_dataset("kvasir_seg", data_dir=data_dir)
    clinicdb = open_dataset("cvc_clinicdb", data_dir=data_dir)
    parts = kvasir.split("reference")
    sets = [
        choose_frames(VALIDATION, kvasir, parts["validation"], most=PER_SET),
        choose_frames("kvasir_seg.test", kvasir, parts["test"], most=PER_SET),
        choose_frames("cvc_clinicdb", clinicdb, clinicdb.ids, most=PER_SET),
    ]
    centre = (data_dir or Path("data")) / "PolypGen-C3"
    if centre.is_dir():
        opened = open_dataset("folder", source=centre)
        sets.append(choose_frames("polypgen_c3", opened, opened.ids, most=100))
    return {one.name: one for one in sets}


def gather(folder: Path, *, data_dir: Path | None, cache: Path, echo: Callable[[str], object]) -> list[Cell]:
    """Every cell of a model's matrix, the model's own first; those in ``cache`` are not measured again."""
    sets = open_sets(data_dir)
    corruptions = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]
    found: list[Cell] = []

    def measure(segmenter: Segmenter, frames: FrameSet, kinds: Sequence[tuple[str, int]], model: str) -> None:
        for cell in measure_cells(segmenter, frames, kinds, model=model, cache=cache):
            found.append(cell)
            mean = sum(row.dice for row in cell.rows) / len(cell.rows)
            echo(f"{cell.model} {cell.set} {cell.kind} {cell.severity}: n = {len(cell.rows)}, Dice {mean:.3f}")

    model = load(folder, runtime="onnxruntime")
    for frames in sets.values():
        measure(model, frames, [(CLEAN, 0)], SHIPPED)
    others = {name: _some(frames, PER_OTHER_MODEL) for name, frames in sets.items() if name != VALIDATION}
    for title, segmenter in _other_models(folder, model, cache):
        for frames in others.values():
            measure(segmenter, frames, [(CLEAN, 0)], title)
    corrupted = [_some(frames, PER_CORRUPTED_SET) for name, frames in sets.items() if name != VALIDATION]
    for corruption in corruptions:
        for frames in corrupted:
            measure(model, frames, [corruption], SHIPPED)
    return found


def _some(frames: FrameSet, count: int) -> FrameSet:
    step = max(1, len(frames.ids) // count)
    return FrameSet(name=frames.name, dataset=frames.dataset, ids=frames.ids[::step][:count])


def _other_models(folder: Path, model: Segmenter, cache: Path) -> list[tuple[str, Segmenter]]:
    """The model in 8 bits, with noise on its weights, and fed swapped colours."""
    processor = FrameProcessor.from_pretrained(folder)
    found = [("red and blue swapped", Segmenter(runtime=SwappedColours(runtime=model.runtime), processor=processor, name="swapped"))]
    for amount in NOISE:
        path = cache / "noisy" / f"{model.fingerprint()[:16]}.{amount}.onnx"
        if not path.is_file():
            add_noise(folder / ONNX_FILES["fp32"], path, amount=amount)
        noisy = Segmenter(runtime=OnnxRuntime(path), processor=processor, name="noisy")
        found.append((f"weights with noise {amount}", noisy))
    if (folder / ONNX_FILES["int8"]).is_file():
        found.append(("8 bits", load(folder, runtime="onnxruntime", precision="int8")))
    return found
