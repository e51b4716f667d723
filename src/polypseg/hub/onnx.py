"""A model folder -> ONNX and OpenVINO files in fp32, fp16 and int8, checked by their outputs against torch.

The layout is the one that transformers.js reads (``onnx/model.onnx``, ``model_fp16.onnx``, ``model_quantized.onnx``).
Input ``pixel_values`` (B, 3, h, w), normalized, B free, h and w fixed; output ``logits`` (B, 1, h', w') of the polyp.
"""

import importlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from polypseg.data.images import decode_frame
from polypseg.data.polyps import open_dataset
from polypseg.data.sources import IMAGE_SUFFIXES
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError, unknown_name
from polypseg.files import atomic_path
from polypseg.inference.model import load_model, polyp_against_background
from polypseg.inference.preparation import PREPROCESSOR, FrameProcessor
from polypseg.inference.replay import add_replay
from polypseg.inference.runtimes import (
    INPUT,
    ONNX_FILES,
    OPENVINO_FILES,
    OUTPUT,
    OnnxRuntime,
    OpenVinoRuntime,
    Runtime,
    TorchRuntime,
    openvino_core,
    sigmoid,
)
from polypseg.provenance.checksums import MANIFEST, check_folder, write_manifest
from polypseg.provenance.local import CONFIG
from polypseg.provenance.passport import PASSPORT

FORMATS = ("onnx", "openvino")
OPSET = 18
"""Antialias-free Resize, ReduceMean with axes as input: read by onnxruntime-web, OpenVINO and transformers.js."""
CALIBRATION_FRAMES, HELD_OUT = 100, 12
"""Frames whose activations set the ranges of int8, and others by which the layers to keep in float are chosen."""
_KEPT_FIRST = (0, 1, 2, 4, 8, 12, 16, 20, 24)
"""How many of a network's first convolutions an int8 file may keep in float."""
_EXACT, _HALF = 1e-4, 0.05
"""Largest difference of logits, relative to their largest magnitude, of an fp32 and of an fp16 file."""
_WORTH_A_CAST = 2048
"""Values of a tensor from which storing it in half precision saves more than the cast costs at loading."""
_SIMILAR = 0.9
"""Least correlation of int8 logits with fp32's; below, the file is broken rather than coarse."""
_REDUCE_RANGE = True
"""7-bit weights: with 8 bits, CPUs without VNNI overflow silently, and a clinic's PC may be one."""


@dataclass(frozen=True, kw_only=True)
class RuntimeExport:
    """A file that was written."""

    path: Path
    size: int
    """Bytes, of all its parts."""
    difference: float
    """Largest difference of a logit from torch's on the frames of the check, relative to the largest logit."""
    agreement: float
    """Mean Dice of its masks with torch's on those frames; 1 for two empty masks."""
    kept_in_float: tuple[str, ...] = ()
    """Layers that int8 leaves in fp32."""

    def lines(self) -> list[str]:
        """A summary to print."""
        kept = f"; kept in fp32: {', '.join(self.kept_in_float)}" if self.kept_in_float else ""
        return [
            f"{self.path}: {self.size / 1e6:.2f} MB; logits differ from torch's by at most {self.difference:.1g} of "
            f"the largest, masks agree with Dice {self.agreement:.4f}{kept}"
        ]


