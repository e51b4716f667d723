"""Image processors and models by path or Hub id, as evaluation and prediction need them."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedConfig
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from polypseg.data.images import as_frame
from polypseg.errors import UsageError, first_line
from polypseg.files import file_sha256
from polypseg.inference.preparation import NUMBERS, SIZES, check_settings
from polypseg.inference.runtimes import BF16, NO_BF16, Precision, refuse_non_finite
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import MANIFEST, read_manifest
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a model's JSON file; the largest real ones have some hundred kilobytes."""
ATTENTION = ("eager", "sdpa")
"""Attention of PyTorch itself; any other name makes transformers import or download a kernel."""
ADAPTER = "adapter_config.json"


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

    In float32, whatever the file holds. Raises UsageError when there is no such model, it cannot be read, its weights
    are not complete and finite, or its configuration asks for a kernel or a quantization, before either is looked for.
    """
    options = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    folder = Path(name_or_path)
    try:
        refuse_configuration(folder, PreTrainedConfig.get_config_dict(name_or_path, **options)[0])
        with without_shard_bars():
            model, report = AutoModelForSemanticSegmentation.from_pretrained(
                name_or_path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                dtype=torch.float32,
                **options,
            )
        processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil", **options)
        check_processor(processor, model)
    except Exception as error:  # what a configuration of somebody else's can set off has no common class
        place = "folder" if folder.exists() else "folder or Hub id"
        raise UsageError(
            f"cannot load a segmentation model from {place} {name_or_path!r}: {first_line(error)}"
        ) from error
    # transformers would draw these at random and go on with a warning.
    unfit = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if unfit:
        raise UsageError(
            f"the weights in {name_or_path!r} are not those of its config.json: {len(unfit)} tensor(s) are missing or "
            f"of another shape: {', '.join(fold_names(unfit, known=model.state_dict()))}"
        )
    broken = {name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()}
    if broken:
        raise UsageError(
            f"the weights in {name_or_path!r} hold values that are not finite numbers (NaN or infinity), in "
            f"{', '.join(fold_names(broken, known=model.state_dict()))}: the file is damaged; get it again"
        )
    origin = WeightsOrigin.within(model.config, path=folder / CONFIG_NAME)
    if origin.content and (folder / SAFE_WEIGHTS_NAME).is_file():  # results must say of which weights they are
        model.config.weights_origin = current_origin(origin, folder).content
    return model.eval(), processor


def refuse_configuration(folder: Path, config: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that transformers must not be given: what it would fetch, import or fill.

    ``folder``: where the model's files lie, if they do so already.
    """
    for path in folder.glob("*.json") if folder.is_dir() else ():
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes, more than any model's {LARGEST_CONFIG}")
    if (folder / ADAPTER).is_file():
        raise ValueError(f"{ADAPTER} asks for another model: merge the adapter into it and save the whole")
    for key, value in _walk(config):
        if "attn_implementation" in key:
            for name in value.values() if isinstance(value, dict) else (value,):
                if name is not None and name not in ATTENTION:
                    raise ValueError(
                        f"config.json asks for the attention kernel {name!r}, which would be fetched and run as code: "
                        f"remove {key} or set it to one of {', '.join(ATTENTION)}"
                    )
        if key == "quantization_config" and value is not None:
            raise ValueError("config.json asks for quantized weights, which are not read here: give the full ones")
        if key == WEIGHTS_ORIGIN and not isinstance(value, dict | None):
            raise ValueError(f"{WEIGHTS_ORIGIN} in config.json is a record (a mapping), not {type(value).__name__}")


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from ((str(key), value) for key, value in part.items())
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def check_processor(processor: Any, model: Any) -> None:
    """Raise ValueError for an image processor whose numbers cannot be or whose images do not fit the model."""
    found: dict[str, Any] = {name: getattr(processor, name, None) for name in (*SIZES, *NUMBERS)}
    check_settings(found | {name: dict(found[name]) for name in SIZES if found[name]})
    pixels = processor(images=[Image.new("RGB", (48, 32))], return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"the image processor gives {tuple(pixels.shape)} where (1, 3, height, width) is needed")
    if isinstance(model, PolypSegForSemanticSegmentation) and model.device.type != "meta":
        model.check_image_size(*pixels.shape[2:])


