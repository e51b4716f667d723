"""Fine-tuning: the loop of the reference study (paper section 3.2), on one process or many, interruptible.

What is drawn depends on (seed, epoch, position) only, so a resumed run ends with the weights of an uninterrupted one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from polypseg.data.polyps import PolypDataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.metrics import standard_scores
from polypseg.files import atomic_path, file_sha256, read_json, write_csv, write_json
from polypseg.inference.model import build_image_processor, load_model, without_shard_bars
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.modeling.modeling_polypseg import soft_dice_loss
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin
from polypseg.provenance.passport import (
    PASSPORT,
    Passport,
    attach_passport,
    find_passport,
    finetuning_passport,
    seen_by_encoder,
)
from polypseg.recipe import Recipe, ScheduleRecipe, changes_from_bundled
from polypseg.training.augmentation import PairedAugmentation
from polypseg.training.distributed import synchronize_batchnorm
from polypseg.training.fast_layers import fast_layers
from polypseg.training.loader import (
    CachedPairs,
    Example,
    GlobalBatches,
    JoinedPairs,
    TrainingFeed,
    ValidationFeed,
    cache_pairs,
    training_loader,
)
from polypseg.training.run_folder import (
    InterruptedRunError,
    claim_run,
    newest_checkpoint,
    save_checkpoint,
    sole_run,
    step_bar,
    stop_requests,
)
from polypseg.weights.loading import load_encoder_weights, pretraining_origin, stated_method
from polypseg.zoo import RANDOM, ZooEntry


@dataclass
class Progress:
    """How far a run is; saved with each checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float = -1.0
    losses: list[float] = field(default_factory=list)
    """Of every optimizer step, averaged over processes."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    """One row a finished epoch: epoch, step, learning_rate, loss, validation_dice, images_per_second."""

    def finish_step(self, loss: float) -> None:
        """Count an optimizer step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        self.losses.append(loss)

    def finish_epoch(self, *, learning_rate: float, validation_dice: float, images_per_second: float) -> None:
        """Count an epoch and note its row."""
        losses = self.losses[-self.step_in_epoch :]
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.best = max(self.best, validation_dice)
        row = {"epoch": self.epoch, "step": self.step, "learning_rate": learning_rate}
        row |= {"loss": sum(losses) / len(losses), "validation_dice": validation_dice}
        self.epochs.append(row | {"images_per_second": images_per_second})


