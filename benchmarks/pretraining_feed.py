"""Images a second of the pretraining feed, against the official codes' way (Pillow and torchvision, image by image).

python benchmarks/pretraining_feed.py --source ../shared/data/HyperKvasir-frames

Two views with MoCo v3's augmentation and one with MAE's, from JPEG files to views, in one process with one thread. The
ways alternate within one run; figures are medians over repeats, the ratios are those that may be quoted. The feed gives
8-bit views, which training normalizes on its device; ``normalized`` does this here too, as the official codes do.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
from lightly.transforms.byol_transform import BYOLTransform
from lightly.transforms.mae_transform import MAETransform
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as T
from typer import Option

from polypseg.cli.console import run_script
from polypseg.data.corpus import open_frames
from polypseg.data.shards import write_shards
from polypseg.files import SAMPLE_FRAMES
from polypseg.pretraining.decoded import keep_decoded
from polypseg.pretraining.loader import FrameFeed
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.pretraining.views import ViewSettings
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD
from side_by_side import BASELINE, Row, side_by_side

METHODS = {"moco_v3": "pretrain_moco_v3_resnet50", "mae": "pretrain_mae_vit_base"}
"""Method -> the recipe whose views are timed."""


def official_transform(view: ViewSettings) -> Callable[[Image.Image], Tensor]:
    """The transforms that the official codes compose, in their order."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(*view.blur_sigma)))

    def solarize(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image)

    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return T.Compose(
        [
            T.RandomResizedCrop(224, scale=view.crop_scale, interpolation=T.InterpolationMode(view.interpolation)),
            T.RandomApply([jitter], p=view.jitter_probability),
            T.RandomGrayscale(p=view.grayscale_probability),
            T.RandomApply([T.Lambda(blur)], p=view.blur_probability),
            T.RandomApply([T.Lambda(solarize)], p=view.solarize_probability),
            T.RandomHorizontalFlip(p=view.flip_probability),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def pillow_reader(source: Path, transform: Callable[[Image.Image], object]) -> Callable[[int, int], object]:
    """Read, decode in full and transform a frame, as ImageFolder does."""
    frames = open_frames(source)

    def read(epoch: int, index: int) -> object:
        with (source / frames.name(index)).open("rb") as file:
            image = Image.open(file).convert("RGB")
        return transform(image)

    return read


def official_reader(source: Path, settings: tuple[ViewSettings, ...]) -> Callable[[int, int], object]:
    """A view of a frame for each of the official transforms."""
    transforms = [official_transform(view) for view in settings]
    return pillow_reader(source, lambda image: [transform(image) for transform in transforms])


def feed_reader(
    source: Path, settings: tuple[ViewSettings, ...], *, gigabytes: float = 0
) -> Callable[[int, int], object]:
    """The feed as training uses it; ``gigabytes``: of frames that were decoded once."""
    frames = open_frames(source)
    decoded = keep_decoded(frames, gigabytes=gigabytes) if gigabytes else None
    feed = FrameFeed(frames, settings, size=224, seed=0, decoded=decoded)
    return lambda epoch, index: feed[epoch, index]


def normalized_reader(source: Path, settings: tuple[ViewSettings, ...]) -> Callable[[int, int], object]:
    """The feed, with views normalized on the CPU."""
    feed = FrameFeed(open_frames(source), settings, size=224, seed=0)
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return lambda epoch, index: feed[epoch, index]["views"].permute(0, 3, 1, 2).float().sub(mean).div(std)


def lightly_reader(source: Path, method: str) -> Callable[[int, int], object]:
    """A frame by lightly's own views: BYOL's, which are MoCo v3's, or the masked autoencoder's."""
    return pillow_reader(source, BYOLTransform() if method == "moco_v3" else MAETransform())


def measure(readers: dict[str, Callable[[int, int], object]], *, images: int, repeats: int) -> dict[str, list[float]]:
    """Images a second of each reader, alternating; a first round that fills the page cache is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for repeat in range(-1, repeats):
        for name, read in readers.items():
            start = time.perf_counter()
            for index in range(images):
                read(repeat + 1, index)
            if repeat >= 0:
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def rows(*, images: int = 6, repeats: int = 5) -> list[Row]:
    """Views of the package's sample frames from JPEG, two of MoCo v3 and one of MAE."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    frames, found = SAMPLE_FRAMES, list[Row]()
    count = len(open_frames(frames))
    for method, recipe in METHODS.items():
        settings = tuple(view.settings() for view in load_pretraining_recipe(recipe).views)
        readers = {
            BASELINE: official_reader(frames, settings),
            "the feed": feed_reader(frames, settings),
            "the feed, frames decoded once": feed_reader(frames, settings, gigabytes=10),
            "lightly": lightly_reader(frames, method),
        }
        ways: dict[str, Callable[[], object]] = {
            name: lambda read=read: [read(epoch, epoch % count) for epoch in range(images)]  # type: ignore[misc]
            for name, read in readers.items()
        }
        found += side_by_side(f"{len(settings)} view(s) of {method} from JPEG, {images} times", ways, repeats=repeats)
    return found


def main(
    source: Annotated[Path, Option(help="Folder of frames.")] = Path("../shared/data/HyperKvasir-frames"),
    images: Annotated[int, Option(help="Images a repeat, the first of the corpus.")] = 100,
    repeats: Annotated[int, Option(help="Repeats, alternating.")] = 5,
) -> None:
    """Images a second of the pretraining feed, against the official codes' way."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    images = min(images, len(open_frames(source)))
    with tempfile.TemporaryDirectory() as shards:
        write_shards(open_frames(source), Path(shards))
        for method, recipe in METHODS.items():
            settings = tuple(view.settings() for view in load_pretraining_recipe(recipe).views)
            readers = {
                "official": official_reader(source, settings),
                "normalized": normalized_reader(source, settings),
                "feed": feed_reader(source, settings),
                "decoded once": feed_reader(source, settings, gigabytes=10),
                "from shards": feed_reader(Path(shards), settings),
            }
            rates = measure(readers, images=images, repeats=repeats)
            official = statistics.median(rates["official"])
            for name, rate in rates.items():
                median = statistics.median(rate)
                spread = f"{min(rate):.0f} to {max(rate):.0f}"
                print(f"{method:8} {name:12} {median:6.1f} images/s ({spread}), ratio {median / official:.2f}")


if __name__ == "__main__":
    run_script(main)
