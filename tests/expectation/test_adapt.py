"""Adaptation to given frames: it ships where it must help, ships nothing on chance, and says what it saw."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from constructed_models import draw_frame, expectation_content
from polypseg.cli.app import app
from polypseg.data.polyps import open_dataset
from polypseg.errors import UsageError
from polypseg.expectation import adapt as module
from polypseg.expectation.adapt import RECORD, adapt_files, adapt_labeled, score_frames
from polypseg.expectation.calibrate import Labeled
from polypseg.files import read_json
from polypseg.hub import export as export_module
from polypseg.inference.model import build_image_processor
from polypseg.inference.segmenter import Segmenter, load
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.checksums import check_folder
from polypseg.provenance.origin import read_origin
from polypseg.provenance.passport import Passport, SeenError, check_seen, make_manifest
from polypseg.training.adaptation import StatisticsPlan, TuningPlan, adapt_model, mix_statistics, resize_pairs
from tiny_models import SMOKE_ORIGIN

SIDE = 32
PLANS = (StatisticsPlan(prior=1), TuningPlan(part="decoder", steps=1, learning_rate=1e-3, batch=2))
FRAMES = [draw_frame(seed, side=96)[0].resize((48, 40)) for seed in range(30)]


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.fixture(scope="module")
def good():
    """A tiny model whose statistics are those of the frames and that marks about half of each."""
    torch.manual_seed(0)
    config = PolypSegConfig(
        encoder="test_resnet", image_size=SIDE, decoder_channels=8, weights_origin=dict(SMOKE_ORIGIN)
    )
    model = PolypSegForSemanticSegmentation(config).eval()
    pairs = resize_pairs(FRAMES, [np.zeros((8, 8), dtype=bool)] * len(FRAMES), size=SIDE)
    mix_statistics(model, pairs.images, prior=0)
    with torch.inference_mode():
        pixels = build_image_processor(config)(images=FRAMES, return_tensors="pt")["pixel_values"]
        model.decoder.get_submodule("head").bias -= model(pixels).logits[:, 1].median()
    return model


@pytest.fixture(scope="module")
def broken(good):
    """The same with statistics of other frames."""
    model = copy.deepcopy(good)
    for layer in batch_norms(model):
        layer.running_mean.add_(2 * layer.running_var.sqrt())
        layer.running_var.mul_(6)
    return model


@pytest.fixture(scope="module")
def labeled(good):
    """What the good model says is true: 20 frames of five clips."""
    masks = [prediction.mask for prediction in load_in_memory(good).predict(FRAMES[:20])]
    return [
        Labeled(name=f"clip{k // 4}_{k}", group=f"clip{k // 4}", frame=frame, truth=mask)
        for k, (frame, mask) in enumerate(zip(FRAMES, masks, strict=False))
    ]


def load_in_memory(model):
    return Segmenter(model=model, processor=build_image_processor(model.config), name="in memory")


def save(model, folder):
    model.save_pretrained(folder)
    build_image_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def few_plans(monkeypatch):
    """The methods of these tests, and no card's pictures, which cost forward passes."""
    monkeypatch.setattr(module, "adapt_labeled", partial(adapt_labeled, plans=PLANS))
    monkeypatch.setattr(export_module, "_write_card", lambda *_, **__: None)


@pytest.fixture
def pairs(labeled, tmp_path):
    """The labeled frames and their masks in two folders."""
    for one in labeled:
        for folder, picture in (("frames", one.frame), ("masks", Image.fromarray(one.truth.astype(np.uint8) * 255))):
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{one.name}.png")
    return tmp_path / "frames", tmp_path / "masks"


# Methods -----------------------------------------------------------------------------------------------


