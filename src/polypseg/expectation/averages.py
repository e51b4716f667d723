"""Averages of a model's weights with those that its last stage began from, judged on validation frames alone.

A stage that mends one thing costs another; between both ends of it a model can be better than either (Wortsman et al.
2022, robust fine-tuning of zero-shot models). Test sets of other hospitals stay unseen: their place is taken by the
validation frames shrunk to half and under the corruption kit.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from polypseg.data.corruptions import CORRUPTIONS, corrupt
from polypseg.errors import UsageError
from polypseg.expectation.calibrate import Labeled, logits_of
from polypseg.expectation.fit import VALIDATION, learn_point, open_model, open_sets
from polypseg.files import atomic_path, file_sha256, read_json, write_json
from polypseg.hub.onnx import export_runtime
from polypseg.hub.pack import save_weights
from polypseg.inference.features import dice
from polypseg.inference.runtimes import WEIGHTS
from polypseg.inference.segmenter import Segmenter
from polypseg.provenance.local import CONFIG
from polypseg.provenance.origin import WEIGHTS_ORIGIN, WeightsOrigin

SEVERITY = 3
"""Of the corruptions."""
MOST_ALARMS = 0.05
"""Share of polyp-free validation frames that may raise an alarm at the model's own operating point."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def average_models(before: Path, after: Path, output: Path, *, share: float) -> Path:
    """Write the model folder ``output``: ``share`` of the weights of ``after``, the rest of those it began with.

    Raises UsageError for a share outside 0 to 1 and where ``after`` did not go on from the weights of ``before``.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"the share lies between 0 and 1; got {share}")
    origin, digest = WeightsOrigin.of_folder(after), file_sha256(before / WEIGHTS)
    if origin.continued_from is None or origin.continued_from.sha256 != digest:
        raise UsageError(f"{after} did not go on from {before / WEIGHTS}: give the model that its run began with")
    old, new = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (before, after))
    with atomic_path(output) as temporary:
        shutil.copytree(after, temporary)
        save_weights(average_states(old, new, share=share), temporary)
        config = read_json(temporary / CONFIG)
        config[WEIGHTS_ORIGIN] = origin.averaged(share=share, sha256=file_sha256(temporary / WEIGHTS)).content
        write_json(temporary / CONFIG, config)
    return output


def average_states(before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, share: float) -> dict[str, Tensor]:
    """(1 - share) x before + share x after, in float32; counters are those of ``after``. Raises UsageError."""
    if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in after.items()}:
        raise UsageError("the two models are of different networks")
    return {
        name: ((1 - share) * before[name].float() + share * value.float()).contiguous()
        if value.is_floating_point()
        else value
        for name, value in after.items()
    }


def shrink(frame: Image.Image, mask: NDArray[np.bool_]) -> tuple[Image.Image, NDArray[np.bool_]]:
    """The frame and its mask at half the size, in the middle of a black frame of the old size."""
    half = (max(1, frame.width // 2), max(1, frame.height // 2))
    place = ((frame.width - half[0]) // 2, (frame.height - half[1]) // 2)
    small, truth = Image.new("RGB", frame.size), Image.new("L", frame.size)
    small.paste(frame.resize(half, Image.Resampling.LANCZOS), place)
    truth.paste(Image.fromarray(mask.astype(np.uint8) * 255).resize(half, Image.Resampling.NEAREST), place)
    return small, np.asarray(truth) > 0


def judge(folder: Path, *, data_dir: Path | None) -> dict[str, Any]:
    """What a model folder is worth on the validation frames; ``score`` is the mean of the three kinds of frames.

    Mean Dice at 0.5 of the frames as they are, ``shrunk``, and over all corruptions; ``alarms``: share of polyp-free
    validation frames with any region, at 0.5 and at the operating point that is chosen on the same frames.
    """
    frames = open_sets(data_dir)[VALIDATION]
    with tempfile.TemporaryDirectory() as name:
        exported = Path(name) / "model"
        shutil.copytree(folder, exported)
        export_runtime(exported)
        point = learn_point(exported, data_dir=data_dir)
        model = open_model(exported)
    clean, shrunk, corrupted = [], [], []
    for record_id in frames.ids:
        frame, truth = frames.dataset.pair(frames.dataset.by_id[record_id])
        one = Labeled(name=record_id, group=record_id, frame=frame, truth=truth.astype(bool))
        small, small_truth = shrink(one.frame, one.truth)
        clean.append(_dice(model, one))
        shrunk.append(_dice(model, replace(one, frame=small, truth=small_truth)))
        for kind in CORRUPTIONS:
            changed = Image.fromarray(corrupt(np.asarray(frame), kind, severity=SEVERITY, key=record_id))
            corrupted.append(_dice(model, replace(one, frame=changed)))
    kinds = {"clean": clean, "shrunk": shrunk, "corrupted": corrupted}
    means = {kind: float(np.mean(values)) for kind, values in kinds.items()}
    alarms = dict(zip(("alarms", "alarms_at_point"), map(float, point.alarms or (np.nan, np.nan)), strict=True))
    return means | alarms | {"score": float(np.mean(list(means.values()))), "n": len(clean)}


def _dice(model: Segmenter, one: Labeled) -> float:
    return dice(logits_of(model, one) > 0, one.truth)


def judge_shares(
    before: Path, after: Path, *, data_dir: Path | None, echo: Callable[[str], object]
) -> list[dict[str, Any]]:
    """What each of SHARES is worth: ``judge`` of the average, with its ``share``."""
    found = []
    for share in SHARES:
        with tempfile.TemporaryDirectory() as name:
            model = average_models(before, after, Path(name) / "model", share=share)
            found.append({"share": share} | judge(model, data_dir=data_dir))
        echo(", ".join(f"{key} {value:.4g}" for key, value in found[-1].items()))
    return found


def choose_share(judged: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of records with a ``share``, the one with the best score among those with few enough alarms at their point.

    Raises UsageError where none has.
    """
    allowed = [one for one in judged if one["alarms_at_point"] <= MOST_ALARMS]
    if not allowed:
        raise UsageError(f"no average raises alarms on at most {MOST_ALARMS:.0%} of the polyp-free frames")
    return max(allowed, key=lambda one: one["score"])
