"""Tables that rename tensors: each row an anchored pattern and what becomes of the keys that it matches."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Keep:
    """Keys that match ``pattern`` as a whole are renamed to ``replacement`` (with ``\\1`` for groups)."""

    pattern: str
    replacement: str


@dataclass(frozen=True)
class Drop:
    """Keys that match ``pattern`` as a whole are left out, because they are ``what``."""

    pattern: str
    what: str


@dataclass(frozen=True)
class KeyMap:
    """What a table makes of a list of keys."""

    kept: dict[str, str] = field(default_factory=dict)
    """Old key -> new key."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """What was left out -> its keys."""
    unknown: list[str] = field(default_factory=list)
    """Keys that no row matches."""


def map_keys(keys: Iterable[str], rows: Iterable[Keep | Drop]) -> KeyMap:
    """Apply the first matching row to each key; the order of ``keys`` is kept. Nothing is left out silently."""
    table = [(re.compile(row.pattern), row) for row in rows]
    result = KeyMap()
    for key in keys:
        row, match = next(((row, m) for pattern, row in table if (m := pattern.fullmatch(key))), (None, None))
        if isinstance(row, Keep) and match is not None:
            result.kept[key] = match.expand(row.replacement)
        elif isinstance(row, Drop):
            result.dropped.setdefault(row.what, []).append(key)
        else:
            result.unknown.append(key)
    return result


def count_and_first(keys: Iterable[str], *, kind: str = "") -> str:
    """``3 missing (first conv1.weight)``, for error messages; ``0`` for none."""
    names = sorted(keys)
    return " ".join(filter(None, (str(len(names)), kind, f"(first {names[0]})" if names else "")))
