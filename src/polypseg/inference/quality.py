"""What is known of a model's quality, as its folder says it: the Dice of its receipts, in words."""

import json
from dataclasses import dataclass
from pathlib import Path

FILE = "quality.json"
"""In a model folder, written from its receipts when they are added to it."""
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
    """What a model folder says; ``UNKNOWN`` where it says nothing."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Quality(words=str(content["words"]), short=str(content["short"]))
    except (OSError, ValueError, TypeError, KeyError):
        return UNKNOWN
