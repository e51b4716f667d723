"""Adaptation to a hospital's own frames, kept only where a gain is shown: by masks over clips, or by expected Dice."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME

from polypseg.errors import PolypSegError, UsageError
from polypseg.expectation.calibrate import (
    LEAST_GROUPS,
    Labeled,
    groups_of,
    logits_of,
    open_pairs,
    read_labeled,
    sure_gain,
)
from polypseg.expectation.estimate import estimate
from polypseg.expectation.frames import LIMIT, GivenFrame, GivenFrames, picture_digest, read_frames
from polypseg.expectation.intervals import group_means, read_interval
from polypseg.files import atomic_path, environment_record, file_sha256, sole_writer_of, write_json
from polypseg.hub.export import export_model, our_model
from polypseg.inference.expected import EXPECTATION, Expectation, read_expectation
from polypseg.inference.features import dice
from polypseg.inference.model import build_image_processor, without_shard_bars
from polypseg.inference.segmenter import Segmenter
from polypseg.modeling import PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import write_manifest
from polypseg.provenance.origin import WeightsOrigin
from polypseg.provenance.passport import (
    FINETUNING,
    ImagePrint,
    Passport,
    Seen,
    SplitManifest,
    attach_passport,
    find_passport,
    image_print,
)
from polypseg.training.adaptation import (
    Plan,
    StatisticsPlan,
    TuningPlan,
    adapt_model,
    has_statistics,
    resize_pairs,
)

Floats = NDArray[np.float64]
RECORD = "adaptation.json"
"""What was tried and what it gained: beside the adapted model, or alone where nothing is shipped."""
FOLDS = 5
LABELED_PLANS: tuple[Plan, ...] = (
    StatisticsPlan(prior=64),
    TuningPlan(part="decoder", steps=6, learning_rate=3e-4, reduction=0.75),
    TuningPlan(part="network", steps=8, learning_rate=3e-5, reduction=0.75),
)
"""Small steps: rates ten times as large lost Dice on frames of another hospital (measure_adaptation.py)."""
UNLABELED_PLANS: tuple[StatisticsPlan, ...] = (StatisticsPlan(prior=16), StatisticsPlan(prior=64))


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One method on frames that it did not see, or by the expected Dice."""

    plan: Plan
    gain: float | None
    """None where nothing can be said of the adapted model's masks."""

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {"method": self.plan.words, "settings": vars(self.plan), "gain": self.gain}


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What adapting to the frames does."""

    model: PolypSegForSemanticSegmentation | None
    """Adapted to all frames; None where no gain can be shown."""
    plan: Plan | None
    """The best on all frames; None where the model as it is is best."""
    labeled: bool
    before: float
    """Mean over clips of the Dice without adaptation; without masks, the expected mean Dice."""
    gain: float
    """Mean over clips, where the choice of the method saw neither the clip nor its scores; without masks, expected."""
    bound: float
    """Lower one-sided 95 % bound of the gain."""
    frames: int
    groups: int
    tried: tuple[Tried, ...]

    def lines(self) -> list[str]:
        """A summary to print."""
        what = "no method" if self.plan is None else self.plan.words
        judged = (
            f"mean Dice of {self.groups} clips, each scored by a model that did not see it"
            if self.labeled
            else f"expected mean Dice of {self.frames} frames"
        )
        told = (
            f"best on these {self.frames} frames: {what}; gain {self.gain:+.4f} (at least {self.bound:+.4f}, one-sided "
            f"95 %) over {self.before:.4f}: {judged}"
        )
        verdict = (
            "adapted: the gain is shown"
            if self.model is not None
            else "not adapted: no gain can be shown, so the model as it is stays the one to use"
        )
        return [told, verdict]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "adapted": self.model is not None,
            "method": None if self.plan is None else self.plan.words,
            "labelled": self.labeled,
            "before": self.before,
            "gain": self.gain,
            "bound": self.bound,
            "frames": self.frames,
            "groups": self.groups,
            "tried": [tried.content() for tried in self.tried],
            "score": "mean Dice; a frame without polyp counts 1 where nothing is found and 0 otherwise"
            if self.labeled
            else "expected mean Dice, if every frame shows a polyp; the bound is of the difference of two estimates",
        }


def adapt_labeled(
    model: PolypSegForSemanticSegmentation,
    labeled: Sequence[Labeled],
    *,
    plans: Sequence[Plan] = LABELED_PLANS,
    show_progress: bool = True,
) -> Adaptation:
    """Try the plans by cross-validation over clips, and adapt to all frames by the best, if its gain is shown.

    Each clip is scored by models that did not see it; the plan that counts for a clip is the best on the others. Raises
    UsageError for fewer than LEAST_GROUPS clips.
    """
    groups = groups_of(labeled, needed=f"whether adapting helps can be shown from {LEAST_GROUPS} on")
    count = len(set(groups))
    plans = [plan for plan in plans if isinstance(plan, TuningPlan) or has_statistics(model)]
    pairs = resize_pairs([one.frame for one in labeled], [one.truth for one in labeled], size=model.config.image_size)
    scores = np.zeros((len(labeled), 1 + len(plans)))
    scores[:, 0] = score_frames(model, labeled)
    folds = list(GroupKFold(n_splits=FOLDS).split(labeled, groups=groups))
    with tqdm(
        total=len(folds) * len(plans) + 1, desc="adapting", leave=False, disable=None if show_progress else True
    ) as bar:
        for seen, unseen in folds:
            for column, plan in enumerate(plans, start=1):
                adapted = adapt_model(model, pairs.take(seen), plan)
                scores[unseen, column] = score_frames(adapted, [labeled[place] for place in unseen])
                bar.update()
        by_group = np.stack([group_means(column, groups) for column in scores.T], axis=1)  # (G, 1 + plans)
        total = by_group.sum(axis=0)
        best = int(np.argmax(total))
        chosen = [int(np.argmax(total - one)) for one in by_group]
        gain, bound = sure_gain(by_group[range(count), chosen] - by_group[:, 0])
        kept = adapt_model(model, pairs, plans[best - 1]) if best > 0 and bound > 0 else None
        bar.update()
    gains = (by_group - by_group[:, :1]).mean(axis=0)
    return Adaptation(
        model=kept,
        plan=plans[best - 1] if best else None,
        labeled=True,
        before=float(by_group[:, 0].mean()),
        gain=gain,
        bound=bound,
        frames=len(labeled),
        groups=count,
        tried=tuple(Tried(plan=plan, gain=float(gains[k])) for k, plan in enumerate(plans, start=1)),
    )


def score_frames(model: PolypSegForSemanticSegmentation, labeled: Sequence[Labeled]) -> Floats:
    """The Dice of each frame at its mask's size, threshold 0.5; 1 where neither mask nor answer shows a polyp."""
    segmenter = _segmenter(model, name="model")
    return np.array([dice(logits_of(segmenter, one) > 0, one.truth) for one in labeled])


