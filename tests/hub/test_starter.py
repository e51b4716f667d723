"""The model that ships: whole, small, offline, the same in every runtime, and honest about what it saw and gives."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import polypseg
from polypseg.data.splits import pinned_split
from polypseg.evaluation.receipt import check_receipt, find_receipts
from polypseg.evaluation.receipt_reading import write_quality
from polypseg.files import SAMPLE_FRAMES, file_sha256
from polypseg.hub.export import RESULTS
from polypseg.hub.pack import LARGEST, add_results
from polypseg.hub.page_texts import page_texts
from polypseg.inference import quality
from polypseg.inference.quality import UNKNOWN, read_quality
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.local import STARTER_FOLDER
from polypseg.provenance.passport import Passport

REPOSITORY = Path(__file__).resolve().parents[2]
FRAMES = sorted(SAMPLE_FRAMES.glob("*.jpg"))


def test_the_folder_is_whole_and_small():
    check_folder(STARTER_FOLDER)
    assert (STARTER_FOLDER / "model.safetensors").stat().st_size <= LARGEST == 10_000_000
    for name in ("onnx/model.onnx", "onnx/model_quantized.onnx", "passport.json", "preprocessor_config.json"):
        assert (STARTER_FOLDER / name).is_file(), name


@pytest.mark.slow
def test_it_segments_the_sample_frames_alike_in_every_runtime():
    assert len(FRAMES) == 3
    by_runtime = {name: polypseg.load(runtime=name).predict(FRAMES) for name in ("onnxruntime", "torch")}
    for one, other in zip(*by_runtime.values(), strict=True):
        assert np.abs(one.probability - other.probability).max() < 2e-3
        assert 0.002 < one.share < 0.6, "each of the frames shows a polyp"


def test_its_int8_file_gives_nearly_the_same_masks():
    whole, small = (polypseg.load(precision=p, runtime="onnxruntime").predict(FRAMES) for p in ("fp32", "int8"))
    for one, other in zip(whole, small, strict=True):
        overlap = 2 * (one.mask & other.mask).sum() / (one.mask.sum() + other.mask.sum())
        assert overlap > 0.9


def test_it_says_what_it_saw():
    listed = {
        (seen.stage, seen.manifest.dataset): {image.id for image in seen.manifest.images}
        for seen in Passport.load(STARTER_FOLDER).seen
        if seen.manifest is not None
    }
    kvasir, negatives = pinned_split("kvasir_seg", "reference"), pinned_split("negatives", "hyperkvasir")
    assert listed["fine-tuning", "kvasir_seg"] == set(kvasir["train"])
    assert listed["validation", "kvasir_seg"] == set(kvasir["validation"])
    assert listed["fine-tuning", "negatives"] == set(negatives["train"])
    origin = json.loads((STARTER_FOLDER / "config.json").read_text())["weights_origin"]
    assert origin["recipe"] == "starter_alarms" and origin["finished"] and origin["scale"] == "small"


def test_its_results_are_of_the_shipped_file():
    digest = file_sha256(STARTER_FOLDER / "model.safetensors")
    receipts = find_receipts(STARTER_FOLDER / RESULTS)
    assert {receipt.model_sha256 for receipt in receipts.values()} == {digest}
    assert {"kvasir_seg", "cvc_clinicdb", "negatives"} <= {receipt.dataset.name for receipt in receipts.values()}
    assert all(check_receipt(path) == [] for path in receipts)


def test_the_pages_show_its_receipts_and_what_was_measured_of_it():
    texts = page_texts(REPOSITORY)
    assert {page.name for page, _, _ in texts} == {"README.md", "results.md"}
    for page, (begin, end), text in texts:
        shown = page.read_text().partition(begin)[2].partition(end)[0]
        assert shown.strip() == text, f"{page} between {begin}: run `make cards`"


def test_receipts_of_other_weights_are_not_added(tmp_path):
    from polypseg.errors import UsageError

    other = REPOSITORY / "model_cards" / "results" / "tf_efficientnet_lite0_deeplabv3plus.random"
    with pytest.raises(UsageError, match="no receipt of the weights"):
        add_results(STARTER_FOLDER, other)


def test_a_run_that_has_not_ended_is_not_packed(tmp_path):
    from polypseg.errors import UsageError
    from polypseg.hub.pack import pack_model
    from polypseg.inference.model import build_image_processor
    from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation

    record = {"model_id": "resnet18_deeplabv3plus.random", "recipe": "smoke", "finished": False}
    config = PolypSegConfig(encoder="resnet18", decoder_channels=16, image_size=64, weights_origin=record)
    PolypSegForSemanticSegmentation(config).save_pretrained(tmp_path / "best")
    build_image_processor(config).save_pretrained(tmp_path / "best")
    with pytest.raises(UsageError, match="has not ended"):
        pack_model(tmp_path / "best", tmp_path / "packed", calibration="synthetic_a")
    assert not (tmp_path / "packed").exists()


def test_its_quality_is_what_its_receipts_say(tmp_path):
    written = write_quality(tmp_path, find_receipts(STARTER_FOLDER / RESULTS).values())
    assert written.read_text() == (STARTER_FOLDER / quality.FILE).read_text(), "run training_scripts/pack_starter.py"
    words = read_quality(STARTER_FOLDER).words
    assert all(f"on {title} (n = " in words for title in ("Kvasir-SEG", "CVC-ClinicDB")) and " [0." in words
    assert read_quality(tmp_path / "nothing") == UNKNOWN


def test_every_overlay_says_how_good_the_model_is_unless_it_would_not_fit():
    segmenter = polypseg.load()
    wide, narrow = (Image.new("RGB", (width, 120), (200, 120, 110)) for width in (640, 60))
    with_caption, bare = (np.asarray(segmenter.predict(frame).overlay()) for frame in (wide, narrow))
    assert (with_caption[-14:] > 160).all(axis=2).any() and "research" in segmenter.caption
    assert not (bare[-14:] > 205).any(axis=None)
