"""What a grid's YAML file says: which encoders and decoders, which starts, how each is pretrained, which seeds.

A study's scale is a bundled grid: rows of the table, compared on two test sets; see ``scale_grid``.
"""

from collections.abc import Mapping, Sequence
from operator import not_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polypseg import zoo
from polypseg.errors import UsageError, unknown_name
from polypseg.files import bundled_folder
from polypseg.recipe import (
    LARGEST_COUNT,
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_STEPS,
    NamedRecipe,
    RecipeSection,
    read_yaml,
    validate_recipe,
)

Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=32, le=LARGEST_SIDE)]
SCALES = ("full", "small", "smoke")
"""Bundled grids that `polypseg study --scale` runs."""


class Architecture(RecipeSection):
    """An encoder and a decoder, and which of the table's two families they stand for."""

    family: str
    """``resnet50`` or ``vit_base``: the rows whose place in the comparison the cells take."""
    encoder: str
    """timm name."""
    decoder: str


class Corpus(RecipeSection):
    """Images to pretrain on; their place is given on the command line."""

    stands_for: str
    """The table's corpus whose place they take: ``imagenet1k`` or ``hyperkvasir``."""
    title: str
    """What they are, for tables: never the name of a corpus that they are not."""


class PretrainingPlan(RecipeSection):
    """How one method is run on the architectures of some families: by a recipe here, or as published weights."""

    method: str
    families: tuple[str, ...]
    recipe: str | None = None
    steps: int | None = Field(default=None, ge=1, le=LARGEST_STEPS)
    """Optimizer steps on every corpus, whatever its size; null: the recipe's epochs."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Part of ``steps`` that warms up."""
    overrides: tuple[str, ...] = ()
    """As ``--set`` of pretrain.py."""
    weights: str | None = None
    """As ``--encoder-weights`` of finetune.py, in the place of a recipe."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainingPlan":
        if (self.recipe is None) == (self.weights is None):
            raise ValueError(f"pretraining of {self.method} needs either a recipe or weights")
        return self


class StartPlan(RecipeSection):
    """One pretraining to start from, on the architectures of some families."""

    method: str
    corpus: str
    families: tuple[str, ...]


class FinetuningPlan(RecipeSection):
    """How all cells are fine-tuned."""

    recipe: str
    overrides: tuple[str, ...] = ()


class EvaluationPlan(RecipeSection):
    """How all cells are tested; images that a model saw are tested all the same, and the receipt says which."""

    tests: tuple[str, ...] = ()
    """Of the suite; none: all whose images are at hand."""
    conventions: tuple[str, ...] = ("paper",)
    """Of the metrics; receipts hold what each needs to be checked, so few make small ones."""
    allow_partial: bool = False
    """Whether parts of the test sets will do."""


class ComparisonPlan(RecipeSection):
    """Two tests by which all rows are compared: part ``test`` of the set trained on, and the whole of another set."""

    in_distribution: str
    out_of_distribution: str
    limit: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Test on the first so many images of each only; null for all."""
    allow_partial: bool = False
    """Whether parts of the datasets will do."""
    synthetic_frames: int = Field(default=300, ge=1, le=LARGEST_COUNT)
    """Frames of a synthetic set."""
    synthetic_size: tuple[Side, Side] | None = None
    """Their height and width in pixels; null for the camera's own sizes."""


