"""Where a model's probabilities are cut into masks, and which regions count; kept in a small file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polypseg.errors import UsageError
from polypseg.files import file_sha256, read_json, write_json
from polypseg.inference.regions import drop_regions
from polypseg.provenance.checksums import MANIFEST, read_manifest

OPERATING_POINT = "operating_point.json"
OPERATING_POINT_KEY = "operating_point"
"""Under it, what was cut at a point says so in its records."""
KIND = "polypseg operating point"
_LARGEST_SHARE = 0.5
WEIGHTS = ("model.safetensors", "onnx/model.onnx", "onnx/model_quantized.onnx")
"""Files of a model folder to which what was learned of the model is bound."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """How logits become masks."""

    threshold: float = 0.5
    """Of the tempered probability; a pixel is polyp where its probability exceeds it."""
    temperature: float = 1.0
    """By which logits are divided before they become probabilities."""
    minimum_share: float = 0.0
    """Regions smaller than this share of the frame are no polyps."""
    minimum_peak: float = 0.0
    """Regions whose highest tempered probability does not exceed this are no polyps."""

    def __post_init__(self) -> None:
        """Raises UsageError for values that no mask can be made with."""
        for name, value, low, high in (
            ("threshold", self.threshold, 0, 1),
            ("temperature", self.temperature, 0, 100),
        ):
            if not (isinstance(value, int | float) and low < value < high):
                raise UsageError(f"the {name} of an operating point lies between {low} and {high}; got {value!r}")
        if not (isinstance(self.minimum_share, int | float) and 0 <= self.minimum_share < _LARGEST_SHARE):
            raise UsageError(
                f"the minimum share of an operating point lies between 0 and {_LARGEST_SHARE}; got "
                f"{self.minimum_share!r}"
            )
        if not (isinstance(self.minimum_peak, int | float) and 0 <= self.minimum_peak < 1):
            raise UsageError(f"the minimum peak of an operating point lies between 0 and 1; got {self.minimum_peak!r}")

    @property
    def is_default(self) -> bool:
        """Whether its masks are those at probability 0.5."""
        return self.threshold == 0.5 and not self.drops_regions

    @property
    def drops_regions(self) -> bool:
        """Whether some regions above the threshold do not count."""
        return self.minimum_share > 0 or self.minimum_peak > self.threshold

    @property
    def limit(self) -> float:
        """The logit that a pixel of the mask exceeds."""
        return self._logit(self.threshold)

    def mask(self, logits: NDArray[np.float32], *, frame_pixels: int | None = None) -> NDArray[np.bool_]:
        """Logits (H, W) at the frame's size -> the mask.

        ``frame_pixels``: of the whole frame, where these are a part of it that holds all above the limit.
        """
        peak = self._logit(self.minimum_peak) if self.minimum_peak else -math.inf
        return self._cut(logits, above=self.limit, peak=peak, pixels=frame_pixels or logits.size)

    def mask_of(self, probability: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Tempered probabilities (H, W) -> the mask."""
        return self._cut(probability, above=self.threshold, peak=self.minimum_peak, pixels=probability.size)

    def _cut(self, values: NDArray[np.float32], *, above: float, peak: float, pixels: int) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = values > above
        if not self.drops_regions:
            return mask
        return drop_regions(mask, least=self.minimum_share * pixels, values=values, peak=peak)

    def _logit(self, probability: float) -> float:
        """The logit of a tempered probability."""
        return self.temperature * math.log(probability / (1 - probability))

    def moved(self, probability: NDArray[np.float32]) -> NDArray[np.float32]:
        """A model's probability map (H, W) -> one that exceeds 0.5 exactly where this point's mask is."""
        safe = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
        logits = np.log(safe / (1 - safe))
        mask = self.mask(logits.astype(np.float32))
        shifted = logits / self.temperature - math.log(self.threshold / (1 - self.threshold))
        values = (1 / (1 + np.exp(-shifted))).astype(np.float32)
        above = np.nextafter(np.float32(0.5), np.float32(1))
        return np.where(mask, np.maximum(values, above), np.minimum(values, np.float32(0.5)))

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def save(self, path: Path, **more: Any) -> Path:
        """Write the point, with ``more`` of how it was found, and return the path."""
        return write_json(path, {"kind": KIND, **self.content(), **more})


OWN = "model"
"""The name of the operating point that lies in a model's own folder."""


def find_operating_point(folder: Path, name: str | Path) -> OperatingPoint:
    """The point in a file, or for OWN the one in a model's folder.

    Raises UsageError for one of other weights, and what ``read_operating_point`` raises.
    """
    path = folder / OPERATING_POINT if str(name) == OWN else Path(name)
    point = read_operating_point(path)
    check_weights(folder, read_json(path).get("weights") or {}, path)
    return point


def read_operating_point(path: Path) -> OperatingPoint:
    """Read a file that ``polypseg calibrate`` wrote. Raises UsageError for another file or impossible values."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist: write an operating point with `polypseg calibrate`")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise UsageError(f"{path} is no operating point: write one with `polypseg calibrate`")
    names = OperatingPoint.__dataclass_fields__.keys() - ({"minimum_peak"} - content.keys())  # a younger field
    missing = sorted(names - content.keys())
    if missing:
        raise UsageError(f"{path} does not give {', '.join(missing)}: write it again with `polypseg calibrate`")
    return OperatingPoint(**{name: content[name] for name in names})


def weights_digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of the weights in a model folder, as its manifest says where it has one."""
    listed = read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return {name: listed.get(name) or file_sha256(folder / name) for name in WEIGHTS if (folder / name).is_file()}


def check_weights(folder: Path, learned_from: Mapping[str, str], path: Path) -> None:
    """Raise UsageError where ``path`` was learned from other weights than those in a model's folder.

    ``learned_from``: file -> SHA-256; none for what is bound to no weights.
    """
    other = [name for name, digest in weights_digests(folder).items() if learned_from.get(name, digest) != digest]
    if other:
        raise UsageError(f"{path} was learned from another {other[0]}: remove it, or learn it again")
