"""Opt-in: publish a tiny private model on huggingface.co, get it back, delete it.

HF_HUB_OFFLINE=0 HF_TOKEN=... POLYPSEG_REAL_HUB=1 python -m pytest tests/test_real_hub.py

Needs a token with write access; the repository is private, lives in the token's own account, and is removed at the end.
What only the real Hub can tell: card rules, name rules, quotas, and that Xet transfers as it does for users.
"""

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi

from polypseg.export import export_model
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.processing import build_image_processor

ORIGIN = {
    "model_id": "resnet10t_deeplabv3plus.random",
    "encoder_initialisation": "random",
    "scale": "small",
    "recipe": "smoke",
    "recipe_changes": [],
    "finetuned_on": "synthetic_a reference/train",
    "n": 120,
    "finished": True,
}


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("HF_TOKEN") and os.environ.get("POLYPSEG_REAL_HUB")),
    reason="opt-in: set HF_HUB_OFFLINE=0, HF_TOKEN and POLYPSEG_REAL_HUB=1 to publish on huggingface.co",
)
def test_a_private_model_goes_to_the_real_hub_and_back(tmp_path):
    torch.manual_seed(0)
    config = PolypSegConfig(encoder="resnet10t", image_size=64, decoder_channels=8, weights_origin=ORIGIN)
    PolypSegForSemanticSegmentation(config).save_pretrained(tmp_path / "best")
    build_image_processor(config).save_pretrained(tmp_path / "best")
    folder = export_model(tmp_path / "best", tmp_path / "exported").folder
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}

    def polypseg(*words: object) -> str:
        command = [sys.executable, "-m", "polypseg_command", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert environment["HF_TOKEN"] not in done.stdout + done.stderr
        return done.stdout

    api = HfApi(token=environment["HF_TOKEN"])
    repo_id = f"{api.whoami()['name']}/resnet10t_deeplabv3plus.random-smoke-synthetic_a"
    try:
        assert "fetched back and equal" in polypseg("push", folder, "--private")
        assert "already there" in polypseg("push", folder, "--private")
        assert "files are right" in polypseg("verify", repo_id, "--revision", "v0.1.0")
    finally:
        api.delete_repo(repo_id, missing_ok=True)
