"""polypseg: polyp segmentation models whose behaviour on other hospitals' data is known."""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PolypSegConfig": "polypseg.modeling",
    "PolypSegForSemanticSegmentation": "polypseg.modeling",
    "soft_dice_loss": "polypseg.modeling",
    "ZOO": "polypseg.zoo",
    "load_polyps": "polypseg.data",
    "evaluate_model": "polypseg.evaluation",
    "load": "polypseg.hub",
}
__all__ = list(_HOMES)

# Importing the package registers the model with transformers' Auto classes. The commands set POLYPSEG_LAZY because
# most of them need neither torch nor timm, whose import takes seconds.
if not os.environ.get("POLYPSEG_LAZY"):
    importlib.import_module("polypseg.modeling")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polypseg' has no attribute {name!r}")
