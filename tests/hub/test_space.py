"""The Space: complete, loadable without this package, refusing unpinned code; and the app as a user sees it."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import DPTConfig, DPTForSemanticSegmentation

import processes
from polypseg import PolypSegConfig
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import UsageError
from polypseg.hub.space import EXAMPLES, GRADIO, SpaceModel, describe_model, export_space, run_demo_app
from polypseg.inference.model import build_image_processor
from polypseg.inference.segmenter import MIN_AREA, Segmenter
from tiny_models import SMOKE_ORIGIN, write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALLOWED = {"gradio", "torch", "transformers", "numpy", "PIL", "cv2"}
HUB = SpaceModel(id="owner/name", title="hub", licence="mit", note="A note.", revision="v1")


def save_native_dpt(folder: Path, *, seed: int) -> Path:
    """A tiny random DPT of transformers whose mask covers about half of a synthetic frame."""
    torch.manual_seed(seed)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        readout_type="ignore",
        use_auxiliary_head=False,
        initializer_range=0.2,
        id2label={0: "background", 1: "polyp"},
        label2id={"background": 0, "polyp": 1},
    )
    model = DPTForSemanticSegmentation(config).eval()
    processor = build_image_processor(PolypSegConfig(encoder="resnet18", image_size=64))
    frame = Image.fromarray(synthesize_frame(CAMERAS["a"], seed=0, index=1)[0])
    with torch.no_grad():
        both = model(**processor(images=[frame], return_tensors="pt")).logits[0]
        polyp, last = both[1] - both[0], [m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        last.bias[1] -= polyp.median()
        last.weight *= 2 / polyp.std()
        last.bias *= 2 / polyp.std()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[SpaceModel]:
    root = tmp_path_factory.mktemp("models")
    return [
        SpaceModel(
            id=str(save_native_dpt(root / name, seed=seed)),
            title=f"Tiny {name}",
            licence=f"license of {name}",
            note=f"Random weights, {name}.",
        )
        for seed, name in enumerate(("one", "two"))
    ]


# -- the exported folder --------------------------------------------------------------------------------


def test_export_writes_a_complete_space(tiny, tmp_path):
    space = export_space(tmp_path / "space", models=[*tiny, HUB], title="A Space")
    _, header, body = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["title"], card["sdk"], card["sdk_version"], card["app_file"]) == (
        "A Space",
        "gradio",
        GRADIO,
        "app.py",
    )
    assert (card["license"], card["models"], card["pinned"]) == ("apache-2.0", ["owner/name"], False)
    assert len(card["short_description"]) <= 60
    assert "not a medical device" in body and "$" not in body
    assert all(text in body for model in (*tiny, HUB) for text in (model.title, model.licence, model.note))
    entries = json.loads((space / "models.json").read_text(encoding="utf-8"))
    assert set(entries[0]) == {"id", "revision", "title", "licence", "note", "remote_code"}
    assert entries[2] == dataclasses.asdict(HUB)
    for entry in entries[:2]:
        assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {
            file.name for file in (space / entry["id"]).iterdir()
        }
    assert str(tmp_path) not in "".join(f.read_text() for f in space.iterdir() if f.suffix in (".md", ".json", ".txt"))


def test_requirements_follow_the_packages_own_ranges_and_the_tested_gradio(tiny, tmp_path):
    plain = export_space(tmp_path / "plain", models=tiny) / "requirements.txt"
    own = dataclasses.replace(HUB, revision=COMMIT, remote_code=True)
    with pytest.raises(UsageError, match="--trust-remote-code"):
        export_space(tmp_path / "coded", models=[own])
    coded = export_space(tmp_path / "coded", models=[own], trust_remote_code=True) / "requirements.txt"
    assert "timm" not in plain.read_text() and {"timm>=1.0.31,<2", "torchvision>=0.25,<1"} <= set(
        coded.read_text().split()
    )
    repository = Path(__file__).resolve().parents[2]
    known = set(re.findall(r'"([\w.-]+[<>=][^"]*)"', (repository / "pyproject.toml").read_text(encoding="utf-8")))
    assert set(coded.read_text().split()) <= known
    assert f"gradio=={GRADIO}" in (repository / "constraints.txt").read_text(encoding="utf-8").split()


def test_app_compiles_and_imports_only_what_a_space_has(tiny, tmp_path):
    source = (export_space(tmp_path / "space", models=tiny) / "app.py").read_text(encoding="utf-8")
    compile(source, "app.py", "exec")
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    roots = {name.partition(".")[0] for name in names}
    assert roots - set(sys.stdlib_module_names) == ALLOWED
    assert len(source.splitlines()) <= 280 and f"MIN_AREA = {MIN_AREA} " in source


def test_examples_are_the_synthetic_frames_of_both_cameras(tiny, tmp_path):
    folder = export_space(tmp_path / "space", models=tiny) / "examples"
    assert {camera for camera, _ in EXAMPLES} == {"a", "b"}
    assert len(list(folder.iterdir())) == len(EXAMPLES)
    for camera, index in EXAMPLES:
        with Image.open(folder / f"synthetic_camera_{camera}_{index:02d}.png") as image:
            expected, _ = synthesize_frame(CAMERAS[camera], seed=0, index=index)
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_second_export_keeps_a_clones_history_and_drops_old_models(tiny, tmp_path):
    space = export_space(tmp_path / "space", models=tiny)
    (space / ".git").mkdir()
    export_space(space, models=[HUB])
    assert (space / ".git").is_dir() and not (space / "models").exists()
    assert [entry["id"] for entry in json.loads((space / "models.json").read_text())] == ["owner/name"]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "at least one model"),
        ([HUB, dataclasses.replace(HUB, id="owner/other")], "two models are called 'hub'"),
        ([dataclasses.replace(HUB, id="nowhere")], "neither a model folder nor a Hub id"),
        ([dataclasses.replace(HUB, remote_code=True)], "only at a full commit .* not at 'v1'"),
        ([dataclasses.replace(HUB, remote_code=True, revision=None)], "only at a full commit"),
    ],
)
def test_export_refuses_what_the_app_would_refuse(tmp_path, models, words):
    with pytest.raises(UsageError, match=words):
        export_space(tmp_path / "space", models=models)
    assert not (tmp_path / "space").exists()


def test_export_leaves_another_folder_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no Space"):
        export_space(tmp_path / "mine", models=[HUB])
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def own_model(tmp_path_factory) -> Path:
    """A run's best/ folder: this package's own class, no code beside it."""
    return write_tiny_model(tmp_path_factory.mktemp("run") / "best", origin=SMOKE_ORIGIN | {"n": 8}, image_size=32)


def test_export_refuses_a_model_that_needs_this_package(own_model, tmp_path):
    with pytest.raises(UsageError, match="export it first with `polypseg export`"):
        export_space(tmp_path / "space", models=[describe_model(str(own_model))])


def test_describe_model_reads_license_and_origin_of_a_folder(own_model):
    model = describe_model(str(own_model))
    assert model.title == "resnet10t_deeplabv3plus.random-smoke-synthetic_a"
    assert model.licence == "apache-2.0" and "synthetic_a reference/train (n = 8)" in model.note
    assert (model.id, model.revision, model.remote_code) == (str(own_model), None, False)
    with pytest.raises(UsageError, match="has no config"):
        describe_model(str(own_model.parents[1]))


# -- what the app does with an upload -------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(tiny, tmp_path_factory) -> dict:
    """The names of an exported app's own file, not launched."""
    pytest.importorskip("gradio")
    return runpy.run_path(str(export_space(tmp_path_factory.mktemp("app") / "space", models=tiny) / "app.py"))


