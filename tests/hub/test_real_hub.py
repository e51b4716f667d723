"""Opt-in: publish a tiny private model on huggingface.co, get it back, delete it.

HF_HUB_OFFLINE=0 HF_TOKEN=... POLYPSEG_REAL_HUB=1 python -m pytest tests/hub/test_real_hub.py

Needs a token with write access; the repository is private, lives in the token's own account, and is removed at the end.
What only the real Hub can tell: card rules, name rules, quotas, and that Xet transfers as it does for users.
"""

import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi

from polypseg.hub.export import export_model
from tiny_models import SMOKE_NAME, SMOKE_ORIGIN, write_tiny_model


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("HF_TOKEN") and os.environ.get("POLYPSEG_REAL_HUB")),
    reason="opt-in: set HF_HUB_OFFLINE=0, HF_TOKEN and POLYPSEG_REAL_HUB=1 to publish on huggingface.co",
)
def test_a_private_model_goes_to_the_real_hub_and_back(tmp_path):
    folder = export_model(write_tiny_model(tmp_path / "best", origin=SMOKE_ORIGIN), tmp_path / "exported").folder
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}

    def polypseg(*words: object) -> str:
        command = [sys.executable, "-m", "polypseg_command", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        assert environment["HF_TOKEN"] not in done.stdout + done.stderr
        return done.stdout

    api = HfApi(token=environment["HF_TOKEN"])
    repo_id = f"{api.whoami()['name']}/{SMOKE_NAME}"
    try:
        assert "fetched back and equal" in polypseg("push", folder, "--private")
        assert "already there" in polypseg("push", folder, "--private")
        assert "files are right" in polypseg("verify", repo_id, "--revision", "v0.1.0")
    finally:
        api.delete_repo(repo_id, missing_ok=True)
