"""Command-line arguments that several commands take."""

from collections.abc import Collection, Mapping, Sequence
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
WideOption = Annotated[bool, Option("--wide", help="All columns, however narrow the screen is.")]
PrecisionOption = Annotated[
    str,
    Option(help="fp32, or what a file of the model (fp16, int8) or the arithmetic of this CPU (bf16) rounds to."),
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON, for programs.")]
NamedMaskValues = Annotated[
    list[str] | None,
    Option(
        "--mask-values",
        help="NAME=VALUES: values or colors of a set's mask files that are polyp, 1, 1-6 or '#ff0000'. NAME is a side "
        "(study: in or out; shift: a or b) or a test's dataset. Repeat for several.",
    ),
]
SourceOption = Annotated[
    list[str] | None,
    Option("--source", help="Folder or archive of the dataset, or NAME=PATH for a dataset of several; repeatable."),
]


def places(sources: Sequence[str] | None, *, datasets: Sequence[str]) -> dict[str, Path]:
    """``--source`` options -> dataset -> where it lies. A bare path is of the only dataset.

    Raises UsageError for a dataset that the command does not use, one that is named twice, and a bare path where there
    are several datasets.
    """
    from polypseg.data.catalog import DATASETS

    found: dict[str, Path] = {}
    for text in sources or []:
        name, _, path = text.partition("=")
        if name not in DATASETS or not path:
            if len(set(datasets)) != 1:
                raise UsageError(f"--source {text!r}: say of which dataset, as in {datasets[0]}={text}")
            name, path = datasets[0], text
        if name not in datasets:
            raise UsageError(f"--source {text!r}: this command uses {', '.join(dict.fromkeys(datasets))}")
        if name in found:
            raise UsageError(f"--source names {name} twice: give it once")
        found[name] = Path(path)
    return found


def two_places(sources: Sequence[str] | None, first: str, second: str) -> tuple[Path | None, Path | None]:
    """Where two datasets lie. Of two of one name, which only ``folder`` may be, the first ``--source`` is the first's.

    Raises UsageError as ``places``.
    """
    from polypseg.data.catalog import OWN_FOLDER

    if first == second == OWN_FOLDER and len(sources or []) == 2:
        here, there = (Path(text.removeprefix(f"{OWN_FOLDER}=")) for text in sources or [])
        return here, there
    found = places(sources, datasets=[first, second])
    return found.get(first), found.get(second)


def refuse_options(given: Mapping[str, object], *, because: str) -> None:
    """Raise UsageError for the first option (its name -> its value) that was given though it does not apply."""
    for option, value in given.items():
        if value not in (None, False, [], ()):
            raise UsageError(f"{option} does not apply: {because}")


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
