"""A model folder that needs no torch: a hand-made ONNX network and how frames are prepared for it."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = (40, 48)
"""Height and width of the network's input."""
MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]


def network(*, channels: int = 1, batch: int | str = "batch") -> onnx.ModelProto:
    """(B, 3, 40, 48) -> (B, channels, 20, 24): a 3x3 convolution of stride 2 with fixed weights."""
    weights = np.random.default_rng(0).normal(size=(channels, 3, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["pixel_values", "w"], ["logits"], strides=[2, 2], pads=[1, 1, 1, 1], name="c")
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, 3, *SIZE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, channels, SIZE[0] // 2, SIZE[1] // 2])
    graph = helper.make_graph([node], "net", [pixels], [logits], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_light_model(folder: Path) -> Path:
    """``config.json``, ``preprocessor_config.json`` and ``onnx/model.onnx``, without weights for torch."""
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "polypseg", "image_size": SIZE[0]}))
    preparation = {
        "image_processor_type": "DPTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": SIZE[0], "width": SIZE[1]}, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": MEAN, "image_std": STD, "keep_aspect_ratio": False, "ensure_multiple_of": 1, "do_pad": False,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    onnx.save(network(), folder / "onnx" / "model.onnx")
    return folder
