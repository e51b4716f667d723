"""Adaptation of a trained model to a few frames of one hospital: BatchNorm statistics, last layers, whole network.

Each method changes a copy. BatchNorm and dropout stay as in evaluation while weights move: statistics of a few frames
are worth less than those of training, and mixing them in is a method of its own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from polypseg.errors import PolypSegError, UsageError
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.modeling.modeling_polypseg import SMALLEST_SIDE
from polypseg.recipe import AugmentationRecipe
from polypseg.training.augmentation import Normalization, PairedAugmentation
from polypseg.training.fast_layers import fast_layers
from polypseg.training.finetune import dice_of_polyps
from polypseg.training.loader import keep_opencv_to_one_thread, resize_pair, to_example

Image8 = NDArray[np.uint8]
MOST_FOR_STATISTICS = 64
"""Frames that go through the network together for its statistics; of more, so many are taken evenly."""
AUGMENTATION = AugmentationRecipe(
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.02,
    blur_kernel=0,
    blur_sigma=(0.001, 0.002),
    horizontal_flip=0.5,
    vertical_flip=0.5,
    rotation=180,
    translation=0.1,
    scale=(0.7, 1.3),
    shear=8,
    interpolation="bilinear",
    fill=-1.0,
)
"""Milder in color than that of training from far: the frames are of the very camera that is adapted to."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Frames (N, S, S, 3) and masks (N, S, S) at the model's size, uint8; masks are soft, 0 to 255."""

    images: Image8
    masks: Image8

    def __len__(self) -> int:
        return len(self.images)

    def take(self, places: Sequence[int]) -> "Pairs":
        """Some of them."""
        return Pairs(images=self.images[list(places)], masks=self.masks[list(places)])


def resize_pairs(frames: Sequence[Image.Image], masks: Sequence[NDArray[np.bool_]], *, size: int) -> Pairs:
    """RGB frames and their masks (H, W) of any size -> pairs of ``size`` pixels, resized as in training."""
    gray = (mask.astype(np.uint8) * 255 for mask in masks)
    pictures, resized = zip(*(resize_pair(*pair, size=size) for pair in zip(frames, gray, strict=True)), strict=True)
    return Pairs(images=np.stack(pictures), masks=np.stack(resized))


@dataclass(frozen=True, kw_only=True)
class StatisticsPlan:
    """BatchNorm statistics of the frames, mixed with those of training (Schneider et al. 2020)."""

    prior: int
    """Frames that the statistics of training count as."""

    @property
    def words(self) -> str:
        """For people."""
        return f"BatchNorm statistics of the frames, mixed with those of training as of {self.prior} frames"


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """A few steps of AdamW on augmented frames, the step size falling to zero."""

    part: Literal["decoder", "network"]
    steps: int
    learning_rate: float
    batch: int = 6
    reduction: float = 1.0
    """Side of the frames while tuning, as a share of the model's own."""

    @property
    def words(self) -> str:
        """For people."""
        what = {"decoder": "last layers (the decoder)", "network": "whole network"}[self.part]
        return f"{what} tuned for {self.steps} steps of {self.batch} frames"


