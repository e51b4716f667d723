"""Images a second of the training feed, against the reference study's way (Pillow and tensors, image by image).

python benchmarks/feed.py --source ../shared/data/Kvasir-SEG

The two alternate within one run; the figures are medians over repeats, the last one is the ratio that may be quoted.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torchvision.transforms import ColorJitter, GaussianBlur, RandomAffine
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data import PolypDataset, open_dataset
from polypseg.recipe import load_recipe
from polypseg.training.augmentation import PairedAugmentation
from polypseg.training.loader import TrainingFeed, cache_pairs
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD


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


def main(
    dataset: Annotated[str, Option(help="Dataset of the table.")] = "kvasir_seg",
    source: Annotated[Path | None, Option(help="Folder or archive.")] = None,
    images: Annotated[int, Option(help="Images a repeat.")] = 64,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Images a second of the training feed, against the reference study's way."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    data, recipe = open_dataset(dataset, source=source), load_recipe("finetune")
    pairs = cache_pairs(data, data.ids[:images], image_size=224)
    statistics_ = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    feed = TrainingFeed(pairs, PairedAugmentation(recipe.augmentation, **statistics_), seed=0)
    rates: dict[str, list[float]] = {"reference": [], "feed": []}
    for repeat in range(repeats):
        for name, rate in rates.items():
            start = time.perf_counter()
            for index in range(len(pairs)):
                _ = reference_example(data, index) if name == "reference" else feed[repeat, index]
            rate.append(len(pairs) / (time.perf_counter() - start))
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    spread = {name: f"{min(rate):.0f} to {max(rate):.0f}" for name, rate in rates.items()}
    for name, median in medians.items():
        print(f"{name:10} {median:7.0f} images/s, one thread ({spread[name]})")
    print(
        f"ratio      {medians['feed'] / medians['reference']:7.1f} (numpy {np.__version__}, OpenCV {cv2.__version__})"
    )


if __name__ == "__main__":
    run_script(main)
