"""A run computes in the precision asked for, or in float32 where it cannot, and goes on as it began."""

import pytest
import torch
from accelerate.state import AcceleratorState

from polypseg.files import write_json
from polypseg.training.run_folder import make_accelerator, usable_precision


@pytest.fixture
def cpu(monkeypatch):
    """A CPU with bf16 arithmetic, or without."""

    def with_bf16(has: bool) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield with_bf16
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("asked", "device", "has", "found"),
    [
        ("fp16", "cuda", False, "fp16"),
        ("bf16", "cuda", False, "bf16"),
        ("fp16", "cpu", True, "no"),
        ("bf16", "cpu", True, "bf16"),
        ("fp16", "cpu", False, "no"),
        ("bf16", "cpu", False, "no"),
        ("no", "cpu", True, "no"),
    ],
)
def test_precision_that_a_device_has(cpu, asked, device, has, found):
    cpu(has)
    assert usable_precision(asked, device=device) == found


@pytest.mark.parametrize("has", [False, True])
def test_a_run_says_what_it_computes_in_and_what_would_be_faster(cpu, tmp_path, capsys, has):
    cpu(has)
    assert make_accelerator("fp16", run_dir=tmp_path).mixed_precision == "no"
    told = capsys.readouterr().out
    assert "this cpu has no fp16 arithmetic: computing in float32" in told
    assert ("--set training.precision=bf16 is faster" in told) == has


def test_a_run_goes_on_in_the_precision_in_which_it_began(cpu, tmp_path):
    cpu(True)
    write_json(tmp_path / "run.json", {"environment": {"precision": "no"}})
    assert make_accelerator("bf16", run_dir=tmp_path).mixed_precision == "no"
