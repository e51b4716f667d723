"""Where a model's weights come from, and what name that earns them.

Every model carries ``config.weights_origin``; no other file knows its keys, the package reads a ``WeightsOrigin``.
Nothing but full-size weights, trained by the study's recipes or converted from the reference's own files, may bear one
of the twelve ids; everything else says in its name what it is. Their authors publish no checksums, so the record is
believed and the file's own digest stands in it and on the card.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polypseg import zoo
from polypseg.data.catalog import DATASETS, DatasetSpec
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import read_json
from polypseg.provenance.local import CONFIG
from polypseg.recipe import Recipe, load_recipe
from polypseg.zoo import RANDOM, STARTERS, ZooEntry

Kind = Literal["trained", "converted", "untrained"]

WEIGHTS_ORIGIN = "weights_origin"
"""Under which config.json, and what describes predictions, hold the record."""
UNKNOWN = "unknown"
"""The id, and other facts, of weights whose record has none."""
STUDY_RECIPE = "finetune"
STUDY_DATA = "kvasir_seg reference/train"
STUDY_TRAINING_IMAGES = 800
HARMLESS_CHANGES = ("seed", "model.encoder", "training.precision", "training.checkpoint_steps")
"""Recipe settings that another seed or another machine may need, and that make no other study of it; a model's id names
its encoder."""
HARMLESS_PRETRAINING_CHANGES = ("training.precision", "training.checkpoint_steps", "moco_v3.encoder_chunk")
"""Settings of a pretraining recipe that change where or how fast it runs, not what it computes."""
RANDOM_MARK = "*"
"""Ends the short name of a row whose encoder started at random instead of from the pretraining in its name."""
CORPUS_FRAMES = {"hyperkvasir": 99_417, "imagenet1k": 1_281_167, "imagenet1k_only": 1_281_167}
"""Frames of a complete corpus; a hundredth of them may be unreadable."""


# -- the record --------------------------------------------------------------------------------------------------------


class _Record(BaseModel):
    """What is read of a record in JSON; null and {} are as absent, and unknown keys stay in ``content``."""

    model_config = ConfigDict(frozen=True, strict=True)

    content: dict[str, Any] = Field(default_factory=dict, repr=False)
    """The JSON itself, in the order in which it is written."""

    @model_validator(mode="before")
    @classmethod
    def _keep_content(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        content = {key: value.content if isinstance(value, _Record) else value for key, value in given.items()}
        return {key: value for key, value in given.items() if value is not None and value != {}} | {"content": content}

    @classmethod
    def of(cls, content: Mapping[str, Any] | None, *, path: Path | str = CONFIG) -> Self:
        """From JSON; ``path`` is the file that held it. Raises UsageError that names the first wrong field."""
        try:
            return cls.model_validate({} if content is None else content)
        except ValidationError as error:
            first = error.errors()[0]
            field, what = ".".join(map(str, first["loc"])), first["msg"]
            raise UsageError(
                f"{path} has a damaged {WEIGHTS_ORIGIN} ({f'{field}: ' if field else ''}{what}): export the model again"
            ) from error

    def updated(self, **fields: Any) -> Self:
        """With these fields set."""
        return self.of(self.content | fields)

    def without(self, *names: str) -> Self:
        """Without these fields."""
        return self.of({key: value for key, value in self.content.items() if key not in names})


class ConversionRecord(_Record):
    """The published file that weights were converted from."""

    format: str = UNKNOWN
    file: str = UNKNOWN
    sha256: str = UNKNOWN
    upstream: str = UNKNOWN


class PretrainingRecord(_Record):
    """How an encoder was pretrained, as its file says: in a run of the publisher's own, or by whom it was converted."""

    method: str | None = None
    encoder: str | None = None
    """timm name."""
    recipe: str | None = None
    recipe_changes: Sequence[str] = ()
    seed: int | None = None
    image_size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    total_batch_size: int | None = None
    frames: int = 0
    source: str | None = None
    """Name of the folder or archive of the frames."""
    content_id: str | None = None
    corpus: str | None = None
    """What ids of models call the frames, where they are not the row's."""
    passport: str | None = None
    """SHA-256 of the passport beside the encoder."""
    sha256: str | None = None
    """Of the encoder's file."""
    converted_from: ConversionRecord | None = None

    @property
    def frames_in_words(self) -> str:
        """``1000 frames of hyperkvasir``."""
        return f"{self.frames} frames of {self.source or 'an unnamed source'}"


