"""What ten minutes on one GPU can show: full-size rows trained, pretraining's largest batches, GPU against CPU.

Everything runs through the functions that users run; this file only packs small copies of the datasets, counts and
writes down. Without a GPU the same steps run on the CPU, in float32, as far as their limits allow.
"""

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.optim import AdamW
from tqdm import tqdm

from polypseg import zoo
from polypseg.data.corpus import open_frames
from polypseg.data.images import encode_png
from polypseg.data.polyps import PolypDataset, open_dataset
from polypseg.errors import PolypSegError
from polypseg.files import atomic_path, environment_record, write_json
from polypseg.inference.model import default_device, load_model
from polypseg.inference.predictors import ModelPredictions
from polypseg.pretraining.loop import build_method, peak_memory, pretrain
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model, finetune
from polypseg.training.run_folder import make_accelerator

SIDE = 224
LARGEST = 60_000_000
"""Bytes of the packed copies together."""
PACKED = ("kvasir_seg", "cvc_clinicdb")
ROWS = ("RN-NA-NA", "VT-NA-NA")
TESTS = {"kvasir_seg": ("reference", "test"), "cvc_clinicdb": ("full", "full")}
RECIPES = (
    "pretrain_moco_v3_resnet50",
    "pretrain_barlow_twins_resnet50",
    "pretrain_moco_v3_vit_base",
    "pretrain_mae_vit_base",
)

