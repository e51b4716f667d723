"""``import polypseg`` is light, and transformers' Auto classes know the models all the same, in whatever order."""

import subprocess
import sys
from pathlib import Path

import pytest

import polypseg
from tiny_models import write_tiny_model

HEAVY = ("torch", "torchvision", "timm", "transformers", "datasets", "numpy", "PIL", "cv2", "scipy", "typer")


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    loaded = run(f"import sys, polypseg; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert loaded.split() == []


def test_every_public_name_is_listed_and_resolves():
    assert set(polypseg.__all__) <= set(dir(polypseg))
    for name in polypseg.__all__:
        assert getattr(polypseg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = polypseg.nothing
    assert (Path(polypseg.__file__).parent / "py.typed").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("lazy") / "model")


FIRST = """
import sys, polypseg
import transformers.models.auto.configuration_auto as table
assert "timm" not in sys.modules and "polypseg" in table.CONFIG_MAPPING
assert type(table.__spec__.loader).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("polypseg")]
from transformers import AutoConfig, AutoModelForSemanticSegmentation
assert AutoConfig.for_model("polypseg", encoder="resnet10t").encoder == "resnet10t"
assert table.CONFIG_MAPPING["polypseg"] is polypseg.PolypSegConfig
print(type(AutoModelForSemanticSegmentation.from_pretrained({folder!r})).__name__)
"""
SECOND = """
from transformers import AutoConfig, AutoModelForSemanticSegmentation
import polypseg
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "PolypSegConfig"
print(type(AutoModelForSemanticSegmentation.from_pretrained({folder!r})).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [FIRST, SECOND], ids=["polypseg-first", "transformers-first"])
def test_auto_classes_know_the_models(folder, code):
    assert run(code.replace("{folder!r}", repr(str(folder)))).strip() == "PolypSegForSemanticSegmentation"


@pytest.mark.parametrize("tested", ["--predictions {folder}/predicted", "--model starter --runtime onnxruntime"])
def test_evaluating_without_torch_imports_no_deep_learning(tested, tmp_path):
    code = f"""
import sys
from pathlib import Path
from polypseg.cli.app import app
from polypseg.data import SyntheticOptions, open_dataset
data = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=3, size=(40, 50)))
from PIL import Image
for kind in ("images", "masks", "predicted"):
    (Path({str(tmp_path)!r}) / kind).mkdir()
for record in data.records:
    frame, mask = data.frame(record), Image.fromarray(255 * data.mask(record))
    frame.save(f"{tmp_path}/images/{{record.id}}.png")
    mask.save(f"{tmp_path}/masks/{{record.id}}.png")
    mask.save(f"{tmp_path}/predicted/{{record.id}}.png")
app(["evaluate", "--dataset", "folder", "--source", {str(tmp_path)!r}, *{tested.format(folder=tmp_path).split()!r},
     "--output", "{tmp_path}/results"], standalone_mode=False)
print("heavy:", *[name for name in ("torch", "transformers", "timm", "datasets", "pandas") if name in sys.modules])
"""
    printed = run(code)
    assert "mDice " in printed and printed.splitlines()[-1] == "heavy:"
    assert ("mDice 1.000" in printed) == tested.startswith("--predictions")
