"""What computes a model: torch, ONNX Runtime or OpenVINO behind one protocol, a pixel batch in, polyp logits out.

Only the chosen one is imported: ONNX Runtime and OpenVINO need neither torch nor transformers.
"""

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polypseg.errors import PIP, PolypSegError, UsageError, first_line, unknown_name
from polypseg.files import cache_folder, file_sha256, read_json

Logits = NDArray[np.float32]
Box: TypeAlias = tuple[slice, slice]
"""Rows and columns of a frame."""
WHOLE: Box = (slice(None), slice(None))
Precision = Literal["fp32", "fp16", "int8", "bf16"]
AUTO, TORCH, ONNXRUNTIME, OPENVINO = "auto", "torch", "onnxruntime", "openvino"
RUNTIMES = (TORCH, ONNXRUNTIME, OPENVINO)
ONNX_FILES: dict[str, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
}
"""Precision -> file of a model folder, in the layout that transformers.js reads."""
BF16 = "bf16"
"""No file's precision: OpenVINO or torch computes the fp32 weights in it, where the CPU has such arithmetic."""
NO_BF16 = "this CPU has no bf16 arithmetic (AVX512_BF16 or AMX): ask for fp32 or int8"
PRECISIONS = (*ONNX_FILES, BF16)
OPENVINO_FILES: dict[str, str] = {
    "fp32": "openvino/openvino_model.xml",
    "fp16": "openvino/openvino_model_fp16.xml",
    "int8": "openvino/openvino_model_quantized.xml",
}
INPUT, OUTPUT = "pixel_values", "logits"
"""Names in the exported files: (B, 3, h, w) normalized RGB, and (B, 1, h', w') logits of the polyp."""
WEIGHTS = "model.safetensors"
_INSTALL = {TORCH: f"{PIP} polypseg", ONNXRUNTIME: f"{PIP} onnxruntime", OPENVINO: f"{PIP} openvino"}


class Runtime(Protocol):
    """Anything that computes a model."""

    @property
    def name(self) -> str:
        """``torch``, ``onnxruntime`` or ``openvino``."""

    @property
    def description(self) -> str:
        """Which version computes which file in which precision, for people."""

    def polyp_logits(self, pixels: NDArray[np.float32], *, names: Sequence[str] = ()) -> Logits:
        """Prepared frames (B, 3, h, w) -> polyp logits (B, h', w') float32, positive where a polyp is predicted.

        ``names``: what errors call the frames. Raises PolypSegError for outputs that are not finite.
        """

    def resize(self, logits: Logits, size: tuple[int, int], *, box: Box = WHOLE) -> Logits:
        """Logits (h, w) -> those in ``box`` of (H, W), of ``size``: bilinear, no antialias, corners not aligned."""

    def update_digest(self, update: Callable[[bytes], object]) -> None:
        """Feed what identifies the weights to a hash's ``update``."""


@dataclass(frozen=True, kw_only=True)
class TorchRuntime:
    """A transformers model in this process."""

    model: Any
    title: str = "the model"
    """What errors call the model."""
    name: str = TORCH
    bf16: bool = False
    """Whether matrix products and convolutions are rounded to it."""

    @property
    def description(self) -> str:
        import torch

        parameter = next(self.model.parameters())
        kind = BF16 if self.bf16 else str(parameter.dtype).removeprefix("torch.")
        return f"torch {torch.__version__} on {parameter.device.type}, {kind}"

    def polyp_logits(self, pixels: NDArray[np.float32], *, names: Sequence[str] = ()) -> Logits:
        import torch

        from polypseg.inference.model import computing_in, polyp_logits

        model = self.model.eval()
        device = next(model.parameters()).device
        with torch.inference_mode(), computing_in("bf16" if self.bf16 else "fp32", device=device):
            batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
            logits = model(pixel_values=batch).logits.float()
            found: Logits = polyp_logits(logits, model.config, model=self.title, images=names).cpu().numpy()
        return found

    def resize(self, logits: Logits, size: tuple[int, int], *, box: Box = WHOLE) -> Logits:
        """By torch itself, so that masks are those of the evaluation to the last bit."""
        import torch

        from polypseg.inference.model import resize_map

        resized: Logits = resize_map(torch.from_numpy(logits), size).numpy()
        return resized[box]

    def update_digest(self, update: Callable[[bytes], object]) -> None:
        import torch

        if self.bf16:
            update(BF16.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


class _FileRuntime:
    """What the runtimes share that compute a file."""

    name = ""

    def __init__(self, path: Path):
        self.path = path

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, channels, height, width), None where the file leaves a size open."""
        raise NotImplementedError

    def _compute(self, pixels: NDArray[np.float32]) -> Any:
        """The file's first output."""
        raise NotImplementedError

    def run(self, pixels: NDArray[np.float32]) -> Logits:
        """Prepared frames (B, 3, h, w) -> the file's first output, float32. Raises PolypSegError where it fails."""
        try:
            return np.asarray(self._compute(pixels), dtype=np.float32)
        except Exception as error:  # of neither runtime have they a common class
            shape = "x".join(map(str, pixels.shape))
            raise PolypSegError(f"{self.path} cannot compute an input of {shape}: {first_line(error)}") from error

    @property
    def version(self) -> str:
        """Of the package that computes."""
        return str(importlib.import_module(self.name).__version__).split("-", maxsplit=1)[0]

    @property
    def description(self) -> str:
        return f"{self.name} {self.version} on cpu, {self.path.parent.name}/{self.path.name}"

    def polyp_logits(self, pixels: NDArray[np.float32], *, names: Sequence[str] = ()) -> Logits:
        found = one_logit(self.run(pixels), name=str(self.path))
        return _checked(found, model=str(self.path), names=names)

    def resize(self, logits: Logits, size: tuple[int, int], *, box: Box = WHOLE) -> Logits:
        return resize_bilinear(logits, size, box=box)

    def update_digest(self, update: Callable[[bytes], object]) -> None:
        update(f"{self.path.name} {file_sha256(self.path)}\n".encode())
        weights = self.path.with_suffix(".bin")
        if weights.is_file():
            update(f"{weights.name} {file_sha256(weights)}\n".encode())