def export_runtime(
    folder: Path,
    *,
    format: str = "onnx",
    precision: str = "fp32",
    calibration: str | None = None,
    output: Path | None = None,
) -> RuntimeExport:
    """Write a model folder's network for ONNX Runtime, browsers or OpenVINO, into it or into ``output``.

    ``calibration`` (int8 only): a folder of training frames, or a dataset of the table, whose reference training part
    is taken where it has one. ``output`` becomes a folder that runs without torch: the file, ``config.json``,
    ``preprocessor_config.json`` and the passport. A test input with the file's own output (``replay``) and the
    checksums are kept up to date. Raises UsageError for a request that cannot be met, PolypSegError where the written
    file's outputs are not the model's.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if precision not in ONNX_FILES:  # bf16 is no file's precision
        raise unknown_name("precision", precision, ONNX_FILES)
    if (precision == "int8") != (calibration is not None):
        raise UsageError(
            "int8 needs training frames to set its ranges: name them with --calibration"
            if precision == "int8"
            else f"calibration belongs to int8; {precision} needs none"
        )
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no model folder: it has no {CONFIG}")
    for package in ("onnx", "onnxscript", "onnxruntime", *(("openvino",) if format == "openvino" else ())):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"this export needs {package}: run `python -m pip install 'polypseg[export]'`")
    check_folder(folder)
    processor = FrameProcessor.from_pretrained(folder)
    frames = [] if calibration is None else _spread(calibration_frames(calibration), CALIBRATION_FRAMES + HELD_OUT)
    model, _ = load_model(str(folder))
    target = folder if output is None else output
    if output is not None:
        _start_folder(folder, output)
    name = (ONNX_FILES if format == "onnx" else OPENVINO_FILES)[precision]
    kept: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory(prefix="polypseg-export-") as place:
        made = Path(place) / Path(name).name
        graph = trace(model, processor)
        if precision == "int8":
            pixels = [processor([frame])["pixel_values"] for frame in tqdm(frames, desc="preparing", disable=None)]
            kept = _write_int8(graph, made.with_suffix(".onnx"), pixels=pixels)
        elif precision == "fp16" and format == "onnx":
            _save(_half(graph), made)
        else:
            _save(_compact(graph), made.with_suffix(".onnx"))
        if format == "openvino":
            _convert_to_openvino(made.with_suffix(".onnx"), made, halve=precision == "fp16")
        runtime: Runtime = OnnxRuntime(made) if format == "onnx" else OpenVinoRuntime(made)
        difference, agreement = _check(runtime, model, processor, precision=precision)
        parts = [made, *([made.with_suffix(".bin")] if format == "openvino" else [])]
        for part in parts:
            with atomic_path((target / name).with_name(part.name)) as temporary:
                shutil.move(part, temporary)
    size = sum((target / name).with_name(part.name).stat().st_size for part in parts)
    add_replay(target, name)
    if output is not None or (target / MANIFEST).is_file():
        write_manifest(target)
    return RuntimeExport(path=target / name, size=size, difference=difference, agreement=agreement, kept_in_float=kept)


def _start_folder(source: Path, output: Path) -> None:
    """Create the folder of a light model, or go on with one of the same model. Raises UsageError for anything else."""
    if output.is_dir() and any(output.iterdir()):
        same = (output / CONFIG).is_file() and (output / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
        if not same:
            raise UsageError(f"{output} holds something else than this model's exports: give the name of a new folder")
        check_folder(output, names=("*",))
    elif output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file: give the name of a folder")
    for name in (CONFIG, PREPROCESSOR, PASSPORT):
        if (source / name).is_file():
            with atomic_path(output / name) as temporary:
                shutil.copyfile(source / name, temporary)


# Tracing -----------------------------------------------------------------------------------------------


class _PolypNetwork(nn.Module):
    """The network as it is exported: pixels in, one logit per pixel out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 1, h', w')."""
        return polyp_against_background(self.model(pixel_values=pixel_values).logits, self.model.config)[:, None]


def trace(model: Any, processor: FrameProcessor) -> Any:
    """The network as an ONNX graph as torch gives it, in fp32, with a free batch and the processor's size."""
    height, width = processor.size["height"], processor.size["width"]
    example = torch.zeros(2, 3, height, width)  # of one, the batch would be taken for a constant
    network = _PolypNetwork(model.float().cpu()).eval()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer's own deprecations
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            external_data=False,
            optimize=False,
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _optimized(graph: Any, *, keep_casts: bool = False) -> Any:
    """Constants folded, BatchNorm fused; with ``keep_casts`` what stands behind a Cast is left as it is."""
    from onnxscript import ir, optimizer

    model = ir.serde.deserialize_model(graph)
    optimizer.optimize_ir(model, should_fold=lambda node: False if keep_casts and node.op_type == "Cast" else None)
    return ir.serde.serialize_model(model)


def _compact(graph: Any) -> Any:
    """The same fp32 function in less space: weights that half precision holds exactly are stored in it and cast.

    A runtime casts them once, when it loads the file. Of a model whose weights are published in half precision, all
    are: the file then has their size and computes what torch does with those weights widened.
    """
    import onnx

    small = onnx.ModelProto()
    small.CopyFrom(graph)
    casts = []
    for tensor in small.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < _WORTH_A_CAST:
            continue
        with np.errstate(over="ignore"):
            halved = values.astype(np.float16)
        if not np.array_equal(halved.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halved, f"{name}.fp16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.fp16"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *small.graph.node]
    del small.graph.node[:]
    small.graph.node.extend(nodes)
    for value in list(small.graph.value_info):  # types of the weights as they were
        if value.name in {cast.output[0] for cast in casts}:
            small.graph.value_info.remove(value)
    return _optimized(small, keep_casts=True)


def _half(graph: Any) -> Any:
    """All weights and activations in half precision, input and output in fp32: for WebGPU, slow on CPUs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxscript import ir

    model = ir.serde.deserialize_model(convert_float_to_float16(_optimized(graph), keep_io_types=True))
    model.graph.sort()  # the converter puts the casts of input and output last
    return ir.serde.serialize_model(model)


def _save(graph: Any, path: Path) -> None:
    """Write a model, the same bytes in every process: the exporter orders a node's attributes by chance."""
    import onnx

    for node in graph.graph.node:
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
    onnx.checker.check_model(graph)
    onnx.save(graph, path)


def _convert_to_openvino(onnx_file: Path, path: Path, *, halve: bool) -> None:
    """OpenVINO's own format, by its runtime: its converter would report its use to its makers."""
    import openvino

    openvino.save_model(openvino_core().read_model(str(onnx_file)), str(path), compress_to_fp16=halve)


# int8 --------------------------------------------------------------------------------------------------


