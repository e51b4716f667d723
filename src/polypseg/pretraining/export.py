"""What a finished pretraining run leaves: the encoder for timm and for fine-tuning, curves, and what it learned."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import update_bn

from polypseg.data.corpus import FrameStore
from polypseg.files import file_sha256, read_json, write_text
from polypseg.pretraining.loop import PretrainingProgress, build_feed, build_method
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.probes.labeled import LabeledFrames
from polypseg.pretraining.probes.report import (
    draw_loss_curve,
    draw_reconstructions,
    embed,
    normalize,
    normalized_batches,
    score_cell,
    write_report,
)
from polypseg.pretraining.recipe import PretrainingRecipe
from polypseg.provenance.origin import PretrainingRecord
from polypseg.provenance.passport import PASSPORT
from polypseg.recipe import changes_from_bundled
from polypseg.tables import Column, Table
from polypseg.weights.loading import PRETRAINING_KEY, write_timm_encoder
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD

TIMM_FACTS = ("input_size", "fixed_input_size", "pool_size", "interpolation", "crop_pct", "first_conv", "classifier")
"""What timm must know of an architecture to build it again; the input size is the position table's, not the views'."""
EMBEDDINGS = {
    "moco_v3": "the encoder's pooled features (CNN) or class token (ViT)",
    "barlow_twins": "the encoder's pooled features (CNN) or class token (ViT)",
    "mae": "mean of the patch tokens after the final norm",
    "supervised": "the encoder's pooled features (CNN) or class token (ViT)",
}


def export_encoder(
    method: Any,
    recipe: PretrainingRecipe,
    progress: PretrainingProgress,
    frames: FrameStore,
    *,
    folder: Path,
    corpus: str | None = None,
) -> Path:
    """Write ``folder``, which timm loads as ``local-dir:<folder>``; return the path of its ``model.safetensors``.

    Keys are timm's, which for ResNet50 and ViT-B are those of the published weights. The file's header and
    ``config.json`` say what it was trained with and on. ``corpus`` is what the ids of models call the frames where they
    are not the row's, such as ``natural_images``.
    """
    origin = PretrainingRecord(
        method=recipe.method,
        encoder=recipe.encoder,
        recipe=recipe.name,
        recipe_changes=changes_from_bundled(recipe),
        seed=recipe.seed,
        image_size=recipe.data.image_size,
        steps=progress.step,
        epochs=progress.epoch,
        total_batch_size=recipe.training.total_batch_size,
        frames=len(frames),
        source=frames.path.name,
        content_id=frames.content_id,
    )
    if corpus is not None:
        origin = origin.updated(corpus=corpus)
    known = method.encoder.pretrained_cfg
    passport = folder.parent / PASSPORT
    if passport.is_file():
        origin = origin.updated(passport=file_sha256(passport))
    written = write_timm_encoder(
        folder,
        {key: value.detach().cpu() for key, value in method.encoder.state_dict().items()},
        architecture=recipe.encoder,
        num_features=method.encoder.num_features,
        facts={key: known[key] for key in TIMM_FACTS if key in known},
        origin=origin,
        key=PRETRAINING_KEY,
    )
    if passport.is_file():
        write_text(folder / PASSPORT, passport.read_text(encoding="utf-8"))
    return written


def write_run_report(
    method: Any,
    recipe: PretrainingRecipe,
    progress: PretrainingProgress,
    frames: FrameStore,
    *,
    folder: Path,
    labeled: LabeledFrames | None,
) -> list[Path]:
    """The loss curve, for MAE reconstructions, and with labeled frames the representation report; return the files."""
    title = f"{recipe.method} {recipe.encoder}, {len(frames)} frames, {progress.step} steps"
    note = f"recipe {recipe.name}, {recipe.data.image_size} px, batch {recipe.training.total_batch_size}, one seed"
    written = [
        draw_loss_curve(folder / "loss.png", losses=progress.losses, spreads=progress.spreads, title=title, note=note)
    ]
    device = next(method.parameters()).device
    method = method.eval()
    if isinstance(method, MAE):
        written.append(_draw_reconstructions(method, recipe, frames, note=note, path=folder / "reconstructions.png"))
    if labeled is not None:
        untrained = _embed(_untrained(recipe, labeled, device=device), labeled)
        trained = _embed(method, labeled)
        facts = {
            "recipe": recipe.name,
            "seed": recipe.seed,
            "image_size": recipe.data.image_size,
            "epochs": progress.epoch,
            "steps": progress.step,
            "embedding": EMBEDDINGS[recipe.method],
            "random_start": "same seed as the run; BatchNorm statistics estimated on the labeled frames",
            "seen_in_pretraining": labeled.content_id == frames.content_id,
        }
        written.append(
            write_report(folder, trained=trained, untrained=untrained, frames=labeled, title=title, facts=facts)
        )
    return written


def _untrained(recipe: PretrainingRecipe, labeled: LabeledFrames, *, device: torch.device) -> Any:
    """The run's start. BatchNorm's initial statistics, 0 and 1, would understate it, so they are estimated."""
    method = build_method(recipe).to(device)
    update_bn(normalized_batches(labeled, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device), method.encoder)
    return method.eval()


def _embed(method: Any, labeled: LabeledFrames) -> NDArray[np.float32]:
    device = next(method.parameters()).device
    return embed(method.represent, labeled, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device)


def _draw_reconstructions(method: MAE, recipe: PretrainingRecipe, frames: FrameStore, *, note: str, path: Path) -> Path:
    """Six frames that are spread over the corpus, as the encoder sees them and as the decoder completes them."""
    feed = build_feed(method, frames, recipe)
    chosen = np.linspace(0, len(frames) - 1, num=min(6, len(frames))).astype(int).tolist()
    examples = [feed[0, index] for index in chosen]
    device = next(method.parameters()).device
    mean, std = (torch.tensor(x, device=device) for x in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.stack([example["views"][0] for example in examples]).to(device)
    images = normalize(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    masked, painted = method.reconstruct(images, torch.stack([e["noise"] for e in examples]).to(device))

    def to_bytes(x: Tensor) -> NDArray[np.uint8]:
        restored = (x.permute(0, 2, 3, 1) * std + mean).clamp(0, 1) * 255
        return restored.round().byte().cpu().numpy()  # type: ignore[no-any-return]

    return draw_reconstructions(
        path, originals=pixels.cpu().numpy(), masked=to_bytes(masked), reconstructed=to_bytes(painted), note=note
    )


INDEX_HEAD = """# Small pretraining runs

