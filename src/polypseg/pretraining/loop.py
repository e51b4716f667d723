"""The pretraining loop, for all methods: on one process or many, interruptible, and continued to the same result.

Order, views and masks depend on (seed, epoch, frame) only, and nothing else is drawn after the start, so the number of
processes and interruptions change no result.
"""

import contextlib
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from polypseg.data.corpus import FrameStore
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import read_json, write_csv, write_json
from polypseg.pretraining.barlow_twins import BarlowTwins
from polypseg.pretraining.decoded import keep_decoded
from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.loader import FrameFeed, UnreadableFrames, frame_loader
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.moco_v3 import MoCoV3
from polypseg.pretraining.optim import LARS, warmup_cosine
from polypseg.pretraining.probes.report import embedding_spread, normalize
from polypseg.pretraining.recipe import OptimizerRecipe, PretrainingRecipe
from polypseg.pretraining.supervised import Supervised, read_labels
from polypseg.provenance.passport import PASSPORT, PRETRAINING, Passport, Seen, frames_manifest
from polypseg.training.distributed import gather_rows, synchronize_batchnorm
from polypseg.training.loader import Example, GlobalBatches
from polypseg.training.run_folder import (
    InterruptedRunError,
    claim_run,
    newest_checkpoint,
    save_checkpoint,
    sole_run,
    step_bar,
    stop_requests,
)
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD

METHOD_CLASSES: dict[str, Any] = {"moco_v3": MoCoV3, "barlow_twins": BarlowTwins, "mae": MAE, "supervised": Supervised}
COLLAPSED = 0.02
"""Spread of embeddings below which the run warns: nearly all frames look the same to the encoder."""
WARN_EVERY = 100
"""Steps between two such warnings."""


@dataclass
class PretrainingProgress:
    """How far a run is; saved with each checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    """Of every optimizer step, over the global batch."""
    spreads: list[float] = field(default_factory=list)
    """Spread of the global batch's embeddings at every step; see ``embedding_spread``."""
    unreadable: list[int] = field(default_factory=list)
    """Frames that could not be read so far, by number."""

    def finish_step(self, loss: float, spread: float) -> None:
        """Count an optimizer step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        self.losses.append(loss)
        self.spreads.append(spread)


def build_method(recipe: PretrainingRecipe) -> Any:
    """The method's module around a fresh encoder, initialized from the recipe's seed. Raises UsageError."""
    torch.manual_seed(recipe.seed)
    return METHOD_CLASSES[recipe.method](build_encoder(recipe.encoder), **recipe.method_options())


def build_feed(method: nn.Module, frames: FrameStore, recipe: PretrainingRecipe) -> FrameFeed:
    """The recipe's views of the frames, with noise for a method that hides patches, labels for one that needs them.

    Raises UsageError when the frames are not of the recipe's classes.
    """
    labels = read_labels(frames, classes=method.head.out_features) if isinstance(method, Supervised) else None
    kept = recipe.data.decoded_gigabytes
    return FrameFeed(
        frames,
        [view.settings() for view in recipe.views],
        size=recipe.data.image_size,
        seed=recipe.seed,
        tokens=getattr(method, "patches", 0),
        labels=labels,
        decoded=keep_decoded(frames, gigabytes=kept) if kept else None,
    )


def build_optimizer(method: nn.Module, recipe: OptimizerRecipe, *, total_batch_size: int) -> Optimizer:
    """LARS or AdamW over what trains. Each group's ``peak`` is its learning rate after the warm-up."""
    scale = total_batch_size / 256
    peak = recipe.base_learning_rate * scale
    bias_peak = (recipe.bias_base_learning_rate or recipe.base_learning_rate) * scale
    trained = [p for p in method.parameters() if p.requires_grad]
    groups: list[dict[str, Any]]
    if recipe.kind == "lars":
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "peak": peak},
            {"params": [p for p in trained if p.ndim <= 1], "peak": bias_peak},
        ]
        return LARS(groups, lr=0.0, weight_decay=recipe.weight_decay)
    if recipe.decay_everything:
        groups = [{"params": trained, "weight_decay": recipe.weight_decay}]
    else:
        groups = param_groups_weight_decay(method, recipe.weight_decay)
    return AdamW([group | {"peak": peak} for group in groups], lr=0.0, betas=recipe.betas)