class OnnxRuntime(_FileRuntime):
    """An ONNX file in ONNX Runtime on the CPU."""

    name = ONNXRUNTIME

    def __init__(self, path: Path):
        """Raises UsageError without onnxruntime, without the file, and for one that is no ONNX model."""
        super().__init__(path)
        onnxruntime = _import(ONNXRUNTIME, path)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: give an ONNX file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count()
        options.log_severity_level = 3  # errors only: they come as exceptions too
        options.enable_cpu_mem_arena = False  # a third less memory, no slower
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others use these cores too
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common class
            raise UsageError(f"cannot load {path} as an ONNX model: {first_line(error)}") from error
        self._input = self._session.get_inputs()[0]

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return tuple(side if isinstance(side, int) else None for side in self._input.shape)

    def _compute(self, pixels: NDArray[np.float32]) -> Any:
        return self._session.run(None, {self._input.name: pixels})[0]


class OpenVinoRuntime(_FileRuntime):
    """An ONNX file or an OpenVINO model in OpenVINO on the CPU, in the precision of the file or, asked for, in bf16."""

    name = OPENVINO

    def __init__(self, path: Path, *, bf16: bool = False):
        """Raises UsageError without openvino or the file, for one that is no model, and for bf16 on other CPUs."""
        super().__init__(path)
        self._bf16 = bf16
        _import(OPENVINO, path)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: give an ONNX file or an OpenVINO model (.xml)")
        if bf16 and not has_bf16():
            raise UsageError(NO_BF16)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",  # without it, OpenVINO would round to bf16 unasked
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": thread_count(),
            "CACHE_DIR": str(cache_folder() / "openvino"),  # compiled once for each machine: starts twice as fast
        }
        try:
            self._model = openvino_core().compile_model(str(path), "CPU", options)
        except Exception as error:  # openvino's errors have no common class
            raise UsageError(f"cannot load {path} into OpenVINO: {first_line(error)}") from error

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        shape = self._model.input(0).partial_shape
        return tuple(side.get_length() if side.is_static else None for side in shape) if shape.rank.is_static else ()

    @property
    def description(self) -> str:
        return super().description + (f" in {BF16}" if self._bf16 else "")

    def update_digest(self, update: Callable[[bytes], object]) -> None:
        super().update_digest(update)
        if self._bf16:
            update(f"{BF16}\n".encode())

    def _compute(self, pixels: NDArray[np.float32]) -> Any:
        return self._model([pixels])[0]


def has_bf16() -> bool:
    """Whether OpenVINO is installed and computes in bf16 on this CPU."""
    return is_installed(OPENVINO) and "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def openvino_core() -> Any:
    """OpenVINO itself, loaded once and never again taken apart in this process.

    It gives the thread that loads its CPU plugin another stack for signals. Unloaded by another thread, it frees that
    stack without giving the old one back: the next signal, such as a Ctrl-C, would end the process.
    """
    return importlib.import_module(OPENVINO).Core()


def open_runtime(folder: Path, *, runtime: str = AUTO, precision: Precision = "fp32") -> Runtime:
    """What computes the model of a folder; see ``choose_runtime``."""
    chosen, path = choose_runtime(folder, runtime=runtime, precision=precision)
    if chosen != TORCH:
        return open_file(path, runtime=chosen, precision=precision)
    _import(TORCH, folder)
    from polypseg.inference.model import load_model

    return TorchRuntime(model=load_model(str(folder))[0], title=str(folder))


