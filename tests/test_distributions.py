"""Two distributions, one import name: no file belongs to both, and a light installation says what it lacks."""

import tomllib
from pathlib import Path

import pytest

import polypseg
from polypseg.cli.console import reported
from polypseg.errors import missing_package

ROOT = Path(__file__).resolve().parents[1]


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_whole_one_is_the_light_one_with_its_extras_and_no_file():
    light, whole = project(ROOT), project(ROOT / "packaging" / "polypseg")
    version = polypseg.__version__
    assert light["project"]["name"] == "polypseg-light" and whole["project"]["name"] == "polypseg"
    assert light["project"]["version"] == whole["project"]["version"] == version
    assert whole["project"]["dependencies"] == [f"polypseg-light[full]=={version}"]
    assert whole["tool"]["hatch"]["build"]["targets"]["wheel"] == {"bypass-selection": True}
    assert all(light["project"][key] == whole["project"][key] for key in ("classifiers", "urls", "license", "authors"))
    for extra, needed in whole["project"]["optional-dependencies"].items():
        assert needed == [f"polypseg-light[{extra}]=={version}"] and extra in light["project"]["optional-dependencies"]
    heavy = {"torch", "transformers", "datasets", "opencv-python-headless", "scipy", "pydantic"}
    assert not heavy & {line.split(">")[0] for line in light["project"]["dependencies"]}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("torch", "python -m pip install polypseg"),
        ("openvino", "python -m pip install openvino"),
        ("onnxscript", "python -m pip install 'polypseg[export]'"),
    ],
)
def test_missing_packages_are_named_with_the_line_to_type(module, line, capsys):
    error = ModuleNotFoundError(f"No module named {module!r}", name=module)
    assert str(missing_package(error)) == f"this needs {module}, which is not installed: run `{line}`"
    with pytest.raises(SystemExit) as caught, reported():
        raise error
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {missing_package(error)}\n"


def test_our_own_missing_modules_are_faults_not_advice():
    with pytest.raises(ModuleNotFoundError), reported():
        raise ModuleNotFoundError("No module named 'polypseg.nothing'", name="polypseg.nothing")


def test_public_names_that_need_more_say_so(monkeypatch):
    monkeypatch.setitem(polypseg._HOMES, "evaluate", "no_such_package")
    with pytest.raises(ImportError, match=r"polypseg\.evaluate: this needs no_such_package"):
        _ = polypseg.evaluate
