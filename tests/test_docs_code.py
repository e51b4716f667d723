"""What the pages show runs: the Python for Hugging Face users and both notebooks; errors are quoted as raised."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import polypseg_command

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def run_cells(cells: list[str], *, name: str) -> dict[str, object]:
    """Execute cells one after the other in one namespace, as a notebook does; return the namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells, start=1):
        exec(compile(cell, f"{name}, block {number}", "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_blocks_for_hugging_face_users_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "hugging_face.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 5
    made = run_cells(blocks, name=page.name)
    assert made["found"]["label"] in ("background", "polyp")
    assert made["trainer"].state.global_step == 2 and (tmp_path / "runs/trainer/best/model.safetensors").is_file()
    assert (tmp_path / "runs/lora/adapter_model.safetensors").is_file() and made["loss"].requires_grad
    assert type(made["whole"]) is made["PolypSegForSemanticSegmentation"]
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = run_cells([source for kind, source in cells_of(path) if kind == "code"], name=path.name)
    if path.stem == "use_a_model":
        assert len(list((tmp_path / "segmented").glob("*_mask.png"))) == len(made["frames"]) == 3
    else:
        assert len(list((tmp_path / "receipts").rglob("*.receipt.json"))) == len(made["results"]) == 2


def cells_of(path: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]


def test_notebooks_are_kept_without_outputs_and_places():
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        content = json.loads(path.read_text())
        assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
        ids = [cell["id"] for cell in content["cells"]]
        assert len(set(ids)) == len(ids)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in content["cells"]), path.name
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", path.read_text()), path.name
        for kind, source in cells_of(path):
            targets = re.findall(r"\]\(([^)#:]+)\)", source) if kind == "markdown" else []
            assert all((path.parent / target).exists() for target in targets), (path.name, targets)


def texts_of_the_source() -> list[list[str | None]]:
    """Every text of the source that has some words in it, as its words and None for what is filled in."""
    found = []
    for path in (REPOSITORY / "src" / "polypseg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if all(word is None or isinstance(word, str) for word in words) and sum(len(w or "") for w in words) > 20:
                found.append(words)
    return found


def is_one_of(texts: list[list[str | None]], said: str) -> bool:
    close = [words for words in texts if all(word is None or word in said for word in words)]
    return any(re.fullmatch("".join(".*" if w is None else re.escape(w) for w in words), said) for words in close)


def test_quoted_errors_are_those_of_the_source():
    quoted = re.findall(r"```text\nerror: (.*)\n```", (DOCS / "troubleshooting.md").read_text())
    assert len(quoted) >= 20
    texts = texts_of_the_source()
    assert [said for said in quoted if not is_one_of(texts, said)] == []
    assert not any(is_one_of(texts, said.replace("e", "ee")) for said in quoted)


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        ("segment broken/ --output out", 1),
        ("evaluate --model starter --dataset folder --source my-frames", 1),
        ("evaluate --model starter --dataset folder --source colored", 1),
        ("evaluate --model starter --dataset cvc_clinicdb --source results.rar", 2),
        ("diagnose 0.82 73.3", 2),
    ],
)
def test_errors_are_printed_as_quoted(command, exit_code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("broken", "my-frames/images", "my-frames/masks", "colored/images", "colored/masks"):
        (tmp_path / folder).mkdir(parents=True)
    Path("broken/a.jpg").write_bytes(b"\xff\xd8\xff\xe0garbage")
    Path("results.rar").write_bytes(b"Rar!\x1a\x07\x01\x00")
    frame, marked = Image.new("RGB", (64, 48), (200, 90, 80)), Image.new("RGB", (64, 48))
    marked.paste((255, 0, 0), (10, 10, 30, 30))
    for name in ("my-frames/images/1.png", "my-frames/images/2.png", "colored/images/1.png"):
        frame.save(name)
    marked.convert("L").point(lambda value: 255 * (value > 0)).save("my-frames/masks/1.png")
    marked.save("colored/masks/1.png")
    monkeypatch.setattr("sys.argv", ["polypseg", *shlex.split(command)])
    with pytest.raises(SystemExit) as stopped:
        polypseg_command.main()
    assert stopped.value.code == exit_code
    said = capsys.readouterr().err.strip().splitlines()[-1].partition(". All are listed in")[0]
    told = (DOCS / "troubleshooting.md").read_text()
    assert said.replace("none of the 1 file(s) could be read: ", "") in told.splitlines()
