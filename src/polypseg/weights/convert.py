"""Published weights in this package's format: encoders as timm folders, the study's fine-tuned files as whole models.

Nothing is written before the converted weights have given the outputs of a second network that is evaluated straight
from the file's own tensors (``source_networks``).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from polypseg import zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import atomic_path, file_sha256
from polypseg.inference.model import build_image_processor, without_shard_bars
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.origin import ConversionRecord, PretrainingRecord, WeightsOrigin
from polypseg.weights.formats import (
    AUGREG,
    OURS,
    SSL4GIE_RESNET,
    SSL4GIE_VIT,
    Recognized,
    count_and_first,
    empty_state,
    position_layout,
    read_arrays,
    read_content,
    recognize,
    with_counters,
)
from polypseg.weights.loading import (
    CONVERSION_KEY,
    PRETRAINING_KEY,
    identify_encoder,
    recorded_method,
    write_timm_encoder,
)
from polypseg.weights.oracles import (
    augreg_features,
    deeplabv3plus_logits,
    dpt_logits,
    resnet50_features,
    vit_features,
)
from polypseg.zoo import CORPORA, ENCODERS, METHODS, ZooEntry

TOLERANCE = 1e-5
"""Largest difference between the two networks' float32 outputs, relative to the largest output (at least 1)."""
UPSTREAM = "SSL4GIE"
_FILE_NAME = re.compile(
    r"(?P<arch>resnet50|vit_b)-(?P<pretraining>Hyperkvasir|ImageNet_self|ImageNet_class|random)"
    r"(?:_(?P<ss>mocov3|barlowtwins|mae))?_init-frozen_(?P<frozen>True|False)-dataset_(?P<dataset>Kvasir|CVC)\.pth"
)
_DATASETS = {"Kvasir": "Kvasir-SEG", "CVC": "CVC-ClinicDB"}
_ARCHITECTURES = {"resnet50": "resnet50", "vit_b": "vit_base"}
_METHODS = {"mocov3": "moco_v3", "barlowtwins": "barlow_twins", "mae": "mae"}
_ENCODER_OF = {SSL4GIE_RESNET.name: "resnet50", SSL4GIE_VIT.name: "vit_base"}
TIMM_FACTS = ("input_size", "pool_size", "interpolation", "crop_pct", "first_conv", "classifier")


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """What a weights file is and what converting it would do."""

    path: Path
    format: str
    """The layout in words."""
    holds: str
    """``encoder`` or ``fine-tuned model``."""
    architecture: str | None
    """timm name of the encoder; None where it is none of the study's."""
    method: str | None
    """Pretraining method, where the file tells."""
    tensors: int
    parameters: int
    """Elements of all tensors of the layout."""
    kept: int
    """Tensors that a conversion keeps."""
    dropped: dict[str, int]
    """What a conversion leaves out -> number of tensors."""
    unknown: tuple[str, ...]
    """Tensors that the layout does not have: the file would be refused."""
    extras: dict[str, str]
    """Other entries of the file -> their kind; none is kept."""
    models: tuple[str, ...]
    """Short names of the rows that the file may belong to."""
    sha256: str

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        dropped = ", ".join(f"{what} ({n})" for what, n in self.dropped.items())
        extras = ", ".join(f"{name} ({kind})" for name, kind in self.extras.items())
        method = METHODS[self.method] if self.method else "not stated by the file"
        facts = {
            "file": self.path.name,
            "format": self.format,
            "holds": f"{self.holds}, {self.architecture or 'of an architecture outside the table'}",
            "pretraining": method,
            "tensors": f"{self.tensors} with {self.parameters:,} values",
            "kept": str(self.kept),
            "left out": dropped or "nothing",
            "other entries": extras or "none",
            "may be": ", ".join(self.models) or "none of the twelve models",
            "sha256": self.sha256,
        }
        if self.unknown:
            facts["unknown"] = count_and_first(self.unknown)
        return [f"{name:<14} {value}" for name, value in facts.items()]


def inspect_file(path: Path) -> FileReport:
    """Say what a weights file is, without converting it. Raises UsageError and PolypSegError as ``read_content``."""
    content = read_content(path)
    found = recognize(content, path=path)
    method = recorded_method(content, path=path) or found.method
    rows = _possible_rows(found, method=method)
    if found.format.whole_model and len({row.method for row in rows}) == 1:
        method = rows[0].method
    return FileReport(
        path=path,
        format=OURS if PRETRAINING_KEY in content.metadata else found.format.name,
        holds="fine-tuned model" if found.format.whole_model else "encoder",
        architecture=ENCODERS[_ENCODER_OF[found.format.name]] if found.format.whole_model else found.architecture,
        method=method,
        tensors=len(found.source),
        parameters=sum(value.numel() for value in found.source.values()),
        kept=len(found.state),
        dropped={what: len(keys) for what, keys in found.dropped.items()},
        unknown=tuple(found.unknown),
        extras=found.extras,
        models=tuple(row.short_name for row in rows),
        sha256=file_sha256(path),
    )


