"""Where the files of a model lie that is given by name."""

from pathlib import Path

from polypseg.errors import UsageError
from polypseg.provenance.checksums import LOADED
from polypseg.provenance.fetch import fetch
from polypseg.provenance.local import CONFIG, local_folder

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
