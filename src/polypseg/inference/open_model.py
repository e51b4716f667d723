"""Any model that can be tested, opened by name; torch is imported only for one that it computes."""

from pathlib import Path

from polypseg.errors import UsageError
from polypseg.files import read_json
from polypseg.inference.model_folder import ONNX, named_folder, results_name
from polypseg.inference.onnx_predictions import OnnxPredictions
from polypseg.inference.prediction_source import Output, PredictionSource
from polypseg.inference.preparation import FrameProcessor
from polypseg.inference.prepared_frames import usual_batch_size
from polypseg.inference.runtimes import (
    AUTO,
    BF16,
    ONNXRUNTIME,
    OPENVINO,
    TORCH,
    Precision,
    check_names,
    choose_runtime,
    runtime_files,
)
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.local import CONFIG


def open_model(
    model: str,
    *,
    folder: Path | None = None,
    name: str | None = None,
    image_size: int | None = None,
    gives_probabilities: bool = False,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
    runtime: str | None = None,
    precision: Precision = "fp32",
) -> PredictionSource:
    """Any model that can be tested: transformers or segmentation_models_pytorch folder, Hub id, row's id, ONNX file.

    ``folder``: where ``model_folder`` found it, so that it is fetched once. ``image_size`` and ``gives_probabilities``
    (not logits) are of ONNX and segmentation_models_pytorch models, whose files do not say so; ``name`` is the one in
    results; ``trust_remote_code`` runs the code in the folder of a transformers model. ``runtime``: by default torch
    for a folder, whose weights are tested then, and ONNX Runtime for a file; with another, or another ``precision``,
    the folder's file for it. ``batch_size``: None for the device's usual one. Raises UsageError for a model that is not
    there or cannot be loaded.
    """
    check_names(runtime or AUTO, precision=precision)
    output: Output = "probability" if gives_probabilities else "logits"
    if Path(model).suffix == ONNX:
        path = Path(model)
        if not path.is_file():
            raise UsageError(f"{path} does not exist: give an ONNX file")
        if runtime == TORCH or precision not in ("fp32", BF16):
            raise UsageError(f"{path} has a precision of its own: ask onnxruntime or openvino to compute it")
        return OnnxPredictions(
            name=name or path.stem,
            path=path,
            image_size=image_size,
            output=output,
            runtime=(OPENVINO if precision == BF16 else ONNXRUNTIME) if runtime in (None, AUTO) else runtime,
            precision=precision,
        )
    folder = folder or named_folder(model, with_code=trust_remote_code)
    if is_smp_folder(folder):
        if runtime not in (None, TORCH) or precision != "fp32":
            raise UsageError(f"{folder} is computed by torch in fp32: leave out the runtime and the precision")
        from polypseg.inference.predictors import open_smp

        return open_smp(folder, name=name or folder.resolve().name, image_size=image_size, output=output)
    if image_size is not None or gives_probabilities:
        raise UsageError("--image-size and --gives-probabilities are of ONNX and segmentation_models_pytorch models")
    if runtime is not None or precision != "fp32":
        chosen, path = choose_runtime(folder, runtime=runtime or AUTO, precision=precision)
        if chosen != TORCH:
            check_folder(folder, names=runtime_files(chosen, precision=precision))
            return OnnxPredictions(
                name=name or f"{results_name(read_json(folder / CONFIG), model)}.{chosen}.{precision}",
                path=path,
                processor=FrameProcessor.from_pretrained(folder),
                batch_size=batch_size or usual_batch_size("cpu"),
                runtime=chosen,
                precision=precision,
            )
    from polypseg.inference.predictors import open_transformers_model

    return open_transformers_model(
        model,
        folder=folder,
        name=name,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        precision=precision,
    )


def is_smp_folder(path: Path) -> bool:
    """Whether a folder was written by ``save_pretrained`` of segmentation_models_pytorch."""
    config = path / "config.json"
    return config.is_file() and "_model_class" in read_json(config)