def test_mixed_statistics_are_the_moments_of_both_sets():
    config = PolypSegConfig(encoder="test_resnet", image_size=SIDE, decoder_channels=8)
    model = PolypSegForSemanticSegmentation(config).eval()
    first = batch_norms(model)[0]
    first.running_mean.fill_(0.5)
    first.running_var.fill_(2.0)
    seen = []
    handle = first.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    images = np.random.default_rng(0).integers(0, 255, (4, SIDE, SIDE, 3), dtype=np.uint8)
    mix_statistics(model, images, prior=12)  # 4 of 16 frames are new
    handle.remove()
    x = seen[0].double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    both = 0.75 * 0.5 + 0.25 * mean
    second = 0.75 * (2.0 + 0.25) + 0.25 * (var + mean**2)
    assert torch.allclose(first.running_mean.double(), both, atol=1e-5)
    assert torch.allclose(first.running_var.double(), second - both**2, rtol=1e-4)


def test_tuning_moves_its_part_alone_and_is_the_same_again(good, labeled):
    pairs = resize_pairs([one.frame for one in labeled], [one.truth for one in labeled], size=SIDE)
    before = {name: value.clone() for name, value in good.state_dict().items()}
    plan = TuningPlan(part="decoder", steps=2, learning_rate=1e-3, batch=2)
    whole, again = (adapt_model(good, pairs, plan).state_dict() for _ in range(2))
    moved = {name for name in before if not torch.equal(before[name], whole[name])}
    assert moved and all(name.startswith("decoder.") and "running" not in name for name in moved)
    assert all(torch.equal(whole[name], again[name]) for name in before)
    network = adapt_model(good, pairs, TuningPlan(part="network", steps=1, learning_rate=1e-3, batch=2)).state_dict()
    assert any(not torch.equal(before[key], network[key]) for key in before if key.startswith("encoder."))
    assert all(torch.equal(before[key], value) for key, value in good.state_dict().items())  # the model itself stays


# With masks --------------------------------------------------------------------------------------------


def test_wrong_statistics_are_put_right_and_shipped(good, broken, labeled):
    assert score_frames(good, labeled).min() == 1
    found = adapt_labeled(broken, labeled, plans=PLANS, show_progress=False)
    assert found.model is not None and found.plan == PLANS[0] and 0 < found.bound < found.gain
    assert found.gain == pytest.approx(found.tried[0].gain)
    assert score_frames(found.model, labeled).mean() > found.before + 0.9 * found.gain
    assert "adapted: the gain is shown" in found.lines()[1]


def test_random_masks_ship_nothing(good, labeled):
    rng = np.random.default_rng(0)
    noise = [replace(one, truth=rng.random((5, 6)).repeat(8, 0).repeat(8, 1) > 0.5) for one in labeled]
    found = adapt_labeled(good, noise, plans=PLANS, show_progress=False)
    assert found.model is None and found.bound <= 0 and "not adapted" in found.lines()[1]


def test_too_few_clips_are_refused(good, labeled):
    with pytest.raises(UsageError, match=r"4 clip.*--clip"):
        adapt_labeled(good, labeled[:16], show_progress=False)


def test_shipped_folder_is_a_model_that_says_what_it_saw(broken, labeled, pairs, few_plans, tmp_path):
    source, output = save(broken, tmp_path / "model"), tmp_path / "adapted"
    frames, masks = pairs
    found = adapt_files(source, str(frames), masks, output, clip="(.*)_[0-9]+", show_progress=False)
    assert found.model is not None
    check_folder(output)
    prediction = load(output, runtime="torch").predict(labeled[0].frame)
    assert (prediction.mask == load_in_memory(found.model).predict(labeled[0].frame).mask).all()
    record = read_json(output / RECORD)
    assert record["adapted"] and record["gain"] == found.gain and len(record["tried"]) == len(PLANS)
    seen = Passport.load(output).seen
    assert seen[0].manifest is None and "does not list" in seen[0].description
    assert [image.id for image in seen[1].manifest.images] == [
        one.name for one in sorted(labeled, key=lambda x: x.name)
    ]
    assert {image.clip for image in seen[1].manifest.images} == {f"clip{k}" for k in range(5)}
    assert all(len(image.mask) == 32 for image in seen[1].manifest.images)
    for folder, given in (("images", frames), ("masks", masks)):  # under another name, in another folder
        (tmp_path / "test" / folder).mkdir(parents=True)
        shutil.copyfile(given / "clip0_0.png", tmp_path / "test" / folder / "other.png")
    tested = make_manifest(open_dataset("folder", source=tmp_path / "test"), split="full", part="full")
    with pytest.raises(SeenError, match="same content"):
        check_seen(output, tested)
    origin = read_origin(read_json(output / "config.json")["weights_origin"])
    assert "adapted" in origin.suffix and "20 frames of 5 clips, with their masks" in origin.adaptation
    with pytest.raises(UsageError, match="exists already"):
        adapt_files(source, str(frames), masks, output)


