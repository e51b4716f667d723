"""Commands that use models, as a user types them."""

import csv
import json
import sys
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

import processes
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model folder, as fine-tuning leaves it."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "best")


def polypseg(*words: object) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "polypseg_command", *map(str, words)]
    return processes.run(command, capture_output=True, timeout=180)


def test_segment_writes_masks_of_the_frames_sizes_and_goes_on_after_bad_files(model, tmp_path):
    rng = np.random.default_rng(0)
    for name, size in {"a.png": (60, 80), "b.png": (70, 50)}.items():
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    done = polypseg("segment", tmp_path, "--model", model, "--output", tmp_path / "out", "--threshold", 0.4)
    assert done.returncode == 0, done.stderr
    assert "2 frame(s) segmented" in done.stdout and "bad.png" in done.stdout
    assert Image.open(tmp_path / "out" / "masks" / "a.png").size == (80, 60)
    with (tmp_path / "out" / "frames.csv").open() as file:
        assert [row["width"] for row in csv.DictReader(file)] == ["80", "50"]
    again = polypseg("segment", tmp_path, "--model", model, "--output", tmp_path / "out", "--threshold", 0.5)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "another threshold" in again.stderr


def test_robustness_writes_curves(model, tmp_path):
    done = polypseg(
        *("robustness", "--model", model, "--dataset", "synthetic_b", "--limit", 4),
        *("--corruption", "smoke", "--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "clean mDice" in done.stdout and "n = 4" in done.stdout
    assert (tmp_path / "best" / "synthetic_b.full.full-first4.robustness.png").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("segment", "nowhere.png", "--model", "MODEL", "--output", "OUT"), 2, "nowhere.png"),
        (("segment", "x.png", "--model", "RN-IN-MX", "--output", "OUT"), 2, "Did you mean"),
        (("segment", "x.png", "--model", "starterr", "--output", "OUT"), 2, "Did you mean 'starter'?"),
        (("verify", "MODEL"), 2, "SHA256SUMS"),
        (("export", "OUT", "--output", "OUT2"), 2, "no model folder"),
        (("push", "--all", "OUT"), 2, "polypseg export"),
        (("convert", "nowhere.pth", "--inspect"), 2, "nowhere.pth"),
        (("data", "push", "cvc_clinicdb", "someone/cvc", "--public"), 2, "override"),
    ],
)
def test_wrong_input_is_one_line_and_an_exit_code(model, tmp_path, words, code, message):
    places = {"MODEL": model, "OUT": tmp_path / "out", "OUT2": tmp_path / "out2"}
    done = polypseg(*(places.get(word, word) for word in words))
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


def test_evaluate_scores_a_model_and_its_saved_maps_alike(model, tmp_path):
    common = ("--dataset", "synthetic_b", "--limit", 3, "--convention", "paper", "--output", tmp_path / "results")
    done = polypseg("evaluate", "--model", model, *common)
    assert done.returncode == 0, done.stderr
    assert (
        "paper" in done.stdout
        and (tmp_path / "results" / "best" / "synthetic_b.full.full-first3.receipt.json").is_file()
    )
    assert polypseg("evaluate", *common).returncode == 2


def test_diagnose_reads_published_digits():
    pooled = polypseg("diagnose", "0.9502", "0.9051")
    assert pooled.returncode == 0 and pooled.stdout.startswith("pooled"), pooled.stdout + pooled.stderr
    assert polypseg("diagnose", "0.90", "0.95").stdout.startswith("impossible")
    assert polypseg("diagnose", "high", "0.8").returncode == 2


def test_evaluate_takes_a_segmentation_models_pytorch_folder(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(8, 8, 8)).eval()
    network.save_pretrained(tmp_path / "unet")
    common = ("--model", tmp_path / "unet", "--dataset", "synthetic_b", "--limit", 2, "--convention", "paper")
    missing = polypseg("evaluate", *common, "--output", tmp_path)
    assert missing.returncode == 2 and "give --image-size" in missing.stderr
    done = polypseg("evaluate", *common, "--image-size", 64, "--output", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "unet").glob("*.receipt.json")
    receipt = json.loads(path.read_text())
    assert receipt["predictions"]["class"] == "Unet" and receipt["n"] == 2 and receipt["model"] is None


def test_evaluate_names_an_onnx_file_that_is_not_there(tmp_path):
    done = polypseg("evaluate", "--model", tmp_path / "net.onnx", "--dataset", "synthetic_b", "--limit", 1)
    assert done.returncode == 2 and "net.onnx does not exist" in done.stderr
