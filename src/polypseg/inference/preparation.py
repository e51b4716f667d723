"""Frames -> a model's input by Pillow and NumPy alone, bit for bit as transformers' image processor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.errors import UsageError
from polypseg.files import read_json

PREPROCESSOR = "preprocessor_config.json"
_NEEDED = ("size", "resample", "image_mean", "image_std")
_REFUSED = ("do_pad", "do_center_crop", "keep_aspect_ratio")
_ONLY_RESIZE = "only a plain resize can be done without torch (runtime 'torch')"
LARGEST_SIDE = 4096
"""Pixels; that of the configuration of our models."""
_LARGEST_NUMBER = 1e30
"""Of means, deviations and scales: beyond it float32 ends."""
SIZES = ("size", "crop_size", "pad_size")
NUMBERS = ("image_mean", "image_std", "rescale_factor")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for ``SIZES`` and ``NUMBERS`` of an image processor that cannot be."""
    for name in SIZES:
        sides = settings.get(name) or {}
        if any(type(n) is not int or not 0 < n <= LARGEST_SIDE for n in sides.values() if n is not None):
            raise ValueError(f"{name} of the image processor is {_short(sides)}: sides are 1 to {LARGEST_SIDE} pixels")
    for name in NUMBERS:
        value = settings.get(name)
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(map(_is_finite, numbers)) or (name == "image_std" and min(numbers, default=1) <= 0):
            raise ValueError(
                f"{name} of the image processor is {_short(value)}: finite numbers are needed, no deviation of 0"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _check_types(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for what ``FrameProcessor`` cannot compute with, of settings that pass ``check_settings``."""
    for name in ("image_mean", "image_std"):
        if not isinstance(settings[name], list) or len(settings[name]) != 3:
            raise ValueError(f"{name} is {_short(settings[name])}: three numbers are needed, one per color")
    scale, resample = settings.get("rescale_factor", 1), settings["resample"]
    if not _is_finite(scale):
        raise ValueError(f"rescale_factor is {_short(scale)}: a number is needed")
    if type(resample) is not int or resample not in {int(known) for known in Image.Resampling}:
        raise ValueError(f"resample is {_short(resample)}: Pillow has 0 to {max(map(int, Image.Resampling))}")
    if type(multiple := settings["ensure_multiple_of"]) is not int or not 0 < multiple <= LARGEST_SIDE:
        raise ValueError(f"ensure_multiple_of is {_short(multiple)}: a number of pixels is needed")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not isinstance(settings.get(name, True), bool):
            raise ValueError(f"{name} is {_short(settings[name])}: true or false is needed")


class Prepared(dict[str, Any]):
    """A mapping whose entries are attributes too, as of transformers' BatchFeature."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True, kw_only=True)
class FrameProcessor:
    """Squash a frame to the model's size, scale its values and normalize them; called as transformers' processors."""

    size: dict[str, int]
    """``{"height": ..., "width": ...}`` in pixels."""
    image_mean: list[float]
    image_std: list[float]
    resample: int = int(Image.Resampling.BICUBIC)
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    origin: str = field(default="", compare=False)
    """The file that says so, for messages."""

    @classmethod
    def from_pretrained(cls, folder: Path) -> "FrameProcessor":
        """What a model folder's ``preprocessor_config.json`` says.

        Raises UsageError for a preparation that this one cannot do (padding, cropping, kept aspect ratio), and for
        sizes and numbers that cannot be.
        """
        path = folder / PREPROCESSOR
        if not path.is_file():
            raise UsageError(f"{folder} does not say how frames are prepared for its model: it has no {PREPROCESSOR}")
        return cls.from_dict(read_json(path), origin=str(path))

    @classmethod
    def from_dict(cls, settings: dict[str, Any], *, origin: str) -> "FrameProcessor":
        """The same from the file's content."""
        if not isinstance(settings, dict):
            raise UsageError(f"{origin} holds no settings but a {type(settings).__name__}: get the model again")
        size: Any = settings.get("size")
        missing = [key for key in _NEEDED if settings.get(key) is None]
        if not missing and not (isinstance(size, dict) and {"height", "width"} <= size.keys()):
            missing = ["size.height and size.width"]
        if missing:
            raise UsageError(f"{origin} does not give {', '.join(missing)}: {_ONLY_RESIZE}")
        given = {key: settings[key] for key in cls.__dataclass_fields__ if key in settings and key != "origin"}
        given["size"] = {side: size[side] for side in ("height", "width")}
        multiple = settings.get("ensure_multiple_of") or 1
        try:
            check_settings(given)
            _check_types(given | {"ensure_multiple_of": multiple})
        except ValueError as error:
            raise UsageError(f"{origin} cannot be followed: {error}") from error
        refused = [key for key in _REFUSED if settings.get(key)]
        if given.get("do_resize") is False:
            refused.append("do_resize false")
        if any(side % multiple for side in given["size"].values()):
            refused.append("ensure_multiple_of")
        if refused:
            raise UsageError(f"{origin} asks for {', '.join(refused)}: {_ONLY_RESIZE}")
        return cls(**given, origin=origin)

    def __call__(
        self, images: Sequence[Image.Image], return_tensors: Literal["np", "pt"] = "np", **_: Any
    ) -> "Prepared":
        """RGB frames of any size -> ``{"pixel_values": (B, 3, h, w) float32}``, an array or a torch tensor."""
        pixels = np.stack([self.prepare(image) for image in images])
        if return_tensors == "np":
            return Prepared(pixel_values=pixels)
        import torch

        return Prepared(pixel_values=torch.from_numpy(pixels))

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """An RGB frame of any size -> (3, h, w)."""
        if self.do_resize:
            image = image.resize((self.size["width"], self.size["height"]), resample=Image.Resampling(self.resample))
        pixels = np.asarray(image)
        prepared = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        for channel, values in enumerate(self._tables):
            np.take(values, pixels[..., channel], out=prepared[channel], mode="clip")  # without a copy to check bounds
        return prepared

    @cached_property
    def _tables(self) -> NDArray[np.float32]:
        """(3, 256): what each gray value of each channel becomes, in transformers' order of rounding."""
        values = np.arange(256, dtype=np.uint8)
        scaled = values.astype(np.float64) * self.rescale_factor if self.do_rescale else values
        table: NDArray[np.float32] = np.repeat(scaled.astype(np.float32)[:, None], 3, axis=1)
        if self.do_normalize:
            mean, deviation = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
            table = (table - mean) / deviation
        return np.ascontiguousarray(table.T, dtype=np.float32)
