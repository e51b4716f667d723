"""Averages of two stages: weights, origin, the rule by which a share is chosen."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from polypseg.errors import UsageError
from polypseg.expectation import averages
from polypseg.expectation.averages import SHARES, average_models, average_states, choose_share, judge_shares, shrink
from polypseg.files import file_sha256
from polypseg.provenance.origin import WeightsOrigin


def stage(folder, *, weights, continued_from=None, **origin):
    """A model folder that holds just what averaging reads."""
    folder.mkdir()
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    record = {"model_id": "tiny", "recipe": "starter_alarms", "finished": True, "n": 3, **origin}
    if continued_from is not None:
        record["continued_from"] = {"sha256": file_sha256(continued_from / "model.safetensors")}
    (folder / "config.json").write_text(json.dumps({"weights_origin": record}))
    return folder


@pytest.fixture
def stages(tmp_path):
    before = stage(tmp_path / "before", weights={"w": torch.tensor([0.0, 4.0]).half(), "n": torch.tensor(7)})
    after = stage(
        tmp_path / "after", weights={"w": torch.tensor([1.0, 8.0]), "n": torch.tensor(9)}, continued_from=before
    )
    return before, after


def test_the_average_holds_both_weights_and_says_so(stages, tmp_path):
    folder = average_models(*stages, tmp_path / "average", share=0.25)
    found = safetensors.torch.load_file(folder / "model.safetensors")
    assert found["w"].tolist() == [0.25, 5.0] and found["w"].dtype == torch.float32 and found["n"] == 9
    origin = WeightsOrigin.of_folder(folder)
    assert origin.averaged_with_start.share == 0.25 and origin.sha256 == file_sha256(folder / "model.safetensors")
    assert "25% the run's end, the rest its start" in origin.summary
    assert origin.suffix.endswith("averaged") and "averaged" not in WeightsOrigin.of_folder(stages[1]).suffix


def test_only_the_start_of_a_run_is_averaged_with_it(stages, tmp_path):
    before, after = stages
    for one, other in ((after, after), (after, before)):
        with pytest.raises(UsageError, match="did not go on from"):
            average_models(one, other, tmp_path / "average", share=0.5)
    with pytest.raises(UsageError, match="between 0 and 1"):
        average_models(before, after, tmp_path / "average", share=1.5)
    assert not (tmp_path / "average").exists()


def test_different_networks_are_refused():
    with pytest.raises(UsageError, match="different networks"):
        average_states({"w": torch.zeros(2)}, {"w": torch.zeros(3)}, share=0.5)


def test_a_shrunk_frame_keeps_size_and_place_of_the_polyp():
    frame, mask = Image.new("RGB", (80, 60), (200, 10, 10)), np.zeros((60, 80), dtype=bool)
    mask[20:40, 30:50] = True
    small, truth = shrink(frame, mask)
    assert small.size == (80, 60) and small.getpixel((40, 30)) == (200, 10, 10) and small.getpixel((5, 5)) == (0, 0, 0)
    assert truth.sum() == mask.sum() / 4 and truth[25:35, 35:45].all()


def test_each_share_is_judged_by_its_own_average(stages, monkeypatch):
    def judge(folder, *, data_dir):
        return {"score": float(safetensors.torch.load_file(folder / "model.safetensors")["w"][0])}

    monkeypatch.setattr(averages, "judge", judge)
    told = []
    found = judge_shares(*stages, data_dir=None, echo=told.append)
    assert [(one["share"], one["score"]) for one in found] == [(share, share) for share in SHARES]
    assert told[1] == "share 0.25, score 0.25"


def test_the_share_with_the_best_score_is_taken_among_those_with_few_alarms():
    judged = [
        {"share": 0.0, "score": 0.9, "alarms_at_point": 0.1},
        {"share": 0.5, "score": 0.89, "alarms_at_point": 0.02},
        {"share": 1.0, "score": 0.88, "alarms_at_point": 0.01},
    ]
    assert choose_share(judged)["share"] == 0.5
    with pytest.raises(UsageError, match="5% of the polyp-free"):
        choose_share(judged[:1])