class ContinuationRecord(_Record):
    """The fine-tuned model that training went on from."""

    sha256: str | None = None
    recipe: str | None = None
    finetuned_on: str | None = None


class AverageRecord(_Record):
    """The weights of ``continued_from`` that were mixed into those of the run's end."""

    share: float = Field(ge=0, le=1)
    """Of the run's end; the rest is of the weights that it began with."""


class AdaptationRecord(_Record):
    """The frames that weights were adapted to, and what that gained on frames left out."""

    method: str
    labelled: bool
    frames: int
    groups: int
    gain: float
    bound: float
    """Lower bound of the gain, one-sided 95 %."""
    source: str = Field(alias="from")
    """SHA-256 of the weights before."""


class WeightsOrigin(_Record):
    """What is known of a model's weights: ``config.weights_origin``, and what name that earns them."""

    model_id: str = UNKNOWN
    row: str | None = None
    """Id of the row of the table that the weights stand for."""
    encoder_initialisation: str | None = None
    """What the encoder started from, as ``weights.loading.describe_source`` words it."""
    scale: str | None = None
    """``full`` or ``small``."""
    pretraining: PretrainingRecord | None = None
    continued_from: ContinuationRecord | None = None
    averaged_with_start: AverageRecord | None = None
    converted_from: ConversionRecord | None = None
    adapted: AdaptationRecord | None = None
    recipe: str | None = None
    """Of fine-tuning."""
    recipe_changes: Sequence[str] = ()
    finetuned_on: str | None = None
    """``<dataset> <split>/<part>``; of converted weights, words."""
    n: int | None = None
    """Training images."""
    negatives: str | None = None
    """The list of polyp-free frames that were trained on too."""
    negatives_n: int | None = None
    finished: bool | None = None
    """Whether the training run came to its end; None where that was not recorded."""
    passport: str | None = None
    """SHA-256 of the passport beside the weights."""
    sha256: str | None = None
    """Of the weights file that was trained, converted and evaluated."""
    changed: bool = False
    """Whether the weights were changed after ``sha256`` was recorded."""

    @classmethod
    def within(cls, holder: Any, *, path: Path | str = CONFIG) -> Self:
        """The record in a configuration, read from JSON or a model's; empty where it has none."""
        held = holder.get(WEIGHTS_ORIGIN) if isinstance(holder, Mapping) else getattr(holder, WEIGHTS_ORIGIN, None)
        return cls.of(held, path=path)

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The record in a model folder's config.json. Raises PolypSegError where that is none."""
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise PolypSegError(f"{folder / CONFIG} is no model's configuration: get the folder again")
        return cls.within(config, path=folder / CONFIG)

    @classmethod
    def planned(cls, entry: ZooEntry) -> Self:
        """Of a row without weights: what the model will be when it is trained as the study says."""
        start = f"timm:{entry.upstream.timm}" if entry.upstream.timm else "weights as published"
        return cls(
            model_id=entry.model_id,
            row=entry.model_id,
            encoder_initialisation=RANDOM if entry.method == "none" else start,
            scale="full",
            recipe=STUDY_RECIPE,
            recipe_changes=[],
            finetuned_on=STUDY_DATA,
            n=STUDY_TRAINING_IMAGES,
            finished=True,
        )

    def continued(self, *, sha256: str) -> Self:
        """The start of further training: the encoder's own, and these fine-tuned weights, whose digest is given."""
        kept = ("model_id", "row", "encoder_initialisation", "scale", "pretraining")
        before = {"sha256": sha256, "recipe": self.recipe, "finetuned_on": self.finetuned_on}
        start = {key: self.content[key] for key in kept if key in self.content}
        return self.of(start | {"continued_from": before})

    def averaged(self, *, share: float, sha256: str) -> Self:
        """After averaging with the weights that training went on from; ``sha256`` of the average."""
        return self.updated(averaged_with_start={"share": share}, sha256=sha256)

    def adapted_to(
        self, *, method: str, labeled: bool, frames: int, groups: int, gain: float, bound: float, source: str
    ) -> Self:
        """After adaptation, without the digests of the weights that were adapted; see ``AdaptationRecord``."""
        adapted = {"method": method, "labelled": labeled, "frames": frames, "groups": groups}
        adapted |= {"gain": gain, "bound": bound, "from": source}
        return self.updated(adapted=adapted).without("passport", "sha256")

    # -- what it means ---------------------------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        """How the weights came to be. Raises UsageError for a trained or converted model without an id."""
        kind: Kind = "converted" if self.converted_from else "trained" if self.recipe else "untrained"
        if kind != "untrained" and self.model_id == UNKNOWN:
            raise UsageError(f"{CONFIG} has a {WEIGHTS_ORIGIN} without a model_id: export the model again")
        return kind

    @property
    def random_start(self) -> bool:
        """Whether the encoder is recorded to have started at random."""
        return self.encoder_initialisation == RANDOM

    @property
    def full_size(self) -> bool:
        """Whether the encoder is the study's."""
        return self.scale == "full"

    @property
    def stated_row(self) -> ZooEntry | None:
        """The row that the record names. Raises UsageError for an unknown one."""
        return zoo.get(self.row) if self.row is not None else None

    @cached_property
    def entry(self) -> ZooEntry | None:
        """The row that the weights stand for, or that they descend from at a smaller scale; None for neither.

        By id, else the row that the record names, else the row of the same decoder and pretraining:
        ``resnet50_dpt.moco_v3_imagenet1k`` has VT-IN-MC's decoder and pretraining and descends from RN-IN-MC all the
        same.
        """
        stated, named = self.stated_row, "" if self.model_id == UNKNOWN else self.model_id
        exact = next((entry for entry in zoo.rows() if entry.model_id == named), None)
        if exact is None and stated is not None and named.endswith(f".{stated.tag}"):
            return stated
        alike = (entry for entry in zoo.rows() if named.endswith(f"_{entry.decoder}.{entry.tag}"))
        return exact or next(alike, stated)

    @cached_property
    def _reasons(self) -> tuple[tuple[str, str], ...]:
        return tuple(_reasons(self))

    @property
    def shortcomings(self) -> tuple[str, ...]:
        """Why the weights may not bear one of the twelve ids; empty when they may."""
        return tuple(reason for _, reason in self._reasons)

    @property
    def suffix(self) -> str:
        """What the name says besides the id: ``smoke``, ``small``, ``random`` and so on; empty for official weights."""
        return "-".join(dict.fromkeys(suffix for suffix, _ in self._reasons if suffix))

    @property
    def official(self) -> bool:
        """Whether the weights may be published under one of the twelve ids."""
        return not self.shortcomings

    @property
    def repo_name(self) -> str:
        """The name under which the weights are published: the id, with the suffix of what they are not."""
        return f"{self.model_id}-{self.suffix}" if self.suffix else self.model_id

    @property
    def label(self) -> str:
        """Short name of the row for tables and plots: the paper's at full size (``RN-IN-MC``), else with the encoder.

        ``resnet10t-NI-MC`` is a small encoder pretrained with MoCo v3 on natural images that are no ImageNet-1k. A row
        keeps its name when its encoder started at random for lack of weights; RANDOM_MARK then ends it.
        """
        row = self.stated_row or self.entry
        if row is None:
            return self.model_id
        mark = RANDOM_MARK if self.random_start and row.method != "none" else ""
        architecture, named = self.model_id.split(".", maxsplit=1)[0], row.corpus
        if not mark and self.pretraining and self.pretraining.corpus:
            named = self.pretraining.corpus
        if named == row.corpus and architecture == row.model_id.split(".", maxsplit=1)[0]:
            return row.short_name + mark
        _, corpus, method = row.short_name.split("-")
        if named != row.corpus:
            corpus = "".join(word[:1] for word in named.split("_")).upper()
        encoder = architecture.removesuffix(f"_{row.decoder}").split("_patch", maxsplit=1)[0]
        return f"{encoder}-{corpus}-{method}{mark}"

    @property
    def own_pretraining(self) -> str:
        """One sentence on the publisher's own pretraining run; empty without one."""
        run = self.pretraining
        if not run:
            return ""
        changes = f" changed by {', '.join(run.recipe_changes)}" if run.recipe_changes else ""
        method = zoo.METHODS.get(str(run.method), run.method or "a method that is not recorded")
        return (
            f"Pretraining: {method}, run by the publisher with recipe `{run.recipe}`{changes}, on "
            f"{run.frames_in_words}."
        )

    @property
    def adaptation(self) -> str:
        """One sentence on the frames that the weights were adapted to; empty where they were not."""
        adapted = self.adapted
        if not adapted:
            return ""
        labels = "with their masks" if adapted.labelled else "without masks"
        return (
            f"Then adapted to {adapted.frames} frames of {adapted.groups} clips, {labels}, from weights with the "
            f"SHA-256 {adapted.source[:12]}: {adapted.method}; on frames that it did not see this gained "
            f"{adapted.gain:+.3f} of Dice (at least {adapted.bound:+.3f}, one-sided 95 %). Their terms bind it."
        )

    @property
    def summary(self) -> str:
        """One sentence on where the weights come from."""
        if self.converted_from:
            source = self.converted_from
            return (
                f"Converted from {source.file} (sha256 {source.sha256[:12]}) as published by the authors of "
                f"{source.upstream}; the outputs were compared before writing."
            )
        start = self.encoder_initialisation or UNKNOWN
        encoder = "a randomly initialized encoder" if self.random_start else f"an encoder from {start}"
        if self.kind == "untrained":
            return f"Not trained for segmentation: {encoder} and a random decoder. Its masks mean nothing."
        recipe = f"recipe {self.recipe}" + (f" with {', '.join(self.recipe_changes)}" if self.recipe_changes else "")
        data = self.finetuned_on or "data that is not recorded"
        mixed = self.averaged_with_start
        average = f" Its weights are averaged: {mixed.share:.0%} the run's end, the rest its start." if mixed else ""
        return f"Fine-tuned on {data} (n = {self.n}) with {recipe}, from {encoder}.{average}"

    # -- what it names ---------------------------------------------------------------------------------------------

    @property
    def bundled_recipe(self) -> Recipe | None:
        """The recipe that the record names, with its changes; None where this package has none of that name."""
        try:
            return load_recipe(self.recipe, overrides=list(self.recipe_changes)) if self.recipe else None
        except UsageError:
            return None

    @property
    def finetuning_dataset(self) -> DatasetSpec | None:
        """The dataset that the weights were fine-tuned on, from its name or title in the record; None for none."""
        stated = self.finetuned_on or ""
        for spec in DATASETS.values():
            if stated.split(" ", maxsplit=1)[0] == spec.name or stated.startswith(spec.title):
                return spec
        return None

    @property
    def pretrained_entry(self) -> ZooEntry | None:
        """The row whose pretraining the encoder really has; None for a random start."""
        entry, at_random = self.entry, self.random_start or self.encoder_initialisation is None
        if entry is None or entry.method == "none" or (at_random and self.kind != "converted"):
            return None
        return entry


