"""Where the files of a model lie that is given by name, and what results call it."""

import re
from pathlib import Path
from typing import Any

from polypseg.errors import UsageError
from polypseg.provenance.checksums import LOADED
from polypseg.provenance.fetch import fetch
from polypseg.provenance.local import CONFIG, local_folder
from polypseg.provenance.origin import UNKNOWN, WeightsOrigin

ONNX = ".onnx"


def model_folder(model: str | None, *, revision: str | None = None, with_code: bool = False) -> Path | None:
    """Where a model's files lie, a Hub model's once they are fetched; None for no model and an ONNX file by itself.

    ``with_code``: of a Hub model its Python files too.
    """
    if model is None:
        return None
    if Path(model).suffix == ONNX:
        return next((folder for folder in Path(model).resolve().parents[:2] if (folder / CONFIG).is_file()), None)
    return named_folder(model, revision=revision, with_code=with_code)


def named_folder(model: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The folder of a model by name: the shipped one, a folder, or a Hub model once it is fetched and verified.

    Raises UsageError for a revision of a folder.
    """
    folder = local_folder(model)
    if folder is not None and revision is not None:
        raise UsageError(f"{model} is a folder: a revision belongs to a Hub id")
    return folder or fetch(model, revision=revision, files=(*LOADED, "*.py") if with_code else LOADED)


def results_name(config: Any, name_or_path: str) -> str:
    """What results call a model: the id of its record, else the last part of its name or path.

    Raises UsageError for a recorded id that cannot name a folder.
    """
    try:
        name = WeightsOrigin.within(config).model_id
    except UsageError as error:
        raise UsageError(f"{name_or_path} has a record that cannot name results: {error}") from error
    if name == UNKNOWN:
        return Path(name_or_path).name
    if not re.fullmatch(r"\w[\w.+-]{0,199}", name):
        raise UsageError(f"{name_or_path} records the id {name[:80]!r}, which cannot name results: correct it")
    return name