def open_file(path: Path, *, runtime: str, precision: Precision = "fp32") -> OnnxRuntime | OpenVinoRuntime:
    """What computes a model's file: ``onnxruntime`` or ``openvino``, which alone can be asked for bf16."""
    return OnnxRuntime(path) if runtime == ONNXRUNTIME else OpenVinoRuntime(path, bf16=precision == BF16)


def check_frames(runtime: Runtime, size: Mapping[str, int], *, stated_by: str) -> None:
    """Raise UsageError where the file of a runtime takes frames of other sides than ``size`` (height, width)."""
    if not isinstance(runtime, _FileRuntime):
        return
    _, channels, height, width = runtime.input_shape if len(runtime.input_shape) == 4 else (None, 0, None, None)
    if channels not in (None, 3):
        raise UsageError(f"{runtime.path} takes an input of {list(runtime.input_shape)}: (B, 3, h, w) is needed")
    asked = size["height"], size["width"]
    if any(given not in (None, side) for given, side in zip((height, width), asked, strict=True)):
        raise UsageError(
            f"{runtime.path} takes frames of {width}x{height} pixels but {stated_by} says {asked[1]}x{asked[0]}: "
            "get the model again"
        )


def check_names(runtime: str, *, precision: str = "fp32") -> None:
    """Raise UsageError for a runtime or a precision that there is not."""
    if runtime not in (AUTO, *RUNTIMES):
        raise unknown_name("runtime", runtime, [AUTO, *RUNTIMES])
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == BF16 and runtime == ONNXRUNTIME:
        raise UsageError(f"{runtime} does not compute in {BF16}: ask {OPENVINO} or {TORCH} for it")


def choose_runtime(folder: Path, *, runtime: str = AUTO, precision: Precision = "fp32") -> tuple[str, Path]:
    """The runtime for a model folder and the file that it computes.

    ``auto``: the exact path that starts and runs fastest with what is installed and in the folder - ONNX Runtime on the
    folder's fp32 ONNX file, OpenVINO on its own or that file, else torch; for bf16 OpenVINO, or torch for a vision
    transformer, which it computes faster (`make bench-full` times both). Raises UsageError for an
    unknown name, a runtime that is not installed, or a file that the folder does not have.
    """
    check_names(runtime, precision=precision)
    if precision == BF16:
        in_torch = runtime == TORCH or (runtime == AUTO and _is_faster_in_torch(folder))
        return choose_runtime(folder, runtime=TORCH if in_torch else OPENVINO)
    onnx = folder / ONNX_FILES[precision]
    own = folder / OPENVINO_FILES[precision]
    if runtime == AUTO:
        choices = ((ONNXRUNTIME, onnx), (OPENVINO, own), (OPENVINO, onnx))
        for name, path in choices:
            if path.is_file() and is_installed(name):
                return name, path
        if precision == "fp32" and (folder / WEIGHTS).is_file() and is_installed(TORCH):
            return TORCH, folder / WEIGHTS
        return _explain_nothing(folder, precision)
    if runtime == TORCH:
        if precision != "fp32":
            raise UsageError(f"torch computes in fp32 or {BF16}: ask another runtime for {precision}")
        return TORCH, folder / WEIGHTS
    path = own if runtime == OPENVINO and own.is_file() else onnx
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {ONNX_FILES[precision]}: write it with "
            f"`polypseg export {folder} --format onnx --precision {precision}`"
        )
    return runtime, path


def _is_faster_in_torch(folder: Path) -> bool:
    """Whether torch computes a folder's weights in bf16, and OpenVINO cannot or is slower, as for a transformer."""
    if not ((folder / WEIGHTS).is_file() and is_installed(TORCH)):
        return False
    files = any((folder / names["fp32"]).is_file() for names in (ONNX_FILES, OPENVINO_FILES))
    return not (files and is_installed(OPENVINO)) or "vit" in str(read_json(folder / "config.json").get("encoder"))


def _explain_nothing(folder: Path, precision: str) -> tuple[str, Path]:
    """No runtime fits: say which one to install, or which file to make."""
    if (folder / ONNX_FILES[precision]).is_file():
        raise UsageError(f"{folder} needs a runtime that is not installed: run `{_INSTALL[ONNXRUNTIME]}`")
    if precision != "fp32":
        raise UsageError(
            f"{folder} has no {ONNX_FILES[precision]}: write it with "
            f"`polypseg export {folder} --format onnx --precision {precision}`"
        )
    if is_installed(TORCH):  # a folder of sharded or other weights: transformers says what is wrong with it
        return TORCH, folder / WEIGHTS
    raise UsageError(
        f"{folder} has no {ONNX_FILES['fp32']}, so that its model needs torch: run `{_INSTALL[TORCH]}`, or export it "
        "where torch is (`polypseg export FOLDER --format onnx`)"
    )


