"""The training feed against the reference study's way (Pillow and tensors, image by image) and albumentations.

OMP_NUM_THREADS=1 python benchmarks/feed.py --dataset kvasir_seg --source ../shared/data/Kvasir-SEG

The feed and albumentations start from frames that were decoded and resized once.
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import ColorJitter, GaussianBlur, RandomAffine
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data import PolypDataset, open_dataset
from polypseg.data.polyps import SyntheticOptions
from polypseg.recipe import load_recipe
from polypseg.training.augmentation import PairedAugmentation
from polypseg.training.loader import TrainingFeed, cache_pairs
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD
from side_by_side import BASELINE, Neighbors, Row, show, side_by_side


def reference_example(data: PolypDataset, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode, resize, jitter, blur, normalize, flip and warp one pair as the study's code orders it."""
    frame, mask = data.pair(data.records[index])
    frame, gray = frame.resize((224, 224)), Image.fromarray(mask * 255).resize((224, 224))
    frame = GaussianBlur((25, 25), sigma=(0.001, 2.0))(ColorJitter(0.4, 0.5, 0.25, 0.01)(frame))
    image = F.normalize(F.to_tensor(frame), IMAGENET_MEAN, IMAGENET_STD)
    target = F.to_tensor(gray)
    angle, shift, scale, shear = RandomAffine.get_params(
        (-180, 180), (0.125, 0.125), (0.5, 1.5), (-22.5, 22.5), [224] * 2
    )
    return (
        F.affine(image, angle, list(shift), scale, list(shear), fill=-1.0),
        F.affine(target, angle, list(shift), scale, list(shear), fill=0.0),
    )


def peer() -> Callable[..., object]:
    """The reference's augmentation in its order, by albumentations."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it asks the network for a newer version
    albumentations = importlib.import_module("albumentations")
    return albumentations.Compose(  # type: ignore[no-any-return]
        [
            albumentations.ColorJitter(brightness=0.4, contrast=0.5, saturation=0.25, hue=0.01, p=1),
            albumentations.GaussianBlur(blur_limit=(25, 25), sigma_limit=(0.001, 2.0), p=1),
            albumentations.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.VerticalFlip(p=0.5),
            albumentations.Affine(
                rotate=(-180, 180),
                translate_percent=(-0.125, 0.125),
                scale=(0.5, 1.5),
                shear={"x": (-22.5, 22.5), "y": 0},
                interpolation=cv2.INTER_NEAREST,
                fill=-1.0,
                p=1,
            ),
            albumentations.ToTensorV2(),
        ]
    )


def rows(*, images: int = 16, repeats: int = 5, data: PolypDataset | None = None) -> list[Row]:
    """Augmented pairs of a dataset's first images, drawn frames of 512x512 without one."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data = data or open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=images, size=(512, 512)))
    pairs = cache_pairs(data, data.ids[:images], image_size=224)
    augmentation = load_recipe("finetune").augmentation
    feed = TrainingFeed(pairs, PairedAugmentation(augmentation, mean=[*IMAGENET_MEAN], std=[*IMAGENET_STD]), seed=0)
    transform = peer()

    def read(index: int) -> dict[str, Any]:
        image, mask = pairs.pair(index)
        return {"image": image, "mask": mask}

    ways: dict[str, Callable[[], object]] = {
        BASELINE: lambda: [reference_example(data, index) for index in range(len(pairs))],
        "the feed": lambda: [feed[0, index] for index in range(len(pairs))],
        "albumentations": lambda: [transform(**read(index)) for index in range(len(pairs))],
    }
    return side_by_side(f"{len(pairs)} augmented images for fine-tuning", ways, repeats=repeats)


def main(
    dataset: Annotated[str, Option(help="Dataset of the table.")] = "synthetic_a",
    source: Annotated[Path | None, Option(help="Folder or archive.")] = None,
    images: Annotated[int, Option(help="Images a repeat.")] = 64,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Time the training feed against the reference study's way."""
    neighbors = Neighbors()
    data = open_dataset(dataset, source=source)
    print(show(rows(images=images, repeats=repeats, data=data), neighbors.cores()))


if __name__ == "__main__":
    run_script(main)
