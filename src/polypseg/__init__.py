"""polypseg: polyp segmentation models whose behavior on other hospitals' data is known.

``load`` gives a model that segments frames (``polypseg.load().predict([image])``), ``BatchSegmenter`` the same for
engines that spread an archive over workers, ``load_polyps`` a dataset,
``evaluate`` the scores of a model on one, ``ZOO`` the table of the twelve models; ``PolypSegConfig`` and
``PolypSegForSemanticSegmentation`` are the classes that transformers' Auto classes find after ``import polypseg``.
Importing the package takes a blink: names are resolved when they are used, and torch is imported when a model is asked
for that needs it. For research only, not a medical device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from polypseg.auto_classes import register_lazily
from polypseg.errors import missing_package

if TYPE_CHECKING:
    from polypseg.data import load_polyps
    from polypseg.evaluation.suite import evaluate
    from polypseg.inference.batches import BatchSegmenter
    from polypseg.inference.segmenter import load
    from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation, soft_dice_loss
    from polypseg.zoo import ZOO

__version__ = "0.1.0"

_HOMES = {
    "PolypSegConfig": "polypseg.modeling",
    "PolypSegForSemanticSegmentation": "polypseg.modeling",
    "soft_dice_loss": "polypseg.modeling",
    "ZOO": "polypseg.zoo",
    "load_polyps": "polypseg.data",
    "evaluate": "polypseg.evaluation.suite",
    "load": "polypseg.inference.segmenter",
    "BatchSegmenter": "polypseg.inference.batches",
}
__all__ = [
    "ZOO",
    "BatchSegmenter",
    "PolypSegConfig",
    "PolypSegForSemanticSegmentation",
    "evaluate",
    "load",
    "load_polyps",
    "soft_dice_loss",
]

register_lazily()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:  # a light installation
            raise ImportError(f"polypseg.{name}: {missing_package(error)}", name=error.name) from error
    raise AttributeError(f"module 'polypseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