def calibration_frames(name: str) -> list[Any]:
    """Callables that each decode one training frame: of a folder of images, or of a dataset of the table."""
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UsageError(f"{folder} holds no image to calibrate with")
        return [lambda path=path: decode_frame(path.read_bytes(), name=str(path)) for path in files]
    data = open_dataset(name)
    try:
        ids, _ = data.part("reference", "train")
    except UsageError:  # a set without that split
        ids, _ = data.part("full", "full")
    return [lambda record=data.by_id[record_id]: data.frame(record) for record_id in ids]


def _spread(readers: Sequence[Any], count: int) -> list[Image.Image]:
    """``count`` frames, or all where there are fewer, taken evenly from the whole."""
    if len(readers) < 2:
        raise UsageError("int8 needs at least two training frames: some to set its ranges, others to choose layers by")
    chosen = np.unique(np.linspace(0, len(readers) - 1, min(count, len(readers))).round().astype(int))
    return [readers[n]() for n in chosen]


def _write_int8(graph: Any, path: Path, *, pixels: Sequence[NDArray[np.float32]]) -> tuple[str, ...]:
    """Write a static QDQ file (8-bit activations, weights per channel); return the layers that stay in fp32.

    The last convolution always does: it costs little and gives every logit. How many of the first ones do is chosen by
    the difference of probabilities on frames that set no ranges.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    every = max(2, len(pixels) // HELD_OUT)
    held_out = pixels[::every]
    ranges = [batch for n, batch in enumerate(pixels) if n % every]
    plain = path.with_name("plain.onnx")
    _save(_optimized(graph), plain)
    prepared, cache = path.with_name("prepared.onnx"), path.with_name("ranges.json")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    wanted = [_probability(OnnxRuntime(prepared), batch) for batch in held_out]
    best: tuple[float, tuple[str, ...]] | None = None
    for keep in _candidates(prepared):
        made = path.with_name(f"candidate{len(keep)}.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_static(
                str(prepared),
                str(made),
                _Batches(ranges),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=_REDUCE_RANGE,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["Conv", "Add", "Concat", "MatMul", "Gemm"],
                nodes_to_exclude=list(keep),
                calibration_cache_path=str(cache),
            )
        network = OnnxRuntime(made)
        off = float(
            np.mean([np.abs(_probability(network, b) - w).mean() for b, w in zip(held_out, wanted, strict=True)])
        )
        if best is None or off < 0.9 * best[0]:  # keeping more must be worth it
            best = (off, keep)
            shutil.copyfile(made, path)
    assert best is not None
    return best[1]


def _probability(runtime: Runtime, batch: NDArray[np.float32]) -> NDArray[np.float32]:
    return sigmoid(runtime.polyp_logits(batch))


def _candidates(path: Path) -> Iterator[tuple[str, ...]]:
    """Names of the nodes to keep in float: the last convolution, and more and more of the first, up to a third of all.

    The first ones see the frame's fine gray levels and have few channels: they lose most by 8 bits and weigh least.
    """
    import onnx

    convolutions = [node.name for node in onnx.load(str(path)).graph.node if node.op_type == "Conv"]
    if not convolutions:
        yield ()
        return
    for first in _KEPT_FIRST:
        if first <= max(1, len(convolutions) // 3):
            yield tuple(dict.fromkeys([*convolutions[:first], convolutions[-1]]))


class _Batches:
    """What onnxruntime's calibration reads: one input after the other, then None."""

    def __init__(self, batches: Sequence[NDArray[np.float32]]):
        self._rest = iter(batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next input."""
        batch = next(self._rest, None)
        return None if batch is None else {INPUT: batch}


# Checking ----------------------------------------------------------------------------------------------


def _check(runtime: Runtime, model: Any, processor: FrameProcessor, *, precision: str) -> tuple[float, float]:
    """Compare a file with torch on noise and on frames, in batches of 1, 2 and 5; see RuntimeExport for what is given.

    Raises PolypSegError where the file does not compute the model.
    """
    torch_model = TorchRuntime(model=model)
    height, width = processor.size["height"], processor.size["width"]
    noise = np.random.default_rng(0).normal(size=(1, 3, height, width)).astype(np.float32)
    frames = processor([Image.fromarray(synthesize_frame(CAMERAS["a"], seed=0, index=n)[0]) for n in range(7)])
    pixels = frames["pixel_values"]
    wanted, found = [], []
    for batch in (noise, pixels[:2], pixels[2:]):
        wanted.append(torch_model.polyp_logits(batch))
        found.append(runtime.polyp_logits(batch))
    ours, theirs = np.concatenate(found), np.concatenate(wanted)
    if ours.shape != theirs.shape:
        raise PolypSegError(f"the exported file gives logits of {ours.shape}, torch of {theirs.shape}")
    difference = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))
    allowed = {"fp32": _EXACT, "fp16": _HALF}.get(precision, np.inf)
    correlation = float(np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]) if precision == "int8" else 1.0
    if not difference <= allowed or not correlation >= _SIMILAR:
        raise PolypSegError(
            f"the {precision} file's outputs are not the model's: logits differ by {difference:.2g} of the largest"
            + (f", correlation {correlation:.3f}" if precision == "int8" else "")
        )
    return difference, float(np.mean([_dice(a > 0, b > 0) for a, b in zip(ours, theirs, strict=True)]))


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