def _segmenter(
    model: PolypSegForSemanticSegmentation, *, name: str, expectation: Expectation | None = None
) -> Segmenter:
    return Segmenter(model=model, processor=build_image_processor(model.config), name=name, expectation=expectation)


def adapt_unlabeled(
    model: PolypSegForSemanticSegmentation,
    given: GivenFrames,
    *,
    expectation: Expectation | None,
    plans: Sequence[StatisticsPlan] = UNLABELED_PLANS,
    show_progress: bool = True,
) -> Adaptation:
    """Adapt to frames without masks, if the expected mean Dice rises by more than the two estimates may err.

    Only methods that do not optimize what the estimate looks at: confidence and agreement. Raises UsageError for a
    model of which nothing was learned, or that has no BatchNorm statistics, PolypSegError for frames of which nothing
    can be said.
    """
    if expectation is None:
        raise UsageError(
            f"without masks adaptation is judged by the expected Dice, and this model's folder has no {EXPECTATION}: "
            "give masks, or learn one with training_scripts/fit_expectation.py"
        )
    if not has_statistics(model):
        raise UsageError("without masks only BatchNorm statistics are adapted, and this model has none: give masks")
    before = estimate(_segmenter(model, name="model", expectation=expectation), given, show_progress=show_progress)
    if before.expected is None:
        raise PolypSegError(f"adaptation without masks cannot be judged here, as {before.refused}: give masks")
    frames = [frame.image for frame in given.frames]
    empty = [np.zeros((1, 1), dtype=bool)] * len(frames)
    pairs = resize_pairs(frames, empty, size=model.config.image_size)
    tried: list[Tried] = []
    best: tuple[float, StatisticsPlan, PolypSegForSemanticSegmentation] | None = None
    for plan in plans:
        adapted = adapt_model(model, pairs, plan)
        after = estimate(_segmenter(adapted, name="model", expectation=expectation), given, show_progress=show_progress)
        gain = None if after.expected is None else after.expected - before.expected
        tried.append(Tried(plan=plan, gain=gain))
        if gain is not None and gain > (best[0] if best else 0.0):
            best = gain, plan, adapted
    groups = len({frame.group for frame in given.frames})
    low, high = read_interval(expectation.content["interval"]).bounds(0.5, groups=groups)
    gain = best[0] if best else 0.0
    bound = gain - sqrt(2) * (high - low) / 2
    return Adaptation(
        model=best[2] if best and bound > 0 else None,
        plan=best[1] if best else None,
        labeled=False,
        before=before.expected,
        gain=gain,
        bound=bound,
        frames=len(given.frames),
        groups=groups,
        tried=tuple(tried),
    )


