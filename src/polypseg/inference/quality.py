"""What is known of a model's quality, as its folder says it: the Dice of its receipts, in words."""

import json
from dataclasses import dataclass
from pathlib import Path

from polypseg.files import read_bounded

FILE = "quality.json"
"""In a model folder, written from its receipts when they are added to it."""
LARGEST = 2**16
"""Bytes of that file; real ones have some hundred."""
RESEARCH = "for research only"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good a model is, in words."""

    words: str
    """Dice with interval and n of each test; a sentence where nothing was measured."""
    short: str
    """For the foot of an overlay."""


UNKNOWN = Quality(words="how good it is has not been measured: no receipts come with it", short="Dice not measured")


def read_quality(folder: Path) -> Quality:
    """What a model folder says; ``UNKNOWN`` where it says nothing that can be read."""
    try:
        content = json.loads(read_bounded(folder / FILE, largest=LARGEST))
        words, short = content["words"], content["short"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return UNKNOWN
    return Quality(words=words, short=short) if isinstance(words, str) and isinstance(short, str) else UNKNOWN
