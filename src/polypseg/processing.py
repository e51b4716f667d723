"""Image processors and models by path or Hub id, as evaluation and prediction need them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from polypseg.artifacts import file_sha256
from polypseg.errors import UsageError, first_line
from polypseg.manifest import MANIFEST, read_manifest
from polypseg.modeling import PolypSegConfig

SOURCE_SHA256 = "sha256"
"""Key of ``weights_origin``: the digest of the weights file that was trained, converted and evaluated."""


def build_image_processor(config: PolypSegConfig) -> Any:
    """The native DPTImageProcessor (Pillow backend) with the model's size and statistics; bicubic as the reference."""
    return DPTImageProcessorPil(
        size={"height": config.image_size, "width": config.image_size},
        resample=Image.Resampling.BICUBIC,
        keep_aspect_ratio=False,
        ensure_multiple_of=1,
        image_mean=config.image_mean,
        image_std=config.image_std,
    )


@contextmanager
def without_shard_bars() -> Iterator[None]:
    """Keep transformers' bars for single files out of commands that show progress of their own."""
    was_active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_active:
            logging.enable_progress_bar()


def load_model(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Any AutoModelForSemanticSegmentation and its image processor, from a folder or the Hub, in evaluation mode.

    Raises UsageError when there is no such model, it cannot be read, or its weights are not complete.
    """
    options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    try:
        with without_shard_bars():
            model, report = AutoModelForSemanticSegmentation.from_pretrained(
                name_or_path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,  # half-precision files are widened: they save space, not time
                **options,
            )
        processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **options)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        place = "folder" if Path(name_or_path).exists() else "folder or Hub id"
        raise UsageError(
            f"cannot load a segmentation model from {place} {name_or_path!r}: {first_line(error)}"
        ) from error
    # transformers would draw these at random and go on with a warning.
    unfit = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if unfit:
        raise UsageError(
            f"the weights in {name_or_path!r} are not those of its config.json: {len(unfit)} tensor(s) are missing or "
            f"of another shape, first {unfit[0]}"
        )
    record = getattr(model.config, "weights_origin", None)
    if record and (Path(name_or_path) / SAFE_WEIGHTS_NAME).is_file():  # results must say of which weights they are
        model.config.weights_origin = current_record(record, Path(name_or_path))
    return model.eval(), processor


def current_record(weights_origin: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A model's record of origin with the digest of the weights that were trained, converted and evaluated.

    An intact export keeps the digest of its source. Anywhere else a recorded digest that is not the file's means that
    the weights were changed since, and ``changed`` says so from then on.
    """
    digest, recorded = file_sha256(folder / SAFE_WEIGHTS_NAME), weights_origin.get(SOURCE_SHA256)
    if recorded in (None, digest) or _is_intact_export(folder, weights=digest):
        return weights_origin | {SOURCE_SHA256: recorded or digest}
    return weights_origin | {SOURCE_SHA256: digest, "changed": True}


def _is_intact_export(folder: Path, *, weights: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder / MANIFEST)
    return manifest.get(SAFE_WEIGHTS_NAME) == weights and manifest.get(CONFIG_NAME) == file_sha256(folder / CONFIG_NAME)


def results_name(config: Any, name_or_path: str) -> str:
    """What results call a model: the id of its record, else the last part of its name or path."""
    record = getattr(config, "weights_origin", None) or {}
    return str(record.get("model_id") or Path(name_or_path).name)


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resize_map(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits or probabilities (h, w) -> (H, W) of ``size``, as the protocol resizes: bilinear, no antialias."""
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def polyp_logits(logits: Tensor, config: Any) -> Tensor:
    """Class logits (B, K, h, w) -> polyp-against-background logits (B, h, w): positive where a polyp is predicted.

    One class is taken as it is; of two, the second against the first; of more, the class called polyp against the
    strongest other. Raises UsageError when more than two classes are not labelled.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    if logits.shape[1] == 2:
        return logits[:, 1] - logits[:, 0]
    labels = {str(name).lower(): int(index) for index, name in config.id2label.items()}
    if "polyp" not in labels:
        raise UsageError(f"the model has {logits.shape[1]} classes and none is called 'polyp'")
    index = labels["polyp"]
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
    return logits[:, index] - others.amax(dim=1)
