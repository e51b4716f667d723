"""Random views of a frame for self-supervised pretraining, as the official code of each method draws them.

A frame is decoded once for all its views, and no larger than they need: JPEG can be decoded at 1/2, 1/4 or 1/8 of its
size for a fraction of the time. Boxes are drawn at full resolution first, then moved to whole pixels of the reduced
frame, by less than a pixel of the view: this changes no distribution that can be told apart.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.images import decode_frame, open_picture
from polypseg.errors import PolypSegError
from polypseg.training.augmentation import Image8, color_jitter, gaussian_blur

Interpolation = Literal["bilinear", "bicubic"]
REDUCTIONS = (1, 2, 4, 8)
"""By which JPEG can be reduced while it is decoded."""
Levels = Mapping[int, Image8]
"""A decoded frame: reduction -> RGB pixels (H, W, 3). Reduction 1 is there, the others of REDUCTIONS may be."""
SOLARIZE_THRESHOLD = 128
_SOLARIZE = np.where(np.arange(256) < SOLARIZE_THRESHOLD, np.arange(256), 255 - np.arange(256)).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How one view is drawn; probabilities of 0 leave an operation out."""

    crop_scale: tuple[float, float]
    """Share of the frame's area that the crop covers, drawn uniformly."""
    interpolation: Interpolation
    """Of the resize, antialiased either way."""
    jitter_probability: float
    brightness: float
    """Factor drawn from [1 - b, 1 + b]."""
    contrast: float
    saturation: float
    hue: float
    """Shift drawn from [-h, h], in turns of the color wheel."""
    grayscale_probability: float
    blur_probability: float
    blur_sigma: tuple[float, float]
    """Standard deviation in pixels of the view, drawn uniformly."""
    solarize_probability: float
    flip_probability: float


@dataclass(frozen=True, kw_only=True)
class Box:
    """A crop in pixels of a frame."""

    top: int
    left: int
    height: int
    width: int

    def reduced(self, reduction: int) -> "Box":
        """The same in whole pixels of the reduced frame, its sides moved up and left to the next ones."""
        top, left = self.top // reduction, self.left // reduction
        bottom, right = (self.top + self.height) // reduction, (self.left + self.width) // reduction
        return Box(top=top, left=left, height=bottom - top, width=right - left)


