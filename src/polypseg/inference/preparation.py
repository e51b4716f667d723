"""Frames -> a model's input by Pillow and NumPy alone, bit for bit as transformers' image processor."""

from collections.abc import Sequence
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

        Raises UsageError for a preparation that this one cannot do (padding, cropping, kept aspect ratio).
        """
        path = folder / PREPROCESSOR
        if not path.is_file():
            raise UsageError(f"{folder} does not say how frames are prepared for its model: it has no {PREPROCESSOR}")
        return cls.from_dict(read_json(path), origin=str(path))

    @classmethod
    def from_dict(cls, settings: dict[str, Any], *, origin: str) -> "FrameProcessor":
        """The same from the file's content."""
        size: Any = settings.get("size")
        missing = [key for key in _NEEDED if settings.get(key) is None]
        if not missing and not (isinstance(size, dict) and {"height", "width"} <= size.keys()):
            missing = ["size.height and size.width"]
        refused = [key for key in _REFUSED if settings.get(key)]
        multiple = int(settings.get("ensure_multiple_of") or 1)
        if not missing and any(int(size[side]) % multiple for side in ("height", "width")):
            refused.append("ensure_multiple_of")
        if missing or refused:
            what = f"does not give {', '.join(missing)}" if missing else f"asks for {', '.join(refused)}"
            raise UsageError(f"{origin} {what}: only a plain resize can be done without torch (runtime 'torch')")
        given = {key: settings[key] for key in cls.__dataclass_fields__ if key in settings and key != "origin"}
        given["size"] = {side: int(size[side]) for side in ("height", "width")}
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
        return np.stack([values[pixels[..., channel]] for channel, values in enumerate(self._tables)])

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
