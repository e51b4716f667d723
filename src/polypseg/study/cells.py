"""The cells of a grid: every combination of architecture, start, share of the corpus and image size, with its names."""

from dataclasses import dataclass
from itertools import product

from polypseg import zoo
from polypseg.data.corpus import FrameStore, FrameSubset
from polypseg.errors import UsageError
from polypseg.pretraining.recipe import PretrainingRecipe, load_pretraining_recipe
from polypseg.recipe import Recipe, load_recipe
from polypseg.study.schema import Architecture, Grid, PretrainingPlan, StartPlan
from polypseg.zoo import RANDOM, ZooEntry


@dataclass(frozen=True, kw_only=True)
class Start:
    """An encoder that cells start from; cells with the same start share it."""

    architecture: Architecture
    method: str
    corpus: str
    """Name in the grid's corpora."""
    share: float
    plan: PretrainingPlan
    seed: int | None
    """None where all seeds share the encoder."""

    @property
    def name(self) -> str:
        """``resnet10t.moco_v3_hyperkvasir``, with the share and the seed where they are not the plain ones."""
        share = "" if self.share == 1 else f"-share{self.share:g}"
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.architecture.encoder}.{self.method}_{self.corpus}{share}{seed}"

    def recipe(self, frames: FrameStore) -> PretrainingRecipe:
        """The plan's recipe with this encoder, as long as the plan says. Raises UsageError without a recipe."""
        if self.plan.recipe is None:
            raise UsageError(f"{self.name} starts from weights, not from a recipe")
        base = load_pretraining_recipe(self.plan.recipe, overrides=self._overrides())
        if self.plan.steps is None:
            return base
        per_epoch = len(frames) // base.training.total_batch_size
        if not per_epoch:
            raise UsageError(
                f"{frames.path} has {len(frames)} frames, fewer than a batch of {base.training.total_batch_size}"
            )
        epochs = -(-self.plan.steps // per_epoch)
        length = (
            f"training.epochs={epochs}",
            f"training.max_steps={self.plan.steps}",
            f"optimiser.warmup_epochs={round(self.plan.warmup_share * self.plan.steps / per_epoch, 3)}",
        )
        return load_pretraining_recipe(self.plan.recipe, overrides=[*self._overrides(), *length])

    def frames(self, corpus: FrameStore) -> FrameStore:
        """The share of the corpus."""
        return corpus if self.share == 1 else FrameSubset(corpus, share=self.share)

    def _overrides(self) -> list[str]:
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        return [f"encoder={self.architecture.encoder}", *seed, *self.plan.overrides]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the matrix: trained once a seed."""

    entry: ZooEntry
    """The row of the table whose place it takes."""
    architecture: Architecture
    method: str
    corpus: str
    share: float
    image_size: int
    name: str
    """Folder name, unique in the grid."""

    def start(self, grid: Grid, seed: int) -> Start | None:
        """What the encoder starts from; None for random initialisation."""
        if self.method == "none":
            return None
        return Start(
            architecture=self.architecture,
            method=self.method,
            corpus=self.corpus,
            share=self.share,
            plan=grid.plan(self.method, self.architecture.family),
            seed=seed if grid.repeat_pretraining else None,
        )

    def recipe(self, grid: Grid, seed: int) -> Recipe:
        """The grid's fine-tuning recipe for this cell."""
        own = [f"model.encoder={self.architecture.encoder}", f"data.image_size={self.image_size}", f"seed={seed}"]
        if self.architecture.decoder != self.entry.decoder:
            own.append(f"model.decoder={self.architecture.decoder}")
        return load_recipe(grid.finetuning.recipe, overrides=[*own, *grid.finetuning.overrides])


def grid_cells(grid: Grid) -> list[Cell]:
    """All cells, in the order of the grid. Raises UsageError for a start that is no row of the table."""
    cells = []
    for start, size in product(grid.starts, grid.image_sizes):
        shares = grid.shares if start.method != "none" else (1.0,)
        for architecture, share in product(grid.architectures, shares):
            if architecture.family in start.families:
                cells.append(_cell(grid, architecture, start, share=share, image_size=size))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise UsageError(f"grid {grid.name} has cells twice: remove the repeated architecture, start or size")
    return cells


def _cell(grid: Grid, architecture: Architecture, start: StartPlan, *, share: float, image_size: int) -> Cell:
    random = start.method == "none"
    stands_for = "none" if random else grid.corpora[start.corpus].stands_for
    tag = RANDOM if random else f"{start.method}_{start.corpus}"
    parts = ["" if share == 1 else f"-share{share:g}", "" if len(grid.image_sizes) == 1 else f"-{image_size}px"]
    return Cell(
        entry=_row(architecture.family, start.method, stands_for),
        architecture=architecture,
        method=start.method,
        corpus="none" if random else start.corpus,
        share=share,
        image_size=image_size,
        name=f"{architecture.encoder}_{architecture.decoder}.{tag}{''.join(parts)}",
    )


def _row(family: str, method: str, corpus: str) -> ZooEntry:
    for entry in zoo.ZOO:
        if (entry.encoder, entry.method, entry.corpus) == (family, method, corpus):
            return entry
    known = ", ".join(f"{e.method} on {e.corpus}" for e in zoo.ZOO if e.encoder == family) or "no such family"
    raise UsageError(f"the table has no row for {family} with {method} on {corpus}; it has: {known}")
