"""Results of other instruments (shift, robustness), shown as they stand in their JSON files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polypseg.errors import UsageError
from polypseg.files import file_sha256, read_json
from polypseg.report.tables import slug
from polypseg.report.wording import between, number, short_p, with_interval
from polypseg.tables import Cell, Column, Table

MOST_ROWS = 60
"""Rows shown of a list; the file has the others."""
_LEFT_OUT = ("images", "environment", "weights_origin", "digest", "strengths", "cross_talk", "predictions", "titles")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One file of another instrument."""

    title: str
    source: str
    """File and digest."""
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]


def read_document(path: Path) -> Document:
    """A file's single values as facts, its lists of records as tables; a robustness file as corruptions by severity.

    Raises UsageError for a file that is no JSON object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object: give a file that a polypseg command wrote")
    curve = {"corruption", "severity", "dice_mean"} <= set((content.get("rows") or [{}])[0])
    lists = {key: value for key, value in content.items() if key not in _LEFT_OUT and _is_table(value)}
    tables = [
        _severity_table(rows, path) if curve and key == "rows" else _plain_table(key, rows, path)
        for key, rows in lists.items()
    ]
    return Document(
        title=_title(content) or path.stem,
        source=f"{path.name}, sha256 {file_sha256(path)[:12]}",
        facts=[(key.replace("_", " "), text) for key, text in _facts(content)],
        tables=tables,
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _title(content: Mapping[str, Any]) -> str:
    """Of a shift file the two sets and, where it speaks of one, the model."""
    name = str(content.get("title") or content.get("model_id") or content.get("model") or "")
    if "titles" not in content:
        return name
    a, b = content["titles"]
    return f"{name}: {a} toward {b}" if name else f"{a} (a) and {b} (b)"


def _facts(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Single values, estimates with their interval, and short lists of values."""
    for key, value in content.items():
        if key in _LEFT_OUT:
            continue
        if isinstance(value, dict) and value.keys() == {"estimate", "low", "high"}:
            yield f"{prefix}{key}", with_interval(value["estimate"], value["low"], value["high"])
        elif isinstance(value, dict):
            yield from _facts(value, f"{prefix}{key} ")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", _words(value)
        elif value and not any(isinstance(part, dict | list) for part in value):
            yield f"{prefix}{key}", ", ".join(map(_words, value))


def _words(value: Any) -> str:
    return number(value) if isinstance(value, float) else "–" if value is None else str(value)


def _plain_table(name: str, rows: Sequence[Mapping[str, Any]], path: Path) -> Table:
    every = dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict | list))
    keys = [key for key in every if not (key.endswith(("_low", "_high")) and key.rsplit("_", 1)[0] in every)]
    numeric = {key: all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys}
    more = "" if len(rows) <= MOST_ROWS else f" (the first {MOST_ROWS} of {len(rows)})"
    return Table(
        name=slug(path.stem, name),
        caption=name.replace("_", " ") + more,
        columns=[Column(key.replace("_", " "), "", partial(_cell, key), numeric=numeric[key]) for key in keys],
        records=rows[:MOST_ROWS],
    )


def _cell(key: str, row: Mapping[str, Any]) -> Cell:
    """A value, above the interval that the row has for it."""
    value = row.get(key)
    text = short_p(value) if key.startswith("p_") and isinstance(value, float) else _words(value)
    return Cell(text, between(row.get(f"{key}_low"), row.get(f"{key}_high")), sort=value)


def _severity_table(rows: Sequence[Mapping[str, Any]], path: Path) -> Table:
    severities = sorted({row["severity"] for row in rows})
    by_kind: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["corruption"], {})[row["severity"]] = row

    def dice(severity: int, kind: str) -> Cell:
        return _dice_cell(by_kind[kind].get(severity))

    return Table(
        name=slug(path.stem, "corruptions"),
        caption="Mean Dice with 95 % interval under each corruption.",
        columns=[
            Column(
                "Corruption",
                "",
                lambda kind: Cell(kind.replace("_", " "), sort=kind),
                numeric=False,
                smallest_first=True,
            ),
            *(Column(str(s), "", partial(dice, s), group="Severity") for s in severities),
        ],
        records=list(by_kind),
    )


def _dice_cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None:
        return Cell("–")
    return Cell(number(row["dice_mean"]), between(row["dice_low"], row["dice_high"]), sort=row["dice_mean"])
