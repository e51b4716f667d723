"""Evaluation receipts: one file a test that holds enough to compute every score and interval in it again.

A receipt has each image's measures, the counts behind the curves over 256 thresholds and the calibration bins, packed,
and what identifies the images. docs/receipts.md describes its fields. No other file knows their names: the rest of the
package reads a ``Receipt``.
"""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.stats import binomtest

from polypseg.data.catalog import NEGATIVES, is_synthetic_name, title_of
from polypseg.errors import PolypSegError, UsageError, unknown_name
from polypseg.evaluation.conventions import CONVENTIONS, Convention
from polypseg.evaluation.image_metrics import MEASURES, Floats, ImageMeasures
from polypseg.evaluation.metrics import mean_with_interval
from polypseg.files import file_sha256, read_json, write_text
from polypseg.inference.operating_point import OPERATING_POINT_KEY
from polypseg.provenance.origin import WeightsOrigin
from polypseg.provenance.passport import KINDS, Rule, SplitManifest
from polypseg.statistics import RESAMPLES, Interval, draw_means, sample_weights, score_set
from polypseg.statistics.intervals import interval_of, intervals_of
from polypseg.statistics.scores import METRICS, ScoreSet

Test = tuple[str, str, str]
"""Dataset, split and part."""
CONVENTION = "paper"
"""Whose scores cards, tables, the model-index and pages show."""
RECEIPT = 1
"""Version of the format, under the key ``receipt``."""
SUFFIX = ".receipt.json"
SEED = 0
"""Of every bootstrap in a receipt."""
BY_IMAGE = f"95 % percentile bootstrap over images, {RESAMPLES} resamples, seed {SEED}"
BY_CLUSTER = (
    f"95 % expanded percentile bootstrap (Hesterberg 2015) over clusters, {RESAMPLES} resamples, seed {SEED}; a "
    "cluster is a video clip where clips are known, else an image; images of equal pixels count once"
)
_SHAPES = {"curve": (2, 256), "rescaled_curve": (2, 256), "calibration": (2, 10, 3), "squared_error": (2,)}
PACKED: dict[str, tuple[str, ...]] = {
    name: tuple(convention.name for convention in CONVENTIONS.values() if name in convention.needs) for name in _SHAPES
}
"""Measures that are tables, kept packed -> the conventions that need them."""
LARGEST = "largest_component"
"""Column: pixels of the prediction's largest 8-connected component; 0 where nothing is predicted."""
BOOTSTRAP = {"by_image": BY_IMAGE, "by_cluster": BY_CLUSTER, "resamples": RESAMPLES, "seed": SEED}
"""What a receipt says of its bootstraps."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOLERANCE = 1e-7
"""Relative and absolute: sums in another order on another machine."""
_SHOWN = 60  # characters of a value in a difference


# -- images' measures as JSON ------------------------------------------------------------------------------------------


def pack(values: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON: zlib and base64 of little-endian numbers; whole numbers as differences along the last axis."""
    whole = values.dtype.kind in "iu"
    stored = np.diff(values, axis=-1, prepend=0).astype("<i8") if whole else values.astype("<f8")
    text = base64.b64encode(zlib.compress(stored.tobytes())).decode()
    return {"shape": list(values.shape), "type": stored.dtype.str, "data": text}


def unpack(content: Mapping[str, Any]) -> NDArray[Any]:
    """The array of ``pack``. Raises ValueError for anything else."""
    if content["type"] not in ("<i8", "<f8"):
        raise ValueError(f"unknown type {content['type']!r}")
    try:
        data = zlib.decompress(base64.b64decode(content["data"], validate=True))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    stored = np.frombuffer(data, dtype=content["type"]).reshape(content["shape"])
    return stored if stored.dtype.kind == "f" else stored.astype(np.int64).cumsum(axis=-1)


def pack_tables(images: Sequence[ImageMeasures], conventions: Sequence[Convention]) -> dict[str, dict[str, Any]]:
    """The measures of N images that are tables, each packed as (N, ...); those that no convention needs stay out."""
    needed = _needed_tables([convention.name for convention in conventions])
    return {name: pack(np.array([getattr(image, name) for image in images])) for name in needed}


def _needed_tables(conventions: Sequence[str]) -> list[str]:
    return [name for name, needed_by in PACKED.items() if set(needed_by) & set(conventions)]


