"""Expected quality of a model on frames without masks: a number with an interval, or why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from polypseg.errors import UsageError
from polypseg.expectation.frames import LIMIT, GivenFrames, read_frames
from polypseg.expectation.intervals import LEVEL, read_interval
from polypseg.files import environment_record, write_csv, write_json, write_text
from polypseg.inference.expected import DOUBTFUL, EMPTY, UNLIKE, Expectation
from polypseg.inference.features import VIEW_FEATURES, look_at, to_colors
from polypseg.inference.gate import MOST_UNLIKE, describe_place
from polypseg.inference.predictor import read_predictor
from polypseg.inference.segmenter import Segmenter, draw_overlay, read_logits
from polypseg.provenance.passport import PASSPORT, Passport, SplitManifest, find_collisions, image_print
from polypseg.report.wording import number, percent
from polypseg.shift.frame_statistics import measure_frame

LEAST = 30
"""Distinct frames below which nothing is said of a set."""
MOST_EMPTY = 0.5
"""Share of empty masks above which nothing is said: these are not frames of polyps, or the model sees none."""
MOST_SEEN = 0.1
"""Share of frames seen in training above which an estimate says nothing of new ones."""
NOTEWORTHY = 0.5
"""Standard deviations of the training frames from which a difference of means is told."""
_SHOWN = 6
"""Frames with a picture, and differences in words."""
WORDS: Mapping[str, tuple[str, str]] = {
    "lab_l_mean": ("brighter", "darker"),
    "lab_l_std": ("richer in contrast", "poorer in contrast"),
    "lab_a_mean": ("redder", "greener"),
    "lab_b_mean": ("yellower", "bluer"),
    "lab_a_std": ("more varied in red", "less varied in red"),
    "lab_b_std": ("more varied in yellow", "less varied in yellow"),
    "specular_share": ("richer in highlights", "poorer in highlights"),
    "falloff": ("more evenly lit", "darker toward the edge"),
    "sharpness": ("sharper", "blurrier"),
    "border_share": ("with more black border", "with less black border"),
    "blockiness": ("more strongly compressed", "less strongly compressed"),
    "native_side": ("larger in pixels", "smaller in pixels"),
    "native_aspect": ("wider", "narrower"),
}
"""Shift measure -> what frames with more of it, and with less of it, are called."""


@dataclass(frozen=True, kw_only=True)
class FrameEstimate:
    """What is expected of one frame."""

    name: str
    group: str
    expected_dice: float | None
    """None for a frame that is unlike those learned from."""
    flag: str
    polyp_share: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """In which respect frames differ from those that the model was trained on."""

    measure: str
    mean: float
    seen: float
    effect: float
    """Difference of the means in standard deviations of the training frames."""
    words: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The answer."""

    model: str
    frames: tuple[FrameEstimate, ...]
    given: int
    repeats: int
    seen_images: int | None
    """Frames that the model saw in training or nearly so; None where that is not known."""
    refused: str
    """Why nothing is said; empty where something is."""
    expected: float | None
    low: float | None
    high: float | None
    """Mean Dice with its interval of LEVEL, if every frame shows a polyp."""
    below_half: float | None
    """Share of masks expected to have a Dice below .5."""
    differences: tuple[Difference, ...]
    """Greatest first."""
    pictures: tuple[tuple[str, Image.Image], ...] = ()
    """Frames with the least expected Dice, and their overlays."""

    def share(self, flag: str) -> float:
        """Of the frames, those that bear a flag."""
        return float(np.mean([frame.flag == flag for frame in self.frames]))

    @property
    def verdict(self) -> tuple[str, str, str]:
        """Three sentences."""
        told = [difference.words for difference in self.differences if abs(difference.effect) >= NOTEWORTHY][:3]
        differ = (
            f"these frames are {_list(told)} than the training frames"
            if told
            else "these frames are like the training frames in light, color and sharpness"
        )
        if self.refused:
            return (
                f"Nothing can be said of these {len(self.frames)} frames: {self.refused}.",
                f"{differ[0].upper()}{differ[1:]}.",
                "Do not rely on the masks: label some frames and measure (polypseg evaluate).",
            )
        return (
            f"Expected mean Dice {_two(self.expected)} [{_two(self.low)}, {_two(self.high)}] ({LEVEL:.0%} interval, "
            f"{len(self.frames)} frames, if every frame shows a polyp){self._seen_words()}.",
            f"About {percent(self.below_half or 0)} of the masks are expected to be wrong (Dice below .5); {differ}.",
            f"Do not rely on it for {self._unreliable()}.",
        )

    def _seen_words(self) -> str:
        if not self.seen_images:
            return ""
        told = f"; {self.seen_images} of them were seen in training"
        many = self.seen_images > MOST_SEEN * len(self.frames)
        return f"{told}, so that this is no estimate for new frames" if many else told

    def _unreliable(self) -> str:
        parts = []
        for flag, words in (
            (DOUBTFUL, "frame(s) flagged doubtful"),
            (EMPTY, "frame(s) without a mask"),
            (UNLIKE, "frame(s) unlike those learned from"),
        ):
            count = sum(frame.flag == flag for frame in self.frames)
            if count:
                parts.append(f"the {count} {words}")
        return _list([*parts, "polyps that were missed altogether", "other models", "decisions about a patient"])

    def content(self) -> dict[str, Any]:
        """For JSON."""
        counts = {name.replace(" ", "_"): self.share(name) for name in (DOUBTFUL, EMPTY, UNLIKE)}
        return {
            "model": self.model,
            "verdict": list(self.verdict),
            "refused": self.refused or None,
            "expected_dice": self.expected,
            "low": self.low,
            "high": self.high,
            "level": LEVEL,
            "below_half": self.below_half,
            "frames": len(self.frames),
            "groups": len({frame.group for frame in self.frames}),
            "given": self.given,
            "repeats": self.repeats,
            "seen_images": self.seen_images,
            "shares": counts,
            "differences": [vars(difference) for difference in self.differences],
        }


