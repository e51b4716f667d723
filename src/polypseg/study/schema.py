"""What a grid's YAML file says: which encoders and decoders, which starts, how each is pretrained, which seeds."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from polypseg import zoo
from polypseg.errors import UsageError, unknown_name
from polypseg.files import bundled_folder
from polypseg.recipe import (
    LARGEST_SEED,
    LARGEST_SIDE,
    LARGEST_STEPS,
    NamedRecipe,
    RecipeSection,
    read_yaml,
    validate_recipe,
)

Share = Annotated[float, Field(ge=0, le=1)]


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
    """Optimiser steps on every corpus, whatever its size; null: the recipe's epochs."""
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


class Grid(NamedRecipe):
    """A study as a matrix. Every start meets every architecture of its families, share, image size and seed."""

    title: str
    architectures: tuple[Architecture, ...] = Field(min_length=1)
    corpora: dict[str, Corpus]
    pretraining: tuple[PretrainingPlan, ...]
    starts: tuple[StartPlan, ...] = Field(min_length=1)
    shares: tuple[Share, ...] = (1.0,)
    """Shares of the corpus to pretrain on; smaller ones are contained in larger ones."""
    image_sizes: tuple[Annotated[int, Field(ge=32, le=LARGEST_SIDE)], ...] = Field(min_length=1)
    """Of fine-tuning, in pixels."""
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...] = Field(min_length=1)
    """Of fine-tuning: the same for all cells."""
    repeat_pretraining: bool = False
    """Whether each seed pretrains anew; else all seeds of a cell share one encoder."""
    finetuning: FinetuningPlan
    evaluation: EvaluationPlan | None = None

    @model_validator(mode="after")
    def _check(self) -> "Grid":
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
    path = Path(name_or_path)
    if not path.is_file():
        bundled = bundled_folder("grids") / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml"):
            raise UsageError(f"grid file {path} does not exist")
        if not bundled.is_file():
            raise unknown_name("grid", str(name_or_path), [p.stem for p in bundled.parent.glob("*.yaml")])
        path = bundled
    grid = validate_recipe(Grid, read_yaml(path, kind="grid"), source=str(path), kind="grid")
    for corpus in grid.corpora.values():
        if corpus.stands_for not in zoo.CORPORA:
            raise unknown_name("corpus", corpus.stands_for, zoo.CORPORA)
    return grid