def draw_box(
    rng: np.random.Generator,
    *,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box of a frame, distributed as torchvision's RandomResizedCrop draws it.

    Area uniform in ``scale``, aspect ratio log-uniform in ``ratio``; after ten boxes that do not fit, the center.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return Box(top=int(top), left=int(left), height=h, width=w)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return Box(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w)


def crop_views(
    data: bytes,
    *,
    name: str,
    draw: Callable[[int, int], list[Box]],
    size: int,
    interpolation: Interpolation,
) -> list[Image8]:
    """Crops of an image file, each resized to (size, size, 3) uint8.

    ``draw`` receives height and width of the full frame and returns boxes in its pixels. Raises PolypSegError naming
    the file when it cannot be decoded.
    """
    image, boxes = decode_for(data, name=name, draw=draw, size=size)
    return [resized_crop(image, box, size=size, interpolation=interpolation) for box in boxes]


def greatest_reduction(boxes: Sequence[Box], *, size: int) -> int:
    """The greatest of REDUCTIONS that leaves every box at least ``size`` pixels a side."""
    smallest = min((min(box.height, box.width) for box in boxes), default=0)
    return next((reduction for reduction in reversed(REDUCTIONS) if smallest >= reduction * size), 1)


def is_jpeg(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG."""
    return data.startswith(b"\xff\xd8\xff")


def decode_for(
    data: bytes | Levels, *, name: str, draw: Callable[[int, int], list[Box]], size: int
) -> tuple[Image.Image | Image8, list[Box]]:
    """The RGB frame, reduced as far as its boxes allow, and the boxes in its pixels."""
    if not isinstance(data, bytes):
        boxes = draw(*data[1].shape[:2])
        reduction = greatest_reduction(boxes, size=size)
        reduction = reduction if reduction in data else 1
        return data[reduction], [box.reduced(reduction) for box in boxes]
    if not is_jpeg(data):
        image = decode_frame(data, name=name)
        return image, draw(image.height, image.width)
    with _explain_unreadable(name):
        image = open_picture(data, name=name, load=False)
    boxes = draw(image.height, image.width)
    reduction = greatest_reduction(boxes, size=size)
    with _explain_unreadable(name):
        if not _load_reduced(image, reduction):
            reduction = 1
        return (image if image.mode == "RGB" else image.convert("RGB")), [box.reduced(reduction) for box in boxes]


def decode_levels(data: bytes, *, name: str) -> Levels:
    """An image file at every reduction, as ``decode_for`` would decode it. Raises PolypSegError naming the file."""
    levels = {1: np.asarray(decode_frame(data, name=name))}
    if not is_jpeg(data):
        return levels
    with _explain_unreadable(name):
        for reduction in REDUCTIONS[1:]:
            image = open_picture(data, name=name, load=False)
            if not _load_reduced(image, reduction):
                break
            levels[reduction] = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return levels


def _load_reduced(image: Image.Image, reduction: int) -> bool:
    """Decode an opened JPEG; whether it is reduced as wanted, else it is decoded in full: not every file can be."""
    reduced = (image.width // reduction, image.height // reduction)
    possible = reduction == 1 or image.draft(None, reduced) is not None
    image.load()
    return possible


@contextmanager
def _explain_unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except PolypSegError:
        raise
    except Exception as error:  # as in decode_frame: damaged files fail in a dozen ways
        raise PolypSegError(f"{name} is truncated or not an image ({error}): download it again or remove it") from error


def resized_crop(image: Image.Image | Image8, box: Box, *, size: int, interpolation: Interpolation) -> Image8:
    """Cut the box out, then resize: what lies outside it does not leak in. Within one gray level of Pillow's resize."""
    right, bottom = box.left + box.width, box.top + box.height
    if isinstance(image, Image.Image):
        pixels = np.array(image.crop((box.left, box.top, right, bottom)))
    else:
        pixels = np.array(image[box.top : bottom, box.left : right])
    if pixels.shape[:2] == (size, size):
        return pixels
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(batch, size=(size, size), mode=interpolation, antialias=True)
    found: Image8 = resized[0].permute(1, 2, 0).contiguous().numpy()
    return found


def grayscale(image: Image8) -> Image8:
    """Pillow's gray in all three channels."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def solarize(image: Image8) -> Image8:
    """Invert the values from 128 on."""
    return cv2.LUT(image, _SOLARIZE)


def augment(image: Image8, settings: ViewSettings, rng: np.random.Generator) -> Image8:
    """Jitter, grayscale, blur, solarization and horizontal flip, each with its probability: (S, S, 3) -> same."""
    if rng.random() < settings.jitter_probability:
        image = color_jitter(
            image,
            rng,
            brightness=settings.brightness,
            contrast=settings.contrast,
            saturation=settings.saturation,
            hue=settings.hue,
        )
    if rng.random() < settings.grayscale_probability:
        image = grayscale(image)
    if rng.random() < settings.blur_probability:
        sigma = rng.uniform(*settings.blur_sigma)
        # Pillow's blur, the official one, reaches no farther than 3 sigma either.
        image = gaussian_blur(image, kernel=2 * math.ceil(3 * sigma) + 1, sigma=sigma)
    if rng.random() < settings.solarize_probability:
        image = solarize(image)
    if rng.random() < settings.flip_probability:
        image = image[:, ::-1]
    return image


def make_views(
    data: bytes | Levels, *, name: str, settings: Sequence[ViewSettings], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """One view for each of the settings, all from one decoding: (V, size, size, 3) uint8.

    ``data``: an image file's bytes, or what ``decode_levels`` made of them, which gives the same views.

    Raises PolypSegError naming the file when it cannot be decoded.
    """

    def draw(height: int, width: int) -> list[Box]:
        return [draw_box(rng, height=height, width=width, scale=view.crop_scale) for view in settings]

    image, boxes = decode_for(data, name=name, draw=draw, size=size)
    views = np.empty((len(settings), size, size, 3), dtype=np.uint8)
    for number, (view, box) in enumerate(zip(settings, boxes, strict=True)):
        crop = resized_crop(image, box, size=size, interpolation=view.interpolation)
        views[number] = augment(crop, view, rng)
    return views
