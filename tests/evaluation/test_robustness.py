"""Robustness: clean equals plain evaluation, drops are paired, the files agree with the numbers."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plain_protocol import evaluate_plainly
from polypseg.data import open_dataset
from polypseg.data.polyps import SyntheticOptions
from polypseg.errors import UsageError
from polypseg.evaluation.robustness import measure_robustness
from polypseg.inference.model import build_image_processor
from polypseg.inference.predictors import ModelPredictions
from polypseg.modeling import PolypSegConfig


class BrightRed(torch.nn.Module):
    """Marks what is redder than average: a model whose answer depends on the pixels, without any training."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(id2label={0: "background", 1: "polyp"}, weights_origin={"model_id": "bright_red"})

    def forward(self, pixel_values):
        z = pixel_values[:, 0] - pixel_values[:, 1] - 0.6
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(z), z], dim=1))


@pytest.fixture(scope="module")
def parts():
    dataset = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=20, size=(96, 96)))
    return BrightRed(), build_image_processor(PolypSegConfig(encoder="resnet10t", image_size=64)), dataset


@pytest.mark.slow
def test_clean_is_the_plain_evaluation_and_corruptions_are_paired_with_it(parts, tmp_path):
    model, processor, dataset = parts
    source = ModelPredictions(name="red", model=model, processor=processor)
    result = measure_robustness(source, dataset, kinds=["stain", "under_exposure"], severities=[1, 5])
    plain = evaluate_plainly(*parts)
    assert np.array_equal(result.clean_dice, plain.scores()["dice"])
    assert set(result.corrupted) == {(k, s) for k in ("stain", "under_exposure") for s in (1, 5)}
    rows = {(row["corruption"], row["severity"]): row for row in result.rows()}
    dice = plain.scores()["dice"]
    for key, row in rows.items():
        assert row["drop_mean"] == pytest.approx((dice - result.corrupted[key]).mean())
        assert row["dice_mean"] + row["drop_mean"] == pytest.approx(dice.mean())
        assert row["relative_drop"] == pytest.approx(row["drop_mean"] / dice.mean())
        assert row["drop_low"] <= row["drop_mean"] <= row["drop_high"]
    assert rows["stain", 5]["drop_mean"] > rows["stain", 1]["drop_mean"]  # blood is red: it fools this model

    path = result.write(tmp_path)
    content = json.loads(path.read_text())
    assert content["clean"]["mean"] == pytest.approx(dice.mean())
    assert content["strengths"]["stain"][4] == 0.88 and len(content["images"]) == 20
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["dice_mean"]) for row in table] == pytest.approx([row["dice_mean"] for row in content["rows"]])
    assert path.with_suffix(".png").stat().st_size > 5000


def test_an_unknown_corruption_is_a_usage_error(parts):
    with pytest.raises(UsageError, match="corruption"):
        measure_robustness(ModelPredictions(name="red", model=parts[0], processor=parts[1]), parts[2], kinds=["fog"])