def read_origin(weights_origin: Mapping[str, Any] | None) -> WeightsOrigin:
    """A record that is to be named; None and {} are an untrained model of unknown origin.

    Raises UsageError for a record without a model id that claims to be trained or converted, or of an unknown row.
    """
    origin = WeightsOrigin.of(weights_origin)
    _ = origin.kind, origin.entry
    return origin


def describe_start(entry: ZooEntry, start: str) -> str:
    """What a row's encoder started from, for tables; ``start`` as a run's record says it."""
    wanted = f"{zoo.METHODS[entry.method]}, {zoo.CORPORA[entry.corpus]}"
    if entry.method == "none":
        return "random, as the row says"
    if start == RANDOM:
        return f"RANDOM: no {wanted} at this scale"
    if start in STARTERS.values():
        return f"{wanted} (starter package)"
    if start == f"timm:{entry.upstream.timm}":
        return wanted
    file = start.removeprefix("file ").rpartition(" (")[0]
    return f"{wanted} (given: {file or Path(start).name})"


# -- what separates weights from the study's ---------------------------------------------------------------------------


def _reasons(origin: WeightsOrigin) -> Iterator[tuple[str, str]]:
    """Pairs (suffix of the name, sentence), one for each thing that separates the weights from the study's."""
    kind, entry, data = origin.kind, origin.entry, origin.finetuned_on
    if origin.changed:
        yield "changed", "its weights were changed after their origin was recorded"
    if kind == "converted" and origin.recipe is not None:
        yield "finetuned", f"it was trained further with recipe {origin.recipe}"
    if origin.adapted:
        yield "adapted", "it was adapted to further frames"
    if kind == "untrained":
        yield "untrained", "it has not been trained for segmentation"
    if not origin.full_size:
        # A small encoder already gives the model another id, so the name needs no suffix for it.
        yield ("" if entry and origin.model_id != entry.model_id else "small"), "its encoder is not the study's size"
    if entry is None:
        yield "", "it belongs to no row of the table"
    elif entry in zoo.EXTRA:
        yield "", "it is an extra model beside the study's"
    if kind == "trained":
        yield from _training_reasons(origin)
    elif kind == "converted" and not (data or "").startswith("Kvasir-SEG"):
        known = "cvc_clinicdb" if (data or "").startswith("CVC-ClinicDB") else "unknown-data"
        yield known, f"it was fine-tuned on {data}, not on Kvasir-SEG"
    if kind == "trained" and entry is not None and origin.full_size:
        yield from _encoder_reasons(origin, entry)


