"""What ten minutes on one GPU can show: full-size rows trained, pretraining's largest batches, GPU against CPU.

Everything runs through the functions that users run; this file only packs small copies of the datasets, counts and
writes down. Without a GPU the same steps run on the CPU, in float32, as far as their limits allow.
"""

import io
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.optim import AdamW
from tqdm import tqdm

from polypseg import zoo
from polypseg.data.catalog import get_spec
from polypseg.data.corpus import FrameStore, open_frames
from polypseg.data.images import encode_png
from polypseg.data.polyps import PolypDataset, open_dataset
from polypseg.data.sources import identity
from polypseg.errors import PolypSegError
from polypseg.files import atomic_path, environment_record, read_json, write_json
from polypseg.hub.card_facts import read_epochs
from polypseg.inference.model import default_device, load_model
from polypseg.inference.prediction_files import save_predictions
from polypseg.inference.predictors import ModelPredictions
from polypseg.pretraining.loop import build_method, peak_memory, pretrain
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.recipe import load_recipe
from polypseg.training.finetune import build_model, finetune
from polypseg.training.run_folder import InterruptedRunError, make_accelerator

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
SMALLEST_BATCH = 2
"""Of pretraining: of one image nothing can be contrasted."""
CHECKPOINT_EPOCHS = 10
"""A ViT-B's checkpoint is 1.2 GB: after every epoch, of seconds on a GPU, it would cost much of the time."""


class Step(StrEnum):
    """What can be asked for by itself."""

    DEVICES = "devices"
    ROWS = "rows"
    PRETRAINING = "pretraining"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of each step is done."""

    overrides: tuple[str, ...] = ()
    """Of the fine-tuning recipe."""
    first_batch: int = 256
    """Of pretraining: from there it is doubled, or halved."""
    largest_batch: int = 4096
    batch: int = 48
    """Images of the comparison of CPU and GPU."""
    predictions: int | None = None
    """Of each test, the first ones; None for all."""


FULL = Effort()
SMALL = Effort(
    overrides=("training.max_steps=2", "training.total_batch_size=4", "training.precision=no"),
    first_batch=2,
    largest_batch=2,
    batch=2,
    predictions=2,
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

    The maps (8-bit PNG at the model's size) are scored at home by ``polypseg evaluate --predictions``. Resumes. A run
    that was asked to stop predicts by its best model until then, and says ``interrupted``. Raises InterruptedRunError
    for one that was stopped in its first epoch.
    """
    recipe = load_recipe("finetune", overrides=effort.overrides)
    run_dir, started = output / "runs" / row, time.perf_counter()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(recipe.training.precision, run_dir=run_dir)
    network = build_model(zoo.get(row), recipe, encoder_weights=None)
    interrupted = False
    try:
        finetune(
            network,
            open_packed(packed, "kvasir_seg"),
            recipe,
            accelerator,
            run_dir=run_dir,
            resume=True,
            workers=workers,
            checkpoint_epochs=CHECKPOINT_EPOCHS,
        )
    except InterruptedRunError:
        if not (run_dir / "epochs.csv").is_file():
            raise
        interrupted = True
    seconds = time.perf_counter() - started
    epochs = read_epochs(run_dir / "epochs.csv")
    model, processor = load_model(str(run_dir / "best"))
    source = ModelPredictions(name=row, model=model, processor=processor, batch_size=16, device=default_device())
    for name, (split, part) in TESTS.items():
        dataset = open_packed(packed, name)
        ids = dataset.part(split, part)[0]
        predictions = source.predict(dataset, ids[: effort.predictions])
        save_predictions(predictions, output / "predictions" / row / name)
    return {
        "row": row,
        "epochs": len(epochs),
        "steps": int(epochs[-1]["step"]),
        "best_validation_dice": max(float(epoch["validation_dice"]) for epoch in epochs),
        "seconds": seconds,
        "images_per_second": [float(epoch["images_per_second"]) for epoch in epochs],
        "finished": len(epochs) >= recipe.training.epochs,
        "interrupted": interrupted,
    }