# -- files -------------------------------------------------------------------------------------------------------------


def adapt_files(
    folder: Path,
    frames: str,
    masks: Path | None,
    output: Path,
    *,
    clip: str | None = None,
    limit: int = LIMIT,
    show_progress: bool = True,
) -> Adaptation:
    """Adapt the model in ``folder`` and write ``output``: the adapted model's folder, or only the record.

    ``frames``: with masks a folder or archive, without them whatever ``read_frames`` takes, of which ``limit`` are
    used. Raises UsageError for an ``output`` that holds anything but such a record, FolderInUseError where another
    process writes it, and what reading and adapting raise; nothing is written then.
    """
    _check_output(output, folder=folder)
    with sole_writer_of(output):
        model = our_model(folder)
        if masks is not None:
            dataset = open_pairs(Path(frames), masks)
            labeled = _distinct(read_labeled(dataset, clip=clip))
            found = adapt_labeled(model, labeled, show_progress=show_progress)
            prints = tuple(image_print(one.name, one.frame, clip=_clip(one), mask=one.truth) for one in labeled)
        else:
            given = read_frames([frames], output=output, limit=limit)
            found = adapt_unlabeled(model, given, expectation=read_expectation(folder), show_progress=show_progress)
            prints = tuple(image_print(one.name, one.image, clip=_clip(one)) for one in given.frames)
        _write(found, prints, output, source=folder)
    return found


def _check_output(output: Path, *, folder: Path) -> None:
    if output.exists() and (not output.is_dir() or {path.name for path in output.iterdir()} - {RECORD}):
        raise UsageError(f"{output} exists already: give the name of a new folder (--output)")
    if folder.resolve() in output.resolve().parents:
        raise UsageError(f"{output} lies in the folder of the model that is adapted: give another (--output)")


def _distinct(labeled: Sequence[Labeled]) -> list[Labeled]:
    """Each picture once: a repeat in another clip would be seen on both sides of a fold."""
    first: dict[str, Labeled] = {}
    for one in labeled:
        first.setdefault(picture_digest(one.frame), one)
    return list(first.values())


def _clip(frame: Labeled | GivenFrame) -> str | None:
    """The clip's name; None for a frame that is a group by itself."""
    own = frame.name if isinstance(frame, Labeled) else frame.digest
    return None if frame.group == own else frame.group


def _write(found: Adaptation, prints: tuple[ImagePrint, ...], output: Path, *, source: Path) -> None:
    record = found.content() | {"from": file_sha256(source / SAFE_WEIGHTS_NAME), "environment": environment_record()}
    with atomic_path(output) as temporary:
        if found.model is None:
            temporary.mkdir()
        else:
            with tempfile.TemporaryDirectory(dir=temporary.parent) as made:
                _save_model(found, prints, Path(made) / "model", source=source)
                export_model(Path(made) / "model", temporary)
        write_json(temporary / RECORD, record)
        if found.model is not None:
            write_manifest(temporary)


def _save_model(found: Adaptation, prints: tuple[ImagePrint, ...], folder: Path, *, source: Path) -> None:
    """Weights, configuration, processor and passport, as a training run leaves them."""
    model = found.model
    assert model is not None and found.plan is not None
    before = WeightsOrigin.within(model.config)
    passport = find_passport(source, named=before.passport)
    origin = before.adapted_to(
        method=found.plan.words,
        labeled=found.labeled,
        frames=found.frames,
        groups=found.groups,
        gain=found.gain,
        bound=found.bound,
        source=file_sha256(source / SAFE_WEIGHTS_NAME),
    )
    model.config.weights_origin = origin.content
    with without_shard_bars():
        model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    attach_passport(folder, _passport(passport[0] if passport else None, prints, found=found, model_id=origin.model_id))


def _passport(before: Passport | None, prints: tuple[ImagePrint, ...], *, found: Adaptation, model_id: str) -> Passport:
    """What the model saw before, and the frames with the digests of their masks."""
    part = "labelled" if found.labeled else "unlabelled"
    content = hashlib.sha256("".join(sorted(one.pixels for one in prints)).encode()).hexdigest()[:16]
    manifest = SplitManifest(dataset="folder", split="adaptation", part=part, content_id=content, images=prints)
    words = "with their masks" if found.labeled else "without masks"
    seen = Seen(stage=FINETUNING, description=f"frames given to adapt the model to, {words}", manifest=manifest)
    if before is not None:
        return replace(before, seen=(*before.seen, seen))
    unknown = Seen(stage=FINETUNING, description="images that the model before adaptation does not list")
    return Passport(model_id=model_id, seen=(unknown, seen))