def _training_reasons(origin: WeightsOrigin) -> Iterator[tuple[str, str]]:
    recipe, data = origin.recipe or "", origin.finetuned_on or "unknown data"
    if recipe != STUDY_RECIPE:
        short = recipe.removeprefix("finetune_")
        suffix = "" if short == "small" and origin.scale == "small" else short.replace("_", "-")
        yield suffix, f"it was trained with recipe {recipe}, not {STUDY_RECIPE}"
    changes = _beyond(origin.recipe_changes, HARMLESS_CHANGES)
    if changes:
        yield "variant", f"its recipe was changed: {', '.join(changes)}"
    if data != STUDY_DATA:
        suffix = "" if data.startswith("kvasir_seg ") else data.split(" ", maxsplit=1)[0]
        yield suffix or "variant", f"it was fine-tuned on {data}, not on {STUDY_DATA}"
    elif origin.n != STUDY_TRAINING_IMAGES:
        yield "part", f"it saw {origin.n} training images, not {STUDY_TRAINING_IMAGES}"
    if origin.continued_from:
        stage = origin.bundled_recipe  # whose name says it already, where it is made for that
        yield "" if stage and stage.further_stage else "continued", "it went on from another fine-tuned model"
    if origin.averaged_with_start:
        yield "averaged", "its weights are averaged with those that its last run began with"
    if not origin.finished:
        yield "unfinished", "its training run did not end"


