"""What a model's card says, collected: from the table, the weights' record, the run and the evaluation receipts."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polypseg import __version__, zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import Receipt
from polypseg.evaluation.receipt_reading import no_results, read_results
from polypseg.files import read_json
from polypseg.provenance.origin import STUDY_RECIPE, WeightsOrigin
from polypseg.provenance.passport import PASSPORT, Passport
from polypseg.recipe import Recipe, load_recipe, parse_recipe
from polypseg.zoo import ZooEntry

Stage = Literal["planned", "unpublished", "published"]
"""planned: a row of the table without weights; unpublished: trained and measured here, weights not given away."""

PICTURES = {
    "widget/frame_1.png": ("widget/mask_1.png", "Synthetic frame, camera A"),
    "widget/frame_2.png": ("widget/mask_2.png", "Synthetic frame, camera B"),
}
"""Example frame -> (the model's mask of it, title); card_pictures writes them there."""
EXAMPLES = "pictures/examples.png"
DICE_DISTRIBUTIONS = "pictures/dice_distributions.png"


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """What the image processor does to a frame."""

    size: int
    """Side in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ComputeFacts:
    """What a run's record says of its cost; None where it says nothing."""

    hours: float | None = None
    """Of training without validation, from the images a second of every epoch."""
    platform: str | None = None
    hardware: str | None = None
    """Name of what one process computed on."""
    precision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card says."""

    origin: WeightsOrigin
    encoder: str
    """timm name."""
    decoder: str
    native: bool
    """Whether plain transformers loads the model without the repository's own code."""
    inputs: InputFacts
    stage: Stage
    organization: str
    """Owner of the repository."""
    revision: str = f"v{__version__}"
    """Tag that the usage examples pin."""
    recipe: Recipe | None = None
    results: tuple[Receipt, ...] = ()
    """Those that score by CONVENTION."""
    compute: ComputeFacts = field(default_factory=ComputeFacts)
    passport: Passport | None = None
    """What the model saw; None where it is not recorded."""
    widget_pictures: tuple[str, ...] = ()
    """Those of PICTURES that are there."""
    examples: str | None = None
    dice_distributions: str | None = None
    """Figures, relative to the card."""

    @property
    def with_polyps(self) -> tuple[Receipt, ...]:
        """The results on frames with polyps, of which overlaps are stated."""
        return tuple(result for result in self.results if not result.without_polyps)

    @property
    def repo_id(self) -> str:
        """Id of the repository on the Hub."""
        return f"{self.organization}/{self.origin.repo_name}"


def collect_facts(
    folder: Path, *, organization: str | None = None, revision: str | None = None, run_dir: Path | None = None
) -> CardFacts:
    """The facts of an exported model folder; its results and pictures are found under their fixed names.

    ``run_dir``: the run that the weights come from, for its recipe and its cost. Raises UsageError for results of other
    weights, PolypSegError for a folder without configuration.
    """
    from polypseg.provenance.fetch import organization as default_organization

    config = read_json(folder / "config.json")
    origin = WeightsOrigin.within(config, path=folder / "config.json")
    native = config.get("model_type") == "dpt"
    decoder = config.get("decoder", "dpt")
    encoder = config.get("encoder") or config.get("polypseg", {}).get("encoder")
    has_run = origin.kind == "trained" and run_dir is not None and (run_dir / "run.json").is_file()
    run = run_dir if has_run else None
    return CardFacts(
        origin=origin,
        encoder=encoder or _encoder_of(origin.model_id, decoder),
        decoder=decoder,
        native=native,
        inputs=_input_facts(folder / "preprocessor_config.json"),
        stage="published",
        organization=organization or default_organization(),
        revision=revision or f"v{__version__}",
        recipe=run_recipe(run) if run else origin.bundled_recipe,
        results=_read_results(folder / "results", origin),
        compute=compute_facts(run) if run else ComputeFacts(),
        passport=Passport.load(folder) if (folder / PASSPORT).is_file() else None,
        widget_pictures=tuple(name for name in PICTURES if (folder / name).is_file()),
        examples=EXAMPLES if (folder / EXAMPLES).is_file() else None,
        dice_distributions=DICE_DISTRIBUTIONS if (folder / DICE_DISTRIBUTIONS).is_file() else None,
    )


def _input_facts(path: Path) -> InputFacts:
    """Raises PolypSegError for anything but numbers."""
    processor = read_json(path)
    try:
        size, mean, std = processor["size"]["height"], tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (KeyError, TypeError) as error:
        raise PolypSegError(f"{path} does not say how frames are prepared: export the model again") from error
    if not all(isinstance(value, int | float) for value in (size, *mean, *std)):
        raise PolypSegError(
            f"{path} has something else than numbers as size, mean or deviation: export the model again"
        )
    return InputFacts(size=size, mean=mean, std=std)


def planned_facts(entry: ZooEntry, *, organization: str) -> CardFacts:
    """The facts of a row without weights: what the model will be when it is trained as the study says."""
    config = entry.config_fields()
    return CardFacts(
        origin=WeightsOrigin.planned(entry),
        encoder=config["encoder"],
        decoder=entry.decoder,
        native=entry.decoder == "dpt",
        inputs=InputFacts(size=config["image_size"], mean=tuple(config["image_mean"]), std=tuple(config["image_std"])),
        stage="planned",
        organization=organization,
        recipe=load_recipe(STUDY_RECIPE),
    )


def measured_facts(folder: Path, *, organization: str) -> CardFacts:
    """The facts of a small model whose results, but not its weights, are in this repository: results/<model id>."""
    from polypseg.modeling import PolypSegConfig
    from polypseg.modeling.encoders_polypseg import is_plain_vit

    results = read_results(folder)
    if not results:
        raise no_results(folder)
    origin = results[0].origin.updated(model_id=folder.name)
    if origin.recipe is None:
        raise UsageError(f"{results[0].path} does not say with which recipe its model was trained: evaluate again")
    recipe = load_recipe(origin.recipe, overrides=origin.recipe_changes)
    epochs = read_epochs(folder / "epochs.csv")
    if origin.finished is None:  # a receipt of before this was recorded
        origin = origin.updated(finished=len(epochs) == recipe.training.epochs)
    decoder = folder.name.split(".")[0].rsplit("_", maxsplit=1)[-1]
    encoder = _encoder_of(folder.name, decoder)
    config = PolypSegConfig(encoder=encoder, decoder=decoder, image_size=recipe.data.image_size)
    figure = folder / "dice_distributions.png"
    return CardFacts(
        origin=origin,
        encoder=encoder,
        decoder=decoder,
        native=decoder == "dpt" and is_plain_vit(encoder),
        inputs=InputFacts(
            size=config.image_size, mean=tuple(config.image_mean or ()), std=tuple(config.image_std or ())
        ),
        stage="unpublished",
        organization=organization,
        recipe=recipe,
        results=results,
        compute=ComputeFacts(hours=training_hours(epochs, recipe)),
        dice_distributions=f"results/{folder.name}/{figure.name}" if figure.is_file() else None,
    )


def _encoder_of(model_id: str, decoder: str) -> str:
    """The timm name that a model id starts with."""
    name = model_id.split(".")[0].removesuffix(f"_{decoder}")
    return zoo.ENCODERS.get(name, name)


def _read_results(folder: Path, origin: WeightsOrigin) -> tuple[Receipt, ...]:
    results = read_results(folder)
    ours = origin.sha256
    for receipt in results:
        theirs = receipt.model_sha256
        if ours and theirs and ours != theirs:
            raise UsageError(f"{folder} holds results of other weights ({theirs[:12]}, not {ours[:12]}): export again")
    return results


def run_recipe(run_dir: Path) -> Recipe:
    """The recipe that a folder's ``run.json`` records."""
    return parse_recipe(read_json(run_dir / "run.json")["recipe"], source=str(run_dir / "run.json"))


def compute_facts(run_dir: Path) -> ComputeFacts:
    """What a folder's ``run.json`` and ``epochs.csv`` say of the run's cost."""
    environment = read_json(run_dir / "run.json").get("environment", {})
    return ComputeFacts(
        hours=training_hours(read_epochs(run_dir / "epochs.csv"), run_recipe(run_dir)),
        platform=environment.get("platform"),
        hardware=environment.get("hardware"),
        precision=environment.get("precision"),
        versions=environment.get("versions", {}),
    )


def read_epochs(path: Path) -> list[dict[str, str]]:
    """The rows of a run's epochs.csv; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def training_hours(epochs: Sequence[Mapping[str, str]], recipe: Recipe) -> float | None:
    """Hours of training that the epochs' speeds add up to; None without epochs.

    An epoch at less than a quarter of the median speed was resumed or suspended: it counts at the median.
    """
    seconds, before, usual = 0.0, 0, training_speed(epochs)
    if usual is None:
        return None
    for row in epochs:
        images = (int(row["step"]) - before) * recipe.training.total_batch_size
        rate = float(row["images_per_second"])
        seconds, before = seconds + images / (rate if rate > usual / 4 else usual), int(row["step"])
    return seconds / 3600


def training_speed(epochs: Sequence[Mapping[str, str]]) -> float | None:
    """Images a second in the median of the epochs; None where none was measured."""
    rates = [rate for row in epochs if (rate := float(row["images_per_second"]))]
    return statistics.median(rates) if rates else None