What the three methods learn from a thousand frames on two CPU cores: one run each, scored without fine-tuning beside
the same encoder at random initialization. These are small encoders at a small scale: none is one of the twelve models,
and nothing here says which method is better at full size.

"""
_INDEX_SCORES = (
    ("k-NN balanced accuracy", "knn", "trained"),
    ("random start", "knn", "untrained"),
    ("difference", "knn", "difference"),
    ("linear probe", "probe", "trained"),
    ("difference", "probe", "difference"),
)
"""Heading, measure and side of the index's scores."""


def render_index(folder: Path) -> str:
    """One table of the reports under ``folder``, from their JSON files alone."""
    records = []
    for path in sorted(folder.glob("*/representation.json")):
        numbers, run = read_json(path), read_json(path.parent / "run.json")
        recipe, source = run["recipe"], run["data"]
        records.append(
            {
                "run": f"[{recipe['name']}]({recipe['name']}/representation.md)",
                "encoder": f"{recipe['encoder']}, {recipe['data']['image_size']} px",
                "epochs": numbers["facts"]["epochs"],
                **{f"{kind} {side}": numbers[kind][side]["balanced_accuracy"] for _, kind, side in _INDEX_SCORES},
            }
        )
    columns = [
        *(Column(key, key) for key in ("run", "encoder", "epochs")),
        *(Column(title, f"{kind} {side}", score_cell) for title, kind, side in _INDEX_SCORES),
    ]
    notes = [
        "",
        f"n = {numbers['n']} frames of {len(numbers['classes'])} classes ({numbers['groups']} groups that look alike, "
        f"none split between folds); the runs saw the same frames without labels ({source['frames']} frames, content "
        f"id {source['content_id']}). Intervals: {numbers['interval']}.",
        "",
        numbers["limits"],
        "",
        "Frames in the pictures are from HyperKvasir (Borgli et al., Scientific Data 7:283, 2020; CC BY 4.0).",
        "",
    ]
    return INDEX_HEAD + "\n".join([Table(columns=columns, records=records).markdown(), *notes])
