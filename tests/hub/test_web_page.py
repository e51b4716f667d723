"""``polypseg web``: what the page is put together from, how it is served, and the Space that is written."""

import gzip
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import yaml

from polypseg.errors import UsageError
from polypseg.evaluation.receipt import find_receipts
from polypseg.hub.web_page import PageServer, assemble_page, export_page, page_weight, stated_scores
from polypseg.provenance.local import STARTER_FOLDER

REPOSITORY = Path(__file__).resolve().parents[2]
RECEIPTS = REPOSITORY / "model_cards" / "results" / "tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k"
PREPARATION = {
    "do_resize": True,
    "size": {"height": 96, "width": 96},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


@pytest.fixture
def built(tmp_path) -> Path:
    """A build without its code: the files by name are all that is looked at here."""
    folder = tmp_path / "_web"
    files = ["index.html", "page.js", "service_worker.js", "runtime/ort-wasm.wasm.gz", "runtime/ort-webgpu.wasm.gz"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"content of {name}".encode())
    listed = {name: {"later": name.endswith("webgpu.wasm.gz")} for name in files}
    (folder / "build.json").write_text(json.dumps({"files": listed}))
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "a-model"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(b"network " * 100)
    (folder / "config.json").write_text(json.dumps({"weights_origin": None}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return folder


def test_page_states_how_frames_are_prepared_and_lists_what_is_kept(built, model):
    content = assemble_page(model, built=built, threshold=0.4, min_area=10)
    facts = json.loads(content["page.json"])
    assert (facts["threshold"], facts["min_area"], facts["scores"]) == (0.4, 10, [])
    assert facts["model"]["name"] == "a-model" and facts["model"]["size"] == 96
    assert facts["model"]["mean"] == PREPARATION["image_mean"] and facts["model"]["std"] == PREPARATION["image_std"]
    network = facts["model"]["network"]
    packed = content[network["path"]]
    assert gzip.decompress(packed) == b"network " * 100
    assert network["sha256"] == hashlib.sha256(packed).hexdigest() and network["bytes"] == len(packed)
    line, code = content["service_worker.js"].decode().split("\n", 1)
    kept = json.loads(line.removeprefix("const POLYPSEG = ").removesuffix(";"))
    assert code == "content of service_worker.js" and kept["version"] == facts["version"]
    assert set(kept["small"]) == {"index.html", "page.js", "page.json"}
    assert kept["small"]["page.json"] == hashlib.sha256(content["page.json"]).hexdigest()
    assert [path.split("?")[0] for path in kept["large"]] == ["runtime/ort-wasm.wasm.gz", network["path"]]
    assert [path.split("?")[0] for path in kept["later"]] == ["runtime/ort-webgpu.wasm.gz"]
    assert "MB travel at first use" in page_weight(content)
    assert assemble_page(model, built=built, threshold=0.4, min_area=10) == content  # the same bytes again
    (model / "onnx" / "model.onnx").write_bytes(b"another")
    assert json.loads(assemble_page(model, built=built)["page.json"])["version"] != facts["version"]


def test_page_states_the_dice_of_the_models_receipts_and_refuses_those_of_others(model):
    sha256 = json.loads((RECEIPTS / "cvc_clinicdb.full.full.receipt.json").read_text())["model"]["sha256"]
    shutil.copytree(RECEIPTS, model / "results")
    (model / "config.json").write_text(json.dumps({"weights_origin": {"sha256": sha256}}))
    scores = stated_scores(model)
    assert {score.dataset: score.images for score in scores} == {"CVC-ClinicDB": 612, "Kvasir-SEG test": 100}
    assert all(score.low < score.dice < score.high for score in scores)
    (model / "config.json").write_text(json.dumps({"weights_origin": {"sha256": "0" * 64}}))
    with pytest.raises(UsageError, match="of other weights"):
        stated_scores(model)


def test_page_states_no_dice_of_frames_without_polyps():
    receipts = find_receipts(STARTER_FOLDER).values()
    assert any(receipt.dataset.name == "negatives" for receipt in receipts)
    assert {score.dataset for score in stated_scores(STARTER_FOLDER)} == {
        "CVC-ClinicDB", "Kvasir-SEG test", "PolypGen-center-3"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resample": 2}, "resample"),
        ({"size": {"height": 96, "width": 128}}, "size"),
        ({"size": {"shortest_edge": 96}}, "size"),
        ({"keep_aspect_ratio": True}, "keep_aspect_ratio"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ],
)
def test_another_preparation_of_frames_is_refused(built, model, change, words):
    (model / "preprocessor_config.json").write_text(json.dumps(PREPARATION | change))
    with pytest.raises(UsageError, match=f"asks for something else: {words}"):
        assemble_page(model, built=built)


def test_missing_parts_are_named_with_their_remedy(built, model, tmp_path):
    with pytest.raises(UsageError, match=r"run `make web`.*Node\.js"):
        assemble_page(model, built=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"model_quantized\.onnx does not exist"):
        assemble_page(model, built=built, precision="int8")
    with pytest.raises(UsageError, match="unknown precision"):
        assemble_page(model, built=built, precision="int4")
    with pytest.raises(UsageError, match="no model folder"):
        assemble_page(tmp_path, built=built)
    with pytest.raises(UsageError, match="threshold"):
        assemble_page(model, built=built, threshold=1)


# -- the server ---------------------------------------------------------------------------------------------


@pytest.fixture
def server(built, model) -> Iterator[PageServer]:
    with PageServer(assemble_page(model, built=built)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: PageServer, path: str, *, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_server_isolates_the_page_and_keeps_copies_fresh(server):
    response, body = ask(server, "/")
    assert response.status == 200 and body == b"content of index.html"
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["Content-Type"].startswith("text/html")
    again, body = ask(server, "/index.html", **{"If-None-Match": response.headers["ETag"]})
    assert again.status == 304 and body == b""
    network = json.loads(server.content["page.json"])["model"]["network"]
    pinned, _ = ask(server, f"/{network['path']}?sha256={network['sha256']}")
    stale, _ = ask(server, f"/{network['path']}?sha256={'0' * 64}")
    assert "immutable" in pinned.headers["Cache-Control"] and stale.headers["Cache-Control"] == "no-cache"
    head, body = ask(server, "/page.js", method="HEAD")
    assert head.status == 200 and body == b"" and head.headers["Content-Length"] == "18"


def test_server_answers_this_machine_only_and_gives_nothing_else(server):
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert ask(server, "/", Host=host)[0].status == 421, host
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0].status == 200
    for path in ("/runtime/", "/runtime", "/../pyproject.toml", "/%2e%2e/pyproject.toml", "//etc/passwd", "/model"):
        assert ask(server, path)[0].status == 404, path
    assert ask(server, "/", method="POST")[0].status == 501


def test_closed_server_answers_nobody_over_an_open_connection(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", "/")
    connection.getresponse().read()
    server.shutdown()
    server.server_close()
    with pytest.raises((http.client.HTTPException, OSError)):
        connection.request("GET", "/")
        connection.getresponse()


def test_taken_port_is_named(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another port"):
            PageServer({}, port=taken.getsockname()[1])
    with pytest.raises(UsageError, match="choose another port"):
        PageServer({}, port=70_000)


# -- the Space ----------------------------------------------------------------------------------------------


def test_exported_space_holds_the_served_files_and_asks_for_isolation(built, model, tmp_path):
    content = assemble_page(model, built=built)
    space = export_page(content, tmp_path / "space", title="Polyps")
    assert all((space / name).read_bytes() == data for name, data in content.items())
    _, header, body = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert (card["sdk"], card["app_file"], card["title"]) == ("static", "index.html", "Polyps")
    assert card["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert card["custom_headers"]["cross-origin-opener-policy"] == "same-origin"
    assert len(card["short_description"]) <= 60 and "not a medical device" in body
    (space / ".git").mkdir()
    (space / "model" / "old.onnx.gz").write_bytes(b"old")
    export_page(content, space)
    assert (space / ".git").is_dir() and not (space / "model" / "old.onnx.gz").exists()


def test_export_leaves_other_folders_alone(built, model, tmp_path):
    content = assemble_page(model, built=built)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no page"):
        export_page(content, tmp_path / "mine")
    with pytest.raises(UsageError, match="at most 60"):
        export_page(content, tmp_path / "space", title="x" * 61)
    assert not (tmp_path / "space").exists() and len(list((tmp_path / "mine").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--export", "out", "--port", "8000"], "leave out --port"),
        (["--title", "Mine"], "give --export"),
        (["--model", "nowhere"], "no model folder|not built"),
    ],
)
@pytest.mark.slow
def test_command_refuses_options_that_do_not_apply(tmp_path, options, words):
    command = [sys.executable, "-m", "polypseg_command", "web", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 2 and re.search(words, result.stderr), result.stderr
    assert not list(tmp_path.iterdir())
