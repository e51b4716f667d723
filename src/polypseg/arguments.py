"""Command-line arguments that several commands take."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.errors import UsageError, unknown_name

ImageSize = Annotated[int | None, Option(min=32, help="Side that a model was trained at, where its files do not say.")]
GivesProbabilities = Annotated[
    bool, Option("--gives-probabilities", help="The ONNX or smp model ends in probabilities, not in logits.")
]
MaskValuesOption = Annotated[
    str | None,
    Option(
        "--mask-values",
        help="Values or colors of the mask files that are polyp: 1, 1-6 or '#ff0000,#00ff00'. Default: gray above 127.",
    ),
]

NamedMaskValues = Annotated[
    list[str] | None,
    Option(
        "--mask-values",
        help="NAME=VALUES: values or colors of a set's mask files that are polyp, 1, 1-6 or '#ff0000'. NAME is a side "
        "(study: in or out; shift: a or b) or a test's dataset. Repeat for several.",
    ),
]


def named_values(pairs: Sequence[str] | None, *, option: str, form: str = "NAME=VALUE") -> dict[str, str]:
    """The pairs of a repeatable option as a table. Raises UsageError for another form and a name given twice."""
    values: dict[str, str] = {}
    for pair in pairs or []:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise UsageError(f"{option} {pair!r} must look like {form}")
        if name in values:
            raise UsageError(f"{option} names {name} twice: give it once")
        values[name] = value
    return values


def named_places(pairs: Sequence[str] | None, *, option: str, form: str = "NAME=PATH") -> dict[str, Path]:
    """The same for files and folders."""
    return {name: Path(value) for name, value in named_values(pairs, option=option, form=form).items()}


def named_mask_values(pairs: Sequence[str] | None, *, names: Collection[str]) -> dict[str, str]:
    """The values of ``NamedMaskValues`` by name. Raises UsageError for a name not in ``names`` and for other values."""
    from polypseg.data.images import MaskValues  # late: commands without masks need no NumPy

    values = named_values(pairs, option="--mask-values", form="NAME=VALUES")
    for name, text in values.items():
        if name not in names:
            raise unknown_name("set with mask values", name, names)
        MaskValues.parse(text)
    return values