def pretrain(
    method: nn.Module,
    frames: FrameStore,
    recipe: PretrainingRecipe,
    accelerator: Accelerator,
    *,
    run_dir: Path,
    resume: bool = False,
    workers: int = 0,
) -> PretrainingProgress:
    """Train ``method`` (see ``build_method``) on ``frames``; leave checkpoints, losses and the record in ``run_dir``.

    With ``resume`` continues from the newest checkpoint, if there is one. Raises UsageError when ``run_dir`` holds
    another run or the batch does not fit, PolypSegError for a non-finite loss (the last checkpoint stays) or too many
    unreadable frames, InterruptedRunError after a SIGINT or SIGTERM.
    """
    with sole_run(run_dir, accelerator):
        run = _Run(method, frames, recipe, accelerator, run_dir=run_dir, workers=workers)
        progress, training = run.start(resume=resume), recipe.training
        rate = 0.0  # images/s over all processes in this epoch
        with stop_requests() as stop, step_bar(accelerator, total=run.total_steps, done=progress.step) as bar:
            while progress.step < run.total_steps:
                run.method.train()
                run.batches.start(epoch=progress.epoch, first_step=progress.step_in_epoch)
                began, first_step = time.perf_counter(), progress.step
                for batch in run.loader:
                    loss, spread = run._train_step(batch)
                    progress.finish_step(loss, spread)
                    images = (progress.step - first_step) * training.total_batch_size
                    rate = images / (time.perf_counter() - began)
                    bar.update()
                    shown = {"epoch": progress.epoch + 1, "loss": f"{loss:.3f}", "spread": f"{spread:.2f}"}
                    bar.set_postfix(shown | {"images/s": f"{rate:.0f}"}, refresh=False)
                    numbers = {"loss": loss, "spread": spread, "learning_rate": run.learning_rate}
                    accelerator.log(numbers | {"images_per_second": rate}, step=progress.step)
                    run.warn_of_collapse(bar)
                    if progress.step >= run.total_steps:
                        break
                    stopping = stop.anywhere(accelerator)
                    if stopping or progress.step % training.checkpoint_steps == 0:
                        run.save()
                    if stopping:
                        raise InterruptedRunError(f"interrupted at step {progress.step}; continue with --resume")
                if progress.step_in_epoch >= len(run.batches):
                    progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            bar.close()
            run.save()
            run.finish(rate)
    return progress


