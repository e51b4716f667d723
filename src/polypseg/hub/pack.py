"""A finished run -> the folder that ships in the package: float16 weights, ONNX files, passport, checksums."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import find_receipts
from polypseg.evaluation.receipt_reading import write_quality
from polypseg.files import atomic_path, file_sha256, read_json, write_json
from polypseg.hub.export import RESULTS, half
from polypseg.hub.onnx import RuntimeExport, export_runtime
from polypseg.inference.model import build_image_processor, load_model, without_shard_bars
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import write_manifest
from polypseg.provenance.origin import WeightsOrigin
from polypseg.provenance.passport import PASSPORT

LARGEST = 10_000_000
"""Bytes of the weights that a package may carry."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was written."""

    folder: Path
    parameters: int
    size: int
    """Bytes of the weights file."""
    files: tuple[RuntimeExport, ...]
    """The ONNX files with their differences from torch."""


def pack_model(source: Path, output: Path, *, calibration: str) -> Packed:
    """Write the folder ``output`` from a finished run's model folder ``source``.

    The float16 weights are the model from here on: every other file of the folder, and every receipt, is of them.
    ``calibration``: training frames of the int8 file, as for ``export_runtime``. Raises UsageError for a run that has
    not ended, a model of another package, or weights of more than ``LARGEST`` bytes.
    """
    model, _ = load_model(str(source))
    if not isinstance(model, PolypSegForSemanticSegmentation):
        raise UsageError(f"{source} holds a {type(model).__name__}, which is no model of this package")
    origin = WeightsOrigin.within(model.config)
    if not origin.finished:
        raise UsageError(f"the run of {source} has not ended: continue it with --resume")
    if not (source / PASSPORT).is_file():
        raise UsageError(f"{source} has no {PASSPORT}: a packed model must say what it saw")
    model.config.weights_origin = origin.without("sha256").content  # that is of the float32 file
    with atomic_path(output) as temporary, without_shard_bars():
        temporary.mkdir()
        model.config.save_pretrained(temporary)
        config = read_json(temporary / CONFIG_NAME)
        config |= {"architectures": [type(model).__name__], "dtype": "float32"}  # in which it computes
        write_json(temporary / CONFIG_NAME, config)
        save_weights(half(model), temporary)
        size = (temporary / SAFE_WEIGHTS_NAME).stat().st_size
        if size > LARGEST:
            raise UsageError(f"the weights have {size} bytes, more than the {LARGEST} that the package carries")
        build_image_processor(model.config).save_pretrained(temporary)
        shutil.copyfile(source / PASSPORT, temporary / PASSPORT)
        write_manifest(temporary)
        files = [
            export_runtime(temporary, precision="fp32"),
            export_runtime(temporary, precision="int8", calibration=calibration),
        ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Packed(folder=output, parameters=parameters, size=size, files=tuple(files))


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of a model folder, readable for everyone."""
    path = folder / SAFE_WEIGHTS_NAME
    safetensors.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors gives a file to its owner only


def add_results(folder: Path, results: Path) -> tuple[str, ...]:
    """Copy the receipts of just these weights from ``results`` into a packed folder; return their names.

    Raises UsageError where there is none, PolypSegError for one that its images do not give.
    """
    digest = file_sha256(folder / SAFE_WEIGHTS_NAME)
    ours = {p: r for p, r in find_receipts(results).items() if r.model_sha256 == digest}
    if not ours:
        raise UsageError(f"{results} has no receipt of the weights in {folder}: run `polypseg evaluate` first")
    for path, receipt in ours.items():
        wrong = receipt.differences()
        if wrong:
            raise PolypSegError(f"{path} is not what its images give: {wrong[0]}")
    with atomic_path(folder / RESULTS) as temporary:
        temporary.mkdir()
        for path in ours:
            shutil.copyfile(path, temporary / path.name)
    write_quality(folder, ours.values())
    write_manifest(folder)
    return tuple(path.name for path in ours)