def image_rows(
    images: Sequence[ImageMeasures],
    manifest: SplitManifest,
    conventions: Sequence[Convention],
    *,
    largest: Sequence[int],
) -> list[dict[str, Any]]:
    """One row per image: id, clip, center where the dataset tells it, measures that are numbers, and
    ``convention.output`` where images have such scores.

    None where an image has no such score. ``largest``: pixels of each prediction's largest component.
    """
    centers = any(known.centre for known in manifest.images)
    rows: list[dict[str, Any]] = [
        {
            "id": known.id,
            "clip": known.clip,
            **({"centre": known.centre} if centers else {}),
            **image.row(),
            LARGEST: area,
        }
        for known, image, area in zip(manifest.images, images, largest, strict=True)
    ]
    for convention in conventions:
        for output, values in (convention.per_image(images) or {}).items():
            for row, value in zip(rows, values, strict=True):
                row[f"{convention.name}.{output}"] = float(value) if value == value else None
    return rows


def false_alarms(
    rows: Sequence[Mapping[str, Any]], pixels: Sequence[str], *, minimal_area: int
) -> dict[str, Any] | None:
    """What is predicted on frames without polyp; None where the test has none. Frames of equal ``pixels`` count once.

    A frame is an alarm when its largest predicted component (8-connected) has at least ``minimal_area`` pixels.
    ``per_100_frames`` with the 95 % Wilson interval, ``predicted_share`` of a frame's area with the bootstrap over
    frames.
    """
    distinct = {key: row for key, row in zip(pixels, rows, strict=True) if row["true"] == 0}
    if not distinct:
        return None
    alarms = sum(row[LARGEST] >= minimal_area for row in distinct.values())
    wilson = binomtest(alarms, len(distinct)).proportion_ci(method="wilson")
    share = mean_with_interval([row["predicted"] / (row["height"] * row["width"]) for row in distinct.values()])
    return {
        "minimal_area_pixels": minimal_area,
        "frames": len(distinct),
        "alarms": alarms,
        "per_100_frames": {
            "mean": 100 * alarms / len(distinct),
            "low": 100 * float(wilson.low),
            "high": 100 * float(wilson.high),
            "n": len(distinct),
        },
        "predicted_share": share | {"n": len(distinct)},
    }


def describe(conventions: Sequence[Convention]) -> dict[str, dict[str, str]]:
    """What each convention means."""
    return {c.name: {"title": c.title, "formula": c.formula, "empty": c.empty, "source": c.source} for c in conventions}


# -- scores by clusters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which images of a test belong together."""

    title: str
    pixels: tuple[str, ...]
    clips: tuple[str, ...] | None
    """None where the dataset tells no clips."""

    @classmethod
    def of(cls, manifest: SplitManifest) -> "Layout":
        """By what the manifest notes of each image."""
        clips = tuple(image.clip for image in manifest.images if image.clip is not None)
        known = clips if len(clips) == len(manifest.images) else None
        return cls(title=manifest.title, pixels=tuple(image.pixels for image in manifest.images), clips=known)

    def scores(self, columns: Mapping[str, Floats], chosen: NDArray[np.bool_]) -> ScoreSet:
        """Columns (N,), of the chosen images (N,) only."""
        places = np.flatnonzero(chosen)
        return score_set(
            {name: values[places] for name, values in columns.items()},
            title=self.title,
            clusters=None if self.clips is None else [self.clips[k] for k in places],
            repeats=[self.pixels[k] for k in places],
        )

    def record(self) -> dict[str, Any]:
        """For JSON: how many images, how many after repeats were merged, how many clusters."""
        everything = self.scores({"": np.zeros(len(self.pixels))}, np.ones(len(self.pixels), dtype=bool))
        return {
            "by": "image" if self.clips is None else "clip",
            "images": everything.images,
            "observations": everything.observations,
            "repeats_merged": everything.images - everything.observations,
            "clusters": everything.cluster_count,
        }


def cluster_scores(
    images: Sequence[ImageMeasures], layout: Layout, conventions: Sequence[Convention]
) -> dict[str, dict[str, dict[str, Any]]]:
    """convention -> output -> mean over observations with the interval over clusters; see ``BY_CLUSTER``.

    Scores of single images have their intra-cluster correlation, design effect and effective sample size as well.
    """
    return {c.name: _by_cluster(c, images, layout) for c in conventions}


