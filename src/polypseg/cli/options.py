"""Command-line arguments that several commands take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Option

from polypseg.errors import UsageError

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
