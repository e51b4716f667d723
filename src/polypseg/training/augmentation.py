"""The paired augmentation of fine-tuning (paper section 3.2), with OpenCV instead of Pillow and tensors.

The operations and their distributions are the reference's: on the 8-bit image color jitter in random order and a
Gaussian blur, then, after normalization, flips and one affine warp of image and mask. OpenCV makes it ten times faster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from numpy.typing import NDArray

from polypseg.data.corruptions import CORRUPTIONS, corrupt
from polypseg.recipe import AppearanceRecipe, AugmentationRecipe

Image8 = NDArray[np.uint8]
_GRAY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601 luma, as Pillow's "L"
_INTERPOLATION = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR}


def adjust_brightness(image: Image8, factor: float) -> Image8:
    """Blend with black: (H, W, 3) uint8 -> same; factor 1 changes nothing."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: Image8, factor: float) -> Image8:
    """Blend with the mean gray of the image."""
    mean = int(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean() + 0.5)
    table = np.clip(np.arange(256) * factor + mean * (1 - factor), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def adjust_saturation(image: Image8, factor: float) -> Image8:
    """Blend with the gray image."""
    matrix = factor * np.eye(3, dtype=np.float32) + (1 - factor) * _GRAY[None, :]
    return cv2.transform(image, matrix)


def adjust_hue(image: Image8, shift: float) -> Image8:
    """Turn the color wheel by ``shift`` turns, in steps of 1/255 as Pillow does."""
    steps = int(shift * 255)
    if steps == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def color_jitter(
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
    """One affine warp about the image's center, in torchvision's convention."""

    angle: float
    """Degrees, clockwise."""
    translation: tuple[float, float]
    """Pixels to the right and down."""
    scale: float
    shear: float
    """Degrees along x."""

    def matrix(self, side: int, *, out_side: int | None = None) -> NDArray[np.float64]:
        """The forward map (2, 3) from input to output pixel coordinates, of an output of ``out_side`` pixels."""
        angle, shear = math.radians(self.angle), math.radians(self.shear)
        cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(shear)
        linear = self.scale * np.array([[cos, -cos * tan - sin], [sin, -sin * tan + cos]])
        center, out_center = np.full(2, (side - 1) / 2), np.full(2, ((out_side or side) - 1) / 2)
        shift = out_center + np.array(self.translation) - linear @ center
        return np.column_stack([linear, shift])

    def warp(
        self, image: NDArray[np.float32], *, interpolation: str, fill: float, side: int | None = None
    ) -> NDArray[np.float32]:
        """Warp (S, S) or (S, S, 3) to ``side`` (S without); what comes from outside is ``fill``."""
        side = side or image.shape[0]
        return cv2.warpAffine(
            image,
            self.matrix(image.shape[0], out_side=side),
            (side, side),
            flags=_INTERPOLATION[interpolation],
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=(fill, fill, fill, fill),
        )


def _fit(
    pixels: NDArray[np.float32], target: NDArray[np.float32], affine: Affine, *, side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], Affine]:
    """The same warp for an output of another side; what it reduces is averaged first, so that it does not alias."""
    factor = side / len(target)
    reduced = affine.scale * factor
    if reduced < 0.75:
        smaller = max(side // 4, round(len(target) * reduced / 0.75))
        pixels, target = (cv2.resize(x, (smaller, smaller), interpolation=cv2.INTER_AREA) for x in (pixels, target))
        reduced = affine.scale * side / smaller
    shift = (affine.translation[0] * factor, affine.translation[1] * factor)
    return pixels, target, replace(affine, scale=reduced, translation=shift)


def change_appearance(
    image: Image8,
    recipe: AppearanceRecipe,
    rng: np.random.Generator,
    *,
    partner: Callable[[np.random.Generator], Image8] | None,
) -> Image8:
    """An 8-bit frame as another endoscope or a worse moment might have shown it; the mask stays.

    ``partner`` draws the other frame of an exchange; without it there is none.
    """
    if partner is not None and rng.random() < recipe.color_exchange:
        image = exchange_colors(image, partner(rng), amount=rng.uniform(0.3, 1.0))
    if partner is not None and rng.random() < recipe.amplitude_exchange:
        image = exchange_amplitudes(image, partner(rng), reach=rng.uniform(0.005, 0.03), amount=rng.uniform(0.3, 1.0))
    if recipe.gamma:
        limit = -math.log(1 - recipe.gamma)
        exponent = math.exp(rng.uniform(-limit, limit))
        image = cv2.LUT(image, np.rint(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)).astype(np.uint8)
    if rng.random() < recipe.corruption:
        kind = list(CORRUPTIONS)[rng.integers(len(CORRUPTIONS))]
        severity = int(rng.integers(1, recipe.corruption_severity + 1))
        image = corrupt(image, kind, severity=severity, key=str(rng.integers(1 << 32)))
    return image


def exchange_colors(image: Image8, other: Image8, *, amount: float) -> Image8:
    """Move mean and standard deviation of each CIELAB channel by ``amount`` of the way to those of ``other``.

    Reinhard et al. 2001 (Color transfer between images). The black border of a frame counts in neither.
    """
    lab, theirs = (cv2.cvtColor(x, cv2.COLOR_RGB2LAB).astype(np.float32) for x in (image, other))
    lit, theirs_lit = image.max(axis=2) > 24, other.max(axis=2) > 24
    if not lit.any() or not theirs_lit.any():
        return image
    mean, std = lab[lit].mean(axis=0), lab[lit].std(axis=0) + 1.0
    goal_mean, goal_std = theirs[theirs_lit].mean(axis=0), theirs[theirs_lit].std(axis=0) + 1.0
    gain = 1 + amount * (np.clip(goal_std / std, 0.5, 2.0) - 1)
    moved = (lab - mean) * gain + mean + amount * (goal_mean - mean)
    changed = cv2.cvtColor(np.clip(np.rint(moved), 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)
    return np.where(lit[..., None], changed, image).astype(np.uint8)


def exchange_amplitudes(image: Image8, other: Image8, *, reach: float, amount: float) -> Image8:
    """Blend the lowest Fourier amplitudes of each channel with those of ``other`` (same size), phases kept.

    Yang and Soatto 2020 (FDA). ``reach``: half the side of the exchanged square of frequencies, as a fraction of the
    image's side.
    """
    side = image.shape[0]
    half = max(1, round(reach * side))
    spectrum = np.fft.rfft2(image.astype(np.float32), axes=(0, 1))
    theirs = np.abs(np.fft.rfft2(other.astype(np.float32), axes=(0, 1)))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    for rows in (slice(0, half + 1), slice(side - half, side)):
        amplitude[rows, : half + 1] += amount * (theirs[rows, : half + 1] - amplitude[rows, : half + 1])
    blended = np.fft.irfft2(amplitude * np.exp(1j * phase), s=image.shape[:2], axes=(0, 1))
    return np.clip(np.rint(blended), 0, 255).astype(np.uint8)


class PairedAugmentation:
    """Image (S, S, 3) and mask (S, S), both uint8 -> normalized float32 (S, S, 3) and soft mask [0, 1] (S, S)."""

    def __init__(self, recipe: AugmentationRecipe, *, mean: list[float], std: list[float]):
        self.recipe, self.normalize = recipe, Normalization(mean=mean, std=std)

    def __call__(
        self,
        image: Image8,
        mask: Image8,
        rng: np.random.Generator,
        *,
        partner: Callable[[np.random.Generator], Image8] | None = None,
        side: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """``partner`` draws another training frame for exchanges; ``side``: of the result, S without."""
        recipe = self.recipe
        if recipe.appearance is not None:
            image = change_appearance(image, recipe.appearance, rng, partner=partner)
        image = color_jitter(
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
        pixels = self.normalize(image)
        target: NDArray[np.float32] = mask.astype(np.float32) / np.float32(255)
        if rng.random() < recipe.horizontal_flip:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        if rng.random() < recipe.vertical_flip:
            pixels, target = pixels[::-1], target[::-1]
        affine = self._draw_affine(side=mask.shape[0], rng=rng)
        pixels, target = np.ascontiguousarray(pixels), np.ascontiguousarray(target)
        if side not in (None, mask.shape[0]):
            pixels, target, affine = _fit(pixels, target, affine, side=side)
        options = {"interpolation": recipe.interpolation}
        pixels = affine.warp(pixels, **options, fill=recipe.fill, side=side)
        target = affine.warp(target, **options, fill=0.0, side=side)
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


class Normalization:
    """(H, W, 3) uint8 -> float32, (x / 255 - mean) / std."""

    def __init__(self, *, mean: list[float], std: list[float]):
        self.scale = (1 / (255 * np.array(std))).astype(np.float32)
        self.offset = (-np.array(mean) / np.array(std)).astype(np.float32)

    def __call__(self, image: Image8) -> NDArray[np.float32]:
        return image * self.scale + self.offset