def try_batches(
    name: str, packed: Path, output: Path, *, effort: Effort = FULL, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Two steps of a full-size pretraining recipe at batches doubled, or halved, until the largest that fits is known.

    Gives for each whether it fits, images/s with the start of the loader, and the peak memory: of the GPU, else of the
    process until then.
    """
    batch, tried = effort.first_batch, set[int]()
    while SMALLEST_BATCH <= batch <= effort.largest_batch and batch not in tried:
        tried.add(batch)
        cost = _two_steps(name, packed, output / "pretraining" / f"{name}_{batch}", batch=batch, workers=workers)
        yield {"batch": batch, "fits": cost is not None} | (cost or {})
        batch = batch // 2 if cost is None else batch * 2


def _two_steps(name: str, packed: Path, run_dir: Path, *, batch: int, workers: int) -> dict[str, float] | None:
    """What two steps cost; None where the memory does not suffice. The run, of gigabytes, is not kept."""
    overrides = [f"training.total_batch_size={batch}", "training.accumulation_steps=1", "training.max_steps=2"]
    recipe = load_pretraining_recipe(name, overrides=overrides)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(recipe.training.precision, run_dir=run_dir)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        pretrain(build_method(recipe), _frames(packed, batch), recipe, accelerator, run_dir=run_dir, workers=workers)
        cost = read_json(run_dir / "cost.json")
        return {"images_per_second": cost["images_per_second"], "peak_memory_bytes": peak_memory(accelerator.device)}
    except torch.OutOfMemoryError:
        return None
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


@dataclass
class _Repeated:
    """Frames over and over, for a batch of more than there are."""

    frames: FrameStore
    times: int
    path: Path
    content_id: str

    def __len__(self) -> int:
        return len(self.frames) * self.times

    def name(self, index: int) -> str:
        """A name of its own for each repeat."""
        again, index = divmod(index, len(self.frames))
        return f"{again}/{self.frames.name(index)}"

    def read(self, index: int) -> bytes:
        return self.frames.read(index % len(self.frames))


def _frames(packed: Path, batch: int) -> FrameStore:
    """The frames of the packed Kvasir-SEG, without its masks, often enough to fill two batches."""
    frames = open_frames(packed / "kvasir_seg.zip", corpus_folder=get_spec("kvasir_seg").image_folder)
    times = -(-2 * batch // len(frames))
    return _Repeated(frames, times, path=frames.path, content_id=identity([frames.content_id, str(times)]))


def compare_devices(packed: Path, *, effort: Effort = FULL) -> list[dict[str, Any]]:
    """Loss and gradients of one batch: the GPU in float32, fp16 and with SyncBatchNorm, and fused AdamW, by the CPU's.

    Differences are relative to the largest gradient of the CPU in float32. SyncBatchNorm is that of one process, which
    has nobody to exchange with. Without a GPU bf16 takes fp16's place, and SyncBatchNorm is left out: it runs on
    GPUs only.
    """
    dataset = open_packed(packed, "kvasir_seg")
    pairs = [dataset.pair(record) for record in dataset.records[: effort.batch]]
    pixels = np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame, _ in pairs])
    batch = {
        "pixel_values": torch.from_numpy((pixels - 0.5) / 0.25).permute(0, 3, 1, 2),
        "labels": torch.from_numpy(np.stack([mask for _, mask in pairs])).float(),
    }
    recipe, device = load_recipe("finetune", overrides=effort.overrides), default_device()
    half = torch.float16 if device == "cuda" else torch.bfloat16
    found = []
    for row in ROWS:
        model = build_model(zoo.get(row), recipe, encoder_weights=None).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        state = {key: value.clone() for key, value in model.state_dict().items()}
        wanted = _loss_and_gradients(model, batch, device="cpu")
        cases: dict[str, dict[str, Any]] = {
            "float32": {"device": device},
            str(half).removeprefix("torch."): {"device": device, "half": half},
        }
        if device == "cuda":
            cases["SyncBatchNorm, one process"] = {"device": device, "synchronized": True}
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
    network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronized else model
    network = network.to(device)
    network.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=half, enabled=half is not None):
        loss = network(**{key: value.to(device) for key, value in batch.items()}).loss
    loss.backward()
    gradients = {key: p.grad.detach().float().cpu() for key, p in network.named_parameters() if p.grad is not None}
    model.to("cpu")
    return loss.item(), gradients


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
    steps: Sequence[Step] = tuple(Step),
    effort: Effort = FULL,
    workers: int = 0,
) -> Path:
    """Run the steps and write ``gpu_check.json`` after each part, so that a limit of time loses nothing; its path.

    Raises InterruptedRunError when a row was asked to stop, after its predictions are written.
    """
    content: dict[str, Any] = {"device": gpu_name(), "environment": environment_record()}
    path = output / "gpu_check.json"
    if Step.DEVICES in steps:
        content["devices"] = compare_devices(packed, effort=effort)
        write_json(path, content)
    if Step.ROWS in steps:
        for row in ROWS:
            trained = train_row(row, packed, output, effort=effort, workers=workers)
            content.setdefault("rows", []).append(trained)
            write_json(path, content)
            if trained["interrupted"]:
                raise InterruptedRunError(f"{row} was stopped after {trained['epochs']} epochs: the same call goes on")
    if Step.PRETRAINING in steps:
        for name in RECIPES:
            tried: list[dict[str, Any]] = []
            content.setdefault("pretraining", []).append({"recipe": name, "tried": tried})
            for cost in try_batches(name, packed, output, effort=effort, workers=workers):
                tried.append(cost)
                write_json(path, content)
    return path
