"""Recipes of pretraining: one schema a method, in YAML like those of fine-tuning."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polypseg.errors import UsageError, unknown_name
from polypseg.pretraining.views import ViewSettings
from polypseg.recipe import (
    LARGEST_COUNT,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_STEPS,
    NamedRecipe,
    Precision,
    RangeEnd,
    RecipeSection,
    is_unset,
    read_recipe,
    validate_recipe,
)

WIDEST = 65536
"""Channels of a projector's or decoder's layer; the methods' papers go to 8192."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class ViewRecipe(RecipeSection):
    """How one view of a frame is made, in this order."""

    crop_scale: tuple[RangeEnd, RangeEnd]
    """Share of the frame's area that the random crop takes; its aspect ratio is drawn from [3/4, 4/3]."""
    interpolation: Literal["bilinear", "bicubic"]
    """Of the crop's resize, antialiased."""
    jitter_probability: float = Field(ge=0, le=1)
    brightness: float = Field(ge=0, lt=1)
    contrast: float = Field(ge=0, lt=1)
    saturation: float = Field(ge=0, lt=1)
    hue: float = Field(ge=0, le=0.5)
    grayscale_probability: float = Field(ge=0, le=1)
    blur_probability: float = Field(ge=0, le=1)
    blur_sigma: tuple[RangeEnd, RangeEnd]
    """Standard deviation in pixels, drawn uniformly."""
    solarize_probability: float = Field(ge=0, le=1)
    """Values of 128 and above are inverted."""
    flip_probability: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> "ViewRecipe":
        for low, high in (self.blur_sigma, self.crop_scale):
            if not 0 < low <= high:
                raise ValueError("a range needs 0 < low <= high")
        if self.crop_scale[1] > 1:
            raise ValueError("a crop cannot be larger than its frame")
        return self

    def settings(self) -> ViewSettings:
        """The same values as the input pipeline takes them."""
        return ViewSettings(**self.model_dump())


class PretrainingDataRecipe(RecipeSection):
    """What the model sees before augmentation."""

    image_size: int = Field(ge=32, le=LARGEST_SIDE)
    """Side of a view in pixels."""
    max_unreadable: float = Field(ge=0, lt=1)
    """Largest share of frames that may be unreadable before the run fails."""
    decoded_gigabytes: float = Field(default=0, ge=0, le=100_000, exclude_if=is_unset)
    """Keep so many gigabytes of decoded frames in the cache folder, read without decoding from then on; 0 for none.

    Views are the same; a JPEG is kept at every reduction at which it would be decoded, a third more than its pixels.
    """


class PretrainingTrainingRecipe(RecipeSection):
    """The optimization."""

    epochs: int = Field(ge=1, le=LARGEST_COUNT)
    """Passes over the corpus; the schedules span them."""
    total_batch_size: int = Field(ge=2, le=LARGEST_COUNT)
    """Images per optimizer step, over all processes; the last short batch is dropped."""
    accumulation_steps: int = Field(ge=1, le=LARGEST_COUNT)
    """Micro-batches of each process's share; only where images of a batch do not meet in the loss (MAE)."""
    precision: Precision
    """Autocast type of the networks; losses are float32. bf16 falls back to float32 on a CPU without it."""
    max_steps: int | None = Field(ge=1, le=LARGEST_STEPS)
    """Stop after so many steps; the schedules stay those of all epochs."""
    checkpoint_steps: int = Field(ge=1, le=LARGEST_STEPS)
    """Save a resumable checkpoint every so many steps."""


class OptimizerRecipe(RecipeSection):
    """LARS or AdamW, linear warm-up and half a cosine, per step."""

    kind: Literal["lars", "adamw"]
    base_learning_rate: float = Field(gt=0, le=1e30)
    """Peak for a total batch of 256; the peak grows with the batch."""
    bias_base_learning_rate: float | None = Field(gt=0, le=1e30)
    """The same for biases and normalization; null: as the weights."""
    weight_decay: float = Field(ge=0, le=1000)
    decay_everything: bool
    """Whether AdamW's weight decay reaches biases and normalization too."""
    betas: tuple[Beta, Beta]
    """Of AdamW."""
    warmup_epochs: float = Field(ge=0, le=LARGEST_COUNT)
    final_learning_rate: float = Field(ge=0, lt=1)
    """Where the cosine ends, as a share of the peak."""


class MoCoV3Section(RecipeSection):
    """See ``MoCoV3``."""

    temperature: float = Field(gt=0, le=1000)
    momentum: float = Field(ge=0, le=1)
    hidden_width: int = Field(ge=1, le=WIDEST)
    output_width: int = Field(ge=1, le=WIDEST)
    encoder_chunk: int | None = Field(ge=1, le=LARGEST_COUNT)
    """Encode so many images at a time: the memory of a small batch, the loss of the whole one. ViTs only."""


