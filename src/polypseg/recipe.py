"""Recipes: the numbers of an experiment, in YAML, checked on loading.

Unknown and missing keys are errors before any work starts. Code holds no number of an experiment; YAML holds no logic.
"""

import json
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from polypseg.errors import UsageError, unknown_name
from polypseg.files import bundled_folder, read_bounded

LARGEST_SIDE, LARGEST_COUNT, LARGEST_STEPS, LARGEST_SEED = 4096, 1_000_000, 10**9, 2**32 - 1
"""Upper bounds of recipes: pixels, images or channels or epochs, optimizer steps, seeds (NumPy's)."""


class RecipeSection(BaseModel):
    """A frozen group of settings; unknown keys, infinite numbers and booleans for numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would read YAML's yes and true as 1."""
        name = str(info.field_name)
        allowed = cls.model_fields[name].annotation is bool or (name == "precision" and value is False)
        parts = value if isinstance(value, list | tuple) else (value,)
        if not allowed and any(isinstance(part, bool) for part in parts):
            raise ValueError("must not be true or false, as which YAML also reads yes and no")
        return value


LARGEST_YAML = 2**16
"""Bytes; the largest bundled file has some thousand, and a list of this size takes a second."""
_DEEPEST, _LONGEST_NUMBER, _SHOWN, _LISTED = 20, 30, 80, 40


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error; elsewhere the last one wins in silence.

    Anchors, which a few lines can expand without end, deep nesting and numbers of many digits are errors too.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As every YAML loader, with one kind of error for a value that its tag does not fit."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2][:_SHOWN]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:_SHOWN]!r} is no {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value[:_SHOWN]!r} is repeated", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """Python's own limit is 4300 digits, and its error is no YAMLError."""
        if len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        is_float = node.tag == "tag:yaml.org,2002:float"
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _RecipeLoader.construct_number)


def parse_yaml(text: str) -> Any:
    """What a YAML text says. Raises ValueError for one that cannot be read or is larger than any recipe."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"it has {len(text)} characters, more than the {LARGEST_YAML} that are read")
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # the last for "\\U99999999"
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def _undo_yaml(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare no as false


RangeEnd = Annotated[float, Field(ge=-1000, le=1000)]  # the range itself is checked as a whole
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_undo_yaml)]


def is_unset(value: object) -> bool:
    """Settings that the reference lacks stay out of a recipe's record until they are used."""
    return value in (None, 0, "best")


def _is_once(value: object) -> bool:
    """As `is_unset`, for a count whose ordinary value is 1."""
    return value == 1


class DataRecipe(RecipeSection):
    """What the model sees before augmentation."""

    image_size: int = Field(ge=32, le=LARGEST_SIDE)
    """Side in pixels to which image and mask are resized (bicubic, antialiased)."""
    batch_sizes: tuple[Annotated[int, Field(ge=32, le=LARGEST_SIDE)], ...] | None = Field(
        default=None, exclude_if=is_unset
    )
    """Sides in pixels of training batches, one drawn per batch; null trains at ``image_size`` only."""
    negatives: str | None = Field(default=None, exclude_if=is_unset)
    """Pinned list of polyp-free frames whose part ``train`` is trained on with empty masks; null for none."""
    negatives_per_epoch: int = Field(default=1, ge=1, le=100, exclude_if=_is_once)
    """How often an epoch shows each polyp-free frame."""


class AppearanceRecipe(RecipeSection):
    """Changes of appearance by which a model learns to hold on frames of other hospitals; the reference has none."""

    corruption: float = Field(ge=0, le=1)
    """Probability that the frame suffers one of the endoscopy corruptions."""
    corruption_severity: int = Field(ge=1, le=5)
    """Largest severity, drawn uniformly from 1."""
    color_exchange: float = Field(ge=0, le=1)
    """Probability that the frame takes mean and standard deviation, in CIELAB, of another training frame."""
    amplitude_exchange: float = Field(ge=0, le=1)
    """Probability that the frame takes the lowest Fourier amplitudes of another training frame."""
    gamma: float = Field(ge=0, lt=1)
    """Exponent of the gray levels drawn from [1 - g, 1 / (1 - g)], log-uniformly."""