def fold_names(names: Collection[str], *, known: Collection[str]) -> list[str]:
    """Dotted names in order; a group that is there whole is written once: ``encoder.* (49)``."""
    total, found = (_by_prefix(keys) for keys in (known, names))
    folded: dict[str, None] = {}
    for name in sorted(names):
        parts = name.split(".")
        prefixes = (".".join(parts[:depth]) for depth in range(len(parts)))
        whole = next((p for p in prefixes if found[p] == total.get(p) and found[p] > 1), None)
        folded[name if whole is None else f"{f'{whole}.' if whole else ''}* ({found[whole]})"] = None
    return list(folded)


def _by_prefix(names: Collection[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            prefix = ".".join(parts[:depth])
            counts[prefix] = counts.get(prefix, 0) + 1
    return counts


def current_origin(origin: WeightsOrigin, folder: Path) -> WeightsOrigin:
    """Where a folder's weights come from, with the digest of the weights that were trained, converted and evaluated.

    An intact export keeps the digest of its source. Anywhere else a recorded digest that is not the file's means that
    the weights were changed since, and ``changed`` says so from then on.
    """
    digest, recorded = file_sha256(folder / SAFE_WEIGHTS_NAME), origin.sha256
    if recorded in (None, digest) or _is_intact_export(folder, weights=digest):
        return origin.updated(sha256=recorded or digest)
    return origin.updated(sha256=digest, changed=True)


def _is_intact_export(folder: Path, *, weights: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder / MANIFEST)
    return manifest.get(SAFE_WEIGHTS_NAME) == weights and manifest.get(CONFIG_NAME) == file_sha256(folder / CONFIG_NAME)


def default_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def laid_out_for(precision: Precision, model: Any) -> Any:
    """The same model with its channels last for bf16, which CPUs convolve twice as fast so; left alone for fp32."""
    return model.to(memory_format=torch.channels_last) if precision == BF16 else model


@contextmanager
def computing_in(precision: Precision, *, device: torch.device | str) -> Iterator[None]:
    """Round matrix products and convolutions to bf16 inside the block, for ``bf16``; nothing for ``fp32``.

    Raises UsageError on a CPU without such arithmetic, where that would be some ten times slower than float32.
    """
    kind = torch.device(device).type
    if precision == BF16 and kind == "cpu" and not cpu_has_bf16():
        raise UsageError(NO_BF16)
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == BF16):
        yield


def cpu_has_bf16() -> bool:
    """Whether torch computes in bf16 on this CPU at its full speed."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resize_map(values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits or probabilities (h, w) -> (H, W) of ``size``, as the protocol resizes: bilinear, no antialias.

    Every mask, map and score comes through here; raises PolypSegError for values that are not finite.
    """
    refuse_non_finite([bool(values.isfinite().all())])
    return F.interpolate(values[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def finite_images(outputs: Tensor) -> list[bool]:
    """Of each image of a batch (B, ...), whether all its values are finite numbers."""
    found: list[bool] = outputs.isfinite().flatten(1).all(dim=1).tolist()
    return found


def polyp_logits(logits: Tensor, config: Any, *, model: str = "the model", images: Sequence[str] = ()) -> Tensor:
    """``polyp_against_background`` of logits that are finite.

    Raises PolypSegError that names ``model`` and the one of ``images`` for others.
    """
    refuse_non_finite(finite_images(logits), model=model, images=images)
    return polyp_against_background(logits, config)


def polyp_against_background(logits: Tensor, config: Any) -> Tensor:
    """Class logits (B, K, h, w) -> polyp-against-background logits (B, h, w): positive where a polyp is predicted.

    One class is taken as it is; of two, the second against the first; of more, the class called polyp against the
    strongest other. Raises UsageError when more than two classes are not labeled.
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


@torch.inference_mode()
def predict_masks(model: Any, processor: Any, frames: Sequence[Image.Image]) -> list[NDArray[np.bool_]]:
    """PIL images of any size -> boolean masks (H, W) of their sizes."""
    masks = []
    for number, frame in enumerate(frames, start=1):
        logits = model.eval()(**processor(images=[as_frame(frame)], return_tensors="pt")).logits.float()
        polyp = polyp_logits(logits, model.config, images=[f"frame {number}"])
        masks.append(predicted_mask(polyp[0], (frame.height, frame.width)))
    return masks


def predicted_mask(logits: Tensor, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Polyp logits (h, w) -> boolean mask of ``size`` (H, W): bilinear, no antialias, probability > 0.5."""
    return (resize_map(logits, size) > 0).numpy()