STEPS = ("devices", "rows", "pretraining")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of each step is done."""

    overrides: tuple[str, ...] = ()
    """Of the fine-tuning recipe."""
    first_batch: int = 64
    batches: int = 7
    """The pretraining batch is doubled so often at most."""
    batch: int = 48
    """Images of the comparison of CPU and GPU."""


FULL = Effort()
SMALL = Effort(
    overrides=("training.max_steps=2", "training.total_batch_size=4", "training.precision=no"),
    first_batch=2,
    batches=1,
    batch=2,
)
"""For a machine without GPU: shows that every step runs."""


def pack(sources: dict[str, Path], folder: Path) -> list[Path]:
    """Copies of the datasets at 224 px (JPEG frames, 1-bit PNG masks) as zips in their published layout.

    Small enough to carry to a GPU machine. Their scores are of reduced masks: those that count are made at home from
    the predictions. Raises PolypSegError when they are larger than ``LARGEST``.
    """
    written = []
    for name in PACKED:
        dataset = open_dataset(name, source=sources.get(name))
        path = folder / f"{name}.zip"
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for record in tqdm(dataset.records, desc=f"packing {dataset.spec.title}", unit="image", disable=None):
                frame, mask = dataset.pair(record)
                small = frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                small.save(buffer, format="JPEG", quality=92, subsampling=0)
                archive.writestr(f"{dataset.spec.image_folder}/{record.id}.jpg", buffer.getvalue())
                reduced = Image.fromarray(mask * np.uint8(255)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                archive.writestr(f"{dataset.spec.mask_folder}/{record.id}.png", encode_png(np.asarray(reduced)))
        written.append(path)
    size = sum(path.stat().st_size for path in written)
    if size > LARGEST:
        raise PolypSegError(f"the packed copies in {folder} have {size} bytes, more than {LARGEST}")
    return written


def open_packed(folder: Path, name: str) -> PolypDataset:
    """A packed copy."""
    return open_dataset(name, source=folder / f"{name}.zip", allow_partial=True)


def train_row(row: str, packed: Path, output: Path, *, effort: Effort = FULL, workers: int = 0) -> dict[str, Any]:
    """Fine-tune a row from random initialization by the reference's recipe; write its test predictions as small maps.

    The maps (8-bit PNG at the model's size) are scored at home by ``polypseg evaluate --predictions``. Resumes.
    """
    recipe = load_recipe("finetune", overrides=effort.overrides)
    run_dir, started = output / "runs" / row, time.perf_counter()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(recipe.training.precision, run_dir=run_dir)
    network = build_model(zoo.get(row), recipe, encoder_weights=None)
    progress = finetune(
        network,
        open_packed(packed, "kvasir_seg"),
        recipe,
        accelerator,
        run_dir=run_dir,
        resume=True,
        workers=workers,
    )
    seconds = time.perf_counter() - started
    model, processor = load_model(str(run_dir / "best"))
    source = ModelPredictions(name=row, model=model, processor=processor, batch_size=16, device=default_device())
    for name, (split, part) in TESTS.items():
        dataset = open_packed(packed, name)
        ids = dataset.part(split, part)[0]
        for record_id, probability in source.predict(dataset, ids[: effort.batch] if effort is SMALL else ids):
            path = output / "predictions" / row / name / f"{record_id}.png"
            with atomic_path(path) as temporary:
                temporary.write_bytes(encode_png((probability * 255).round().astype(np.uint8)))
    return {
        "row": row,
        "epochs": progress.epoch,
        "steps": progress.step,
        "best_validation_dice": progress.best,
        "seconds": seconds,
        "images_per_second": [row["images_per_second"] for row in progress.epochs],
        "finished": progress.epoch >= recipe.training.epochs,
    }


def largest_batch(name: str, frames: Path, output: Path, *, effort: Effort = FULL, workers: int = 0) -> dict[str, Any]:
    """Two steps of a full-size pretraining recipe at batches doubled until the memory ends; what each took."""
    tried = []
    for doubling in range(effort.batches):
        batch = effort.first_batch * 2**doubling
        overrides = [f"training.total_batch_size={batch}", "training.accumulation_steps=1", "training.max_steps=2"]
        recipe = load_pretraining_recipe(name, overrides=overrides)
        AcceleratorState._reset_state(reset_partial_state=True)
        run_dir = output / "pretraining" / f"{name}_{batch}"
        accelerator = make_accelerator(recipe.training.precision, run_dir=run_dir)
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        try:
            method = build_method(recipe)
            pretrain(method, open_frames(frames), recipe, accelerator, run_dir=run_dir, workers=workers)
        except torch.OutOfMemoryError:
            tried.append({"batch": batch, "fits": False})
            break
        seconds = time.perf_counter() - started
        memory = peak_memory(accelerator.device)
        tried.append({"batch": batch, "fits": True, "seconds_of_two_steps": seconds, "peak_memory_bytes": memory})
        del method
    return {"recipe": name, "tried": tried}


def compare_devices(packed: Path, *, effort: Effort = FULL) -> list[dict[str, Any]]:
    """Loss and gradients of one batch: the GPU in float32 and fp16, fused AdamW, synchronized BatchNorm, by the CPU's.

    Differences are relative to the largest gradient of the CPU in float32. Without a GPU bf16 takes fp16's place.
    """
    dataset = open_packed(packed, "kvasir_seg")
    pairs = [dataset.pair(record) for record in dataset.records[: effort.batch]]
    pixels = np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame, _ in pairs])
    batch = {
        "pixel_values": torch.from_numpy((pixels - 0.5) / 0.25).permute(0, 3, 1, 2),
        "labels": torch.from_numpy(np.stack([mask for _, mask in pairs])).float(),
    }
    device = default_device()
    half = torch.float16 if device == "cuda" else torch.bfloat16
    found = []
    for row in ROWS:
        model = build_model(zoo.get(row), load_recipe("finetune"), encoder_weights=None).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        state = {key: value.clone() for key, value in model.state_dict().items()}
        wanted = _loss_and_gradients(model, batch, device="cpu")
        cases: dict[str, dict[str, Any]] = {
            "float32": {"device": device},
            str(half).removeprefix("torch."): {"device": device, "half": half},
            "synchronized BatchNorm": {"device": device, "synchronized": True},
        }
        for title, options in cases.items():
            model.load_state_dict(state)
            loss, gradients = _loss_and_gradients(model, batch, **options)
            largest = max(float(g.abs().max()) for g in wanted[1].values())
            difference = max(float((gradients[key] - g).abs().max()) for key, g in wanted[1].items())
            found.append(
                {
                    "row": row,
                    "case": title,
                    "loss": loss,
                    "loss_cpu": wanted[0],
                    "gradient_difference": difference / largest,
                }
            )
        found.append(
            {"row": row, "case": "fused AdamW", "weight_difference": _fused_difference(model, state, wanted[1])}
        )
    return found


def _loss_and_gradients(
    model: Any,
    batch: dict[str, torch.Tensor],
    *,
    device: str,
    half: torch.dtype | None = None,
    synchronized: bool = False,
) -> tuple[float, dict[str, torch.Tensor]]:
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronized and device == "cuda" else model
    network = network.to(device)
    network.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=half, enabled=half is not None):
        loss = network(**{key: value.to(device) for key, value in batch.items()}).loss
    loss.backward()
    gradients = {key: p.grad.detach().float().cpu() for key, p in network.named_parameters() if p.grad is not None}
    model.to("cpu")
    return float(loss), gradients


def _fused_difference(model: Any, state: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight after one step of fused and of plain AdamW from the same gradients."""
    stepped = []
    for fused in (False, True):
        model.load_state_dict(state)
        for key, parameter in model.named_parameters():
            parameter.grad = gradients[key].clone() if key in gradients else None
        AdamW(model.parameters(), lr=1e-4, fused=fused).step()
        stepped.append({key: p.detach().clone() for key, p in model.named_parameters()})
    return max(float((stepped[0][key] - stepped[1][key]).abs().max()) for key in stepped[0])


def gpu_name() -> str:
    """What computed."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU; CPU"


def check(
    packed: Path,
    output: Path,
    *,
    steps: Sequence[str] = ("devices", "rows", "pretraining"),
    effort: Effort = FULL,
    workers: int = 0,
) -> Path:
    """Run the steps and write ``gpu_check.json`` after each, so that a limit of time loses nothing; return its path."""
    content: dict[str, Any] = {"device": gpu_name(), "environment": environment_record()}
    path = output / "gpu_check.json"
    if "devices" in steps:
        content["devices"] = compare_devices(packed, effort=effort)
        write_json(path, content)
    if "rows" in steps:
        for row in ROWS:
            content.setdefault("rows", []).append(train_row(row, packed, output, effort=effort, workers=workers))
            write_json(path, content)
    if "pretraining" in steps:
        for name in RECIPES:
            tried = largest_batch(name, packed / "kvasir_seg.zip", output, effort=effort, workers=workers)
            content.setdefault("pretraining", []).append(tried)
            write_json(path, content)
    return path
