"""Predictions as files: a folder or archive of masks or probability maps, matched to a dataset's ids by name.

8-bit gray is read as value / 255 and 16-bit as value / 65535; a set whose values are all 0 and 1, or in 16 bits all 0
and 255, is one of masks. Maps that are coded in another way, such as masks of 0 and 100, are refused: read as
probabilities they predict nothing.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polypseg.data import images
from polypseg.data.polyps import PolypDataset
from polypseg.data.sources import IMAGE_SUFFIXES, Source, open_source
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import atomic_path
from polypseg.inference.prediction_source import Probability

_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
_STEM = r"(?P<id>.+?)_(mask|pred|prediction|prob|probability)"
_FAINT = 9 / 255
"""Share of white up to which all values of a set must be class numbers: as probabilities all would be under 4 %."""

_CLASSES = 256
"""More distinct values are no class or instance numbers."""
_FEW = 16
"""Distinct values up to which a set looks coded rather than soft."""
_SPACINGS = range(1, 11)
"""Parts into which soft maps of few values divide the way to white, as averages of so many masks do."""
_BINS = 4096
"""Of the histogram of a set's values from 0 to 0.5."""


@dataclass(frozen=True)
class FilePredictions:
    """A folder, zip or tar of PNG, JPEG, TIFF, BMP or NPY files, one an image, named as the dataset's ids.

    A name may end in _mask, _pred, _prediction, _prob or _probability. A map of another size than the mask is resized
    to it (bilinear). ``allow_missing`` counts an image without file as one where nothing is predicted.
    """

    path: Path
    allow_missing: bool = False

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def origin(self) -> dict[str, Any]:
        return {"source": "files", "name": self.path.name, "missing_count_as_empty": self.allow_missing}

    @cached_property
    def _source(self) -> Source:
        return open_source(self.path)

    @cached_property
    def _names(self) -> list[str]:
        names = [name for name in self._source.names() if name.lower().endswith(_SUFFIXES)]
        if not names:
            raise UsageError(
                f"no predictions in {self.path}: expected {', '.join(_SUFFIXES)} files named as the images"
            )
        return names

    @cached_property
    def _codes(self) -> dict[np.dtype[Any], frozenset[int] | None]:
        """Filled by ``_codes_of``."""
        return {}

    def _codes_of(self, kind: np.dtype[Any]) -> frozenset[int] | None:
        """The values of all files of a whole-number type, where they are codes; None where they are probabilities.

        Reading stops at the first file that settles it. Values are those of faint soft maps where they are more than
        any classes, or rise by single steps everywhere: at the border of a class they jump.
        """
        if kind not in self._codes:
            found, steepest = set[int](), 0
            for pixels in self._of_kind(kind):
                found.update(np.unique(pixels).tolist())
                if max(found) > _FAINT * np.iinfo(kind).max:
                    self._codes[kind] = None
                    return None
                slopes = (np.abs(np.diff(pixels.astype(np.int32), axis=axis)) for axis in (0, 1))
                steepest = max(steepest, *(int(slope.max(initial=0)) for slope in slopes))
            smooth = len(found) > _CLASSES or (steepest <= 1 and len(found) > 3)
            self._codes[kind] = None if smooth else frozenset(found)
        return self._codes[kind]

    @cached_property
    def _faults(self) -> dict[tuple[np.dtype[Any], str], str]:
        """Filled by ``_check_scale``."""
        return {}

    def _check_scale(self, pixels: NDArray[Any], name: str) -> None:
        """Raise UsageError for a map of a set that is neither masks of 0 and white nor probabilities.

        A single map may be below 0.5 everywhere, or have few values; the whole set tells what it is.
        """
        white = 1.0 if pixels.dtype.kind == "f" else float(np.iinfo(pixels.dtype).max)
        top = float(pixels.max())
        if top == 0:
            return
        if top <= white / 2:
            fault = self._fault(pixels.dtype, "low", lambda: self._low(pixels.dtype, white))
        elif (found := _few_values(pixels)) and not _evenly_spread(found, white) and _straddles(found, white):
            fault = self._fault(pixels.dtype, "mixed", lambda: self._mixed(pixels.dtype))
        else:
            return
        if fault:
            raise UsageError(
                f"{self.path} {fault} ({name}): save masks as 0 and {white:.0f} (what is not labeled as 0 too), "
                "or probabilities p as p in NPY, 255 p in 8 bits or 65535 p in 16 bits"
            )

    def _fault(self, kind: np.dtype[Any], which: str, find: Callable[[], str]) -> str:
        if (kind, which) not in self._faults:
            self._faults[kind, which] = find()
        return self._faults[kind, which]

    def _of_kind(self, kind: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        return (pixels for pixels in map(self._stored, self._names) if pixels.dtype == kind)

    def _low(self, kind: np.dtype[Any], white: float) -> str:
        """What is wrong with a set that is nowhere above 0.5; empty for soft maps, and where a file is above it."""
        values, counts = set[float](), np.zeros(_BINS, dtype=np.int64)
        for pixels in self._of_kind(kind):
            if pixels.max() > white / 2:
                return ""
            if len(values) <= _FEW:
                values.update(np.unique(pixels).tolist())
            counts += np.histogram(pixels / white, bins=_BINS, range=(0, 0.5))[0]
        top = int(np.flatnonzero(counts)[-1])
        levels = 255 * (top + 1) / (2 * _BINS)
        faint = white == 1 and levels <= 255 * _FAINT + 1  # whole numbers as faint as that are judged as codes
        coded = len(values) <= _FEW and (len(values) < levels / 2 or faint)
        upper = counts[(top + 1) // 2 : top + 1].cumsum()
        middle = (top + 1) // 2 + int(np.searchsorted(upper, upper[-1] / 2))  # where most of the light pixels lie
        dark, between, light = (int(part.sum()) for part in np.split(counts, (middle // 4, 3 * middle // 4)))
        if not coded and not (2 * between < light and between < dark):  # soft maps have a flank wider than their top
            return ""
        words = _listed(values) if len(values) <= _FEW else f"up to {top / (2 * _BINS) * white:.3g}"
        return f"is nowhere above one half although it is not black: its values are {words}"

    def _mixed(self, kind: np.dtype[Any]) -> str:
        """What is wrong with a set some map of which has values on both sides of 0.5; empty for soft maps."""
        values = set[float]()
        for pixels in self._of_kind(kind):
            values.update(np.unique(pixels).tolist())
            if len(values) > _FEW:
                return ""
        return f"holds only the values {_listed(values)}, neither masks nor probabilities"

    def files_of(self, dataset: PolypDataset, ids: Sequence[str]) -> dict[str, str]:
        """id -> file name. Raises UsageError listing missing files, files of no image, and two files of one image."""
        known, found, strangers = set(dataset.ids), dict[str, str](), []
        for name in self._names:
            stem = PurePosixPath(name).stem
            match = re.fullmatch(_STEM, stem)
            key = match["id"] if match and stem not in known else stem
            if key not in known:
                strangers.append(name)
            elif key in found:
                raise UsageError(f"{self.path}: {found[key]} and {name} are of one image: remove one of them")
            else:
                found[key] = name
        if strangers:
            raise UsageError(
                f"{self.path}: {len(strangers)} file(s) belong to no image of {dataset.spec.title}: {_some(strangers)}"
            )
        missing = [record_id for record_id in ids if record_id not in found]
        if missing and not self.allow_missing:
            raise UsageError(
                f"{self.path}: {len(missing)} of {len(ids)} images have no prediction: {_some(missing)}. Add them, or "
                "say that a missing file means that nothing is predicted (allow_missing)"
            )
        return found

    def predict(self, dataset: PolypDataset, ids: Sequence[str]) -> Iterator[tuple[str, Probability]]:
        """Raises UsageError before the first map for files that do not match, PolypSegError for one that is broken."""
        files = self.files_of(dataset, ids)
        return ((record_id, self._map(files.get(record_id), dataset, record_id)) for record_id in ids)

    def _map(self, name: str | None, dataset: PolypDataset, record_id: str) -> Probability:
        shape = dataset.mask(dataset.by_id[record_id]).shape
        if name is None:
            return np.zeros(shape, dtype=np.float32)
        pixels = self._stored(name)
        probability = self._as_probability(pixels, name)
        if probability.shape == shape:
            return probability
        _refuse_transposed(probability.shape, shape, name=str(self.path / name))
        import torch

        from polypseg.inference.predictors import probability_map

        return probability_map(torch.from_numpy(probability), shape, output="probability")

    def _as_probability(self, pixels: NDArray[Any], name: str) -> Probability:
        """Whole numbers are codes only if the whole set is coded, since one faint map may hold nothing else."""
        white = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        if white == 1 or pixels.max() > _FAINT * white or (codes := self._codes_of(pixels.dtype)) is None:
            self._check_scale(pixels, name)
            return _unit(pixels)
        if codes <= {0, 1}:
            return pixels.astype(np.float32)
        if codes <= {0, 255} and white > 255:
            return (pixels == 255).astype(np.float32)
        bits = f" in {8 * pixels.dtype.itemsize} bits" if white > 255 else ""
        raise UsageError(
            f"{self.path} is coded with class numbers up to {max(codes)}{bits} ({name}): save 0 and 1, 0 and 255, "
            "or probabilities (as NPY, where all of them are so low)"
        )

    def _stored(self, name: str) -> NDArray[Any]:
        return read_map(self._source.read(name), name=str(self.path / name))


def _refuse_transposed(found: tuple[int, ...], wanted: tuple[int, ...], *, name: str) -> None:
    """Raise PolypSegError for a map (h, w) whose sides are those of the image (H, W), at some scale, exchanged.

    Other proportions are what models of a fixed input size give, and are resized.
    """
    (h, w), (height, width) = found, wanted
    # Sides may have been rounded to whole pixels, by half a pixel each.
    exchanged = abs(h * height - w * width) <= 0.5 * (height + width)
    if exchanged and not abs(h * width - w * height) <= 0.5 * (height + width):
        raise PolypSegError(
            f"{name} is {w}x{h} but its image is {width}x{height}: it seems to be transposed. Save it upright, in the "
            "image's size"
        )


def _few_values(pixels: NDArray[Any]) -> list[float]:
    """The distinct values in order; none where there are more than few."""
    found: list[float] = np.unique(pixels).tolist()
    return found if len(found) <= _FEW else []


def _evenly_spread(values: Sequence[float], white: float) -> bool:
    """Whether values divide the way from 0 to white into equal parts, but for rounding to 8 bits."""
    shares = np.array(values) / white
    return any(bool((np.abs(shares - np.rint(shares * n) / n) <= 0.5 / 255 + 1e-6).all()) for n in _SPACINGS)


def _straddles(values: Sequence[float], white: float) -> bool:
    """Whether values other than 0 lie on both sides of one half."""
    return any(0 < value <= white / 2 for value in values) and max(values) > white / 2


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.5g}" for value in sorted(values))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _unit(pixels: NDArray[Any]) -> Probability:
    """Whole numbers over their type's maximum; floats as they are."""
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32)
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def read_map(data: bytes, *, name: str) -> NDArray[Any]:
    """Bytes of an image or NPY file -> (H, W): uint8 or uint16 as stored (bilevel as 0/255), or float in [0, 1].

    Raises PolypSegError for a file that cannot be read, is in colors, or holds other values.
    """
    try:
        if PurePosixPath(name).suffix.lower() == ".npy":
            pixels = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            pixels = images.read_values(data, name=name)
    except UsageError:
        raise
    except Exception as error:  # damaged files fail in a dozen ways
        raise PolypSegError(f"{name} cannot be read as a map ({error}): save it again or remove it") from error
    pixels = np.squeeze(pixels, axis=tuple(k for k in (0, -1) if pixels.ndim == 3 and pixels.shape[k] == 1)[:1])
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4) and pixels.dtype == np.uint8:
        pixels = _gray(pixels, name)
    if pixels.ndim != 2 or not pixels.size:
        raise PolypSegError(f"{name} has the shape {pixels.shape}: a map is gray, (height, width)")
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        return pixels
    if pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 1:
        return pixels.astype(np.uint8) * np.uint8(255)
    raise PolypSegError(
        f"{name} holds {pixels.dtype} values from {pixels.min()} to {pixels.max()}: save probabilities between 0 and 1 "
        "(apply the sigmoid to logits), or 8- or 16-bit gray"
    )


def _gray(pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """The luminance of (H, W, 3 or 4) pixels that are gray but for what JPEG does to them."""
    if pixels.shape[2] == 4 and pixels[..., 3].min(initial=255) < 255:
        raise PolypSegError(f"{name} is transparent in places: save gray without alpha")
    if (np.ptp(pixels[..., :3], axis=2) > 64).mean() > 1e-3:
        raise PolypSegError(f"{name} is in colors: save the polyp's probability as gray")
    return np.asarray(Image.fromarray(pixels[..., :3]).convert("L"))


def save_predictions(
    predictions: Iterable[tuple[str, Probability]], folder: Path, *, form: Literal["npy", "png"] = "png"
) -> Path:
    """Write each map to ``<folder>/<id>.<form>``, all or nothing: NPY exactly, PNG in 8 bits, off by at most 1/510.

    PNG rounds halves down, so that 0.5 stays unpredicted and thresholding at 0.5 gives the same mask.
    """
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for record_id, probability in predictions:
            if form == "npy":
                np.save(temporary / f"{record_id}.npy", probability, allow_pickle=False)
                continue
            gray = np.ceil(probability.astype(np.float64) * 255 - 0.5).astype(np.uint8)
            (temporary / f"{record_id}.png").write_bytes(images.encode_png(gray))
    return folder
