"""The two errors that users see: one line of English that names the file and the remedy, and an exit code."""

_LONGEST = 500  # characters of what another library says


class PolypSegError(Exception):
    """Something failed while working: a broken file, no space, a server that refuses. Exit code 1."""

    exit_code = 1


class UsageError(PolypSegError):
    """The request itself cannot be met: an unknown name, a typo in a recipe, a missing path. Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut at 500 characters, or its kind where it has none."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."


PIP = "python -m pip install"
_DISTRIBUTIONS = {
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "gradio": "'polypseg[app]'",
    "onnx": "'polypseg[export]'",
    "onnxscript": "'polypseg[export]'",
}
"""Module -> what to install for it, where that is not the whole of polypseg."""


def missing_package(error: ModuleNotFoundError) -> UsageError:
    """What a user of a light installation is told: which module is missing, and the line that brings it."""
    module = (error.name or "a module").partition(".")[0]
    if module == "cv2":
        videos = f"`{PIP} opencv-python-headless` for videos, `{PIP} polypseg` for everything"
        return UsageError(f"this needs cv2, which is not installed: run {videos}")
    needed = _DISTRIBUTIONS.get(module, "polypseg")
    return UsageError(f"this needs {module}, which is not installed: run `{PIP} {needed}`")


def unknown_name(kind: str, name: str, known: object) -> UsageError:
    """The error for ``name`` that is none of ``known`` (any iterable of strings), with the closest match."""
    import difflib

    names = sorted(str(item) for item in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Choose from: {', '.join(names)}")