Plan = StatisticsPlan | TuningPlan


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has BatchNorm statistics that may be mixed."""
    return any(_is_counting(module) for module in model.modules())


def adapt_model(
    model: PolypSegForSemanticSegmentation, pairs: Pairs, plan: Plan, *, seed: int = 0
) -> PolypSegForSemanticSegmentation:
    """A copy of a model, adapted to frames; statistics need no masks. The same plan and seed give the same weights.

    Raises UsageError where a model has no statistics to mix, PolypSegError where the loss is not finite.
    """
    adapted = copy.deepcopy(model).eval()
    if isinstance(plan, StatisticsPlan):
        mix_statistics(adapted, pairs.images, prior=plan.prior)
    else:
        tune(adapted, pairs, plan, seed=seed)
    return adapted.eval()


@torch.no_grad()
def mix_statistics(model: PolypSegForSemanticSegmentation, images: Image8, *, prior: int) -> None:
    """Mix each BatchNorm layer's mean and variance with those of its input on images (N, S, S, 3), layer after layer.

    Training counts as ``prior`` frames. Raises UsageError for a model without such layers.
    """
    if not has_statistics(model):
        raise UsageError(f"the encoder {model.config.encoder} has no BatchNorm statistics to adapt: give masks")
    places = np.linspace(0, len(images) - 1, min(MOST_FOR_STATISTICS, len(images))).round().astype(int)
    normalize = _normalization(model)
    pixels = torch.stack([torch.from_numpy(normalize(images[place])).permute(2, 0, 1) for place in places])
    with _before_each(model, lambda layer, x: _mix(layer, x, share=len(images) / (len(images) + prior))):
        model(pixels.to(memory_format=torch.channels_last))


def _is_counting(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _before_each(model: nn.Module, change: Any) -> Iterator[None]:
    """Let ``change(layer, input)`` see every BatchNorm layer just before it computes."""
    handles = [
        layer.register_forward_pre_hook(lambda module, args: change(module, args[0]))
        for layer in model.modules()
        if _is_counting(layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mix(layer: _BatchNorm, x: Tensor, *, share: float) -> None:
    """The moments of a mixture: the variance holds the distance of the two means too."""
    assert layer.running_mean is not None and layer.running_var is not None
    axes = [0, *range(2, x.ndim)]
    mean, var = x.float().mean(axes), x.float().var(axes, unbiased=False)
    apart = mean - layer.running_mean
    layer.running_var.copy_((1 - share) * layer.running_var + share * var + share * (1 - share) * apart.square())
    layer.running_mean.add_(share * apart)


def tune(model: PolypSegForSemanticSegmentation, pairs: Pairs, plan: TuningPlan, *, seed: int = 0) -> None:
    """Move the weights of ``plan.part`` on augmented pairs: soft Dice of frames with a polyp, and cross-entropy of all.

    Raises PolypSegError where the loss is not finite.
    """
    keep_opencv_to_one_thread()
    model.eval()
    trained = list((model.decoder if plan.part == "decoder" else model).parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    on_cpu = next(model.parameters()).device.type == "cpu"
    with fast_layers(model, bf16=False, enabled=on_cpu):
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * (1 - step / plan.steps)
            loss = _loss(model, *_batch(model, pairs, plan, step=step, seed=seed))
            if not torch.isfinite(loss):
                raise PolypSegError(f"the loss is {float(loss)} at step {step + 1}: this model cannot be adapted")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None


def _batch(
    model: PolypSegForSemanticSegmentation, pairs: Pairs, plan: TuningPlan, *, step: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, S, S) and soft masks (B, S, S): each pass over the frames is in an order of its own."""
    augment, side = PairedAugmentation(AUGMENTATION, **_statistics(model)), _side(model, plan)
    examples = []
    for place in range(step * plan.batch, (step + 1) * plan.batch):
        turn, position = divmod(place, len(pairs))
        index = int(np.random.default_rng([seed, turn]).permutation(len(pairs))[position])
        rng = np.random.default_rng([seed, turn, position])
        examples.append(to_example(*augment(pairs.images[index], pairs.masks[index], rng, side=side)))
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return pixels.to(memory_format=torch.channels_last), torch.stack([example["labels"] for example in examples])


def _side(model: PolypSegForSemanticSegmentation, plan: TuningPlan) -> int:
    """Pixels, a multiple of SMALLEST_SIDE; a ViT keeps the size that its position embedding is of."""
    size = int(model.config.image_size)
    reduced = max(1, round(plan.reduction * size / SMALLEST_SIDE)) * SMALLEST_SIDE
    return size if model.has_vit else min(size, reduced)


def _loss(model: PolypSegForSemanticSegmentation, pixels: Tensor, labels: Tensor) -> Tensor:
    logits = model(pixels).logits[:, 1].float()
    return dice_of_polyps(logits, labels) + F.binary_cross_entropy_with_logits(logits, labels)


def _statistics(model: PolypSegForSemanticSegmentation) -> dict[str, Any]:
    return {"mean": model.config.image_mean, "std": model.config.image_std}


def _normalization(model: PolypSegForSemanticSegmentation) -> Normalization:
    return Normalization(**_statistics(model))
