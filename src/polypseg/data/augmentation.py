"""The paired augmentation of fine-tuning (paper section 3.2), with OpenCV instead of Pillow and tensors.

The operations and their distributions are the reference's: on the 8-bit image colour jitter in random order and a
Gaussian blur, then, after normalisation, flips and one affine warp of image and mask. OpenCV makes it ten times faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from polypseg.recipe import AugmentationRecipe

Image8 = NDArray[np.uint8]
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601 luma, as Pillow's "L"
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR}


def adjust_brightness(image: Image8, factor: float) -> Image8:
    """Blend with black: (H, W, 3) uint8 -> same; factor 1 changes nothing."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: Image8, factor: float) -> Image8:
    """Blend with the mean grey of the image."""
    mean = int(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    table = np.clip(np.arange(256) * factor + mean * (1 - factor), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def adjust_saturation(image: Image8, factor: float) -> Image8:
    """Blend with the grey image."""
    matrix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * _GREY[None, :]
    return cv2.transform(image, matrix)


def adjust_hue(image: Image8, shift: float) -> Image8:
    """Turn the colour wheel by ``shift`` turns, in steps of 1/255 as Pillow does."""
    steps = int(shift * 255)
    if steps == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def colour_jitter(
    image: Image8, rng: np.random.Generator, *, brightness: float, contrast: float, saturation: float, hue: float
) -> Image8:
    """The four adjustments in random order: factors from [1 - x, 1 + x], x < 1, hue shifts from [-hue, hue] turns."""
    operations: list[Callable[[Image8], Image8]] = [
        partial(adjust_brightness, factor=rng.uniform(1 - brightness, 1 + brightness)),
        partial(adjust_contrast, factor=rng.uniform(1 - contrast, 1 + contrast)),
        partial(adjust_saturation, factor=rng.uniform(1 - saturation, 1 + saturation)),
        partial(adjust_hue, shift=rng.uniform(-hue, hue)),
    ]
    for index in rng.permutation(len(operations)):
        image = operations[index](image)
    return image


def gaussian_blur(image: Image8, *, kernel: int, sigma: float) -> Image8:
    """Gaussian blur with reflected borders; taps beyond 5 sigma weigh nothing and are left out."""
    needed = 2 * math.ceil(5 * sigma) + 1
    side = min(kernel, needed)
    return image if side < 3 else cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


@dataclass(frozen=True, kw_only=True)
class Affine:
    """One affine warp about the image's centre, in torchvision's convention."""

    angle: float
    """Degrees, clockwise."""
    translation: tuple[float, float]
    """Pixels to the right and down."""
    scale: float
    shear: float
    """Degrees along x."""

    def matrix(self, side: int) -> NDArray[np.float64]:
        """The forward map (2, 3) from input to output pixel coordinates."""
        angle, shear = math.radians(self.angle), math.radians(self.shear)
        cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(shear)
        linear = self.scale * np.array([[cos, -cos * tan - sin], [sin, -sin * tan + cos]])
        centre = np.full(2, (side - 1) / 2)
        shift = centre + np.array(self.translation) - linear @ centre
        return np.column_stack([linear, shift])

    def warp(self, image: NDArray[np.float32], *, interpolation: str, fill: float) -> NDArray[np.float32]:
        """Warp (S, S) or (S, S, 3); what comes from outside is ``fill``."""
        side = image.shape[0]
        return cv2.warpAffine(
            image,
            self.matrix(side),
            (side, side),
            flags=_INTERPOLATION[interpolation],
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(fill, fill, fill, fill),
        )


class PairedAugmentation:
    """Image (S, S, 3) and mask (S, S), both uint8 -> normalised float32 (S, S, 3) and soft mask [0, 1] (S, S)."""

    def __init__(self, recipe: AugmentationRecipe, *, mean: list[float], std: list[float]):
        self.recipe, self.normalise = recipe, Normalisation(mean=mean, std=std)

    def __call__(
        self, image: Image8, mask: Image8, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        recipe = self.recipe
        image = colour_jitter(
            image,
            rng,
            brightness=recipe.brightness,
            contrast=recipe.contrast,
            saturation=recipe.saturation,
            hue=recipe.hue,
        )
        sigma = rng.uniform(*recipe.blur_sigma)
        if recipe.blur_kernel:
            image = gaussian_blur(image, kernel=recipe.blur_kernel, sigma=sigma)
        pixels = self.normalise(image)
        target: NDArray[np.float32] = mask.astype(np.float32) / np.float32(255)
        if rng.random() < recipe.horizontal_flip:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        if rng.random() < recipe.vertical_flip:
            pixels, target = pixels[::-1], target[::-1]
        affine = self._draw_affine(side=mask.shape[0], rng=rng)
        options = {"interpolation": recipe.interpolation}
        pixels = affine.warp(np.ascontiguousarray(pixels), **options, fill=recipe.fill)
        target = affine.warp(np.ascontiguousarray(target), **options, fill=0.0)
        return pixels, target

    def _draw_affine(self, *, side: int, rng: np.random.Generator) -> Affine:
        """Draw the warp; shifts are whole pixels, as torchvision rounds them."""
        recipe, reach = self.recipe, self.recipe.translation * side
        return Affine(
            angle=rng.uniform(-recipe.rotation, recipe.rotation),
            translation=(round(rng.uniform(-reach, reach)), round(rng.uniform(-reach, reach))),
            scale=rng.uniform(*recipe.scale),
            shear=rng.uniform(-recipe.shear, recipe.shear),
        )


class Normalisation:
    """(H, W, 3) uint8 -> float32, (x / 255 - mean) / std."""

    def __init__(self, *, mean: list[float], std: list[float]):
        self.scale = (1 / (255 * np.array(std))).astype(np.float32)
        self.offset = (-np.array(mean) / np.array(std)).astype(np.float32)

    def __call__(self, image: Image8) -> NDArray[np.float32]:
        return image * self.scale + self.offset