def convert_file(path: Path, output: Path, *, model: str | None = None) -> Path:
    """Convert a published file into the folder ``output`` and return it, once the outputs have been compared.

    An encoder becomes a timm folder (``local-dir:``) whose ``model.safetensors`` fine-tuning takes; a fine-tuned file
    of the reference study becomes a model folder. ``model``: the row that the file is of, where its name or content
    does not say. Raises UsageError for a file that is not of the row or whose row is open, PolypSegError for a file
    that cannot be read, does not fit exactly, or gives other outputs.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists already: give another --output or delete it")
    entry = zoo.get(model) if model else None
    content = read_content(path)
    if {PRETRAINING_KEY, CONVERSION_KEY} & set(content.metadata):
        raise UsageError(f"{path} is already in this package's format: give it to finetune.py --encoder-weights")
    found = recognize(content, path=path)
    if found.format.whole_model:
        _convert_model(path, output, found, entry)
    else:
        _convert_encoder(path, output, entry)
    return output


# -- encoders ---------------------------------------------------------------------------------------------


def _convert_encoder(path: Path, output: Path, entry: ZooEntry | None) -> None:
    found = identify_encoder(path)
    name = found.architecture
    if name is None:
        raise PolypSegError(
            f"{path} ({found.format.name}) is no encoder of the table: {_closest_difference(found.state)}"
        )
    method = _encoder_method(path, found, entry)
    state = with_counters(found.state, empty_state(name))
    _prove_encoder(path, found, state)
    source = ConversionRecord(format=found.format.name, file=path.name, sha256=file_sha256(path))
    origin = PretrainingRecord(method=method, encoder=name, converted_from=source)
    facts = timm.get_pretrained_cfg(name)
    if facts is None:
        raise PolypSegError(f"timm has no facts of {name}: install a version that the package allows")
    known = facts.to_dict()
    write_timm_encoder(
        output,
        state,
        architecture=name,
        num_features=int(_build_timm(name).num_features),
        facts={key: known[key] for key in TIMM_FACTS if key in known},
        origin=origin,
        key=CONVERSION_KEY,
    )


def _build_timm(name: str) -> Any:
    return timm.create_model(name, pretrained=False, num_classes=0, device=torch.device("meta"))


def _closest_difference(state: Mapping[str, Tensor]) -> str:
    """What separates a state dict from the study's encoder with which it shares most names."""
    name = max(ENCODERS.values(), key=lambda name: len(set(empty_state(name)) & set(state)))
    return f"from {name} it differs by {_differences(state, empty_state(name))}"


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """``2 missing (first a), 1 of another shape (first b)``; empty when names and shapes agree."""
    problems = {
        "missing": set(expected) - set(state),
        "unexpected": set(state) - set(expected),
        "of another shape": {k for k in set(expected) & set(state) if expected[k].shape != state[k].shape},
    }
    return ", ".join(count_and_first(keys, kind=kind) for kind, keys in problems.items() if keys)


def _encoder_method(path: Path, found: Recognized, entry: ZooEntry | None) -> str | None:
    """The file's method, which must be the row's; where the file does not tell, the row's."""
    if entry is None:
        return found.method
    if ENCODERS[entry.encoder] != found.architecture:
        raise UsageError(f"{path} holds {found.architecture}, but {entry.short_name} has {ENCODERS[entry.encoder]}")
    if entry.method == "none":
        raise UsageError(f"{entry.short_name} stands for random initialization: {path} cannot be of it")
    if found.method is not None and found.method != entry.method:
        raise UsageError(
            f"{path} was pretrained with {METHODS[found.method]}, but {entry.short_name} stands for "
            f"{METHODS[entry.method]}: choose the matching row"
        )
    return entry.method


def _prove_encoder(path: Path, found: Recognized, state: dict[str, Tensor]) -> None:
    """Compare the features of this package's encoder with those of the file's own tensors."""
    is_vit = found.architecture == ENCODERS["vit_base"]
    config = PolypSegConfig(encoder=str(found.architecture), decoder="dpt" if is_vit else "deeplabv3plus")
    with torch.device("meta"):
        model = PolypSegForSemanticSegmentation(config).eval()
    wanted = model.encoder.state_dict()
    model.encoder.load_state_dict({key: state[key] for key in wanted}, strict=True, assign=True)
    prefix = found.format.prefix
    if found.format is AUGREG:
        arrays = read_arrays(path)
        _compare(path, model.extract_features, lambda x: augreg_features(arrays, x), side=224)
    elif is_vit:
        _compare(path, model.extract_features, lambda x: vit_features(found.source, x, prefix=prefix), side=224)
    else:
        _compare(path, model.extract_features, lambda x: resnet50_features(found.source, x, prefix=prefix), side=64)


@torch.inference_mode()
def _compare(
    path: Path, ours: Callable[[Tensor], list[Tensor]], theirs: Callable[[Tensor], list[Tensor]], *, side: int
) -> None:
    """Raise PolypSegError unless both give the same maps for a random image of ``side`` pixels."""
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(ours(pixels), theirs(pixels), strict=True):
        difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
        if not difference <= TOLERANCE * max(1.0, largest):  # NaN is no agreement
            raise PolypSegError(
                f"{path}: converted outputs differ from those of the file's own tensors by {difference:.2g} (largest "
                f"{largest:.2g}); nothing is written. The file is damaged, or report this"
            )


