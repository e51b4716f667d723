"""Polyp masks for frames of any size: probability, mask and the list of lesions, and how to draw them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polypseg.errors import UsageError
from polypseg.processing import polyp_logits, resize_map

MIN_AREA = 64
"""Pixels; smaller connected regions are in the mask but not in the list of lesions."""
OUTLINE, HALO = (0, 229, 255), (0, 0, 0)
"""Cyan stands out from red mucosa for every kind of colour vision; the dark halo keeps it visible on highlights."""
FILL_OPACITY = 0.22


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """One connected region of a mask (pixels that touch by side or corner); lengths in pixels of the frame."""

    x: int
    """Left side of the bounding box."""
    y: int
    """Upper side of the bounding box."""
    width: int
    height: int
    area: int
    """Pixels of the region."""
    mean_probability: float
    """Over the region's pixels, 0 to 1."""
    max_probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of one frame, at the frame's own size."""

    probability: NDArray[np.float32]
    """(H, W), 0 to 1."""
    mask: NDArray[np.bool_]
    """(H, W), True where the probability exceeds the threshold."""
    lesions: tuple[Lesion, ...]
    """Largest first."""

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(self.mask.sum())

    @property
    def share(self) -> float:
        """Share of the frame that the mask covers, 0 to 1."""
        return float(self.mask.mean())


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A segmentation model with its image processor, ready for frames."""

    model: Any
    processor: Any
    name: str
    revision: str | None = None
    """Commit of a Hub repository; None for a folder."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> "Segmenter":
        """The same as ``polypseg.load``; its errors too."""
        from polypseg.hub import load

        return load(name_or_path, revision=revision)

    def to(self, device: torch.device | str) -> "Segmenter":
        """Move the model to a device, and return the segmenter."""
        self.model.to(device)
        return self

    def predict(
        self,
        frames: Sequence[Image.Image],
        *,
        threshold: float = 0.5,
        min_area: int = MIN_AREA,
        batch_size: int = 1,
        names: Sequence[str] = (),
    ) -> list[Prediction]:
        """RGB frames of any size -> one prediction a frame; the masks at 0.5 are those of ``predict_masks``.

        Frames that go through the model together (``batch_size``) can differ from single ones in the last bits.
        ``threshold``: a pixel is polyp where its probability exceeds it. ``min_area``: pixels that a lesion of the list
        has at least. ``names``: what errors call the frames. Raises UsageError for a threshold outside 0 to 1 or a
        count below 1, PolypSegError for outputs that are not finite.
        """
        check_options(threshold=threshold, min_area=min_area)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        predictions = []
        for start in range(0, len(frames), batch_size):
            batch = frames[start : start + batch_size]
            called = names[start:] or [f"frame {number + 1}" for number in range(start, len(frames))]
            for frame, logits in zip(batch, self._logits(batch, names=called), strict=True):
                resized = resize_map(logits, (frame.height, frame.width))
                predictions.append(read_logits(resized, threshold=threshold, min_area=min_area))
        return predictions

    @torch.inference_mode()
    def _logits(self, frames: Sequence[Image.Image], *, names: Sequence[str]) -> Tensor:
        """Polyp logits (B, h, w) at the model's own size, on the CPU."""
        inputs = self.processor(images=[frame.convert("RGB") for frame in frames], return_tensors="pt")
        device = next(self.model.parameters()).device
        logits = self.model.eval()(pixel_values=inputs["pixel_values"].to(device)).logits
        return polyp_logits(logits.float(), self.model.config, model=self.name, images=names).cpu()

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the processor's settings: the same for the same model in another file."""
        digest = hashlib.sha256()
        options = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        prepares = {name: str(getattr(self.processor, name, None)) for name in options}
        digest.update(json.dumps(prepares, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def check_options(*, threshold: float, min_area: int) -> None:
    """Raise UsageError for a threshold that is no probability between 0 and 1, or a minimum area below 1 pixel."""
    if not 0 < threshold < 1:
        raise UsageError(f"the threshold is a probability between 0 and 1, both excluded; got {threshold}")
    if min_area < 1:
        raise UsageError(f"the minimum area of a lesion is at least 1 pixel; got {min_area}")


def read_logits(logits: Tensor, *, threshold: float = 0.5, min_area: int = MIN_AREA) -> Prediction:
    """Polyp logits (H, W) at the frame's size -> its prediction.

    The threshold is applied to the logits: in float32 the probability of a tiny positive one rounds to 0.5.
    """
    mask = (logits > math.log(threshold / (1 - threshold))).numpy()
    probability = logits.sigmoid().numpy()
    return Prediction(
        probability=probability, mask=mask, lesions=find_lesions(probability, mask=mask, min_area=min_area)
    )


def find_lesions(
    probability: NDArray[np.float32], *, mask: NDArray[np.bool_], min_area: int = MIN_AREA
) -> tuple[Lesion, ...]:
    """Connected regions of the mask (H, W) of at least ``min_area`` pixels, largest first."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    lesions = []
    for label, (x, y, width, height, area) in enumerate(boxes.tolist()):
        if label == 0 or area < min_area:  # label 0 is the background
            continue
        inside = np.s_[y : y + height, x : x + width]
        values = probability[inside][labels[inside] == label]
        lesions.append(
            Lesion(
                x=x,
                y=y,
                width=width,
                height=height,
                area=area,
                mean_probability=float(values.mean(dtype=np.float64)),
                max_probability=float(values.max()),
            )
        )
    return tuple(sorted(lesions, key=lambda lesion: (-lesion.area, lesion.y, lesion.x)))


def draw_overlay(frame: Image.Image, prediction: Prediction) -> Image.Image:
    """The frame with the mask's outline (cyan with a dark halo) and a light fill, RGB, of the frame's size."""
    mask = prediction.mask
    pixels = np.array(frame.convert("RGB"))
    colour = np.array(OUTLINE, dtype=np.float32)
    pixels[mask] = ((1 - FILL_OPACITY) * pixels[mask] + FILL_OPACITY * colour).round().astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    width = max(2, round(min(frame.size) / 200))
    for line, shade in ((2 * width + 1, HALO), (width, OUTLINE)):
        cv2.drawContours(pixels, contours, -1, shade, line, cv2.LINE_AA)
    return Image.fromarray(pixels)