class BarlowTwinsSection(RecipeSection):
    """See ``BarlowTwins``."""

    projector_width: int = Field(ge=1, le=WIDEST)
    off_diagonal_weight: float = Field(ge=0, le=1000)
    encoder_chunk: int | None = Field(ge=1, le=LARGEST_COUNT)
    """Encode so many images at a time: the memory of a small batch, the loss of the whole one. ViTs only."""


class MAESection(RecipeSection):
    """See ``MAE``."""

    mask_ratio: float = Field(gt=0, lt=1)
    decoder_width: int = Field(ge=4, le=WIDEST)
    decoder_depth: int = Field(ge=1, le=1000)
    decoder_heads: int = Field(ge=1, le=WIDEST)
    normalise_targets: bool


class SupervisedSection(RecipeSection):
    """See ``Supervised``."""

    classes: int = Field(ge=2, le=LARGEST_COUNT)
    """Of the corpus, which must have just so many."""
    label_smoothing: float = Field(ge=0, lt=1)


class PretrainingRecipe(NamedRecipe):
    """What the recipes of all methods share."""

    method: str
    encoder: str
    """timm architecture."""
    seed: int = Field(ge=0, le=LARGEST_SEED)
    data: PretrainingDataRecipe
    views: tuple[ViewRecipe, ...]
    """One for each view of a frame: two for MoCo v3 and Barlow Twins, one for MAE and supervised training."""
    training: PretrainingTrainingRecipe
    optimiser: OptimizerRecipe

    def method_options(self) -> dict[str, Any]:
        """The arguments of the method's module."""
        options: dict[str, Any] = getattr(self, self.method).model_dump()
        return options


class MoCoV3Recipe(PretrainingRecipe):
    """MoCo v3."""

    method: Literal["moco_v3"]
    moco_v3: MoCoV3Section

    @model_validator(mode="after")
    def _check(self) -> "MoCoV3Recipe":
        _check_in_batch(self, "negatives")
        return self


class BarlowTwinsRecipe(PretrainingRecipe):
    """Barlow Twins."""

    method: Literal["barlow_twins"]
    barlow_twins: BarlowTwinsSection

    @model_validator(mode="after")
    def _check(self) -> "BarlowTwinsRecipe":
        _check_in_batch(self, "correlations")
        return self


class MAERecipe(PretrainingRecipe):
    """Masked autoencoder."""

    method: Literal["mae"]
    mae: MAESection

    @model_validator(mode="after")
    def _check(self) -> "MAERecipe":
        _check_views(self, 1)
        return self

    def method_options(self) -> dict[str, Any]:
        return super().method_options() | {"image_size": self.data.image_size}


class SupervisedRecipe(PretrainingRecipe):
    """Classification of labeled images."""

    method: Literal["supervised"]
    supervised: SupervisedSection

    @model_validator(mode="after")
    def _check(self) -> "SupervisedRecipe":
        _check_views(self, 1)
        return self


def _check_views(recipe: PretrainingRecipe, wanted: int) -> None:
    if len(recipe.views) != wanted:
        raise ValueError(f"{recipe.method} takes {wanted} view(s) of a frame, not {len(recipe.views)}")


def _check_in_batch(recipe: PretrainingRecipe, what: str) -> None:
    """The demands of the methods whose loss relates the images of a batch to each other."""
    _check_views(recipe, 2)
    if recipe.training.accumulation_steps > 1:
        raise ValueError(
            f"accumulation_steps must be 1: {recipe.method} takes its {what} from the whole batch, which accumulated "
            f"small batches do not have; with a ViT set {recipe.method}.encoder_chunk, else use more processes"
        )


RECIPES: dict[str, type[PretrainingRecipe]] = {
    "moco_v3": MoCoV3Recipe,
    "barlow_twins": BarlowTwinsRecipe,
    "mae": MAERecipe,
    "supervised": SupervisedRecipe,
}


def load_pretraining_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> PretrainingRecipe:
    """Read a pretraining recipe and apply overrides. Raises UsageError naming the file and every wrong key."""
    content, source = read_recipe(name_or_path, overrides=overrides)
    return parse_pretraining_recipe(content, source=source)


def parse_pretraining_recipe(content: dict[str, Any], *, source: str) -> PretrainingRecipe:
    """A recipe from plain values, such as a run's record. Raises UsageError that names ``source``."""
    if "method" not in content:
        raise UsageError(f"recipe {source} has no key 'method': it is no pretraining recipe")
    if content["method"] not in RECIPES:
        raise unknown_name(f"method in recipe {source}:", str(content["method"]), RECIPES)
    return validate_recipe(RECIPES[content["method"]], content, source=source)