def _by_cluster(convention: Convention, images: Sequence[ImageMeasures], layout: Layout) -> dict[str, dict[str, Any]]:
    everything = np.ones(len(images), dtype=bool)
    single = convention.per_image(images)
    if single is None:
        return _reduced(convention, images, layout)
    whole = {output: values for output, values in single.items() if np.isfinite(values).all()}
    found = _means(layout.scores(whole, everything)) if whole else {}
    for output, values in single.items():
        defined = np.isfinite(values)
        if output not in whole:
            found |= _means(layout.scores({output: values}, defined)) if defined.any() else {output: _undefined()}
    return {output: found[output] for output in single}


def _means(scores: ScoreSet) -> dict[str, dict[str, Any]]:
    intervals, weights = intervals_of(draw_means(scores, seed=SEED)), sample_weights(scores)
    return {
        name: _entry(intervals[name], scores)
        | {
            "correlation": weights[name].correlation,
            "design_effect": weights[name].design_effect,
            "effective_size": weights[name].effective_size,
        }
        for name in scores.models
    }


def _reduced(convention: Convention, images: Sequence[ImageMeasures], layout: Layout) -> dict[str, dict[str, Any]]:
    """Scores of the whole set: the columns of the convention's table are drawn together, then reduced."""
    assert convention.reduce is not None
    table = convention.numbers(images)
    scores = layout.scores({str(k): column for k, column in enumerate(table.T)}, np.ones(len(images), dtype=bool))
    draws = draw_means(scores, seed=SEED)
    estimates, values = convention.reduce(draws.estimates), convention.reduce(draws.values)
    found = {}
    for output, estimate, sample in zip(convention.outputs, estimates, values.T, strict=True):
        defined = sample[np.isfinite(sample)]
        found[output] = _undefined() | {"n": scores.observations, "clusters": scores.cluster_count}
        if np.isfinite(estimate) and len(defined):
            found[output] = _entry(interval_of(defined, estimate, freedom=draws.freedom), scores)
    return found


def _entry(interval: Interval, scores: ScoreSet) -> dict[str, Any]:
    counts = {"n": scores.observations, "clusters": scores.cluster_count}
    return {"mean": float(interval.estimate), "low": interval.low, "high": interval.high, **counts}


def _undefined() -> dict[str, Any]:
    return {"mean": None, "low": None, "high": None, "n": 0, "clusters": 0}


