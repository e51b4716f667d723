"""Where a model's weights come from, and what name that earns them.

Every model carries ``config.weights_origin``. Nothing but full-size weights, trained by the study's recipes or
converted from the reference's own files, may bear one of the twelve ids; everything else says in its name what it is.
Their authors publish no checksums, so the record is believed and the file's own digest stands in it and on the card.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polypseg import zoo
from polypseg.data.catalog import DATASETS, DatasetSpec
from polypseg.errors import UsageError
from polypseg.recipe import Recipe, load_recipe
from polypseg.zoo import RANDOM, STARTERS, ZooEntry

Kind = Literal["trained", "converted", "untrained"]

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
CORPUS_FRAMES = {"hyperkvasir": 99_417, "imagenet1k": 1_281_167}
"""Frames of a complete corpus; a hundredth of them may be unreadable."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of a model's weights."""

    kind: Kind
    model_id: str
    """The recorded id; ``unknown`` where there is none."""
    entry: ZooEntry | None
    """The row that the weights stand for, or that they descend from at a smaller scale; None for neither."""
    shortcomings: tuple[str, ...]
    """Why the weights may not bear one of the twelve ids; empty when they may."""
    suffix: str
    """What the name says besides the id: ``smoke``, ``small``, ``random`` and so on; empty for official weights."""
    record: Mapping[str, Any]
    """The record itself, ``config.weights_origin``."""

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
        row = zoo.get(self.record["row"]) if "row" in self.record else self.entry
        if row is None:
            return self.model_id
        mark = RANDOM_MARK if self.record.get("encoder_initialisation") == RANDOM and row.method != "none" else ""
        architecture, named = self.model_id.split(".", maxsplit=1)[0], row.corpus
        if not mark:
            named = (self.record.get("pretraining") or {}).get("corpus", row.corpus)
        if named == row.corpus and architecture == row.model_id.split(".", maxsplit=1)[0]:
            return row.short_name + mark
        _, corpus, method = row.short_name.split("-")
        if named != row.corpus:
            corpus = "".join(word[0] for word in named.split("_")).upper()
        encoder = architecture.removesuffix(f"_{row.decoder}").split("_patch", maxsplit=1)[0]
        return f"{encoder}-{corpus}-{method}{mark}"

    @property
    def own_pretraining(self) -> str:
        """One sentence on the publisher's own pretraining run; empty without one."""
        run = self.record.get("pretraining")
        if not run:
            return ""
        changes = f" changed by {', '.join(run['recipe_changes'])}" if run.get("recipe_changes") else ""
        return (
            f"Pretraining: {zoo.METHODS[run['method']]}, run by the publisher with recipe `{run['recipe']}`{changes}, "
            f"on {run['frames']} frames of {run.get('source', 'an unnamed source')}."
        )

    @property
    def adaptation(self) -> str:
        """One sentence on the frames that the weights were adapted to; empty where they were not."""
        adapted = self.record.get("adapted")
        if not adapted:
            return ""
        labels = "with their masks" if adapted["labelled"] else "without masks"
        return (
            f"Then adapted to {adapted['frames']} frames of {adapted['groups']} clips, {labels}, from weights with the "
            f"SHA-256 {adapted['from'][:12]}: {adapted['method']}; on frames that it did not see this gained "
            f"{adapted['gain']:+.3f} of Dice (at least {adapted['bound']:+.3f}, one-sided 95 %). Their terms bind it."
        )

    @property
    def summary(self) -> str:
        """One sentence on where the weights come from."""
        if self.kind == "converted":
            source = self.record["converted_from"]
            return (
                f"Converted from {source['file']} (sha256 {source['sha256'][:12]}) as published by the authors of "
                f"{source['upstream']}; the outputs were compared before writing."
            )
        start = str(self.record.get("encoder_initialisation", "unknown"))
        encoder = "a randomly initialised encoder" if start == RANDOM else f"an encoder from {start}"
        if self.kind == "untrained":
            return f"Not trained for segmentation: {encoder} and a random decoder. Its masks mean nothing."
        changes = self.record.get("recipe_changes") or []
        recipe = f"recipe {self.record['recipe']}" + (f" with {', '.join(changes)}" if changes else "")
        return (
            f"Fine-tuned on {self.record['finetuned_on']} (n = {self.record.get('n')}) with {recipe}, from {encoder}."
        )


