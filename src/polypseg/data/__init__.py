"""Datasets, splits and the feed."""

import importlib
from typing import Any

_HOMES = {
    "DATASETS": "polypseg.data.catalog",
    "DatasetSpec": "polypseg.data.catalog",
    "PolypDataset": "polypseg.data.polyps",
    "SyntheticOptions": "polypseg.data.polyps",
    "load_polyps": "polypseg.data.polyps",
    "open_dataset": "polypseg.data.polyps",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # The catalog is a table; opening a set imports the datasets library, whose import takes seconds.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polypseg.data' has no attribute {name!r}")
