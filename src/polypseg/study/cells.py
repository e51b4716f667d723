"""The cells of a grid: every combination of architecture, start, share of the corpus and image size, with its names.

Or the rows of the table that the grid lists, with what each starts from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from polypseg import zoo
from polypseg.data.corpus import FrameStore, FrameSubset
from polypseg.errors import UsageError
from polypseg.pretraining.recipe import PretrainingRecipe, load_pretraining_recipe
from polypseg.recipe import Recipe, load_recipe
from polypseg.study.schema import Architecture, Grid, PretrainingPlan, StartPlan, weights_by_row
from polypseg.weights.loading import STARTER_ENCODER, starter_installed
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
    """One place of the matrix: trained once a seed, or once where the grid names no seeds."""

    entry: ZooEntry
    """The row of the table whose place it takes."""
    architecture: Architecture
    method: str
    corpus: str
    share: float
    name: str
    """Folder name, unique in the grid."""
    changes: tuple[str, ...]
    """What it changes of the grid's fine-tuning recipe."""
    weights: str | None = None
    """What the encoder of a listed row starts from, as ``load_encoder_weights`` takes it; None for a grid of starts."""
    lacks_weights: bool = False
    """Whether that is a random start for lack of the row's own pretraining."""

    def start(self, grid: Grid, seed: int | None) -> Start | None:
        """The pretraining that the encoder starts from; None for random initialization and for listed rows."""
        if self.method == "none" or self.weights is not None:
            return None
        return Start(
            architecture=self.architecture,
            method=self.method,
            corpus=self.corpus,
            share=self.share,
            plan=grid.plan(self.method, self.architecture.family),
            seed=seed if grid.repeat_pretraining else None,
        )

    def recipe(self, grid: Grid, seed: int | None) -> Recipe:
        """The grid's fine-tuning recipe for this cell; without a seed, the recipe's own, moved where rows need it."""
        own = [*self.changes, *([] if seed is None else [f"seed={seed}"])]
        recipe = load_recipe(grid.finetuning.recipe, overrides=[*own, *grid.finetuning.overrides])
        if seed is not None:
            return recipe
        place = zoo.rows().index(self.entry)
        # Rows that share a start would otherwise be copies of each other.
        moved = place if grid.seed_by_row else 1 + place if self.lacks_weights else 0
        return recipe.model_copy(update={"seed": recipe.seed + moved})


def grid_cells(grid: Grid) -> list[Cell]:
    """All cells, in the order of the grid. Raises UsageError for what is no row of the table or lacks its weights."""
    if grid.rows:
        return _row_cells(grid)
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
    entry = _row(architecture.family, start.method, stands_for)
    changes = [f"model.encoder={architecture.encoder}", f"data.image_size={image_size}"]
    if architecture.decoder != entry.decoder:
        changes.append(f"model.decoder={architecture.decoder}")
    return Cell(
        entry=entry,
        architecture=architecture,
        method=start.method,
        corpus="none" if random else start.corpus,
        share=share,
        name=f"{architecture.encoder}_{architecture.decoder}.{tag}{''.join(parts)}",
        changes=tuple(changes),
    )


def _row_cells(grid: Grid) -> list[Cell]:
    """The listed rows, each with the weights that are given for it, or that timm or the starter package has of it."""
    given = weights_by_row(grid.weights, rows=grid.rows)
    rows = dict.fromkeys(zoo.get(name) for name in grid.rows)
    cells = [_row_cell(grid, row, given=given) for row in rows]
    missing = [cell.entry.model_id for cell in cells if cell.lacks_weights]
    if missing and grid.missing_weights == "refuse":
        raise UsageError(
            f"no pretraining weights for {', '.join(missing)}: give each by --encoder-weights MODEL=FILE, or accept a "
            "random start, which the tables will state, with --start-from-available. `polypseg models` says where each "
            "is published"
        )
    return cells


def _row_cell(grid: Grid, entry: ZooEntry, *, given: Mapping[str, str]) -> Cell:
    stand_in = grid.stand_ins.get(entry.encoder)
    changes = () if stand_in is None else (f"model.encoder={stand_in}",)
    recipe = load_recipe(grid.finetuning.recipe, overrides=[*changes, *grid.finetuning.overrides])
    weights = given.get(entry.model_id) or _own_weights(entry, encoder=recipe.model.encoder)
    architecture = Architecture(
        family=entry.encoder,
        encoder=recipe.model.encoder or zoo.ENCODERS[entry.encoder],
        decoder=recipe.model.decoder or entry.decoder,
    )
    return Cell(
        entry=entry,
        architecture=architecture,
        method=entry.method,
        corpus=entry.corpus,
        share=1.0,
        name=entry.model_id,
        changes=changes,
        weights=weights or RANDOM,
        lacks_weights=weights is None,
    )


def _own_weights(entry: ZooEntry, *, encoder: str | None) -> str | None:
    """The row's own start, as far as it is at hand for an encoder (None: the row's); never another in its place."""
    if entry.method == "none":
        return RANDOM
    if encoder is None and entry.upstream.timm:
        return f"timm:{entry.upstream.timm}"
    is_starter = encoder == STARTER_ENCODER and (entry.method, entry.corpus) == ("supervised", "imagenet1k")
    return "starter" if is_starter and starter_installed(STARTER_ENCODER) else None


def _row(family: str, method: str, corpus: str) -> ZooEntry:
    for entry in zoo.ZOO:
        if (entry.encoder, entry.method, entry.corpus) == (family, method, corpus):
            return entry
    known = ", ".join(f"{e.method} on {e.corpus}" for e in zoo.ZOO if e.encoder == family) or "no such family"
    raise UsageError(f"the table has no row for {family} with {method} on {corpus}; it has: {known}")