def test_broken_picture_is_one_message_in_one_place(app, tiny, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    image = app["image"].preprocess(gradio_image(tmp_path / "notes.png"))
    answer = app["one"][0](image, tiny[0].title, 0.5)
    assert answer[0].count("cannot be read as a picture") == 1 and answer[1:] == (None, None, None)
    hidden = app["two"][0](image, tiny[0].title, tiny[1].title, 0.5, False)
    assert not any("cannot be read" in str(part) for part in hidden)


def test_picture_of_too_many_pixels_is_refused_before_it_is_decoded(app, tiny, tmp_path):
    header = Image.new("1", (6000, 4000))
    header.save(tmp_path / "large.png")
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "large.png").write_bytes(whole[:100])  # the header is there, the pixels are not
    image = app["image"].preprocess(gradio_image(tmp_path / "large.png"))
    assert "more than 20 megapixels" in app["one"][0](image, tiny[0].title, 0.5)[0]


def test_reason_of_a_refusal_is_text_not_markup(app, tiny):
    refused = app["RefusedError"]("<img src=x onerror=alert(1)>")
    assert "&lt;img" in app["one"][0](refused, tiny[0].title, 0.5)[0]


def test_app_bounds_uploads_and_what_it_keeps_in_memory(app, tiny, tmp_path):
    source = (export_space(tmp_path / "space", models=tiny) / "app.py").read_text(encoding="utf-8")
    assert 'LARGEST_UPLOAD = "20mb"' in source and "max_file_size=LARGEST_UPLOAD" in source
    assert app["polyp_logits"].cache_info().maxsize <= 3 and app["load_model"].cache_info().maxsize <= 2


def gradio_image(path: Path):
    from gradio.data_classes import ImageData

    return ImageData(path=str(path), orig_name=path.name)


# -- running it -----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def page_of(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as response:
        return response.read().decode()