def build_model(
    entry: ZooEntry, recipe: Recipe, *, encoder_weights: str | None = None
) -> PolypSegForSemanticSegmentation:
    """The model of a row with the recipe's changes, decoders freshly initialized from the recipe's seed.

    ``encoder_weights`` as in ``load_encoder_weights``; None or "random" for random initialization. What was loaded is
    recorded in ``config.weights_origin``; a model of another encoder, decoder, corpus or start than the row's has an id
    of its own. An encoder of ``pretrain.py`` brings its own record. Raises UsageError for an impossible configuration
    or image size, and for an encoder pretrained by another method than the row's (or by any, where it has none).
    """
    fields = entry.config_fields() | {"image_size": recipe.data.image_size}
    changes = recipe.model.model_dump(exclude_none=True)
    if changes.get("encoder", fields["encoder"]) != fields["encoder"]:
        fields |= {"image_mean": None, "image_std": None}  # another encoder brings its own statistics
    torch.manual_seed(recipe.seed)
    try:
        config = PolypSegConfig(**(fields | changes))
        model = PolypSegForSemanticSegmentation(config)
        model.check_image_size(config.image_size, config.image_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    pretraining = pretraining_origin(encoder_weights)
    method = stated_method(encoder_weights)
    if method not in (None, entry.method):
        raise UsageError(
            f"{encoder_weights} was pretrained with {method}, but {entry.short_name} stands for "
            f"{entry.method}: choose the matching row"
        )
    loaded = RANDOM
    if encoder_weights not in (None, RANDOM):
        loaded = load_encoder_weights(model, str(encoder_weights))
    if loaded != RANDOM and entry.method == "none":
        raise UsageError(f"{entry.short_name} stands for random initialization: choose the row of {encoder_weights}")
    full = config.encoder == fields["encoder"]
    corpus = (pretraining.corpus if pretraining else None) or entry.corpus
    tag = RANDOM if loaded == RANDOM else f"{entry.method}_{corpus}"
    origin = WeightsOrigin(
        model_id=f"{entry.encoder if full else config.encoder}_{config.decoder}.{tag}",
        row=entry.model_id,
        encoder_initialisation=loaded,
        scale="full" if full else "small",
    )
    if pretraining:
        origin = origin.updated(pretraining=pretraining)
    config.weights_origin = origin.content
    model.encoder_seen = seen_by_encoder(encoder_weights, origin)
    return model


def continued_model(entry: ZooEntry, recipe: Recipe, *, folder: Path) -> PolypSegForSemanticSegmentation:
    """The fine-tuned model in a folder, to be trained further as this row with the recipe.

    Its record, its passport and the SHA-256 of its weights go into the new model's. Raises UsageError when its encoder
    or decoder is not the recipe's, or it is not of the row.
    """
    model, _ = load_model(str(folder))
    origin = WeightsOrigin.within(model.config)
    if not isinstance(model, PolypSegForSemanticSegmentation) or origin.row != entry.model_id:
        raise UsageError(f"{folder} is no fine-tuned model of {entry.short_name}: choose its own row")
    wanted = PolypSegConfig(**(entry.config_fields() | recipe.model.model_dump(exclude_none=True))).to_dict()
    architecture = ("encoder", "decoder", "decoder_channels", "decoder_dropout")
    differing = [key for key in architecture if wanted[key] != getattr(model.config, key)]
    if differing:
        raise UsageError(f"{folder} differs from recipe {recipe.name} in {', '.join(differing)}")
    try:
        model.check_image_size(recipe.data.image_size, recipe.data.image_size)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model.config.image_size = recipe.data.image_size
    passport = find_passport(folder, named=origin.passport)
    model.config.weights_origin = origin.continued(sha256=file_sha256(folder / SAFE_WEIGHTS_NAME)).content
    model.encoder_seen = passport[0].seen if passport else ()
    return model


def finetune(
    model: PolypSegForSemanticSegmentation,
    dataset: PolypDataset,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    run_dir: Path,
    split: str = "reference",
    negatives: PolypDataset | None = None,
    resume: bool = False,
    workers: int = 0,
    checkpoint_epochs: int = 1,
) -> Progress:
    """Train on the ``train`` part, select on ``validation``; leave the model in ``run_dir/best``.

    ``negatives``: the polyp-free frames of a recipe that asks for them, whose pinned ``train`` part is trained on with
    empty masks. With ``resume`` continues from the newest checkpoint, if there is one; there is one after every
    ``checkpoint_epochs`` epochs, and at the end. Raises UsageError when ``run_dir`` holds another run, another process
    writes there or the recipe's negatives are absent, PolypSegError for a non-finite loss (the last checkpoint stays)
    or validation, InterruptedRunError after a SIGINT or SIGTERM.
    """
    with sole_run(run_dir, accelerator):
        run = _Run(
            model, dataset, recipe, accelerator, run_dir=run_dir, split=split, workers=workers, negatives=negatives
        )
        progress, training = run.start(resume=resume), recipe.training
        with stop_requests() as stop, run.shown() as bar:
            while progress.epoch < training.epochs and progress.step < run.total_steps:
                run.start_epoch()
                began, first_step = time.perf_counter(), progress.step
                for batch in run.train_loader:
                    loss = run._train_step(run.on_device(batch))
                    progress.finish_step(loss)
                    bar.update()
                    bar.set_postfix(epoch=progress.epoch + 1, loss=f"{loss:.3f}", refresh=False)
                    accelerator.log({"loss": loss, "learning_rate": run.schedule.learning_rate}, step=progress.step)
                    if progress.step >= run.total_steps:
                        break
                    stopping = stop.anywhere(accelerator)
                    if stopping or (training.checkpoint_steps and progress.step % training.checkpoint_steps == 0):
                        run.save_checkpoint()
                    if stopping:
                        raise InterruptedRunError(f"interrupted at step {progress.step}; continue with --resume")
                images = (progress.step - first_step) * training.total_batch_size  # since a resume
                seconds = time.perf_counter() - began
                dice = run.validation_dice()
                if dice > progress.best or training.keep == "last":
                    run.save_best()
                rate = run.schedule.learning_rate
                progress.finish_epoch(learning_rate=rate, validation_dice=dice, images_per_second=images / seconds)
                run.schedule.after_epoch(dice)
                accelerator.log({"validation_dice": dice}, step=progress.step)
                mean = progress.epochs[-1]["loss"]
                bar.write(f"epoch {progress.epoch:3d}  loss {mean:.4f}  validation Dice {dice:.4f}")
                run.write_tables()  # before the checkpoint: a finished run has its tables
                if progress.step >= run.total_steps or progress.epoch % checkpoint_epochs == 0:
                    run.save_checkpoint()
            run.finish()
    return progress


class _Run:
    """What the loop of ``finetune`` uses: model, data, optimizer, schedule, progress, folder, and one step."""

    def __init__(
        self,
        model: PolypSegForSemanticSegmentation,
        dataset: PolypDataset,
        recipe: Recipe,
        accelerator: Accelerator,
        *,
        run_dir: Path,
        split: str,
        workers: int,
        negatives: PolypDataset | None = None,
    ):
        if (negatives is None) != (recipe.data.negatives is None):
            wants = "asks for" if recipe.data.negatives else "takes no"
            raise UsageError(f"recipe {recipe.name} {wants} polyp-free frames (data.negatives): see --negatives")
        self.recipe, self.accelerator, self.run_dir = recipe, accelerator, run_dir
        self.progress = Progress()
        self.dataset, self.split, self.encoder_seen = dataset, split, getattr(model, "encoder_seen", ())
        self.negatives = negatives
        parts = dataset.split(split)
        if not {"train", "validation"} <= set(parts):
            raise UsageError(
                f"split {split!r} has the parts {', '.join(parts)}: training needs 'train' and 'validation'"
            )
        with accelerator.main_process_first():
            train = cache_pairs(dataset, parts["train"], image_size=recipe.data.image_size)
            validation = cache_pairs(dataset, parts["validation"], image_size=recipe.data.image_size)
            empty = None
            if negatives is not None:
                listed = negatives.split(str(recipe.data.negatives))["train"]
                empty = cache_pairs(negatives, listed, image_size=recipe.data.image_size)
        self.config = model.config
        origin = WeightsOrigin.within(self.config).updated(
            recipe=recipe.name,
            recipe_changes=changes_from_bundled(recipe),
            finetuned_on=f"{dataset.spec.name} {split}/train",
            n=len(train),
            finished=False,
        )
        if empty is not None:
            origin = origin.updated(negatives=f"{recipe.data.negatives}/train", negatives_n=len(empty))
        self.config.weights_origin = origin.content
        stated = origin.without("recipe_changes").content  # the record holds the recipe itself
        self.record = {
            "model": self.config.to_dict() | {WEIGHTS_ORIGIN: stated},
            "recipe": recipe.model_dump(mode="json"),
            "data": {
                "dataset": dataset.spec.name,
                "content_id": dataset.content_id,
                "split": split,
                "train": len(train),
                "validation": len(validation),
            }
            | ({"negatives": negatives.content_id} if negatives else {}),
        }
        repeated = [] if empty is None else [empty] * recipe.data.negatives_per_epoch
        self._build_loaders(JoinedPairs([train, *repeated]), validation, workers=workers)
        self._build_optimization(model)

    def _build_loaders(self, train: JoinedPairs, validation: CachedPairs, *, workers: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        statistics: dict[str, Any] = {"mean": self.config.image_mean, "std": self.config.image_std}
        self.batches = GlobalBatches(
            len(train),
            total_batch_size=recipe.training.total_batch_size,
            seed=recipe.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            sides=recipe.data.batch_sizes,
        )
        feed = TrainingFeed(train, PairedAugmentation(recipe.augmentation, **statistics), seed=recipe.seed)
        pin = accelerator.device.type == "cuda"
        self.train_loader = training_loader(feed, self.batches, workers=workers, pin_memory=pin)
        mine = list(range(accelerator.process_index, len(validation), accelerator.num_processes))
        self.validation_loader: DataLoader[Example] = DataLoader(
            torch.utils.data.Subset(ValidationFeed(validation, **statistics), mine),
            batch_size=max(1, recipe.training.total_batch_size // accelerator.num_processes),
            generator=torch.Generator(),
        )

    def _build_optimization(self, model: PolypSegForSemanticSegmentation) -> None:
        recipe = self.recipe.training
        self.total_steps = min(recipe.epochs * len(self.batches), recipe.max_steps or recipe.epochs * len(self.batches))
        network = synchronize_batchnorm(model, self.accelerator).to(memory_format=torch.channels_last)
        self.frozen = _leading_stages(network, recipe.frozen_stages)
        for stage in self.frozen:
            stage.requires_grad_(False)
        self.average = None
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)
            self.average = AveragedModel(network, multi_avg_fn=average, use_buffers=True).to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.average)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.schedule = Schedule(self.optimizer, self.recipe.schedule, self.total_steps, recipe.learning_rate)

    def _bare_model(self) -> PolypSegForSemanticSegmentation:
        bare: PolypSegForSemanticSegmentation = self.accelerator.unwrap_model(self.model)
        return bare

    def _kept_model(self) -> PolypSegForSemanticSegmentation:
        """The model that is validated and kept: the averaged one where the recipe averages."""
        return cast(PolypSegForSemanticSegmentation, self.average.module) if self.average else self._bare_model()

    # -- starting, saving, resuming -------------------------------------------------------------------------------

    def start(self, *, resume: bool) -> Progress:
        """Claim the run's folder, or continue the run that is in it; how far it is."""
        if claim_run(self.run_dir, self.record, self.accelerator, resume=resume):
            checkpoint = newest_checkpoint(self.run_dir)
            if checkpoint:
                self.progress = Progress(**read_json(checkpoint / "progress.json"))
                self.schedule.replay(self.progress)
                self.accelerator.load_state(str(checkpoint))
        self.accelerator.init_trackers("tensorboard")
        return self.progress

    def save_checkpoint(self) -> None:
        """Save everything that resuming needs."""
        save_checkpoint(self.accelerator, self.run_dir, step=self.progress.step, progress=lambda: asdict(self.progress))

    def save_best(self) -> None:
        """Keep the current model as the best by validation."""
        if self.accelerator.is_main_process:
            with atomic_path(self.run_dir / "best") as temporary, without_shard_bars():
                self._kept_model().save_pretrained(temporary)
                build_image_processor(self.config).save_pretrained(temporary)
                attach_passport(temporary, self._passport)

    @cached_property
    def _passport(self) -> Passport:
        model_id = WeightsOrigin.within(self.config).model_id
        negatives = (self.negatives, str(self.recipe.data.negatives)) if self.negatives else None
        return finetuning_passport(
            self.dataset, split=self.split, model_id=model_id, encoder_seen=self.encoder_seen, negatives=negatives
        )

    def write_tables(self) -> None:
        """``epochs.csv`` and ``losses.csv``."""
        if self.accelerator.is_main_process:
            write_csv(self.run_dir / "epochs.csv", self.progress.epochs)
            table = [{"step": step, "loss": loss} for step, loss in enumerate(self.progress.losses, start=1)]
            write_csv(self.run_dir / "losses.csv", table)

    def finish(self) -> None:
        """Say in the best model's config that its run came to its end."""
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            if not (self.run_dir / "best" / PASSPORT).is_file():  # of a run that an older version began
                attach_passport(self.run_dir / "best", self._passport)
            _mark_finished(self.run_dir / "best" / CONFIG_NAME)

    # -- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def shown(self) -> "Iterator[tqdm[Any]]":
        """A progress bar over all steps, with the layers that are faster on this device."""
        on_cpu = self.accelerator.device.type == "cpu"
        with (
            step_bar(self.accelerator, total=self.total_steps, done=self.progress.step) as bar,
            fast_layers(self._bare_model(), bf16=self.accelerator.mixed_precision == "bf16", enabled=on_cpu),
        ):
            yield bar

    def start_epoch(self) -> None:
        """Put the model into training and the loader where the epoch goes on."""
        self.model.train()
        for stage in self.frozen:
            stage.eval()
        self.batches.start(epoch=self.progress.epoch, first_step=self.progress.step_in_epoch)

    def on_device(self, batch: Example) -> Example:
        """Channels last: on CPU and on tensor cores the faster layout for both families."""
        device = self.accelerator.device
        pixel_values = batch["pixel_values"].to(device, memory_format=torch.channels_last, non_blocking=True)
        return {"pixel_values": pixel_values, "labels": batch["labels"].to(device, non_blocking=True)}

    def _train_step(self, batch: Example) -> float:
        """One optimizer step; returns the loss over the global batch. Raises PolypSegError if it is not finite."""
        recipe = self.recipe.training
        output = self.model(**batch)
        dice = output.loss if self.negatives is None else dice_of_polyps(output.logits[:, 1], batch["labels"])
        loss = recipe.dice_weight * dice
        if recipe.bce_weight:
            loss = loss + recipe.bce_weight * F.binary_cross_entropy_with_logits(
                output.logits[:, 1].float(), batch["labels"]
            )
        if recipe.alarm_weight:
            loss = loss + recipe.alarm_weight * alarm_loss(output.logits[:, 1], batch["labels"])
        value = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not torch.isfinite(torch.tensor(value)):
            checkpoint = newest_checkpoint(self.run_dir)
            raise PolypSegError(
                f"the loss is {value} at step {self.progress.step + 1}: start again in another --output with a lower "
                "--set training.learning_rate or with training.precision=no"
                + (f"; the checkpoint of step {int(checkpoint.name[5:])} is in {checkpoint}" if checkpoint else "")
            )
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.after_step()
        if self.average:
            self.average.update_parameters(self._bare_model())
        return value

    @torch.no_grad()
    def validation_dice(self) -> float:
        """Mean over all processes' images of the Dice at the model's size, threshold 0.5."""
        model = self._kept_model().eval()
        total = torch.zeros(2, device=self.accelerator.device)
        for batch in map(self.on_device, self.validation_loader):
            with self.accelerator.autocast():
                logits = model(batch["pixel_values"]).logits
            total += _dice_sum(logits[:, 1].float(), batch["labels"])
        overall = self.accelerator.reduce(total, reduction="sum")
        if not overall.isfinite().all():
            raise PolypSegError(
                f"the model's outputs on the validation images are no finite numbers at step {self.progress.step}: "
                "start again in another --output with a lower --set training.learning_rate or with "
                "training.precision=no"
            )
        return float(overall[0] / overall[1])


def _leading_stages(model: nn.Module, count: int) -> list[nn.Module]:
    """The stem and first stages of an EfficientNet encoder. Raises UsageError for another encoder."""
    if not count:
        return []
    encoder: Any = model.get_submodule("encoder")
    if not (hasattr(encoder, "conv_stem") and hasattr(encoder, "blocks") and count <= len(encoder.blocks)):
        raise UsageError(f"training.frozen_stages={count} does not fit this encoder: set it to 0")
    return [encoder.conv_stem, encoder.bn1, *list(encoder.blocks)[: count - 1]]


def dice_of_polyps(logits: Tensor, labels: Tensor) -> Tensor:
    """The soft Dice loss of the images that show a polyp, averaged over all: an empty mask gives it no gradient."""
    shown = labels.amax((1, 2)) > 0.5
    if not shown.any():
        return logits.sum() * 0
    return soft_dice_loss(logits[shown], labels[shown]) * shown.float().mean()


def alarm_loss(logits: Tensor, labels: Tensor, *, share: float = 0.01) -> Tensor:
    """Cross-entropy of the worst ``share`` of pixels of images without polyp, averaged over all: (B, H, W) twice -> ().

    Over all pixels a false alarm weighs as little as its area; an image with a polyp adds nothing.
    """
    empty = labels.amax((1, 2)) <= 0.5
    if not empty.any():
        return logits.sum() * 0
    pixels = logits[empty].float().flatten(1)
    worst = pixels.topk(max(1, round(share * pixels.shape[1])), dim=1, sorted=False).values
    return F.softplus(worst).mean() * empty.float().mean()


def _mark_finished(config: Path) -> None:
    """Say in the best model's config that its run came to its end: until then it is nobody's final model."""
    content = read_json(config)
    content[WEIGHTS_ORIGIN] = WeightsOrigin.within(content, path=config).updated(finished=True).content
    write_json(config, content)


def _is_marked_finished(config: Path) -> bool:
    """Whether _mark_finished was reached: a kill may come between the last checkpoint and it."""
    return config.is_file() and WeightsOrigin.of_folder(config.parent).finished is True


def _dice_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, H, W) twice -> (sum of Dice, number of images); the sum is NaN where a logit is not finite."""
    if not logits.isfinite().all():  # no NaN is above 0: the Dice would be that of an empty mask
        return torch.full((2,), torch.nan, device=logits.device)
    prediction, target = logits > 0, labels > 0.5
    counts = [(x.sum((1, 2))).cpu().numpy() for x in (prediction & target, prediction, target)]
    return torch.tensor(
        [standard_scores(*counts)["dice"].sum(), len(logits)], device=logits.device, dtype=torch.float32
    )


class Schedule:
    """The learning rate as a function of steps (one_cycle) or of the validation scores so far (plateau)."""

    def __init__(self, optimizer: Any, recipe: ScheduleRecipe, total_steps: int, learning_rate: float):
        self.optimizer = optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        self.one_cycle = self.plateau = None
        if recipe.kind == "one_cycle":
            total = total_steps + 1
            share = min(1.0, max(recipe.warmup, 2 / total))  # OneCycleLR divides by zero on a shorter warm-up
            self.one_cycle = OneCycleLR(inner, learning_rate, total_steps=total, pct_start=share, cycle_momentum=False)
        else:
            self.plateau = ReduceLROnPlateau(
                inner,
                mode="max",
                factor=recipe.factor,
                patience=recipe.patience,
                min_lr=recipe.min_learning_rate,
            )

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Advance a schedule that moves every step."""
        if self.one_cycle:
            self.one_cycle.step()

    def after_epoch(self, validation_dice: float) -> None:
        """Advance a schedule that follows the global validation score."""
        if self.plateau:
            self.plateau.step(validation_dice)

    def replay(self, progress: Progress) -> None:
        """Bring a new schedule to where a resumed run left it."""
        if self.one_cycle:
            self.one_cycle.last_epoch = progress.step
        for row in progress.epochs:
            self.after_epoch(row["validation_dice"])


def run_is_finished(
    run_dir: Path, recipe: Recipe, *, start: str, dataset: PolypDataset | None = None, split: str = "reference"
) -> bool:
    """Whether ``run_dir`` holds a completed run of just this recipe and this start (see ``describe_source``).

    With ``dataset``, also whether it was trained on just these images.
    """
    path, checkpoint = run_dir / "run.json", newest_checkpoint(run_dir)
    if not path.is_file() or checkpoint is None or not _is_marked_finished(run_dir / "best" / CONFIG_NAME):
        return False
    record = read_json(path)
    if record["recipe"] != recipe.model_dump(mode="json"):
        return False
    if WeightsOrigin.within(record["model"], path=path).encoder_initialisation != start:
        return False
    if dataset is not None:
        trained_on = (record["data"]["content_id"], record["data"]["split"])
        if trained_on != (dataset.content_id, split):
            return False
    progress = Progress(**read_json(checkpoint / "progress.json"))
    return progress.epoch >= recipe.training.epochs or progress.step >= (recipe.training.max_steps or float("inf"))
