"""``polypseg shift``: how two datasets differ, and what each difference costs a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from polypseg.cli.console import print_table
from polypseg.cli.options import (
    GivesProbabilities,
    ImageSize,
    NamedMaskValues,
    SourceOption,
    named_mask_values,
    two_places,
)

if TYPE_CHECKING:
    from polypseg.shift import SetComparison
    from polypseg.shift.attribution import Attribution, ShiftSet
    from polypseg.shift.comparison import Embed

shift_app = typer.Typer(help="How two datasets differ, and what each difference costs a model.", no_args_is_help=True)

A = Annotated[str, Option("--a", help="First dataset as DATASET[.SPLIT.PART], e.g. kvasir_seg.reference.test.")]
B = Annotated[str, Option("--b", help="Second dataset, alike.")]
Limit = Annotated[int | None, Option(min=1, help="Only the first N images of each set.")]
Output = Annotated[Path, Option(help="Folder of results.")]


@shift_app.command()
def measure(
    a: A,
    b: B,
    source: SourceOption = None,
    mask_values: NamedMaskValues = None,
    encoder: Annotated[
        str, Option(help="For the embedding distance: starter, a model folder, or none to leave it out.")
    ] = "starter",
    limit: Limit = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of a dataset.")] = False,
    output: Output = Path("results/shift"),
) -> None:
    """Measure how two sets differ: color, light, sharpness, border, polyps, compression, embedding, separability."""
    from polypseg.files import sole_writer
    from polypseg.shift import compare_sets
    from polypseg.shift.embedding import open_embedding

    values = named_mask_values(mask_values, names=("a", "b"))
    with sole_writer(output):
        embed = None if encoder == "none" else open_embedding(encoder)
        first, second = (
            _open(name, place, limit=limit, allow_partial=allow_partial, mask_values=values.get(side), embed=embed)
            for side, name, place in _sides(a, b, source)
        )
        found = compare_sets(first.measured, second.measured)
        path = _write(output, f"{a}.{b}.measures", found.content(), list(found.measures))
    _print_comparison(found)
    print(_separability(found))
    print(f"numbers: {path}")


@shift_app.command()
def attribute(
    model: Annotated[str, Option("--model", help="As for `polypseg evaluate --model`.")],
    a: A,
    b: B,
    source: SourceOption = None,
    mask_values: NamedMaskValues = None,
    strength: Annotated[float, Option(min=0, max=1, help="0 changes nothing, 1 moves all the way.")] = 1.0,
    image_size: ImageSize = None,
    gives_probabilities: GivesProbabilities = False,
    one_way: Annotated[bool, Option("--one-way", help="Leave out the direction from b to a.")] = False,
    limit: Limit = None,
    allow_partial: Annotated[bool, Option("--allow-partial", help="Accept a part of a dataset.")] = False,
    output: Output = Path("results/shift"),
) -> None:
    """Re-render each set toward the other, one factor at a time, and say what each factor costs the model."""
    from polypseg.files import sole_writer
    from polypseg.inference.open_model import open_model
    from polypseg.shift import attribute_shift

    values = named_mask_values(mask_values, names=("a", "b"))
    chosen = open_model(model, image_size=image_size, gives_probabilities=gives_probabilities)
    with sole_writer(output / chosen.name):
        first, second = (
            _open(name, place, limit=limit, allow_partial=allow_partial, mask_values=values.get(side))
            for side, name, place in _sides(a, b, source)
        )
        directions = [(a, b, first, second)] if one_way else [(a, b, first, second), (b, a, second, first)]
        for inside, outside, here, there in directions:
            found = attribute_shift(chosen, here, there, strength=strength)
            _print_attribution(found)
            content = found.content() | {"predictions": chosen.origin}
            print(f"numbers: {_write(output / chosen.name, f'{inside}.{outside}.attribution', content, found.rows())}")


def _sides(a: str, b: str, sources: list[str] | None) -> list[tuple[str, str, Path | None]]:
    """Side, name and place of both sets."""
    here, there = two_places(sources, *(name.split(".")[0] for name in (a, b)))
    return [("a", a, here), ("b", b, there)]


def _open(
    name: str,
    source: Path | None,
    *,
    limit: int | None,
    allow_partial: bool,
    mask_values: str | None,
    embed: "Embed | None" = None,
) -> "ShiftSet":
    from polypseg.data import open_dataset
    from polypseg.errors import UsageError
    from polypseg.shift import measure_set, typical_look
    from polypseg.shift.attribution import ShiftSet

    dataset, *rest = name.split(".")
    if len(rest) not in (0, 2):
        raise UsageError(f"{name!r}: give DATASET or DATASET.SPLIT.PART, such as kvasir_seg.reference.test")
    split, part = rest or ("full", "full")
    opened = open_dataset(dataset, source=source, allow_partial=allow_partial, mask_values=mask_values)
    ids, label = opened.part(split, part, limit=limit)
    measured = measure_set(opened, ids, title=f"{opened.spec.title}, {split} {label}", embed=embed)
    return ShiftSet(dataset=opened, ids=ids, measured=measured, look=typical_look(opened, ids, measured))


def _title(found: "SetComparison") -> str:
    (a, b), (n_a, n_b) = found.titles, found.sizes
    return f"a: {a} (n = {n_a}); b: {b} (n = {n_b})"


def _separability(found: "SetComparison") -> str:
    from polypseg.tables import with_bounds

    def words(value: Any) -> str:
        return with_bounds(value.estimate, value.low, value.high)

    parts = [f"a linear classifier of the measures tells the sets apart with AUC {words(found.measures_auc)}"]
    if found.embedding_auc is not None and found.embedding_floor is not None:
        low, high = found.embedding_floor
        parts.append(f"of the embedding with AUC {words(found.embedding_auc)}")
        parts.append(
            f"kernel distance of the embeddings {words(found.embedding_distance)}, between halves of one set "
            f"{low:.3f} to {high:.3f}"
        )
    return "; ".join(parts)


def _print_comparison(found: "SetComparison") -> None:
    from polypseg.tables import Column, Table, bounds

    columns = [
        Column("measure", "measure"),
        *(
            Column(title, key, "{:.4g}".format)
            for title, key in (("a", "mean_a"), ("b", "mean_b"), ("b - a", "difference"))
        ),
        Column("95 % interval", "", lambda row: bounds(row["difference_low"], row["difference_high"], ".4g")),
        Column("effect (d)", "effect", "{:+.2f}".format),
    ]
    print_table(Table(columns=columns, records=found.measures, title=_title(found)))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _print_attribution(found: "Attribution") -> None:
    from polypseg.tables import Column, Table, bounds

    (inside, outside), drop = found.titles, found.drop
    title = (
        f"{found.model}: {inside} (n = {found.sizes[0]}) toward {outside} (n = {found.sizes[1]}); mean Dice "
        f"{found.inside.estimate:.3f} and {found.outside.estimate:.3f}, drop {drop.estimate:+.3f}"
    )
    columns = [
        Column("factor", "factor"),
        Column("costs in mean Dice", "cost", "{:+.3f}".format),
        Column("95 % interval", "", lambda row: bounds(row["cost_low"], row["cost_high"], "+.3f")),
        Column("p (Holm)", "p_holm", "{:.3f}".format),
        Column("share of the drop", "share_of_drop", _share),
        Column("of its shift covered", "covered", _share),
    ]
    print_table(Table(columns=columns, records=found.rows(), title=title))


def _write(folder: Path, name: str, content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    from polypseg.files import environment_record, write_csv, write_json

    write_csv(folder / f"{name}.csv", rows)
    return write_json(folder / f"{name}.json", content | {"environment": environment_record()})