# -- fine-tuned models ------------------------------------------------------------------------------------


def _convert_model(path: Path, output: Path, found: Recognized, entry: ZooEntry | None) -> None:
    entry, dataset = _identify_row(path, found, entry)
    config = entry.config()
    config.weights_origin = WeightsOrigin(
        model_id=entry.model_id,
        scale="full",
        encoder_initialisation=_initialization(entry),
        finetuned_on=dataset,
        finished=True,
        converted_from=ConversionRecord(
            format=found.format.name, file=path.name, sha256=file_sha256(path), upstream=UPSTREAM
        ),
    ).content
    with torch.device("meta"):
        model = PolypSegForSemanticSegmentation(config)
    expected = model.state_dict()
    state = with_counters(found.state, expected)
    problems = _differences(state | {key: torch.empty(0) for key in found.unknown}, expected)
    if problems:
        raise PolypSegError(f"{path} is not a complete {found.format.name}: {problems}. Download it again")
    model.load_state_dict(state, strict=True, assign=True)
    forward, side = (deeplabv3plus_logits, 96) if found.format is SSL4GIE_RESNET else (dpt_logits, 224)
    _compare(path, lambda x: [model.eval()(x).logits[:, 1:]], lambda x: [forward(found.source, x)], side=side)
    with atomic_path(output) as temporary, without_shard_bars():
        model.save_pretrained(temporary)
        build_image_processor(config).save_pretrained(temporary)


def _initialization(entry: ZooEntry) -> str:
    if entry.method == "none":
        return zoo.RANDOM
    return f"{METHODS[entry.method]} on {CORPORA[entry.corpus]}, as loaded by the authors of {UPSTREAM}"


def _identify_row(path: Path, found: Recognized, entry: ZooEntry | None) -> tuple[ZooEntry, str]:
    """The row and what the file was fine-tuned on, from the file's name and ``--model``, checked against its content.

    Raises UsageError where they contradict each other or leave the row open.
    """
    named = _FILE_NAME.fullmatch(path.name)
    if named and named["frozen"] == "True":
        raise UsageError(
            f"{path} was fine-tuned with a frozen encoder (its name says so): none of the twelve models is"
        )
    by_name = _row_of_name(named) if named else None
    if entry and by_name and entry != by_name:
        raise UsageError(f"{path} is {by_name.short_name} by its name, not {entry.short_name}: correct one of them")
    row = entry or by_name
    possible = _possible_rows(found, method=None)
    if row is None:
        choice = ", ".join(candidate.short_name for candidate in possible)
        raise UsageError(
            f"{path} has not the name that its authors gave it, and its content fits {choice}: say which with --model"
        )
    if row not in possible:
        choice = ", ".join(candidate.short_name for candidate in possible)
        raise UsageError(f"{path} is not {row.short_name}: {_contradiction(found, row)}; its content fits {choice}")
    if named is None:
        return row, "unknown data (the file has not the name that its authors gave it)"
    data = f"{_DATASETS[named['dataset']]} reference split"
    return row, f"{data} (by the {UPSTREAM} authors, as their file name says)"


def _row_of_name(named: re.Match[str]) -> ZooEntry | None:
    """The row that a file name of the reference study means; None for a combination that the study does not have."""
    if named["pretraining"] in ("random", "ImageNet_class"):
        method, corpus = {"random": ("none", "none"), "ImageNet_class": ("supervised", "imagenet1k")}[
            named["pretraining"]
        ]
    else:
        method = _METHODS.get(named["ss"] or "", "")
        corpus = "hyperkvasir" if named["pretraining"] == "Hyperkvasir" else "imagenet1k"
    wanted = (_ARCHITECTURES[named["arch"]], method, corpus)
    return next((row for row in zoo.ZOO if (row.encoder, row.method, row.corpus) == wanted), None)


def _possible_rows(found: Recognized, *, method: str | None) -> list[ZooEntry]:
    """The rows that nothing in the file contradicts."""
    if not found.format.whole_model:
        encoder = next((short for short, name in ENCODERS.items() if name == found.architecture), None)
        rows = [row for row in zoo.ZOO if row.encoder == encoder and row.method != "none"]
        return [row for row in rows if method is None or row.method == method]
    return [row for row in zoo.ZOO if not _contradiction(found, row)]


def _contradiction(found: Recognized, row: ZooEntry) -> str:
    """What in a fine-tuned file speaks against a row; empty for nothing."""
    if row.encoder != _ENCODER_OF[found.format.name]:
        return f"it is a {found.format.name}"
    if row.encoder != "vit_base":
        return ""
    has_decoder_table = "decoder_pos_embed" in found.source
    if has_decoder_table != (row.method == "mae"):
        return f"it has {'the' if has_decoder_table else 'no'} position table of MAE's decoder (decoder_pos_embed)"
    table = found.source.get("pos_embed")
    layout = "learned" if table is None else position_layout(table) or "learned"
    if layout != row.position_embedding:
        return f"its position table is {layout}, not {row.position_embedding}"
    return ""
