"""Evaluation: the protocol by hand, batching, native mask size, any model, files that can be trusted."""

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from plain_protocol import PlainResult
from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.cli.evaluate import Seen
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.evaluation.receipt import check_receipt, read_content
from polypseg.inference.model import build_image_processor, load_model, polyp_logits, predict_masks, predicted_mask
from polypseg.inference.predictors import ModelPredictions
from polypseg.provenance.passport import SeenError, attach_passport, finetuning_passport
from polypseg.statistics.scores import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = PolypSegConfig(encoder="resnet18", decoder_channels=16, image_size=64)
    return PolypSegForSemanticSegmentation(config).eval()


@pytest.fixture(scope="module")
def data():
    return open_dataset("synthetic_b", synthetic_options=SyntheticOptions(count=11, size=(72, 100)))


def evaluate(model, data, **options):
    return counted(model, build_image_processor(model.config), data, **options)


def counted(model, processor, data, *, batch_size=8, convention="paper", **options):
    """What the package's protocol counts, as the plain one would return it."""
    source = ModelPredictions(name="m", model=model, processor=processor, batch_size=batch_size)
    result = score_predictions(source, data, conventions=(convention,), **options)
    counts = np.array([(image.intersection, image.predicted, image.true) for image in result.images])
    return PlainResult(ids=result.ids, counts=counts, convention={"paper": "standard"}.get(convention, convention))