@contextmanager
def serving(program: str, *, port: int, cwd: Path) -> Iterator[processes.Process]:
    """A process that serves at ``port``; killed at the end if it still runs."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(cwd / "uploads"),
    }
    log = cwd / "server.log"
    with log.open("w") as output:
        process = processes.start(
            [sys.executable, "-c", program], cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            limit = time.monotonic() + 240
            while True:
                try:
                    page_of(f"http://127.0.0.1:{port}")
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < limit, log.read_text()
                    time.sleep(0.3)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_demo_app_says_how_to_get_gradio(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'polypseg\[app\]'"):
        run_demo_app(tiny)


def test_demo_app_names_a_taken_port(tiny):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another host or port"):
            run_demo_app(tiny, port=taken.getsockname()[1])


@pytest.mark.slow
def test_demo_app_serves_a_runs_model_and_leaves_nothing_behind(own_model, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    port = free_port()
    program = (
        "import tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from polypseg.hub.space import describe_model, run_demo_app\n"
        f"run_demo_app([describe_model({str(own_model)!r})], port={port}, open_browser=False)\n"
    )
    with serving(program, port=port, cwd=tmp_path) as process:
        (folder,) = tmp_path.glob("polypseg-app-*")
        example = gradio_client.handle_file(str(next((folder / "examples").iterdir())))
        client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False)
        answer = client.predict(example, "resnet10t_deeplabv3plus.random-smoke-synthetic_a", 0.5, api_name="/show_one")
        assert "polyp area" in answer[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not list(tmp_path.glob("polypseg-app-*"))
    with pytest.raises(OSError):
        page_of(f"http://127.0.0.1:{port}")


CHROMIUM = Path("/usr/bin/chromium")
WITHOUT_POLYPSEG = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "polypseg":
            raise ImportError("a Space has no polypseg")
sys.meta_path.insert(0, Refuse())
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_app_in_a_browser_shows_what_the_segmenter_says(tiny, tmp_path):
    """An example is chosen, the figures are those of the package; the threshold, both tabs, an upload, a phone."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM}")
    space, port = export_space(tmp_path / "space", models=tiny), free_port()
    segmenters = [Segmenter.from_pretrained(model.id) for model in tiny]
    frame = Image.open(sorted((space / "examples").iterdir())[0]).convert("RGB")
    one, two = (segmenter.predict([frame])[0] for segmenter in segmenters)
    assert 0.2 < one.share < 0.8 and (one.mask != two.mask).any()
    with serving(WITHOUT_POLYPSEG, port=port, cwd=space), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        page.goto(f"http://127.0.0.1:{port}")
        see = playwright.expect
        see.set_options(timeout=60_000)
        see(page.locator("#warning")).to_contain_text("Research only. Not a medical device.")
        see(page.get_by_text("license of one").first).to_be_visible()
        see(page.get_by_text("Random weights, one.").first).to_be_visible()
        page.locator("button.gallery-item").first.click()
        result = page.locator("#result")
        see(result).to_contain_text(f"{one.area:,} px")
        see(result).to_contain_text(f"{100 * one.share:.1f} %")
        see(result.locator("dd").nth(2)).to_have_text(str(len(one.lesions)))
        see(result.locator("dd").nth(3)).to_have_text(f"{one.probability.max():.2f}")
        see(page.locator("img[src*='.png']:visible")).not_to_have_count(0)
        page.screenshot(path=tmp_path / "one.png")

        (strict,) = segmenters[0].predict([frame], threshold=0.75)
        assert strict.area < 0.9 * one.area
        page.locator("input[type=number]").fill("0.75")
        page.locator("input[type=number]").press("Enter")
        see(result).to_contain_text(f"{strict.area:,} px")
        page.locator("input[type=number]").fill("0.5")
        page.locator("input[type=number]").press("Enter")
        see(result).to_contain_text(f"{one.area:,} px")

        page.get_by_role("tab", name="Compare two models").click()
        pair = page.locator("#pair-result")
        dice = 2 * (one.mask & two.mask).sum() / (one.area + two.area)
        see(pair).to_contain_text(f"Agreement of the two masks (Dice): {dice:.3f}")
        see(pair).to_contain_text(f"{(one.mask ^ two.mask).sum():,} px")
        for model, prediction in zip(tiny, (one, two), strict=True):
            row = pair.locator("tr", has_text=model.title)
            see(row).to_contain_text(f"{prediction.area:,}")
            see(page.get_by_text(model.licence).last).to_be_visible()
        page.screenshot(path=tmp_path / "two.png", full_page=True)

        (tmp_path / "notes.png").write_text("no picture")
        page.get_by_role("tab", name="One model").click()
        page.get_by_label("Remove Image").click()
        see(result).to_contain_text("choose one of the examples")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
        see(page.get_by_text("cannot be read as a picture").first).to_be_visible()
        page.get_by_label("Remove Image").click()
        frame.convert("L").save(tmp_path / "gray.png")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "gray.png")
        (gray,) = segmenters[0].predict([frame.convert("L")])
        see(result).to_contain_text(f"{gray.area:,} px")

        phone = browser.new_page(viewport={"width": 390, "height": 844})
        phone.set_default_timeout(90_000)
        phone.goto(f"http://127.0.0.1:{port}")
        phone.locator("button.gallery-item").first.click()
        see(phone.locator("#result")).to_contain_text(f"{one.area:,} px")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        phone.get_by_role("tab", name="Compare two models").click()
        see(phone.locator("#pair-result")).to_contain_text("Agreement")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        phone.screenshot(path=tmp_path / "phone.png", full_page=True)
        browser.close()
    assert (tmp_path / "one.png").stat().st_size > 20_000
