"""The site of `make docs`: built without a warning, complete, and fetching nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built strictly: a dead link or anchor, a page that no menu names or an unknown API name ends the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    return folder


def test_site_has_its_pages_and_the_public_names(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "hugging_face.html", "troubleshooting.html", "notebooks/use_a_model.html"} <= pages
    models = (site / "api" / "models.html").read_text()
    for name in ("inference.segmenter.load", "inference.segmenter.Prediction.overlay", "modeling.PolypSegConfig"):
        assert f'id="polypseg.{name}"' in models, name
    assert (site / "notebooks" / "use_a_model.ipynb").is_file()
    assert not (site / "site_hooks.py").exists()


def test_pages_fetch_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loads += [tag for tag in re.findall(r"<link[^>]*>", text) if "stylesheet" in tag or "preconnect" in tag]
        assert not [load for load in loads if re.search(r"(?:^|href=[\"']?)(?:https?:)?//", load)], page