# -- the file ----------------------------------------------------------------------------------------------------------


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of a receipt's content, whatever its layout, without the digest itself."""
    bare = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(bare, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def save_receipt(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a receipt with its digest, one line an image; return its path."""
    whole = {**content, "digest": digest_of(content)}
    lines = []
    for key, value in whole.items():
        if key == "images":
            text = "[\n    " + ",\n    ".join(_compact(row) for row in value) + "\n  ]"
        elif key in ("manifest", "tables"):
            text = "{\n    " + ",\n    ".join(f"{_compact(k)}: {_compact(v)}" for k, v in value.items()) + "\n  }"
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")
        lines.append(f"  {_compact(key)}: {text}")
    return write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def receipt_path(folder: Path, name: str, manifest: SplitManifest, *, at_operating_point: bool) -> Path:
    """Where the receipt of a test belongs: ``<folder>/<name>/<dataset>.<split>.<part>.receipt.json``.

    One of masks at an operating point has ``.operating-point`` before the suffix, so that it replaces none of masks at
    probability 0.5.
    """
    point = f".{OPERATING_POINT_KEY.replace('_', '-')}" if at_operating_point else ""
    return folder / name / f"{manifest.dataset}.{manifest.split}.{manifest.part}{point}{SUFFIX}"


def refuse_other_weights(path: Path, *, sha256: str | None) -> None:
    """Raise UsageError where the receipt at ``path`` is of other weights, which a new one would replace."""
    if not path.is_file():
        return
    theirs = read_receipt(path).model_sha256
    if sha256 and theirs and sha256 != theirs:
        raise UsageError(f"{path} is of other weights (sha256 {theirs[:12]}): give another --name or --output")


def is_receipt(content: Any) -> bool:
    """Whether the content of a JSON file is a receipt of this format."""
    return isinstance(content, dict) and content.get("receipt") == RECEIPT


def read_content(path: Path) -> dict[str, Any]:
    """A receipt's JSON as it is. Raises PolypSegError for a file that is missing, no JSON or something else."""
    content = read_json(path)
    if not is_receipt(content):
        version = content.get("receipt") if isinstance(content, dict) else None
        what = "no evaluation receipt" if version is None else f"a receipt of format {version}, not {RECEIPT}"
        raise PolypSegError(f"{path} is {what}: give a file that `polypseg evaluate` of this version wrote")
    return dict(content)


# -- what is read of it ------------------------------------------------------------------------------------------------


class _Record(BaseModel):
    """What is read of an object of a receipt; its other fields are for the check only."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Score(_Record):
    """A mean with its 95 % interval; None where no image defines it."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int | None = None
    effective_size: float | None = None
    """Independent images that are worth as much; None where single images have no such score."""


class Rate(_Record):
    """A rate with its 95 % interval."""

    mean: float
    low: float
    high: float


class Share(_Record):
    """A mean over frames."""

    mean: float


class ModelRecord(_Record):
    """The weights that were tested."""

    sha256: str | None = None
    row: str | None = None
    """Id of the table's row."""
    seed: int | None = None
    """Of the recipe."""
    weights_origin: WeightsOrigin | None = None


class DatasetRecord(_Record):
    """What the weights were tested on."""

    name: str
    title: str
    split: str
    part: str
    content_id: str
    synthetic: bool
    manifest: str
    """Digest of the images' prints."""
    clips_known: bool


class SeenRecord(_Record):
    """What was done about images that the model saw."""

    rule: Rule
    passport: str | None
    """SHA-256 of the model's passport."""
    reason: str | None
    """Why nothing is known."""
    excluded: Sequence[str]


class CollisionCounts(_Record):
    """How many images the model saw."""

    tested: int
    colliding: int
    kinds: Mapping[str, int]
    unchecked: Sequence[str]
    """Stages whose images are not listed."""


class Bootstrap(_Record):
    """How the intervals were drawn, in words."""

    by_cluster: str


class ClusterCounts(_Record):
    """Which images belong together; see ``Layout.record``."""

    by: str
    images: int
    repeats_merged: int
    clusters: int


class FalseAlarms(_Record):
    """What is predicted on frames without polyp; see ``false_alarms``."""

    minimal_area_pixels: int
    frames: int
    per_100_frames: Rate
    predicted_share: Share


class Definition(_Record):
    """What a convention means."""

    formula: str
    empty: str


class ImageRow(_Record):
    """One image: its counts, and as extra fields its other measures and ``convention.output``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    id: str
    clip: str | None = None
    centre: str | None = None
    intersection: int
    predicted: int
    true: int

    @property
    def scores(self) -> dict[str, float | None]:
        """``convention.output`` -> score of this image."""
        return {name: value for name, value in self.__pydantic_extra__.items() if "." in name}


class Prints(_Record):
    """What identifies the images."""

    pixels: Sequence[str]


class Environment(_Record):
    """What computed it, and when."""

    model_config = ConfigDict(extra="forbid")

    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")
    git_revision: str | None = Field(pattern=r"^[0-9a-f]{40}(-dirty)?$")
    versions: Mapping[str, str] = Field(min_length=1)
    python: str = Field(min_length=1)
    platform: str = Field(min_length=1)
    omp_num_threads: str | None
    command: Sequence[str] = Field(min_length=1)


class Receipt(_Record):
    """One receipt file: one source of predictions on one part of one dataset. ``differences`` says whether it holds."""

    path: Path
    content: Mapping[str, Any] = Field(repr=False)
    """The JSON that it was read from."""
    name: str
    model: ModelRecord | None
    """None for predictions of unknown weights."""
    dataset: DatasetRecord
    n: int
    seen: SeenRecord
    collisions: CollisionCounts | None
    surface_tolerance_pixels: float = Field(ge=0)
    bootstrap: Bootstrap
    clusters: ClusterCounts
    scores: Mapping[str, Mapping[str, Score]]
    """convention -> output -> score, images drawn one by one."""
    scores_by_cluster: Mapping[str, Mapping[str, Score]]
    false_alarms: FalseAlarms | None
    definitions: Mapping[str, Definition]
    images: Sequence[ImageRow]
    manifest: Prints
    tables: Mapping[str, Mapping[str, Any]]
    environment: Environment
    digest: str

    @classmethod
    def of(cls, content: Mapping[str, Any], *, path: Path) -> "Receipt":
        """From the JSON of a file. Raises PolypSegError that names the first field which is missing or not as it was
        written."""
        try:
            return cls.model_validate({**content, "path": path, "content": content})
        except ValidationError as error:
            first = error.errors()[0]
            field, what = ".".join(map(str, first["loc"])), first["msg"]
            raise PolypSegError(f"{path} is a damaged receipt ({field}: {what}): evaluate again") from error

    @property
    def test(self) -> Test:
        """Dataset, split and part."""
        return self.dataset.name, self.dataset.split, self.dataset.part

    @property
    def stated(self) -> Mapping[str, Score]:
        """metric -> mean with its interval by cluster, by CONVENTION: what tables and cards state."""
        return self.scores_by_cluster[CONVENTION]

    @property
    def without_polyps(self) -> bool:
        """Whether the test is of frames without polyp, where false alarms count and no overlap does."""
        return self.dataset.name == NEGATIVES

    @property
    def plain_dice(self) -> Score | None:
        """The mean Dice of masks at 0.5, which words about a model state; None for others and for polyp-free frames."""
        without_dice = self.without_polyps or CONVENTION not in self.scores_by_cluster
        if self.operating_point is not None or without_dice or self.stated["dice"].mean is None:
            return None
        return self.stated["dice"]

    @property
    def mean_dice(self) -> float:
        """By CONVENTION, over observations: images of equal pixels count once."""
        mean = self.stated["dice"].mean
        assert mean is not None, "of a test with polyps"
        return mean

    def per_image(self, metric: str) -> Floats:
        """(N,) of one metric under CONVENTION, in the order of ``images``; NaN where an image has no such score."""
        return np.array([row.scores[f"{CONVENTION}.{metric}"] for row in self.images], dtype=np.float64)

    @property
    def operating_point(self) -> Mapping[str, Any] | None:
        """Where the probabilities were cut into masks; None for the default of 0.5 without a minimum area."""
        point: Mapping[str, Any] | None = (self.content.get("predictions") or {}).get(OPERATING_POINT_KEY)
        return point

    @property
    def row(self) -> str:
        """Id of the table's row, or the receipt's name where it belongs to none."""
        return (self.model.row if self.model else None) or self.name

    @property
    def seed(self) -> int | None:
        """Of the recipe; None where it is not known."""
        return self.model.seed if self.model else None

    @property
    def model_sha256(self) -> str | None:
        """Of the weights; None where it is not recorded."""
        return self.model.sha256 if self.model else None

    @property
    def origin(self) -> WeightsOrigin:
        """Where the weights come from; an empty record where that is unknown."""
        return (self.model.weights_origin if self.model else None) or WeightsOrigin()

    @property
    def shows_polyps(self) -> bool:
        """Whether any image of the test has a polyp; without one, only false alarms can be counted."""
        return any(row.true for row in self.images)

    @property
    def seen_images(self) -> int | None:
        """Images that collide with what the model saw; None where that was not checked."""
        return None if self.collisions is None else self.collisions.colliding

    @property
    def has_calibration(self) -> bool:
        """Whether it was made with the convention ``calibration``."""
        return "calibration" in self.tables

    def calibration(self) -> Floats:
        """(2, bins, 3) sums over images: outside and inside the polyp, by bin: pixels, confidence, correct pixels."""
        return unpack(self.tables["calibration"]).sum(axis=0)

    @cached_property
    def file_sha256(self) -> str:
        """Of the receipt file."""
        return file_sha256(self.path)

    @property
    def is_unchanged(self) -> bool:
        """Whether its digest is that of its content."""
        return digest_of(self.content) == self.digest

    def differences(self) -> list[str]:
        """What is not as computed again; see ``check_receipt``."""
        return check_content(self.content)

    def summary(self) -> dict[str, Any]:
        """For JSON: what was tested, and the scores."""
        return {key: self.content[key] for key in ("name", "dataset", "n", "scores", "scores_by_cluster")}


def read_receipt(path: Path) -> Receipt:
    """A receipt. Raises PolypSegError for a file that is missing, damaged or something else."""
    return Receipt.of(read_content(path), path=path)


def find_receipts(folder: Path) -> dict[Path, Receipt]:
    """Path -> receipt, of all in a folder and below it, sorted by path."""
    return {path: read_receipt(path) for path in sorted(folder.rglob(f"*{SUFFIX}"))}


def read_score_set(
    receipts: Mapping[str, Sequence[Receipt]], *, metric: str = "dice", repeats: Sequence[Sequence[str]] = ()
) -> ScoreSet:
    """Scores from receipts: model id -> one receipt a seed.

    metric: a column of the images' rows, ``convention.output``, such as ``paper.dice``; without a convention CONVENTION
    is meant. Frames of known clips are clustered by clip. repeats: groups of ids that show the same frame, beside
    images of equal pixels, which receipts tell by themselves. Raises UsageError when the receipts are not of the same
    images, and for a column that they do not have or that some images leave undefined.
    """
    everything = [receipt for seeds in receipts.values() for receipt in seeds]
    if not everything or not all(receipts.values()):
        raise UsageError("models can be compared only by results: each needs at least one receipt")
    if len({len(seeds) for seeds in receipts.values()}) > 1:
        counts = ", ".join(f"{name} {len(seeds)}" for name, seeds in receipts.items())
        raise UsageError(f"models are compared with as many seeds each, not {counts}: leave the surplus out")
    first = everything[0]
    for other in everything[1:]:
        _check_same_images(first, other)
    ids, clips = [row.id for row in first.images], [row.clip for row in first.images]
    labels = dict(zip(ids, first.manifest.pixels, strict=True))
    labels |= {record_id: f"group {number}" for number, group in enumerate(repeats) for record_id in group}
    return score_set(
        {name: np.array([_column(receipt, metric) for receipt in seeds]) for name, seeds in receipts.items()},
        title=f"{first.dataset.title}, {first.dataset.split} {first.dataset.part}",
        clusters=None if None in clips else [str(clip) for clip in clips],
        repeats=[labels[record_id] for record_id in ids],
    )


def _column(receipt: Receipt, metric: str) -> list[float]:
    """One score an image."""
    wanted, columns = metric if "." in metric else f"{CONVENTION}.{metric}", receipt.images[0].scores
    if wanted not in columns:
        raise unknown_name("metric", metric, [*METRICS, *columns])
    values = [row.scores[wanted] for row in receipt.images]
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        undefined = len(values) - len(defined)
        raise UsageError(f"{wanted} is undefined on {undefined} of {len(values)} images: choose another metric")
    return defined


def _check_same_images(first: Receipt, other: Receipt) -> None:
    names = [f"{receipt.name} on {receipt.dataset.title}" for receipt in (first, other)]
    for what, a, b in (
        ("the images", [row.id for row in first.images], [row.id for row in other.images]),
        ("the content of the images", first.dataset.manifest, other.dataset.manifest),
    ):
        if a != b:
            raise UsageError(f"{names[0]} and {names[1]} differ in {what}: evaluate both again on the same images")


# -- checking ----------------------------------------------------------------------------------------------------------


def check_receipt(path: Path) -> list[str]:
    """Compute everything in a receipt again from its images' measures; return each difference as ``field: what``.

    The bootstraps are drawn anew with the stated seed. Nothing is passed over: what cannot be computed is a difference
    too. Raises PolypSegError for a file that is no receipt.
    """
    return check_content(read_content(path))


def check_content(content: Mapping[str, Any]) -> list[str]:
    """As ``check_receipt``, of a receipt's JSON."""
    try:
        return list(_differences(content))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return [f"the receipt is damaged: {type(error).__name__} {error}"]


def _differences(content: Mapping[str, Any]) -> Iterator[str]:
    rows = content["images"]
    if content["n"] != len(rows):
        yield f"n: stored {content['n']}, but there are {len(rows)} images"
    yield from _check_types(content)
    yield from compare(content["bootstrap"], BOOTSTRAP, "bootstrap")
    yield from _check_dataset(content["dataset"])
    for row in rows:
        yield from compare(content["surface_tolerance_pixels"], row["tolerance"], "surface_tolerance_pixels")
    yield from _check_model(content)
    yield from _check_collisions(content)
    manifest = yield from _check_manifest(content)
    images, unusable = yield from _read_measures(content)
    if manifest is not None:
        yield from _check_scores(content, manifest, images, unusable)
    if content.get("digest") != digest_of(content):
        yield "digest: not that of the content, so something was changed after the receipt was written"


def _check_types(content: Mapping[str, Any]) -> Iterator[str]:
    """Whether every field that is read is of its type, and the environment has all its fields."""
    try:
        Receipt.model_validate({**content, "path": Path(), "content": content})
    except ValidationError as error:
        yield from (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _check_dataset(dataset: Mapping[str, Any]) -> Iterator[str]:
    """Whether a dataset is called what the table calls it."""
    yield from compare(dataset["title"], title_of(dataset["name"]), "dataset.title")
    yield from compare(dataset["synthetic"], is_synthetic_name(dataset["name"]), "dataset.synthetic")


def _check_model(content: Mapping[str, Any]) -> Iterator[str]:
    """Whether digests are digests, and the weights are those of their own record."""
    model = content["model"]
    if model is None:
        return
    digest, recorded = model["sha256"], (model["weights_origin"] or {}).get("sha256")
    for field, value in (("model.sha256", digest), ("model.weights_origin.sha256", recorded)):
        if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            yield f"{field}: {_shown(value)} is no SHA-256 (64 hexadecimal digits)"
    if digest and recorded and digest != recorded:
        yield f"model.sha256: stored {_shown(digest)}, but the weights' record says {_shown(recorded)}"
    seed = model["seed"]
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        yield f"model.seed: {_shown(seed)} is no whole number"


def _check_manifest(content: Mapping[str, Any]) -> Generator[str, None, SplitManifest | None]:
    """Yields differences; returns the manifest, or None where it is not of these images."""
    ids = [row["id"] for row in content["images"]]
    try:
        manifest = SplitManifest.from_content(content["manifest"])
    except ValueError as error:
        yield f"manifest: {error}"
        return None
    dataset = content["dataset"]
    for key in ("split", "part", "content_id"):
        yield from compare(dataset[key], getattr(manifest, key), f"dataset.{key}")
    yield from compare(dataset["name"], manifest.dataset, "dataset.name")
    yield from compare(dataset["manifest"], manifest.digest, "dataset.manifest")
    yield from compare(dataset["clips_known"], Layout.of(manifest).clips is not None, "dataset.clips_known")
    if ids != [image.id for image in manifest.images]:
        yield "images: their ids are not those of the manifest"
        return None
    return manifest


def _read_measures(content: Mapping[str, Any]) -> Generator[str, None, tuple[list[ImageMeasures], set[str]]]:
    """Yields differences; returns the images' measures and the conventions that cannot be computed from them."""
    rows, tables, unusable = content["images"], {}, set[str]()
    needed = _needed_tables(list(content["definitions"]))
    for name, needed_by in PACKED.items():
        shape = (len(rows), *_SHAPES[name])
        if name not in needed:
            continue
        try:
            tables[name] = unpack(content["tables"][name])
            problem = "" if tables[name].shape == shape else f"is of shape {tables[name].shape}, not {shape}"
        except (KeyError, ValueError) as error:
            problem = f"is missing or damaged ({error})"
        if problem:
            yield f"tables.{name}: {problem}; not recomputable: {', '.join(needed_by)}"
            tables[name], unusable = np.zeros(shape), unusable | set(needed_by)
    names = [name for name in ImageMeasures.__dataclass_fields__ if name not in PACKED]
    images = []
    for k, row in enumerate(rows):
        known = {name: row[name] for name in names if name in row or name not in MEASURES}
        arrays: dict[str, Any] = {name: table[k] for name, table in tables.items()}
        if "squared_error" in arrays:
            arrays["squared_error"] = tuple(float(value) for value in arrays["squared_error"])
        images.append(ImageMeasures(**known, **arrays))
    return images, unusable


def _check_scores(
    content: Mapping[str, Any], manifest: SplitManifest, images: Sequence[ImageMeasures], unusable: set[str]
) -> Iterator[str]:
    names = list(content["definitions"])
    unknown = [name for name in names if name not in CONVENTIONS]
    if unknown:
        yield f"definitions: not recomputable, as this version does not know {', '.join(unknown)}"
    known = [CONVENTIONS[name] for name in names if name in CONVENTIONS]
    rows = content["images"]
    expected_rows = image_rows(images, manifest, known, largest=[row[LARGEST] for row in rows])
    for stored, expected in zip(rows, expected_rows, strict=True):
        kept = {key: value for key, value in stored.items() if key.split(".")[0] not in unknown}
        yield from compare(kept, expected, f"images[{expected['id']}]")
        yield from _check_counts(stored)
    area = (content["false_alarms"] or {}).get("minimal_area_pixels", 1)
    alarms = false_alarms(rows, content["manifest"]["pixels"], minimal_area=area)
    yield from compare(content["false_alarms"], alarms, "false_alarms")
    layout = Layout.of(manifest)
    conventions = [c for c in known if c.name not in unusable]
    left_out = unusable | set(unknown)
    yield from compare(content["clusters"], layout.record(), "clusters")
    for key, found in (
        ("definitions", describe(conventions)),
        ("scores", {c.name: c.summary(images) for c in conventions}),
        ("scores_by_cluster", cluster_scores(images, layout, conventions)),
    ):
        yield from compare({k: v for k, v in content[key].items() if k not in left_out}, found, key)


def _check_counts(row: Mapping[str, Any]) -> Iterator[str]:
    """Whether the pixel counts of an image are possible together."""
    largest, predicted = row[LARGEST], row["predicted"]
    if not (0 < largest <= predicted or largest == predicted == 0):
        yield f"images[{row['id']}].{LARGEST}: {largest} of {predicted} predicted pixels"
    if not 0 <= row["intersection"] <= min(predicted, row["true"]):
        yield f"images[{row['id']}].intersection: {row['intersection']} of {predicted} and {row['true']} pixels"


def _check_collisions(content: Mapping[str, Any]) -> Iterator[str]:
    """Whether the counts of collisions are those of the listed ones, these of tested images, and the rule was kept."""
    seen, collisions = content["seen"], content["collisions"]
    if (seen["passport"] is None) != (collisions is None):
        yield "seen.passport: collisions are listed where a model has a passport, and only there"
    if collisions is None:
        if not seen["reason"]:
            yield "collisions: neither listed nor a reason given"
        if seen["excluded"]:
            yield "seen.excluded: nothing was checked, so that no image can have been left out"
        return
    hits, ids = collisions["images"], {row["id"] for row in content["images"]}
    kinds = {kind: len({hit["id"] for hit in hits if hit["kind"] == kind}) for kind in KINDS}
    yield from compare(collisions["kinds"], kinds, "collisions.kinds")
    yield from compare(collisions["colliding"], len({hit["id"] for hit in hits}), "collisions.colliding")
    listed = sorted({hit["id"] for hit in hits})
    expected = listed if seen["rule"] == "exclude" else []
    if sorted(seen["excluded"]) != expected or (listed and seen["rule"] == "refuse"):
        done = f"{len(listed)} seen, {len(seen['excluded'])} left out"
        yield f"seen.rule: {_shown(seen['rule'])} is not what was done: {done}"
    yield from compare(collisions["tested"], content["n"] + len(seen["excluded"]), "collisions.tested")
    strangers = {hit["id"] for hit in hits} - ids - set(seen["excluded"])
    if strangers:
        yield f"collisions.images: {min(strangers)} is no image of this test"
    if ids & set(seen["excluded"]):
        yield f"seen.excluded: {min(ids & set(seen['excluded']))} was tested all the same"


def compare(stored: Any, expected: Any, field: str) -> Iterator[str]:
    """Each difference of two JSON-able values as a line; numbers may differ by 1e-7."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in expected:
            if key not in stored:
                yield f"{field}.{key}: missing"
            else:
                yield from compare(stored[key], expected[key], f"{field}.{key}")
        for key in stored:
            if key not in expected:
                yield f"{field}.{key}: stored, but nothing computes it"
    elif not _equal(stored, expected):
        yield f"{field}: stored {_shown(stored)}, recomputed {_shown(expected)}"


def _equal(stored: Any, expected: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (stored, expected))
    if not numbers:
        return type(stored) is type(expected) and bool(stored == expected)
    return abs(stored - expected) <= _TOLERANCE * max(1.0, abs(expected))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