def test_nothing_shown_leaves_the_record_alone(good, pairs, few_plans, tmp_path):
    source, output = save(good, tmp_path / "model"), tmp_path / "adapted"
    frames, masks = map(str, pairs)
    words = ["adapt", frames, masks, "--model", str(source), "--clip", "(.*)_[0-9]+", "--output", str(output)]
    output.mkdir()
    (output / RECORD).write_text("{}")  # an earlier record may be written over
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0 and "not adapted" in outcome.output, outcome.output
    assert [path.name for path in output.iterdir()] == [RECORD] and not read_json(output / RECORD)["adapted"]


def test_a_failure_leaves_nothing(good, pairs, few_plans, monkeypatch, tmp_path):
    source, output = save(good, tmp_path / "model"), tmp_path / "adapted"
    frames, masks = pairs

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "adapt_labeled", stop)
    with pytest.raises(KeyboardInterrupt):
        adapt_files(source, str(frames), masks, output, clip="(.*)_[0-9]+")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", "masks", "model"]
    with pytest.raises(UsageError, match="is no model folder"):
        adapt_files(frames, str(frames), masks, output)
    with pytest.raises(UsageError, match="lies in the folder of the model"):
        adapt_files(source, str(frames), masks, source / "adapted")


@pytest.mark.parametrize("words", [["--clip", "(.*)_"], ["masks", "--limit", "40"]])
def test_options_that_do_not_apply_are_refused(words):
    outcome = CliRunner().invoke(app, ["adapt", "frames", *words])
    assert isinstance(outcome.exception, UsageError)


# Without masks -----------------------------------------------------------------------------------------


@pytest.fixture
def unlabeled(tmp_path):
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(FRAMES):
        frame.save(tmp_path / "frames" / f"{number}.png")
    return tmp_path / "frames"


def test_without_an_expectation_masks_are_asked_for(good, unlabeled, tmp_path):
    source = save(good, tmp_path / "model")
    with pytest.raises(UsageError, match=r"expectation\.json.*give masks"):
        adapt_files(source, str(unlabeled), None, tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


@pytest.mark.parametrize(("rises", "shipped"), [(0.4, True), (0.05, False)])
@pytest.mark.slow
def test_expected_dice_decides_without_masks(rises, shipped, broken, unlabeled, few_plans, monkeypatch, tmp_path):
    """The half width is .05: a gain within what two estimates may err by is none."""
    source = save(broken, tmp_path / "model")
    (source / "expectation.json").write_text(json.dumps(expectation_content(source)))
    said = iter([0.4, 0.4 + rises, 0.3])

    class Answer:
        refused = ""

        def __init__(self):
            self.expected = next(said)

    monkeypatch.setattr(module, "estimate", lambda *_, **__: Answer())
    output = tmp_path / "adapted"
    found = adapt_files(source, str(unlabeled), None, output, show_progress=False)
    assert (found.model is not None) == shipped and found.gain == pytest.approx(rises)
    assert found.plan == module.UNLABELED_PLANS[0] and found.frames == 30
    if shipped:
        check_folder(output)
        seen = Passport.load(output).seen[-1]
        assert "without masks" in seen.description and len(seen.manifest.images) == 30
        assert not (output / "expectation.json").exists()  # it was learned from other weights
