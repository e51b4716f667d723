"""From a trained or converted model to the folder that is published: loads with plain transformers, carries its proof.

ViT models become native ``DPTForSemanticSegmentation`` (no remote code); CNN models one flat folder with their code.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, DPTForSemanticSegmentation
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.artifacts import atomic_path, file_sha256, read_json, write_json
from polypseg.errors import PolypSegError, UsageError
from polypseg.manifest import write_manifest
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.native_dpt import from_native_dpt, to_native_dpt
from polypseg.origin import Origin, read_origin
from polypseg.processing import build_image_processor, load_model, without_shard_bars
from polypseg.recipe import bundled_folder

FP16_WEIGHTS = "model.fp16.safetensors"
RESULTS = "results"
SOURCE_SHA256 = "sha256"
"""Key of ``weights_origin``: the digest of the weights file that was trained, converted and evaluated."""
TOLERANCE = 1e-5
"""Largest difference of logits between the source and the written folder; observed 0 (DPT) to 5e-6 (remote code)."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    origin: Origin
    results: tuple[str, ...]
    """Names of the result files that were taken along."""
    left_out: tuple[str, ...]
    """Result files of the same id that are not of these weights, each with the reason."""
    largest_difference: float
    """Between the logits of the source and of the written folder."""


def export_model(source: Path, output: Path, *, results: Path | None = None, organisation: str | None = None) -> Export:
    """Write the folder that is published, at ``output``, from a model folder such as ``runs/x/best``.

    ``results``: folder of evaluation results, of which those of just these weights are taken along. The folder is read
    back and its logits compared before it gets its name. Raises UsageError for a folder that is no model of ours,
    PolypSegError when the copy's outputs differ.
    """
    model = _our_model(source)
    weights = file_sha256(source / SAFE_WEIGHTS_NAME)
    record = dict(model.config.weights_origin or {})
    record.setdefault(SOURCE_SHA256, weights)
    model.config.weights_origin = record
    origin = read_origin(record)
    with atomic_path(output) as temporary, without_shard_bars():
        temporary.mkdir()
        write_weights(model, temporary)
        build_image_processor(model.config).save_pretrained(temporary)
        for name in ("handler.py", "requirements.txt"):
            shutil.copyfile(bundled_folder("hub_folder") / name, temporary / name)
        taken, left_out = _copy_results(results, origin, temporary / RESULTS)
        difference = largest_difference(model, temporary)
        _write_card(temporary, name=origin.repo_name, run_dir=source.parent, organisation=organisation)
        write_manifest(temporary)
    return Export(folder=output, origin=origin, results=taken, left_out=left_out, largest_difference=difference)


def _our_model(source: Path) -> PolypSegForSemanticSegmentation:
    if not (source / SAFE_WEIGHTS_NAME).is_file():
        raise UsageError(f"{source} is no model folder: it has no {SAFE_WEIGHTS_NAME}. Give a run's best/ folder")
    model, _ = load_model(str(source))
    if isinstance(model, DPTForSemanticSegmentation):
        return from_native_dpt(model).eval()
    if not isinstance(model, PolypSegForSemanticSegmentation):
        raise UsageError(f"{source} holds a {type(model).__name__}, which is no model of this package")
    return model.float()


def write_weights(model: PolypSegForSemanticSegmentation, folder: Path) -> None:
    """config.json, the weights in float32 and float16, and for CNN models the code, into an existing folder."""
    published: Any = to_native_dpt(model) if model.config.decoder == "dpt" else model
    if published is model:
        with _code_travels_along():
            model.save_pretrained(folder)
    else:
        published.save_pretrained(folder)
    safetensors.torch.save_file(half(published), folder / FP16_WEIGHTS, metadata={"format": "pt"})


@contextmanager
def _code_travels_along() -> Iterator[None]:
    """While this holds, save_pretrained copies the modeling folder's files and names them in config.json."""
    PolypSegConfig.register_for_auto_class()
    PolypSegForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
    try:
        yield
    finally:
        PolypSegConfig._auto_class = None
        PolypSegForSemanticSegmentation._auto_class = None


def half(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with its floating tensors in float16. Raises PolypSegError where a value does not fit."""
    state = {}
    for key, value in model.state_dict().items():
        state[key] = value.half().contiguous() if value.is_floating_point() else value.contiguous()
        if not torch.isfinite(state[key]).all():
            raise PolypSegError(f"{key} has values that float16 cannot hold: the weights are not sound")
    return state


@torch.inference_mode()
def largest_difference(model: PolypSegForSemanticSegmentation, folder: Path) -> float:
    """Largest difference of logits between a model and a written folder, on two random images.

    Raises PolypSegError when it exceeds the tolerance.
    """
    copy = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, found = model.eval()(images).logits, copy(images).logits
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise PolypSegError(
            f"the written model's logits differ from the source's by {difference:.2g}: nothing is kept. Report this"
        )
    return difference


def _copy_results(results: Path | None, origin: Origin, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy the results of these weights; a result that names other weights, or none, stays out."""
    taken, left_out = [], []
    found = sorted((results / origin.model_id).glob("*.json")) if results else []
    for path in found:
        content = read_json(path)
        recorded = content.get("weights_origin", {}).get(SOURCE_SHA256)
        if recorded is None:
            left_out.append(f"{path.name}: does not say of which weights it is")
        elif recorded != origin.record[SOURCE_SHA256]:
            left_out.append(f"{path.name}: is of other weights ({recorded[:12]})")
        else:
            folder.mkdir(exist_ok=True)
            write_json(folder / path.name, content)
            taken.append(path.name)
    return tuple(taken), tuple(left_out)


def _write_card(folder: Path, *, name: str, run_dir: Path, organisation: str | None) -> None:
    """Pictures, then the card that shows them, from the files that the folder already holds."""
    from polypseg.card_pictures import write_card_pictures
    from polypseg.cards import collect_facts, render_card

    model, processor = load_model(str(folder))
    results = [read_json(path) for path in sorted((folder / RESULTS).glob("*.json"))]
    write_card_pictures(model, processor, folder, name=name, results=results)
    render_card(collect_facts(folder, organisation=organisation, run_dir=run_dir)).save(folder / "README.md")