def estimate(
    segmenter: Segmenter, given: GivenFrames, *, passport: Passport | None = None, show_progress: bool = True
) -> Estimate:
    """The expected quality of a model with an expectation on distinct frames.

    Raises UsageError for a model of which nothing was learned and for fewer than LEAST distinct frames.
    """
    learned = segmenter.expectation
    if learned is None:
        raise UsageError(
            f"nothing was learned of the quality of {segmenter.name}: estimates are made for models whose folder holds "
            "an expectation.json, such as the shipped one; learn one of yours with training_scripts/fit_expectation.py"
        )
    if len(given.frames) < LEAST:
        raise UsageError(
            f"{len(given.frames)} distinct frame(s) are too few: an estimate needs {LEAST} or more "
            f"({given.given} were given, {given.repeats} of them repeats)"
        )
    rows, values, measured = [], [], []
    drawn: list[tuple[float, str, Image.Image]] = []
    views = bool(set(learned.three_passes.features) & set(VIEW_FEATURES))
    for frame in tqdm(
        given.frames, desc="estimating", unit="frame", leave=False, disable=None if show_progress else True
    ):
        row, value = _look(segmenter, learned, frame.image, name=frame.name, group=frame.group, views=views)
        rows.append(row)
        values.append(value)
        measured.append(measure_frame(np.asarray(frame.image)))
        if row.expected_dice is not None:
            drawn = sorted([*drawn, (row.expected_dice, frame.name, frame.image)], key=lambda one: one[:2])[:_SHOWN]
    used = np.array([value for value in values if value is not None])
    refused = _refusal(rows)
    expected = low = high = below = None
    if not refused:
        expected = float(used.mean())
        groups = len({row.group for row, value in zip(rows, values, strict=True) if value is not None})
        low, high = read_interval(learned.content["interval"]).bounds(expected, groups=groups)
        below = float(read_predictor(learned.content["failure"])(used[:, None]).mean())
    return Estimate(
        model=segmenter.name,
        frames=tuple(rows),
        given=given.given,
        repeats=given.repeats,
        seen_images=None if passport is None else _seen(passport, given),
        refused=refused,
        expected=expected,
        low=low,
        high=high,
        below_half=below,
        differences=_differences(measured, learned.content["seen"]),
        pictures=tuple((name, _overlay(segmenter, image)) for _, name, image in drawn),
    )