class Grid(NamedRecipe):
    """A study as a matrix: every start meets every architecture of its families, share, image size and seed.

    Or, by ``rows``, a list of the table's rows, each trained once under its own id from its own weights. What a grid
    does not use stays out of its record, which a folder's next call compares.
    """

    title: str
    architectures: tuple[Architecture, ...] = Field(default=(), exclude_if=not_)
    corpora: dict[str, Corpus] = Field(default_factory=dict)
    pretraining: tuple[PretrainingPlan, ...] = ()
    starts: tuple[StartPlan, ...] = Field(default=(), exclude_if=not_)
    shares: tuple[Share, ...] = (1.0,)
    """Shares of the corpus to pretrain on; smaller ones are contained in larger ones."""
    image_sizes: tuple[Side, ...] = Field(default=(), exclude_if=not_)
    """Of fine-tuning, in pixels."""
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...] = Field(default=(), exclude_if=not_)
    """Of fine-tuning: the same for all cells."""
    repeat_pretraining: bool = False
    """Whether each seed pretrains anew; else all seeds of a cell share one encoder."""
    rows: tuple[str, ...] = Field(default=(), exclude_if=not_)
    """Ids or short names of the table's rows, in the place of everything above."""
    stand_ins: dict[str, str] = Field(default_factory=dict, exclude_if=not_)
    """Short encoder name of a row -> timm name of the smaller encoder that stands in for it."""
    weights: dict[str, str] = Field(default_factory=dict, exclude_if=not_)
    """Row -> weights of its encoder, as ``--encoder-weights`` of finetune.py; by default those that timm or the starter
    package has of the row's pretraining."""
    missing_weights: Literal["refuse", "random"] = Field(default="refuse", exclude_if=lambda value: value == "refuse")
    """What becomes of a row without weights: an error, or a random start, which every table states."""
    seed_by_row: bool = Field(default=False, exclude_if=not_)
    """Whether a row's seed is the recipe's plus its place in the table, so that rows of one start differ."""
    finetuning: FinetuningPlan
    evaluation: EvaluationPlan | None = None
    comparison: ComparisonPlan | None = Field(default=None, exclude_if=not_)
    """Of ``rows`` only: ends in ranks, gaps, figures and one report."""

    @model_validator(mode="after")
    def _check(self) -> "Grid":
        if bool(self.rows) == bool(self.starts):
            raise ValueError("a grid needs either 'starts' or 'rows'")
        for key in ("architectures", "image_sizes", "seeds"):
            if bool(self.starts) != bool(getattr(self, key)):
                raise ValueError(f"'starts' need {key!r}, and 'rows' take none")
        if self.comparison and not self.rows:
            raise ValueError("a comparison needs 'rows'")
        families = {architecture.family for architecture in self.architectures}
        for start in self.starts:
            if start.method != "none" and start.corpus not in self.corpora:
                raise ValueError(f"start {start.method} on {start.corpus}: no such corpus in 'corpora'")
            for family in start.families:
                if family not in families:
                    raise ValueError(f"start {start.method} on {start.corpus}: no architecture of family {family!r}")
                if start.method != "none":
                    self.plan(start.method, family)
        if any(not 0 < share <= 1 for share in self.shares):
            raise ValueError("shares must be above 0 and at most 1")
        return self

    def plan(self, method: str, family: str) -> PretrainingPlan:
        """How a method is run on a family. Raises ValueError unless just one plan says it."""
        found = [plan for plan in self.pretraining if plan.method == method and family in plan.families]
        if len(found) != 1:
            raise ValueError(f"'pretraining' must say once, not {len(found)} times, how {method} is run for {family}")
        return found[0]


def load_grid(name_or_path: str | Path) -> Grid:
    """A grid from a file, or by the name of one that comes with the package. Raises UsageError for what is wrong."""
    content, source = _read_grid(name_or_path)
    return _parse_grid(content, source=source)


def scale_grid(
    scale: str,
    *,
    models: Sequence[str] = (),
    overrides: Sequence[str] = (),
    encoder_weights: Mapping[str, str] | None = None,
    start_from_available: bool = False,
    in_distribution: str | None = None,
    out_of_distribution: str | None = None,
    limit: int | None = None,
    allow_partial: bool = False,
) -> Grid:
    """The bundled grid of a scale with the options of `polypseg study` in the place of its own values.

    ``models``: rows (default: the grid's); ``encoder_weights``: row -> weights. Raises UsageError for what is wrong.
    """
    if scale not in SCALES:
        raise unknown_name("scale", scale, SCALES)
    content, source = _read_grid(scale)
    compared = content["comparison"]
    compared |= {"in_distribution": in_distribution or compared["in_distribution"]}
    compared |= {"out_of_distribution": out_of_distribution or compared["out_of_distribution"]}
    compared |= {"limit": limit, "allow_partial": allow_partial}
    content["rows"] = list(models) or content["rows"]
    content["finetuning"]["overrides"] = list(overrides)
    content["weights"] = weights_by_row(encoder_weights or {}, rows=content["rows"])
    if start_from_available:
        content["missing_weights"] = "random"
    return _parse_grid(content, source=source)


def weights_by_row(weights: Mapping[str, str], *, rows: Sequence[str]) -> dict[str, str]:
    """Id of a row -> the weights given for it; rows by id or short name. Raises UsageError for one not in ``rows``."""
    given = {zoo.get(name).model_id: start for name, start in weights.items()}
    unused = set(given) - {zoo.get(name).model_id for name in rows}
    if unused:
        raise UsageError(
            f"weights (--encoder-weights, or of the grid) for {', '.join(sorted(unused))}, which this study does not "
            "include"
        )
    return given


def _read_grid(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """The plain values of a grid, and the file they come from."""
    path = Path(name_or_path)
    if not path.is_file():
        bundled = bundled_folder("grids") / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml"):
            raise UsageError(f"grid file {path} does not exist")
        if not bundled.is_file():
            raise unknown_name("grid", str(name_or_path), [p.stem for p in bundled.parent.glob("*.yaml")])
        path = bundled
    return read_yaml(path, kind="grid"), str(path)


def _parse_grid(content: dict[str, Any], *, source: str) -> Grid:
    grid = validate_recipe(Grid, content, source=source, kind="grid")
    for corpus in grid.corpora.values():
        if corpus.stands_for not in zoo.CORPORA:
            raise unknown_name("corpus", corpus.stands_for, zoo.CORPORA)
    for encoder in grid.stand_ins:
        if encoder not in zoo.ENCODERS:
            raise unknown_name("encoder", encoder, zoo.ENCODERS)
    return grid
