"""What the pages show runs: the Python of the page for Hugging Face users, both notebooks; errors are quoted as raised."""

import ast
import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def run_cells(cells: list[str], *, name: str) -> dict[str, object]:
    """Execute cells one after the other in one namespace, as a notebook does; return the namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells, start=1):
        exec(compile(cell, f"{name}, block {number}", "exec"), namespace)
    return namespace


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