def _look(
    segmenter: Segmenter, learned: Expectation, image: Image.Image, *, name: str, group: str, views: bool
) -> tuple[FrameEstimate, float | None]:
    """A frame's row, and its part of the mean: an empty mask counts as what is expected of one."""
    pixels = segmenter.prepare([image])[0]
    colors = to_colors(pixels, segmenter.processor)
    if learned.gate.unlike(describe_place(colors)[None])[0]:
        return FrameEstimate(name=name, group=group, expected_dice=None, flag=UNLIKE, polyp_share=0.0), None
    predictor = learned.three_passes
    own = set(predictor.features) - set(VIEW_FEATURES)
    look = look_at(segmenter, pixels, views=views, name=name, features=own)
    share = float((look.logits > 0).mean())
    value = float(predictor(np.array([[look.features[feature] for feature in predictor.features]]))[0])
    flag = EMPTY if share == 0 else learned.of_frame(look.logits, pixels, segmenter.processor).flag
    expected = None if flag == EMPTY else value
    return FrameEstimate(name=name, group=group, expected_dice=expected, flag=flag, polyp_share=share), value


def _refusal(rows: Sequence[FrameEstimate]) -> str:
    unlike = float(np.mean([row.flag == UNLIKE for row in rows]))
    if unlike > MOST_UNLIKE:
        return f"{percent(unlike)} of them are unlike the endoscopic frames that estimates were learned from"
    empty = float(np.mean([row.flag == EMPTY for row in rows]))
    if empty > MOST_EMPTY:
        return (
            f"the model finds no polyp in {percent(empty)} of them, and whether there are any cannot be told without "
            "labels"
        )
    return ""


def _overlay(segmenter: Segmenter, image: Image.Image) -> Image.Image:
    logits = segmenter.runtime.polyp_logits(segmenter.prepare([image]))[0]
    return draw_overlay(image, read_logits(segmenter.runtime.resize(logits, (image.height, image.width))))


def _differences(
    measured: Sequence[Mapping[str, float]], seen: Mapping[str, Sequence[float]]
) -> tuple[Difference, ...]:
    found = []
    for name, (more, less) in WORDS.items():
        if name not in seen or name not in measured[0]:
            continue
        mean, (before, spread) = float(np.mean([row[name] for row in measured])), seen[name]
        effect = (mean - before) / spread if spread > 0 else 0.0
        found.append(
            Difference(measure=name, mean=mean, seen=before, effect=effect, words=more if effect > 0 else less)
        )
    return tuple(sorted(found, key=lambda one: -abs(one.effect)))


def _seen(passport: Passport, given: GivenFrames) -> int:
    """Frames that a passport lists, or nearly."""
    prints = tuple(image_print(frame.digest, frame.image) for frame in given.frames)
    manifest = SplitManifest(dataset="given frames", split="full", part="full", content_id="", images=prints)
    return len(find_collisions(passport, manifest).images())


def _two(value: float | None) -> str:
    return number(value, digits=2)


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def estimate_files(
    segmenter: Segmenter, inputs: Sequence[str], output: Path, *, folder: Path | None = None, limit: int = LIMIT
) -> Estimate:
    """Estimate from files, and write ``estimate.json``, ``frames.csv`` and ``estimate.html`` into ``output``.

    ``folder``: the model's, whose passport says what it saw. Raises what ``read_frames`` and ``estimate`` raise.
    """
    from polypseg.report.estimate import render_estimate

    passport = Passport.load(folder) if folder is not None and (folder / PASSPORT).is_file() else None
    found = estimate(segmenter, read_frames(inputs, output=output, limit=limit), passport=passport)
    learned = segmenter.expectation
    assert learned is not None
    rows = [
        {
            "name": row.name,
            "expected_dice": "" if row.expected_dice is None else f"{row.expected_dice:.3f}",
            "flag": row.flag,
            "polyp_share": f"{row.polyp_share:.6f}",
        }
        for row in found.frames
    ]
    write_csv(output / "frames.csv", rows)
    page = render_estimate(found.content(), frames=rows, pictures=found.pictures, learned=learned.content)
    write_text(output / "estimate.html", page)
    write_json(output / "estimate.json", found.content() | {"environment": environment_record()})
    return found
