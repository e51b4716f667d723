"""Polyp masks for frames of any size: load a model, get probability, mask and the list of lesions, draw them.

Imports neither torch nor OpenCV: what computes the model does (``polypseg.inference.runtimes``).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from polypseg.data.images import as_frame, encode_png
from polypseg.errors import UsageError, missing_package
from polypseg.files import atomic_path
from polypseg.inference.expected import Expectation, read_expectation
from polypseg.inference.operating_point import OperatingPoint, find_operating_point
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.quality import RESEARCH, UNKNOWN, Quality, read_quality
from polypseg.inference.regions import measure_regions
from polypseg.inference.runtimes import (
    AUTO,
    BF16,
    ONNXRUNTIME,
    OPENVINO,
    TORCH,
    Box,
    Precision,
    Runtime,
    TorchRuntime,
    box_above,
    check_frames,
    check_names,
    choose_runtime,
    is_installed,
    open_runtime,
    runtime_files,
    sigmoid,
)
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.local import STARTER, local_folder

Frame: TypeAlias = Image.Image | NDArray[np.uint8] | str | Path
"""What is segmented: a PIL image, an RGB array (H, W, 3) or the path of a file."""
MIN_AREA = 64
"""Pixels; smaller connected regions are in the mask but not in the list of lesions."""
OUTLINE, HALO = (0, 229, 255), (0, 0, 0)
"""Cyan stands out from red mucosa for every kind of color vision; the dark halo keeps it visible on highlights."""
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
    expected_dice: float | None = None
    """Expected against an expert's mask, if there is a polyp; None where nothing was learned of the model, for another
    threshold than 0.5, for an empty mask and for a frame unlike those learned from."""
    flag: str = ""
    """``doubtful``, ``unlike`` or ``no mask`` (``inference.expected.FLAGS`` says what each means); empty otherwise."""
    frame: Image.Image | None = field(default=None, repr=False, compare=False)
    """The RGB frame itself; None where the prediction was made of logits alone."""
    caption: str = field(default="", repr=False, compare=False)
    """What the overlay says at its foot: how good the model is."""

    def __repr__(self) -> str:
        height, width = self.mask.shape
        return f"Prediction({width}x{height}, {len(self.lesions)} lesion(s), {100 * self.share:.1f} % of the frame)"

    def _repr_png_(self) -> bytes | None:
        """What notebooks show: the overlay."""
        return None if self.frame is None else encode_png(np.asarray(self.overlay()))

    def overlay(self) -> Image.Image:
        """The frame with the mask's outline and a light fill. Raises UsageError where the frame is not known."""
        if self.frame is None:
            raise UsageError("this prediction was made without its frame: use draw_overlay(frame, prediction)")
        return draw_overlay(self.frame, self, caption=self.caption)

    def save(self, folder: str | Path, *, name: str = "prediction") -> tuple[Path, Path]:
        """Write ``NAME_mask.png`` (0 background, 255 polyp) and ``NAME_overlay.png``; return their paths."""
        paths = Path(folder) / f"{name}_mask.png", Path(folder) / f"{name}_overlay.png"
        for path, pixels in zip(paths, (self.mask * np.uint8(255), np.asarray(self.overlay())), strict=True):
            with atomic_path(path) as temporary:
                temporary.write_bytes(encode_png(pixels))
        return paths

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.mask))

    @property
    def share(self) -> float:
        """Share of the frame that the mask covers, 0 to 1."""
        return self.area / self.mask.size