def read_origin(weights_origin: Mapping[str, Any] | None) -> Origin:
    """The meaning of a config's ``weights_origin``; None and {} are an untrained model of unknown origin.

    Raises UsageError for a record without a model id that claims to be trained or converted.
    """
    record = dict(weights_origin or {})
    kind: Kind = "converted" if "converted_from" in record else "trained" if "recipe" in record else "untrained"
    if kind != "untrained" and "model_id" not in record:
        raise UsageError("config.json has a weights_origin without a model_id: export the model again")
    entry = _row(record)
    reasons = list(_reasons(record, kind, entry))
    suffixes = [suffix for suffix, _ in reasons if suffix]
    return Origin(
        kind=kind,
        model_id=str(record.get("model_id", "unknown")),
        entry=entry,
        shortcomings=tuple(reason for _, reason in reasons),
        suffix="-".join(dict.fromkeys(suffixes)),
        record=record,
    )


def _row(record: Mapping[str, Any]) -> ZooEntry | None:
    """By id, else the row that the record names, else the row of the same decoder and pretraining.

    ``resnet50_dpt.moco_v3_imagenet1k`` has VT-IN-MC's decoder and pretraining and descends from RN-IN-MC all the same.
    """
    model_id = str(record.get("model_id", ""))
    stated = zoo.get(record["row"]) if "row" in record else None
    exact = next((entry for entry in zoo.rows() if entry.model_id == model_id), None)
    if exact is None and stated is not None and model_id.endswith(f".{stated.tag}"):
        return stated
    alike = (entry for entry in zoo.rows() if model_id.endswith(f"_{entry.decoder}.{entry.tag}"))
    return exact or next(alike, stated)


def _reasons(record: Mapping[str, Any], kind: Kind, entry: ZooEntry | None) -> Iterator[tuple[str, str]]:
    """Pairs (suffix of the name, sentence), one for each thing that separates the weights from the study's."""
    if record.get("changed"):
        yield "changed", "its weights were changed after their origin was recorded"
    if kind == "converted" and "recipe" in record:
        yield "finetuned", f"it was trained further with recipe {record['recipe']}"
    if record.get("adapted"):
        yield "adapted", "it was adapted to further frames"
    if kind == "untrained":
        yield "untrained", "it has not been trained for segmentation"
    if record.get("scale") != "full":
        # A small encoder already gives the model another id, so the name needs no suffix for it.
        yield ("" if entry and record["model_id"] != entry.model_id else "small"), "its encoder is not the study's size"
    if entry is None:
        yield "", "it belongs to no row of the table"
    elif entry in zoo.EXTRA:
        yield "", "it is an extra model beside the study's"
    if kind == "trained":
        yield from _training_reasons(record)
    elif kind == "converted" and not str(record.get("finetuned_on", "")).startswith("Kvasir-SEG"):
        known = "cvc_clinicdb" if str(record.get("finetuned_on", "")).startswith("CVC-ClinicDB") else "unknown-data"
        yield known, f"it was fine-tuned on {record.get('finetuned_on')}, not on Kvasir-SEG"
    if kind == "trained" and entry is not None and record.get("scale") == "full":
        yield from _encoder_reasons(record, entry)


