"""``--mask-values`` reaches every command that reads masks: what is refused without it is read right with it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polypseg.cli import study as cli
from polypseg.cli.evaluate import evaluate
from polypseg.cli.options import named_mask_values
from polypseg.cli.shift import measure
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.suite import SuitePlan, run_suite
from polypseg.files import read_json
from polypseg.report import gallery
from polypseg.study import compare as study
from polypseg.study.schema import EvaluationPlan
from polypseg.study.tasks import EvaluateTask

SIZE = (24, 32)


class LeftHalf:
    """Predicts the left half of every frame."""

    name = "left"
    origin = {"source": "test"}  # noqa: RUF012

    def predict(self, dataset: Any, ids: Any) -> Any:
        probability = np.zeros(SIZE, np.float32)
        probability[:, :16] = 0.9
        for record_id in ids:
            yield record_id, probability


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six frames whose left half is polyp, coded as 1."""
    folder = tmp_path_factory.mktemp("coded")
    rng = np.random.default_rng(0)
    mask = np.zeros(SIZE, np.uint8)
    mask[:, :16] = 1
    for number in range(6):
        for part, pixels in (("images", rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)), ("masks", mask)):
            (folder / part).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
    return folder


def test_values_of_an_unknown_set_and_such_that_are_none_are_refused():
    assert named_mask_values(["a=1-6", "b=#ff0000"], names=("a", "b")) == {"a": "1-6", "b": "#ff0000"}
    assert named_mask_values(None, names=()) == {}
    with pytest.raises(UsageError, match=r"unknown set with mask values 'c'.*a, b"):
        named_mask_values(["c=1"], names=("a", "b"))
    with pytest.raises(UsageError, match="mask values 'red': give values"):
        named_mask_values(["a=red"], names=("a", "b"))
    with pytest.raises(UsageError, match="--mask-values '1' must look like NAME=VALUES"):
        named_mask_values(["1"], names=("a", "b"))


@pytest.mark.parametrize(("values", "status"), [(None, "failed"), ({"ours": "1"}, "tested")])
def test_suite(coded, tmp_path, values, status):
    plan = SuitePlan(output=tmp_path, only=("ours",), own={"ours": coded}, mask_values=values, conventions=("paper",))
    if status == "failed":
        with pytest.raises(UsageError, match="coded with the values"):
            run_suite(LeftHalf(), plan)
        return
    (outcome,) = run_suite(LeftHalf(), plan)
    assert (outcome.status, outcome.dice) == ("tested", 1.0)


def test_evaluate_hands_the_values_to_the_suite_or_to_its_one_test(coded, tmp_path, monkeypatch):
    monkeypatch.setattr("polypseg.inference.open_model.open_model", lambda *a, **k: LeftHalf())
    monkeypatch.setattr("polypseg.inference.model_folder.model_folder", lambda model, **k: None)
    common: dict[str, Any] = {"model": "m", "output": tmp_path, "convention": ["paper"]}
    evaluate(suite=True, only=["ours"], own=[f"ours={coded}"], mask_values=["ours=1"], **common)
    evaluate(dataset="folder", source=[str(coded)], mask_values=["1"], **common)
    for name in ("ours", "folder"):
        receipt = read_json(tmp_path / "left" / f"{name}.full.full.receipt.json")
        assert receipt["scores"]["paper"]["dice"]["mean"] == 1.0
    with pytest.raises(UsageError, match="unknown set with mask values 'other'"):
        evaluate(suite=True, own=[f"ours={coded}"], mask_values=["other=1"], **common)
    with pytest.raises(UsageError, match="give --mask-values once"):
        evaluate(dataset="folder", source=[str(coded)], mask_values=["1", "2"], **common)


def test_shift(coded, tmp_path, monkeypatch):
    areas: list[float] = []

    def compare(*sets: Any) -> None:
        areas.extend(float(one.values["polyp_share"].mean()) for one in sets)
        raise KeyboardInterrupt

    monkeypatch.setattr("polypseg.shift.compare_sets", compare)
    sides: dict[str, Any] = {"a": "folder", "b": "folder", "source": [str(coded), str(coded)], "encoder": "none"}
    with pytest.raises(PolypSegError, match="coded with the values"):
        measure(output=tmp_path, mask_values=["a=1"], **sides)
    with pytest.raises(KeyboardInterrupt):
        measure(output=tmp_path, mask_values=["a=1", "b=0"], **sides)
    assert areas == pytest.approx([0.5, 0.5])


def test_study(coded, tmp_path, monkeypatch):
    opened: list[tuple[str, str | None]] = []

    def look(name: str, *, mask_values: str | None = None, **where: Any) -> None:
        opened.append((name, mask_values))

    monkeypatch.setattr(study, "open_dataset", look)
    for name in ("grid_tasks", "_run"):
        monkeypatch.setattr(study, name, lambda *a, **k: [])
    cli.study(output=tmp_path, in_distribution="kvasir_seg", out_of_distribution="folder", mask_values=["out=1"])
    cli.study(output=tmp_path, in_distribution="kvasir_seg", out_of_distribution="folder", mask_values=["in=2"])
    assert opened == [("kvasir_seg", None), ("folder", "1"), ("kvasir_seg", "2"), ("folder", None)]


def test_grid(coded, tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr("polypseg.study.tasks.grid_tasks", lambda grid, data: [])
    monkeypatch.setattr("polypseg.study.workers.run_grid", lambda grid, data, **options: seen.append(data))
    common: dict[str, Any] = {
        "output": tmp_path,
        "grid": "twelve_small",
        "in_distribution": "folder",
        "source": [f"folder={coded}"],
    }
    cli.study(mask_values=["in=1", "etis_larib=2"], **common)
    (data,) = seen
    assert str(data.training.mask_values) == "1"
    cell: Any = SimpleNamespace(name="cell")
    task = EvaluateTask(trained=SimpleNamespace(cell=cell, seed=0, data=data), how=EvaluationPlan())  # type: ignore[arg-type]
    assert task.plan().mask_values == {"etis_larib": "2"}
    with pytest.raises(UsageError, match="unknown set with mask values 'out'"):
        cli.study(mask_values=["out=1"], **common)


def test_report(monkeypatch):
    opened: list[tuple[str, str | None]] = []
    test = ("kvasir_seg", "reference", "test")
    material: Any = SimpleNamespace(tests=[test], inside=test, outside=test)
    monkeypatch.setattr(gallery, "_gallery", lambda *a, **k: None)
    monkeypatch.setattr(gallery, "open_dataset", lambda name, mask_values, **k: opened.append((name, mask_values)))
    places = {"kvasir_seg": Path("x")}
    gallery.build_galleries(material, masks=Path("m"), sources=places, mask_values={"kvasir_seg": "1"})
    assert opened == [("kvasir_seg", "1")]
