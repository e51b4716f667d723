"""Names of models whose files are on this machine: a folder, or the model that ships with the package."""

from pathlib import Path

from polypseg.errors import UsageError

STARTER = "starter"
"""The name of the shipped model wherever a model is named; a folder of that name is given as ``./starter``."""
STARTER_FOLDER = Path(__file__).resolve().parents[1] / "starter"
BEST = "best"
"""Where a training run keeps its model."""
CONFIG = "config.json"
"""As in transformers, without the time to import it."""


def vouched_results() -> Path:
    """Receipts of the models that this repository vouches for, which come with the package: in the wheel, else in the
    checkout."""
    packaged = Path(__file__).resolve().parents[1] / "_results"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[3] / "model_cards" / "results"


def local_folder(name: str | Path) -> Path | None:
    """The folder of a model that is here: the shipped one's, or ``name`` itself; None for the name of a Hub model.

    Of a training run's folder it is the model in it. Raises UsageError for the shipped model where an installation
    lacks it.
    """
    if str(name) == STARTER:
        return starter_folder()
    folder = Path(name)
    if not folder.is_dir():
        return None
    best = folder / BEST
    return best if not (folder / CONFIG).is_file() and (best / CONFIG).is_file() else folder


def starter_folder() -> Path:
    """Where the shipped model lies. Raises UsageError where an installation lacks it."""
    if not (STARTER_FOLDER / CONFIG).is_file():
        raise UsageError(
            f"this installation holds no model called {STARTER!r} ({STARTER_FOLDER / CONFIG} is missing): install a "
            "released version of polypseg, or name another model (--model)"
        )
    return STARTER_FOLDER