def peak_memory(device: torch.device) -> int:
    """The most memory so far in bytes: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


class _Run:
    """What the loop of ``pretrain`` uses: method, data, optimizer, progress, folder, and one step with them."""

    def __init__(
        self,
        method: nn.Module,
        frames: FrameStore,
        recipe: PretrainingRecipe,
        accelerator: Accelerator,
        *,
        run_dir: Path,
        workers: int,
    ):
        self.recipe, self.frames, self.accelerator, self.run_dir = recipe, frames, accelerator, run_dir
        self.progress, self.unreadable = PretrainingProgress(), UnreadableFrames()
        training, processes = recipe.training, accelerator.num_processes
        self.batches = GlobalBatches(
            len(frames),
            total_batch_size=training.total_batch_size,
            seed=recipe.seed,
            process=accelerator.process_index,
            processes=processes,
        )
        self.share = training.total_batch_size // processes
        if self.share % training.accumulation_steps:
            raise UsageError(
                f"a process's {self.share} images cannot be split into {training.accumulation_steps} equal "
                "micro-batches: change --set training.accumulation_steps"
            )
        feed = build_feed(method, frames, recipe)
        pin = accelerator.device.type == "cuda"
        self.loader = frame_loader(feed, self.batches, workers=workers, pin_memory=pin)
        self.schedule_steps = training.epochs * len(self.batches)
        self.total_steps = min(self.schedule_steps, training.max_steps or self.schedule_steps)
        self.record = {
            "recipe": recipe.model_dump(mode="json"),
            "data": {"source": frames.path.name, "content_id": frames.content_id, "frames": len(frames)},
        }
        optimizer = build_optimizer(method, recipe.optimiser, total_batch_size=training.total_batch_size)
        network = synchronize_batchnorm(method, accelerator).to(memory_format=torch.channels_last)
        self.method, self.optimizer = accelerator.prepare(network, optimizer)

    def start(self, *, resume: bool) -> PretrainingProgress:
        """Claim the run's folder, or continue the run that is in it; how far it is."""
        if claim_run(self.run_dir, self.record, self.accelerator, resume=resume):
            checkpoint = newest_checkpoint(self.run_dir)
            if checkpoint:
                self.progress = PretrainingProgress(**read_json(checkpoint / "progress.json"))
                self.unreadable.indices = set(self.progress.unreadable)
                self.accelerator.load_state(str(checkpoint))
        self.accelerator.init_trackers("tensorboard")
        return self.progress

    def finish(self, rate: float) -> None:
        """Say what the run cost on this machine, and note what its encoder saw; ``rate``: the last images/s."""
        self._summarize(rate)
        self.accelerator.end_training()
        if self.accelerator.is_main_process and not (self.run_dir / PASSPORT).is_file():
            self._write_passport()  # last: the other processes need not wait for it

    def _write_passport(self) -> None:
        """Note every frame of the corpus, so that a test on one of them is noticed."""
        manifest = frames_manifest(self.frames, left_out=set(self.progress.unreadable))
        description = f"{len(manifest.images)} frames of {self.frames.path.name}"
        seen = Seen(stage=PRETRAINING, description=description, manifest=manifest)
        Passport(model_id=self.recipe.name, seen=(seen,)).save(self.run_dir)

    def _train_step(self, batch: Example) -> tuple[float, float]:
        """One optimizer step; returns loss and spread over the global batch. Raises PolypSegError for a wild loss."""
        progress, training = self.progress, self.recipe.training
        self._watch_unreadable(batch["unreadable"])
        self._set_rates()
        self.accelerator.unwrap_model(self.method).start_step(progress.step / self.schedule_steps)
        inputs = self._inputs(batch)
        parts = [x.chunk(training.accumulation_steps) for x in inputs]
        losses, embeddings = [], []
        for number, part in enumerate(zip(*parts, strict=True), start=1):
            is_last = number == training.accumulation_steps
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.method):
                output = self.method(*part)
                loss = output.loss / training.accumulation_steps
                losses.append(loss.detach())
                embeddings.append(output.embedding)
                self.accelerator.backward(loss)
        value = float(self.accelerator.reduce(torch.stack(losses).sum(), reduction="mean"))
        if not torch.isfinite(torch.tensor(value)):
            raise PolypSegError(
                f"the loss is {value} at step {progress.step + 1}: start again in another --output with a lower --set "
                "optimiser.base_learning_rate or with training.precision=no; the last good checkpoint is in "
                f"{self.run_dir / 'checkpoints'}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value, float(embedding_spread(gather_rows(torch.cat(embeddings))))

    def _inputs(self, batch: Example) -> list[Tensor]:
        """views (N, V, S, S, 3) uint8 -> (N, V, 3, S, S) normalized, on the device; and noise or labels, if any."""
        device = self.accelerator.device
        views = normalize(batch["views"].to(device, non_blocking=True), mean=IMAGENET_MEAN, std=IMAGENET_STD)
        others = [batch[key].to(device, non_blocking=True) for key in ("noise", "label") if key in batch]
        return [views, *others]

    def _set_rates(self) -> None:
        """The learning rate of this step in every group."""
        recipe = self.recipe.optimiser
        share = warmup_cosine(
            self.progress.step,
            warmup_steps=recipe.warmup_epochs * len(self.batches),
            total_steps=self.schedule_steps,
            floor=recipe.final_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]

    @property
    def learning_rate(self) -> float:
        """Of the first group, at this step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _watch_unreadable(self, unreadable: Tensor) -> None:
        """Collect all processes' unreadable frames; raise PolypSegError when there are too many."""
        everywhere = gather_rows(unreadable.to(self.accelerator.device)).cpu()
        if not bool((everywhere >= 0).any()):
            return
        self.unreadable.update(everywhere)
        self.progress.unreadable = sorted(self.unreadable.indices)
        seen = min(len(self.frames), (self.progress.step + 1) * self.recipe.training.total_batch_size)
        self.unreadable.check(seen, self.frames, self.recipe.data.max_unreadable)

    def warn_of_collapse(self, bar: "tqdm[Any]") -> None:
        """Say so, now and then, when all frames look the same to the encoder."""
        recent = self.progress.spreads[-20:]
        if self.progress.step % WARN_EVERY == 0 and sum(recent) / len(recent) < COLLAPSED:
            bar.write(
                f"warning: the embeddings have collapsed (spread {recent[-1]:.4f} at step {self.progress.step}): lower "
                "the learning rate or lengthen the warm-up, and do not use this encoder"
            )

    def _summarize(self, rate: float) -> None:
        """Print and keep what the run cost on this machine since it was started or resumed."""
        if not rate:
            return
        gigabytes = peak_memory(self.accelerator.device) / 1e9
        summary = {"images_per_second": rate, "peak_memory_gb": gigabytes, "device": str(self.accelerator.device)}
        self.accelerator.print(f"{rate:.1f} images/s in the last epoch, peak memory {gigabytes:.1f} GB a process")
        if self.accelerator.is_main_process:
            write_json(self.run_dir / "cost.json", summary | {"processes": self.accelerator.num_processes})

    def save(self) -> None:
        """The loss table, the list of unreadable frames, and everything that resuming needs."""
        progress = self.progress
        if self.accelerator.is_main_process:
            rows = zip(progress.losses, progress.spreads, strict=True)
            write_csv(
                self.run_dir / "losses.csv",
                [{"step": step, "loss": loss, "spread": spread} for step, (loss, spread) in enumerate(rows, start=1)],
            )
            if progress.unreadable:
                write_json(self.run_dir / "unreadable.json", self.unreadable.names(self.frames))
        save_checkpoint(self.accelerator, self.run_dir, step=progress.step, progress=lambda: asdict(progress))