def runtime_files(runtime: str, *, precision: Precision = "fp32") -> tuple[str, ...]:
    """Patterns of the files of a model that a runtime reads."""
    if runtime == TORCH:
        return ("*.json", "*.safetensors")
    described = ("config.json", "preprocessor_config.json", "expectation.json")
    stored = "fp32" if precision == BF16 else precision
    files: tuple[str, ...] = (ONNX_FILES[stored],)
    if runtime == OPENVINO:
        files += (OPENVINO_FILES[stored], OPENVINO_FILES[stored].replace(".xml", ".bin"))
    return described + files


def is_installed(runtime: str) -> bool:
    """Whether a runtime's package can be imported, without importing it."""
    return importlib.util.find_spec(runtime) is not None


def _import(runtime: str, needed_by: Path) -> Any:
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise UsageError(f"{needed_by} needs {runtime}: run `{_INSTALL[runtime]}`") from error


def thread_count() -> int:
    """Threads of a runtime: the cores that this process may use, or OMP_NUM_THREADS where it says less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def refuse_non_finite(finite: Sequence[bool], *, model: str = "the model", images: Sequence[str] = ()) -> None:
    """Raise PolypSegError that names model and image where the outputs of an image are not all finite.

    A NaN is not above any threshold: without this, a broken model reports that there are no polyps.
    """
    where = next((number for number, good in enumerate(finite) if not good), None)
    if where is None:
        return
    image = images[where] if where < len(images) else f"image {where + 1} of the batch"
    raise PolypSegError(
        f"{model} gives values that are no finite numbers (NaN or infinity) for {image}: its weights or the mean and "
        "standard deviation of its inputs are damaged; get the model again"
    )


def one_logit(result: NDArray[np.float32], *, name: str) -> Logits:
    """Class logits (B, 1 or 2, h, w) -> polyp-against-background logits (B, h, w). Raises UsageError for others."""
    if result.ndim != 4 or result.shape[1] not in (1, 2):
        raise UsageError(f"{name} gives {tuple(result.shape)}: (B, 1 or 2, h, w) is needed")
    return result[:, 0] if result.shape[1] == 1 else result[:, 1] - result[:, 0]


def _checked(logits: Logits, *, model: str, names: Sequence[str]) -> Logits:
    """The same logits (B, h, w), if they are finite."""
    refuse_non_finite([bool(np.isfinite(one).all()) for one in logits], model=model, images=names)
    return logits


def resize_bilinear(values: Logits, size: tuple[int, int], *, box: Box = WHOLE) -> Logits:
    """(h, w) -> (H, W) of ``size``: bilinear, no antialias, corners not aligned, as torch's to about 6e-6.

    ``box``: the rows and columns of (H, W) that are wanted, the same to the last bit.
    """
    rows = _interpolate(np.ascontiguousarray(values, dtype=np.float32), size[0], part=box[0])
    return np.ascontiguousarray(_interpolate(np.ascontiguousarray(rows.T), size[1], part=box[1]).T)


def box_above(values: Logits, size: tuple[int, int], *, limit: float) -> Box | None:
    """Where ``resize_bilinear`` of values (h, w) may exceed ``limit``: a box of (H, W), None where it does nowhere.

    A pixel lies between its four neighbors, so one of them exceeds the limit too, apart from rounding.
    """
    high = values > limit - 1e-3 * max(1.0, abs(limit))
    box = []
    for axis, length in enumerate(size):
        places, scale = np.flatnonzero(high.any(axis=1 - axis)), length / values.shape[axis]
        if not len(places):
            return None
        first, last = math.floor((places[0] - 0.5) * scale - 0.5), math.ceil((places[-1] + 1.5) * scale - 0.5)
        box.append(slice(max(0, first), min(length, last + 1)))
    return box[0], box[1]


def _interpolate(values: Logits, length: int, *, part: slice) -> Logits:
    """(n, m) -> ``part`` of (length, m), linear between neighboring rows; places are rounded as torch rounds them."""
    count = len(values)
    if count == length:
        return values[part]
    scale = np.float64(np.float32(count) / np.float32(length))
    # Of a fused multiply-add only the result is rounded.
    places = np.maximum((scale * (np.arange(length)[part] + 0.5) - 0.5).astype(np.float32), np.float32(0))
    lower = np.minimum(places.astype(np.int64), count - 1)
    weight = (places - lower).astype(np.float32)[:, None]
    result = values[np.minimum(lower + 1, count - 1)]
    result -= values[lower]
    result *= weight
    result += values[lower]
    return result


def sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(values))
    result: NDArray[np.float32] = np.where(values >= 0, np.float32(1), small)
    result /= 1 + small
    return result