def test_image_processor_equals_pillow_and_normalization(model, data):
    frame = data.frame(data.records[0])
    ours = build_image_processor(model.config)(images=[frame], return_tensors="pt")["pixel_values"][0]
    pixels = np.asarray(frame.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = np.array(model.config.image_mean), np.array(model.config.image_std)
    expected = torch.from_numpy(((pixels - mean) / std).astype(np.float32)).permute(2, 0, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_batched_equals_one_at_a_time(model, data):
    one, many = (evaluate(model, data, batch_size=size).scores() for size in (1, 4))
    for name in METRICS:
        np.testing.assert_allclose(one[name], many[name], rtol=0, atol=1e-6)


def test_protocol_by_hand(model, data):
    """Resize to the model, logits back to the mask's size, > 0.5, Dice per image."""
    result, processor = evaluate(model, data), build_image_processor(model.config)
    record = data.records[3]
    frame, mask = data.pair(record)
    logits = model(**processor(images=[frame], return_tensors="pt")).logits
    z = nn.functional.interpolate(logits[:, 1:], size=mask.shape, mode="bilinear", align_corners=False)
    prediction = (torch.sigmoid(z[0, 0]) > 0.5).numpy()
    dice = 2 * (prediction & (mask == 1)).sum() / (prediction.sum() + mask.sum())
    assert result.ids[3] == record.id
    assert result.scores()["dice"][3] == pytest.approx(dice, abs=1e-6)
    assert result.counts[3, 2] == mask.sum()


def test_threshold_is_strict():
    assert not predicted_mask(torch.zeros(2, 2), (4, 4)).any()
    assert predicted_mask(torch.full((2, 2), 1e-3), (4, 4)).all()


@pytest.mark.parametrize("labels", [2, 3])
def test_any_semantic_segmentation_model_can_be_evaluated(labels, data, tmp_path):
    """SegFormer gives logits at a quarter of the size; with three classes the one called polyp counts."""
    names = {0: "background", 1: "polyp", 2: "instrument"}
    config = SegformerConfig(
        num_labels=labels,
        id2label={i: names[i] for i in range(labels)},
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=8,
    )
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    build_image_processor(PolypSegConfig(image_size=64)).save_pretrained(tmp_path)
    model, processor = load_model(str(tmp_path))
    result = counted(model, processor, data)
    assert len(result.ids) == 11 and np.isfinite(result.scores()["dice"]).all()


def test_polyp_logits_reduce_classes():
    logits = torch.tensor([1.0, 4.0, 2.0]).view(1, 3, 1, 1)

    class Config:
        id2label = {0: "background", 1: "polyp", 2: "tool"}  # noqa: RUF012

    assert polyp_logits(logits, Config()).item() == 2.0
    assert polyp_logits(logits[:, :2], Config()).item() == 3.0
    assert polyp_logits(logits[:, :1], Config()).item() == 1.0
    Config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(UsageError, match="none is called 'polyp'"):
        polyp_logits(logits, Config())


def test_predicted_masks_have_the_frames_sizes(model, data):
    frames = [data.frame(record) for record in data.records[:2]] + [Image.new("RGB", (333, 57))]
    assert [mask.shape for mask in predict_masks(model, build_image_processor(model.config), frames)] == [
        (72, 100), (72, 100), (57, 333)
    ]  # fmt: skip


def run_script(**options):
    runpy.run_path(str(REPOSITORY / "training_scripts" / "evaluate.py"))["evaluate"](**options)


def test_script_writes_a_receipt_that_holds_the_protocols_scores(model, tmp_path, capsys):
    """And that its CSV agrees with; the same scores as evaluate_plainly's; of both conventions where both are asked."""
    data = open_dataset("synthetic_b")
    model.save_pretrained(tmp_path / "m")
    build_image_processor(model.config).save_pretrained(tmp_path / "m")
    for conventions in (["paper"], ["paper", "ssl4gie"]):
        options = {"convention": conventions, "limit": 6, "output": tmp_path / conventions[-1]}
        run_script(model=str(tmp_path / "m"), dataset="synthetic_b", **options)
    path = tmp_path / "paper" / "m" / "synthetic_b.full.full-first6.receipt.json"
    content, both = read_content(path), read_content(tmp_path / "ssl4gie" / "m" / path.name)
    assert check_receipt(path) == [] and content["n"] == 6 and content["dataset"]["synthetic"]
    assert list(content["scores"]) == ["paper"] and list(both["scores"]) == ["paper", "ssl4gie"]
    result = evaluate(model, data, limit=6)
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    for name in METRICS:
        scores = result.scores()[name]
        assert [row[f"paper.{name}"] for row in content["images"]] == pytest.approx(scores, abs=1e-9)
        assert [float(row[f"paper.{name}"]) for row in rows] == pytest.approx(scores, abs=1e-9)
        assert content["scores_by_cluster"]["paper"][name]["mean"] == pytest.approx(scores.mean())
    shown = capsys.readouterr().out
    assert (
        f"{result.scores()['dice'].mean():.3f} [" in shown
        and "n = 6\n" in shown
        and "not checked against what" in shown
    )
    with pytest.raises(UsageError, match="unknown metric convention 'ssl4gi'"):
        run_script(model="x", dataset="synthetic_b", convention=["ssl4gi"])


def test_script_refuses_images_that_the_model_saw_unless_told_otherwise(model, tmp_path):
    data = tmp_path / "data"
    for part, mode in (("images", "RGB"), ("masks", "L")):
        (data / part).mkdir(parents=True)
        for index in range(10):
            noise = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).convert(mode).save(data / part / f"{index}.png")
    opened = open_dataset("folder", source=data)
    model.save_pretrained(tmp_path / "m")
    build_image_processor(model.config).save_pretrained(tmp_path / "m")
    attach_passport(tmp_path / "m", finetuning_passport(opened, split="reference", model_id="m"))
    options = {"model": str(tmp_path / "m"), "dataset": "folder", "source": [str(data)], "output": tmp_path / "results"}
    with pytest.raises(SeenError, match="9 of 10 images"):
        run_script(**options)
    assert not (tmp_path / "results").exists()
    run_script(**options, seen=Seen.report)
    content = read_content(tmp_path / "results" / "m" / "folder.full.full.receipt.json")
    assert content["n"] == 10 and content["collisions"]["colliding"] == 9


def test_convention_changes_only_what_it_names(model, data):
    standard, reference = evaluate(model, data), evaluate(model, data, convention="ssl4gie")
    assert (standard.counts == reference.counts).all()
    np.testing.assert_allclose(standard.scores()["dice"], reference.scores()["dice"], atol=1e-7)


def test_wrong_requests_fail_before_the_work(model, data):
    with pytest.raises(UsageError, match="has the parts full, not 'test'"):
        evaluate(model, data, part="test")
    with pytest.raises(UsageError, match="unknown metric convention 'dsc'"):
        evaluate(model, data, convention="dsc")
    with pytest.raises(UsageError, match="cannot load a segmentation model from folder or Hub id 'no/where'"):
        load_model("no/where")


def test_incomplete_or_damaged_weights_are_refused(model, tmp_path):
    """transformers would draw what is missing at random, and the scores would be those of noise."""
    model.save_pretrained(tmp_path)
    build_image_processor(model.config).save_pretrained(tmp_path)
    path, key = tmp_path / "model.safetensors", "decoder.head.weight"
    whole, state = path.read_bytes(), load_file(path)
    load_model(str(tmp_path))
    lacking = {k: v for k, v in state.items() if k != key}
    for wrong in (lacking, lacking | {key: torch.zeros(1)}):
        save_file(wrong, path, metadata={"format": "pt"})
        with pytest.raises(UsageError, match=rf"{tmp_path.name}.*1 tensor.*{key}"):
            load_model(str(tmp_path))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=rf"cannot load .*{tmp_path.name}"):
        load_model(str(tmp_path))


def test_broken_image_is_named(model, tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L" if folder == "masks" else "RGB", (64, 64)).save(tmp_path / folder / "x.png")
    (tmp_path / "images" / "x.png").write_bytes((tmp_path / "images" / "x.png").read_bytes()[:60])
    with pytest.raises(PolypSegError, match=r"images/x\.png is truncated or not an image"):
        evaluate(model, open_dataset("folder", source=tmp_path))


def test_evaluate_module_gives_the_same_numbers():
    import evaluate as hf_evaluate

    metric = hf_evaluate.load(str(REPOSITORY / "hub_configs" / "metrics" / "polyp_segmentation"))
    prediction, target = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [0, 0]])
    empty = np.zeros((3, 2), dtype=int)
    result = metric.compute(predictions=[prediction, empty], references=[target, empty])
    assert result["per_image"]["dice"] == pytest.approx([2 / 3, 1])
    assert result["iou"] == pytest.approx((0.5 + 1) / 2)