class AugmentationRecipe(RecipeSection):
    """Ranges of the paired augmentation; the values of the reference are in finetune.yaml."""

    brightness: float = Field(ge=0, lt=1)
    """Factor drawn from [1 - b, 1 + b]."""
    contrast: float = Field(ge=0, lt=1)
    saturation: float = Field(ge=0, lt=1)
    hue: float = Field(ge=0, le=0.5)
    """Shift drawn from [-h, h], in turns of the color wheel."""
    blur_kernel: int = Field(ge=0, le=LARGEST_SIDE)
    """Side of the Gaussian kernel in pixels; odd, or 0 for no blur."""
    blur_sigma: tuple[RangeEnd, RangeEnd]
    """Standard deviation in pixels, drawn uniformly."""
    horizontal_flip: float = Field(ge=0, le=1)
    """Probability."""
    vertical_flip: float = Field(ge=0, le=1)
    rotation: float = Field(ge=0, le=360)
    """Angle drawn from [-r, r] degrees."""
    translation: float = Field(ge=0, lt=1)
    """Shift of each axis drawn from [-t, t], as a share of the side."""
    scale: tuple[RangeEnd, RangeEnd]
    """Zoom factor, drawn uniformly."""
    shear: float = Field(ge=0, lt=90)
    """Horizontal shear drawn from [-s, s] degrees."""
    interpolation: Literal["nearest", "bilinear"]
    """Of the affine warp; the reference's is nearest."""
    fill: float = Field(ge=-1000, le=1000)
    """Value outside the warped image, in normalized units; the reference's is -1."""
    appearance: AppearanceRecipe | None = Field(default=None, exclude_if=is_unset)
    """Changes of appearance, drawn before everything else; null for none."""

    @model_validator(mode="after")
    def _check(self) -> "AugmentationRecipe":
        if self.blur_kernel and self.blur_kernel % 2 == 0:
            raise ValueError("blur_kernel must be odd")
        for low, high in (self.blur_sigma, self.scale):
            if not 0 < low <= high:
                raise ValueError("a range needs 0 < low <= high")
        return self


class TrainingRecipe(RecipeSection):
    """The optimization."""

    epochs: int = Field(ge=1, le=LARGEST_COUNT)
    """Passes over the training split."""
    total_batch_size: int = Field(ge=2, le=LARGEST_COUNT)
    """Images per optimizer step, over all processes; the last short batch is dropped."""
    learning_rate: float = Field(gt=0, le=1e30)
    """AdamW step size: the start of ``plateau``, the peak of ``one_cycle``."""
    weight_decay: float = Field(ge=0, le=1000)
    """On every parameter, as in the reference."""
    precision: Precision
    """Autocast type of forward and loss; bf16 falls back to float32 on a CPU without bf16 arithmetic."""

    dice_weight: float = Field(ge=0, le=1000)
    bce_weight: float = Field(ge=0, le=1000)
    """Loss = dice_weight * soft Dice + bce_weight * binary cross-entropy + alarm_weight * alarm loss."""
    alarm_weight: float = Field(default=0, ge=0, le=1000, exclude_if=is_unset)
    """Of the cross-entropy of a polyp-free frame's worst hundredth of pixels: over all, a small alarm weighs little."""
    ema_decay: float = Field(ge=0, lt=1)
    """Decay per step of the averaged weights that are validated and kept; 0 for none, as in the reference."""
    keep: Literal["best", "last"] = Field(default="best", exclude_if=is_unset)
    """Which weights become the model: those of the epoch with the best validation Dice, or the last epoch's."""
    frozen_stages: int = Field(default=0, ge=0, le=16, exclude_if=is_unset)
    """Leading stages of an EfficientNet encoder, the stem first, that stay as they were loaded; 0 for none."""
    max_steps: int | None = Field(ge=1, le=LARGEST_STEPS)
    """Stop after so many optimizer steps; null for all epochs."""
    checkpoint_steps: int | None = Field(ge=1, le=LARGEST_STEPS)
    """Save a resumable checkpoint every so many steps, besides the one at each epoch's end."""


class ScheduleRecipe(RecipeSection):
    """The learning rate over time."""

    kind: Literal["plateau", "one_cycle"]
    """``plateau`` halves on a stalled global validation Dice; ``one_cycle`` warms up and anneals over all steps."""
    factor: float = Field(gt=0, lt=1)
    """plateau: multiplier."""
    patience: int = Field(ge=0, le=LARGEST_COUNT)
    """plateau: epochs without improvement before the multiplier."""
    min_learning_rate: float = Field(ge=0, le=1000)
    """plateau: floor."""
    warmup: float = Field(ge=0, lt=1)
    """one_cycle: share of all steps that warm up."""


class ModelRecipe(RecipeSection):
    """What differs from the row's configuration; null keeps the row's value."""

    encoder: str | None
    """timm name of another encoder, for small-scale runs."""
    decoder: str | None
    """Another decoder than the row's, for architecture grids; see PolypSegConfig."""
    decoder_channels: int | None = Field(ge=1, le=LARGEST_SIDE)
    decoder_dropout: float | None = Field(ge=0, lt=1)


class NamedRecipe(RecipeSection):
    """What every recipe has: the name under which runs and models remember it."""

    name: str