class Segmenter:
    """A segmentation model with its image processor, ready for frames."""

    def __init__(
        self,
        *,
        processor: Any,
        name: str,
        model: Any = None,
        runtime: Runtime | None = None,
        revision: str | None = None,
        quality: Quality = UNKNOWN,
        expectation: Expectation | None = None,
        operating_point: OperatingPoint | None = None,
    ):
        """A transformers ``model``, or a ``runtime`` that computes one; ``processor`` prepares frames for it.

        ``name`` is what results call the model, ``revision`` the commit of a Hub repository, ``quality`` what is known
        of its scores, ``expectation`` what was learned of its quality on frames without masks, ``operating_point`` how
        its logits become masks. Raises UsageError unless exactly one of ``model`` and ``runtime`` is given, and for a
        processor that makes other frames than the runtime's file takes.
        """
        if (model is None) == (runtime is None):
            raise UsageError("a segmenter is made of either a model or a runtime")
        if runtime is not None and isinstance(processor, FrameProcessor):
            check_frames(runtime, processor.size, stated_by=processor.origin or "the image processor")
        self.runtime: Runtime = TorchRuntime(model=model, title=name) if runtime is None else runtime
        self.processor = processor
        self.name = name
        self.revision = revision
        self.quality = quality
        self.expectation = expectation
        self.operating_point = operating_point

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = STARTER, **options: Any) -> "Segmenter":
        """The same as ``polypseg.load``; its options and errors too."""
        return load(name_or_path, **options)

    @property
    def model(self) -> Any:
        """The transformers model. Raises UsageError where another runtime than torch computes."""
        if isinstance(self.runtime, TorchRuntime):
            return self.runtime.model
        raise UsageError(f"{self.name} is computed by {self.runtime.name}: load it with runtime='torch' for its model")

    def to(self, device: Any) -> "Segmenter":
        """Move the model to a device, and return the segmenter. Raises UsageError where only torch could."""
        if isinstance(self.runtime, TorchRuntime):
            self.runtime.model.to(device)
        elif str(device) != "cpu":
            raise UsageError(f"{self.runtime.name} computes on the CPU here: a device belongs to runtime 'torch'")
        return self

    def __repr__(self) -> str:
        return f"Segmenter({self.name!r}, {self.runtime.description})"

    @overload
    def predict(
        self,
        frames: Frame,
        *,
        threshold: float | None = ...,
        min_area: int = ...,
        batch_size: int = ...,
        names: Sequence[str] = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        frames: Sequence[Frame],
        *,
        threshold: float | None = ...,
        min_area: int = ...,
        batch_size: int = ...,
        names: Sequence[str] = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        frames: Frame | Sequence[Frame],
        *,
        threshold: float | None = None,
        min_area: int = MIN_AREA,
        batch_size: int = 1,
        names: Sequence[str] = (),
    ) -> Prediction | list[Prediction]:
        """One frame -> its prediction; several, of any sizes -> a list of predictions.

        A frame is a PIL image, an RGB array (H, W, 3) uint8 or a path. With torch, masks at 0.5 are those of
        ``predict_masks``. Frames that go through the model together (``batch_size``) can differ from single ones in the
        last bits. ``threshold``: a pixel is polyp where its probability exceeds it; default 0.5, or the segmenter's
        operating point. ``min_area``: pixels that a lesion of the list has at least. ``names``: what errors call the
        frames. Raises UsageError for a threshold outside 0 to 1, for one beside an operating point, and for a count
        below 1, PolypSegError for outputs that are not finite.
        """
        point = self.point(threshold)
        check_options(threshold=point.threshold, min_area=min_area)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(frames, Image.Image | np.ndarray | str | Path):
            single = [as_frame(frames)]
            return self.predict(single, threshold=threshold, min_area=min_area, names=names or ("the frame",))[0]
        if isinstance(frames, bytes) or not isinstance(frames, Sequence):
            raise UsageError(f"frames are {type(frames).__name__}: give one frame or a list of frames")
        images = [as_frame(frame, name=f"frame {number + 1}") for number, frame in enumerate(frames)]
        predictions = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            called = names[start:] or [f"frame {number + 1}" for number in range(start, len(images))]
            pixels = self.prepare(batch)
            answers = self.runtime.polyp_logits(pixels, names=called)
            for frame, prepared, logits in zip(batch, pixels, answers, strict=True):
                predictions.append(self.read(frame, prepared, logits, point=point, min_area=min_area))
        return predictions

    def read(
        self,
        frame: Image.Image,
        pixels: NDArray[np.float32],
        logits: NDArray[np.float32],
        *,
        point: OperatingPoint | None = None,
        min_area: int = MIN_AREA,
        everywhere: bool = True,
    ) -> Prediction:
        """The runtime's answer (h', w') to one prepared frame (3, h, w) -> its prediction, of the frame's size.

        What ``predict`` does after the model, for those who run the steps in threads of their own. ``point``: how
        logits become masks, by default the segmenter's. Without ``everywhere`` the probability is 0 far from the mask,
        if there is one, which saves most of the work.
        """
        point, size = point or self.point(), (frame.height, frame.width)
        box = None if everywhere else box_above(logits, size, limit=point.limit)
        found = None
        if box is not None:
            part = self.runtime.resize(logits, size, box=box)
            found = read_part(part, box=box, size=size, point=point, min_area=min_area)
        if found is None:
            found = read_logits(self.runtime.resize(logits, size), point=point, min_area=min_area)
        if self.expectation is not None and point.is_default:
            of_frame = self.expectation.of_frame(logits, pixels, self.processor)
            found = replace(found, expected_dice=of_frame.expected_dice, flag=of_frame.flag)
        return replace(found, frame=frame, caption=self.caption)

    @property
    def caption(self) -> str:
        """What overlays say at their foot."""
        return f"{self.quality.short} · {RESEARCH}"

    def point(self, threshold: float | None = None) -> OperatingPoint:
        """How logits become masks: by ``threshold``, else by the segmenter's operating point, else at 0.5.

        Raises UsageError for a threshold beside an operating point, which has its own.
        """
        if threshold is None:
            return self.operating_point or OperatingPoint()
        if self.operating_point is not None:
            raise UsageError(f"the operating point has the threshold {self.operating_point.threshold:g}: give no other")
        check_options(threshold=threshold, min_area=1)
        return OperatingPoint(threshold=threshold)

    def prepare(self, frames: Sequence[Image.Image]) -> NDArray[np.float32]:
        """RGB frames of any size -> the model's input (B, 3, h, w)."""
        inputs = self.processor(images=list(frames), return_tensors="np")
        return np.ascontiguousarray(inputs["pixel_values"], dtype=np.float32)

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of the processor's settings: the same for the same model in another file.

        Of an ONNX or OpenVINO model, of the file that is computed.
        """
        digest = hashlib.sha256()
        options = ("size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        prepares = {name: str(getattr(self.processor, name, None)) for name in options}
        digest.update(json.dumps(prepares, sort_keys=True).encode())
        self.runtime.update_digest(digest.update)
        return digest.hexdigest()


def load(
    id_or_path: str | Path = STARTER,
    *,
    revision: str | None = None,
    runtime: str = AUTO,
    precision: Precision = "fp32",
    operating_point: str | Path | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
) -> Segmenter:
    """A model with its image processor, ready to segment: the shipped one, one in a folder, or one of the Hub.

    ``id_or_path``: ``starter`` (the model that ships with the package and needs no network), a model folder, a Hub id,
    a model id of the table or the paper's short name. ``revision``: tag, branch or commit. ``runtime``: ``torch``,
    ``onnxruntime``, ``openvino``, or ``auto``, the fastest of them that computes the model exactly with what is
    installed and in the folder (``segmenter.runtime.description`` says which); of a Hub model ``auto`` takes torch
    where it is installed. ``precision``: fp16 and int8 files, and bf16 (OpenVINO or torch, on CPUs that have it), are
    used on request only; docs/results.md says what each changes in Dice.
    ``operating_point``: a file that ``polypseg calibrate`` wrote, or ``model`` for the model's own.

    Files are compared with the model's checksums; a damaged one is reported and fetched again. Works from the cache
    without a network. Raises UsageError for a model, revision, runtime or right that is not there, PolypSegError for
    what cannot be got or stays damaged.
    """
    check_names(runtime, precision=precision)
    folder, commit = local_folder(id_or_path), None
    if folder is not None and revision is not None:
        raise UsageError(f"{id_or_path} is a folder: a revision belongs to a Hub id")
    if folder is None:
        try:
            from polypseg.provenance.fetch import fetch
        except ModuleNotFoundError as error:
            raise missing_package(error) from error
        if runtime == AUTO:
            exact = TORCH if is_installed(TORCH) else ONNXRUNTIME
            runtime = {"fp32": exact, BF16: OPENVINO}.get(precision, ONNXRUNTIME)
        folder = fetch(
            str(id_or_path),
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            files=runtime_files(runtime, precision=precision),
        )
        commit = folder.name
    point = None if operating_point is None else find_operating_point(folder, operating_point)
    chosen, _ = choose_runtime(folder, runtime=runtime, precision=precision)
    if chosen == TORCH:
        from polypseg.inference.model import laid_out_for, load_model

        check_folder(folder)
        model, processor = load_model(str(folder))
        model = laid_out_for(precision, model)
        return Segmenter(
            runtime=TorchRuntime(model=model, title=str(id_or_path), bf16=precision == BF16),
            processor=processor,
            name=str(id_or_path),
            revision=commit,
            quality=read_quality(folder),
            expectation=read_expectation(folder),
            operating_point=point,
        )
    check_folder(folder, names=runtime_files(chosen, precision=precision))
    return Segmenter(
        runtime=open_runtime(folder, runtime=chosen, precision=precision),
        processor=FrameProcessor.from_pretrained(folder),
        name=str(id_or_path),
        revision=commit,
        quality=read_quality(folder),
        expectation=read_expectation(folder),
        operating_point=point,
    )


def check_options(*, threshold: float, min_area: int) -> None:
    """Raise UsageError for a threshold that is no probability between 0 and 1, or a minimum area below 1 pixel."""
    if not 0 < threshold < 1:
        raise UsageError(f"the threshold is a probability between 0 and 1, both excluded; got {threshold}")
    if min_area < 1:
        raise UsageError(f"the minimum area of a lesion is at least 1 pixel; got {min_area}")


def read_logits(
    logits: ArrayLike,
    *,
    threshold: float = 0.5,
    point: OperatingPoint | None = None,
    min_area: int = MIN_AREA,
    frame_pixels: int | None = None,
) -> Prediction:
    """Polyp logits (H, W) at the frame's size -> its prediction, by a threshold or a whole operating point.

    The threshold is applied to the logits: in float32 the probability of a tiny positive one rounds to 0.5.
    ``frame_pixels``: of the frame, where the logits are a part of it.
    """
    values = np.asarray(logits, dtype=np.float32)
    point = point or OperatingPoint(threshold=threshold)
    mask = point.mask(values, frame_pixels=frame_pixels)
    probability = sigmoid(values if point.temperature == 1 else values / np.float32(point.temperature))
    return Prediction(
        probability=probability, mask=mask, lesions=find_lesions(probability, mask=mask, min_area=min_area)
    )


def read_part(
    logits: NDArray[np.float32], *, box: Box, size: tuple[int, int], point: OperatingPoint, min_area: int = MIN_AREA
) -> Prediction | None:
    """As read_logits, of the logits in the ``box`` of a frame of ``size`` that holds all above the point's limit.

    None where there is none. The probability outside the box is left at 0.
    """
    if not (logits > point.limit).any():
        return None
    found = read_logits(logits, point=point, min_area=min_area, frame_pixels=size[0] * size[1])
    probability, mask = np.zeros(size, np.float32), np.zeros(size, bool)
    probability[box], mask[box] = found.probability, found.mask
    lesions = (replace(lesion, x=lesion.x + box[1].start, y=lesion.y + box[0].start) for lesion in found.lesions)
    return Prediction(probability=probability, mask=mask, lesions=tuple(lesions))


def find_lesions(
    probability: NDArray[np.float32], *, mask: NDArray[np.bool_], min_area: int = MIN_AREA
) -> tuple[Lesion, ...]:
    """Connected regions of the mask (H, W) of at least ``min_area`` pixels, largest first."""
    regions = measure_regions(probability, mask=mask)
    lesions = [
        Lesion(
            x=int(regions.x[n]),
            y=int(regions.y[n]),
            width=int(regions.width[n]),
            height=int(regions.height[n]),
            area=int(regions.area[n]),
            mean_probability=float(regions.mean[n]),
            max_probability=float(regions.maximum[n]),
        )
        for n in np.flatnonzero(regions.area >= min_area)
    ]
    return tuple(sorted(lesions, key=lambda lesion: (-lesion.area, lesion.y, lesion.x)))


def draw_overlay(frame: Image.Image, prediction: Prediction, *, caption: str = "") -> Image.Image:
    """The frame with the mask's outline (cyan with a dark halo) and a light fill, RGB, of the frame's size.

    ``caption``: small text at the foot, left out where the frame is too narrow for it.
    """
    drawn = frame.convert("RGB")
    return draw_onto(frame.copy() if drawn is frame else drawn, prediction, caption=caption)


def draw_onto(drawn: Image.Image, prediction: Prediction, *, caption: str = "") -> Image.Image:
    """As draw_overlay, on the frame itself, which is RGB and returned: for those who need it no more."""
    mask = prediction.mask
    width = max(2, round(min(drawn.size) / 200))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return _with_caption(drawn, caption)
    margin = width + 3  # the halo, and its soft edge
    top, left = max(0, rows[0] - margin), max(0, columns[0] - margin)
    part = mask[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]
    edge = _boundary(part)
    place = (int(left), int(top))
    fill = Image.fromarray(part.astype(np.uint8) * round(255 * FILL_OPACITY))
    drawn.paste(OUTLINE, place, fill)
    for reach, shade in ((width + 0.5, HALO), (width / 2, OUTLINE)):
        drawn.paste(shade, place, _soft(_thicken(edge, reach)))
    return _with_caption(drawn, caption)


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """White text on a dark band at the foot, in place; nothing where it would be illegible or cut."""
    if not caption:
        return picture
    size = max(10, round(picture.height / 40))
    text = _caption_text(caption, size)
    if text.width > picture.width and size > 10:
        size, text = 10, _caption_text(caption, 10)
    if text.width > picture.width:
        return picture
    top = picture.height - round(1.6 * size)
    band = picture.crop((0, top, picture.width, picture.height)).point(lambda value: value * 0.35)
    picture.paste(band, (0, top))
    picture.paste((255, 255, 255), (0, top), text)
    return picture


@lru_cache(maxsize=8)
def _caption_text(caption: str, size: int) -> Image.Image:
    """The text of a caption as opacities, with half a letter's height before and after it; all frames share it."""
    font = ImageFont.load_default(size)
    text = Image.new("L", (math.ceil(font.getlength(caption) + size), round(1.6 * size)))
    ImageDraw.Draw(text).text((size // 2, round(0.15 * size)), caption, fill=255, font=font)
    return text


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask with a neighbor by side that is not of it; so is all that lies outside the picture."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _thicken(edge: NDArray[np.bool_], reach: float) -> NDArray[np.bool_]:
    """All pixels within ``reach`` pixels of the edge."""
    size = math.floor(reach)
    y, x = np.mgrid[-size : size + 1, -size : size + 1]
    near = y**2 + x**2 <= reach**2
    rows, columns = np.nonzero(edge)
    height, stride = edge.shape[0] + 2 * size, edge.shape[1] + 2 * size
    places = (rows + size) * stride + columns + size
    thick = np.zeros(height * stride, dtype=bool)
    for offset in y[near] * stride + x[near]:
        thick[places + offset] = True
    return thick.reshape(height, stride)[size : size + edge.shape[0], size : size + edge.shape[1]]


_SIDE, _CORNER, _WEIGHTS = 28, 7, 252
"""A Gaussian of 0.6 pixels, cut off where nothing is left of it: a neighbor's weight, and all nine together."""
_OPACITIES = np.floor(np.arange(_WEIGHTS + 1) / _WEIGHTS * 255 + 0.5).astype(np.uint8)


def _soft(line: NDArray[np.bool_]) -> Image.Image:
    """A line as a picture of opacities: full inside, fading over the next pixel."""
    middle = np.pad(line.view(np.uint8), 1)
    beside = middle[:-2] + middle[2:]  # above and below, of each column
    sides = beside[:, 1:-1] + middle[1:-1, :-2] + middle[1:-1, 2:]
    corners = beside[:, :-2] + beside[:, 2:]
    opacities = _OPACITIES[sides * np.uint8(_SIDE) + corners * np.uint8(_CORNER)]
    opacities[line] = 255
    return Image.fromarray(opacities)