def _beyond(changes: Sequence[str], harmless: Sequence[str]) -> list[str]:
    """The changes of a recipe that are not harmless."""
    return [change for change in changes if change.partition("=")[0] not in harmless]


def _encoder_reasons(origin: WeightsOrigin, entry: ZooEntry) -> Iterator[tuple[str, str]]:
    """Whether the encoder's start is the row's own."""
    start, pretraining = origin.encoder_initialisation or RANDOM, origin.pretraining
    if start == RANDOM:
        row = origin.stated_row or entry
        if entry.method != "none":
            yield "random", f"its encoder started at random, not from {zoo.METHODS[entry.method]}"
        elif row.position_embedding != entry.position_embedding:
            yield "variant", f"its position embedding is that of {row.model_id}"
    elif entry.method == "none":
        yield "pretrained", f"its encoder started from {start}, not at random"
    elif start.startswith("timm:") and start.removeprefix("timm:") != entry.upstream.timm:
        yield "variant", f"its encoder came from {start}, which is not the row's"
    if pretraining and entry.method != "none":
        wanted = f"pretrain_{entry.method}_{entry.encoder}"
        frames = CORPUS_FRAMES[entry.corpus]
        if pretraining.recipe != wanted or _beyond(pretraining.recipe_changes, HARMLESS_PRETRAINING_CHANGES):
            yield "variant", f"its encoder was not pretrained with the unchanged recipe {wanted}"
        elif not 0.99 * frames <= pretraining.frames <= frames:
            yield "variant", f"its encoder saw {pretraining.frames} frames, not {frames} ({entry.corpus})"