class Recipe(NamedRecipe):
    """One experiment, apart from the model's row, the data and the place of the output."""

    further_stage: bool = Field(default=False, exclude_if=is_unset)
    """Whether it is made to go on from a fine-tuned model (``--initial-model``): then its name tells that already."""
    seed: int = Field(ge=0, le=LARGEST_SEED)
    model: ModelRecipe
    data: DataRecipe
    augmentation: AugmentationRecipe
    training: TrainingRecipe
    schedule: ScheduleRecipe


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN
AnyRecipe = TypeVar("AnyRecipe", bound=RecipeSection)


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return bundled_folder("recipes")


def find_recipe(name_or_path: str | Path) -> Path:
    """A recipe file by path, or by the name of one that comes with the package. Raises UsageError for neither."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = recipe_folder() / f"{name_or_path}.yaml"
    if bundled.is_file():
        return bundled
    if path.suffix in (".yaml", ".yml"):
        raise UsageError(f"recipe file {path} does not exist")
    raise unknown_name("recipe", str(name_or_path), [p.stem for p in recipe_folder().glob("*.yaml")])


def load_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a fine-tuning recipe and apply overrides such as ``training.epochs=2``.

    Raises UsageError naming the file and every unknown, missing or impossible key.
    """
    content, source = read_recipe(name_or_path, overrides=overrides)
    return parse_recipe(content, source=source)


def read_recipe(name_or_path: str | Path, *, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The plain values of a recipe with its overrides, and the file they come from. Raises UsageError."""
    path = find_recipe(name_or_path)
    content = read_yaml(path, kind="recipe")
    for override in overrides:
        _apply(content, override)
    return content, str(path)


def read_yaml(path: Path, *, kind: str) -> dict[str, Any]:
    """A mapping from a YAML file without repeated keys. Raises UsageError that names the file and its ``kind``."""
    try:
        content = parse_yaml(read_bounded(path, largest=LARGEST_YAML))
    except OSError as error:
        raise UsageError(f"{kind} {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a UnicodeDecodeError is one
        raise UsageError(f"{kind} {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{kind} {path} is empty or not a mapping")
    return content


def parse_recipe(content: dict[str, Any], *, source: str) -> Recipe:
    """A Recipe from plain values, such as a run's record. Raises UsageError that names ``source``."""
    return validate_recipe(Recipe, content, source=source)


def validate_recipe(
    schema: type[AnyRecipe], content: dict[str, Any], *, source: str, kind: str = "recipe"
) -> AnyRecipe:
    """Plain values as a recipe of one kind. Raises UsageError that names ``source`` and the first many problems."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        details = error.errors()
        problems = [_problem(schema, detail) for detail in details[:_LISTED]]
        if len(details) > _LISTED:
            problems.append(f"and {len(details) - _LISTED} more")
        raise UsageError(f"{kind} {source}: " + "; ".join(problems)) from error


def changes_from_bundled(recipe: "NamedRecipe", *, folder: Path | None = None) -> list[str]:
    """What separates a recipe from the bundled one of its name, as ``training.epochs=2``; [] where none is bundled.

    ``folder``: of the bundled ones, where they are no recipes of a run.
    """
    bundled = (folder or recipe_folder()) / f"{recipe.name}.yaml"
    if not bundled.is_file():
        return []
    published = validate_recipe(type(recipe), read_recipe(bundled)[0], source=str(bundled))
    ours, theirs = (dict(_flat(x.model_dump(mode="json"))) for x in (recipe, published))
    return [f"{key}={json.dumps(value)}" for key, value in ours.items() if value != theirs.get(key)]


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problem(schema: type[BaseModel], detail: Any) -> str:
    """One pydantic finding as a phrase with the dotted key."""
    key = ".".join(str(part)[:_SHOWN] for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        section = schema
        for part in detail["loc"][:-1]:
            annotation = section.model_fields[str(part)].annotation
            kinds = (annotation, *get_args(annotation))  # a section that may be absent is a union with None
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
        inside = key.rpartition(".")[0]
        return str(unknown_name("key", key, [f"{inside}.{name}" if inside else name for name in section.model_fields]))
    if detail["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r}: {detail['msg']} (got {_SHORT.repr(detail['input'])})" if key else str(detail["msg"])


def _apply(content: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; the value is read as YAML."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UsageError(f"--set {override!r} must look like training.epochs=2")
    *sections, name = key.split(".")
    target = content
    for section in sections:
        if not isinstance(target.get(section), dict):
            raise UsageError(f"--set {override!r}: the recipe has no section {section!r}")
        target = target[section]
    try:
        target[name] = parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"--set {override[:_SHOWN]!r}: the value is not valid YAML: {error}") from error