def _training_reasons(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    recipe, data = str(record["recipe"]), str(record.get("finetuned_on", "unknown data"))
    if recipe != STUDY_RECIPE:
        short = recipe.removeprefix("finetune_")
        suffix = "" if short == "small" and record.get("scale") == "small" else short.replace("_", "-")
        yield suffix, f"it was trained with recipe {recipe}, not {STUDY_RECIPE}"
    changes = _beyond(record, HARMLESS_CHANGES)
    if changes:
        yield "variant", f"its recipe was changed: {', '.join(changes)}"
    if data != STUDY_DATA:
        suffix = "" if data.startswith("kvasir_seg ") else data.split(" ", maxsplit=1)[0]
        yield suffix or "variant", f"it was fine-tuned on {data}, not on {STUDY_DATA}"
    elif record.get("n") != STUDY_TRAINING_IMAGES:
        yield "part", f"it saw {record.get('n')} training images, not {STUDY_TRAINING_IMAGES}"
    if record.get("continued_from"):
        known = recipe.endswith("further")
        yield "" if known else "continued", "it went on from another fine-tuned model"
    if not record.get("finished"):
        yield "unfinished", "its training run did not end"


def _beyond(record: Mapping[str, Any], harmless: Sequence[str]) -> list[str]:
    """The changes of a record's recipe that are not harmless."""
    return [change for change in record.get("recipe_changes") or [] if change.partition("=")[0] not in harmless]


def _encoder_reasons(record: Mapping[str, Any], entry: ZooEntry) -> Iterator[tuple[str, str]]:
    """Whether the encoder's start is the row's own."""
    start, pretraining = str(record.get("encoder_initialisation", RANDOM)), record.get("pretraining")
    if start == RANDOM:
        row = zoo.get(record["row"]) if "row" in record else entry
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
        if pretraining.get("recipe") != wanted or _beyond(pretraining, HARMLESS_PRETRAINING_CHANGES):
            yield "variant", f"its encoder was not pretrained with the unchanged recipe {wanted}"
        elif not 0.99 * frames <= pretraining.get("frames", 0) <= frames:
            yield "variant", f"its encoder saw {pretraining.get('frames')} frames, not {frames} ({entry.corpus})"


def recorded_recipe(record: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a model's record names, with its changes; None where this package has none of that name."""
    name = record.get("recipe")
    try:
        return load_recipe(str(name), overrides=list(record.get("recipe_changes") or [])) if name else None
    except UsageError:
        return None


def finetuning_dataset(origin: Origin) -> DatasetSpec | None:
    """The dataset that the weights were fine-tuned on, from its name or title in the record; None for none."""
    stated = str(origin.record.get("finetuned_on", ""))
    for spec in DATASETS.values():
        if stated.split(" ", maxsplit=1)[0] == spec.name or stated.startswith(spec.title):
            return spec
    return None


def pretrained_entry(origin: Origin) -> ZooEntry | None:
    """The row whose pretraining the encoder really has; None for a random start."""
    entry = origin.entry
    start = origin.record.get("encoder_initialisation", RANDOM)
    if entry is None or entry.method == "none" or (start == RANDOM and origin.kind != "converted"):
        return None
    return entry


def describe_start(entry: ZooEntry, initialisation: str) -> str:
    """What a row's encoder started from, for tables; ``initialisation`` as a run's record says it."""
    wanted = f"{zoo.METHODS[entry.method]}, {zoo.CORPORA[entry.corpus]}"
    if entry.method == "none":
        return "random, as the row says"
    if initialisation == RANDOM:
        return f"RANDOM: no {wanted} at this scale"
    if initialisation in STARTERS.values():
        return f"{wanted} (starter package)"
    if initialisation == f"timm:{entry.upstream.timm}":
        return wanted
    file = initialisation.removeprefix("file ").rpartition(" (")[0]
    return f"{wanted} (given: {file or Path(initialisation).name})"


def planned_origin(entry: ZooEntry) -> Origin:
    """The record of a row without weights: what the model will be when it is trained as the study says."""
    start = f"timm:{entry.upstream.timm}" if entry.upstream.timm else "weights as published"
    if entry.method == "none":
        start = RANDOM
    return read_origin(
        {
            "model_id": entry.model_id,
            "row": entry.model_id,
            "encoder_initialisation": start,
            "scale": "full",
            "recipe": STUDY_RECIPE,
            "recipe_changes": [],
            "finetuned_on": STUDY_DATA,
            "n": STUDY_TRAINING_IMAGES,
            "finished": True,
        }
    )
