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
from transformers import DPTForSemanticSegmentation
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import find_receipts
from polypseg.evaluation.receipt_reading import no_results, read_results, write_quality
from polypseg.files import atomic_path, write_text
from polypseg.hub.dataset_card import TEMPLATES
from polypseg.inference.model import (
    build_image_processor,
    current_origin,
    load_model,
    without_shard_bars,
)
from polypseg.inference.replay import add_replay
from polypseg.inference.runtimes import TorchRuntime
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import MANIFEST, check_folder, write_manifest
from polypseg.provenance.origin import WeightsOrigin
from polypseg.provenance.passport import PASSPORT, find_passport
from polypseg.weights.native_dpt import from_native_dpt, to_native_dpt

FP16_WEIGHTS = "model.fp16.safetensors"
RESULTS = "results"
_PREPARATION = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
TOLERANCE = 1e-5
"""Largest difference of logits between the source and the written folder; observed 0 (DPT) to 5e-6 (remote code)."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    origin: WeightsOrigin
    results: tuple[str, ...]
    """Names of the receipts that were taken along."""
    left_out: tuple[str, ...]
    """Receipts under the model's id that are not of these weights or not sound, each with the reason."""
    largest_difference: float
    """Between the logits of the source and of the written folder."""


def export_model(source: Path, output: Path, *, results: Path | None = None, organization: str | None = None) -> Export:
    """Write the folder that is published, at ``output``, from a model folder such as ``runs/x/best``.

    ``results``: folder of receipts, of which those of just these weights are computed again and taken along. The folder
    is read back and its logits compared before it gets its name. Raises UsageError for a folder that is no model of
    ours and for ``results`` without receipts, PolypSegError when the copy's outputs differ.
    """
    _check_output(output, source=source)
    if results is not None and not results.is_dir():
        raise UsageError(f"there is no results folder {results}: give the --output of training_scripts/evaluate.py")
    model = our_model(source)
    origin = WeightsOrigin.within(model.config)
    if not origin.content:  # load_model keeps a record current
        origin = current_origin(origin, source)
        model.config.weights_origin = origin.content
    repo_name = origin.repo_name  # fails for what cannot be named, before the work
    with atomic_path(output) as temporary, without_shard_bars():
        temporary.mkdir()
        write_weights(model, temporary)
        build_image_processor(model.config).save_pretrained(temporary)
        for name in ("handler.py", "requirements.txt"):
            shutil.copyfile(TEMPLATES / "hub_folder" / name, temporary / name)
        _copy_passport(source, temporary, named=origin.passport)
        taken, left_out = _copy_results(results, origin, temporary / RESULTS)
        write_quality(temporary, find_receipts(temporary / RESULTS).values() if taken else ())
        written, processor = load_model(str(temporary))
        difference = largest_difference(model, written)
        add_replay(temporary, SAFE_WEIGHTS_NAME, runtime=TorchRuntime(model=written))
        _write_card(temporary, written, processor, name=repo_name, run_dir=source.parent, organization=organization)
        write_manifest(temporary)
    return Export(folder=output, origin=origin, results=taken, left_out=left_out, largest_difference=difference)


def _check_output(output: Path, *, source: Path) -> None:
    """Only an earlier export may be replaced: raise UsageError for anything else that stands there."""
    used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if used and not (output / MANIFEST).is_file():
        raise UsageError(f"{output} exists and is no exported model: give the name of a new folder")
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"{output} holds the model that is to be exported: give another folder")


def our_model(source: Path) -> PolypSegForSemanticSegmentation:
    """The model of a folder in float32, its checksums compared. Raises UsageError for what is no model of ours."""
    if not (source / SAFE_WEIGHTS_NAME).is_file():
        raise UsageError(f"{source} is no model folder: it has no {SAFE_WEIGHTS_NAME}. Give a run's best/ folder")
    check_folder(source)
    model, processor = load_model(str(source))
    if isinstance(model, DPTForSemanticSegmentation):
        model = from_native_dpt(model).eval()
    if not isinstance(model, PolypSegForSemanticSegmentation):
        raise UsageError(f"{source} holds a {type(model).__name__}, which is no model of this package")
    wanted = build_image_processor(model.config)
    differing = [name for name in _PREPARATION if getattr(processor, name, None) != getattr(wanted, name)]
    if differing:
        raise UsageError(
            f"{source} prepares images otherwise than its config.json says ({', '.join(differing)}): save the "
            "processor that belongs to it"
        )
    return model.float()


def write_weights(model: PolypSegForSemanticSegmentation, folder: Path) -> None:
    """config.json, the weights in float32 and float16, and for CNN models the code, into an existing folder."""
    published: Any = to_native_dpt(model) if model.config.decoder == "dpt" and model.has_vit else model
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
def largest_difference(model: PolypSegForSemanticSegmentation, written: Any) -> float:
    """Largest difference of logits between a model and its written copy, on two random images.

    Raises PolypSegError when it exceeds the tolerance.
    """
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, found = model.eval()(images).logits, written(images).logits
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise PolypSegError(
            f"the written model's logits differ from the source's by {difference:.2g}: nothing is kept. Report this"
        )
    return difference


def _copy_passport(source: Path, folder: Path, *, named: str | None) -> None:
    """What the model saw travels with it. Raises PolypSegError where its record names another passport."""
    if find_passport(source, named=named) is not None:
        shutil.copyfile(source / PASSPORT, folder / PASSPORT)


def _copy_results(results: Path | None, origin: WeightsOrigin, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copy sound receipts of these weights, under whatever name; those of the id's other weights stay out."""
    found = find_receipts(results) if results else {}
    if results and not found:
        raise no_results(results)
    taken, left_out = [], []
    for path, receipt in found.items():
        recorded = receipt.model_sha256
        if recorded == origin.sha256:
            wrong = receipt.differences()
            if wrong:
                left_out.append(f"{path.name}: is not what its images give ({wrong[0]})")
                continue
            write_text(folder / path.name, path.read_text(encoding="utf-8"))
            taken.append(path.name)
        elif path.parent.name == origin.model_id:
            what = f"is of other weights ({recorded[:12]})" if recorded else "does not say of which weights it is"
            left_out.append(f"{path.name}: {what}")
    return tuple(taken), tuple(left_out)


def _write_card(
    folder: Path, model: Any, processor: Any, *, name: str, run_dir: Path, organization: str | None
) -> None:
    """Pictures, then the card that shows them, from the files that the folder already holds."""
    from polypseg.hub.card_facts import collect_facts
    from polypseg.hub.card_pictures import write_card_pictures
    from polypseg.hub.model_card import render_card

    write_card_pictures(model, processor, folder, name=name, results=read_results(folder / RESULTS))
    render_card(collect_facts(folder, organization=organization, run_dir=run_dir)).save(folder / "README.md")
