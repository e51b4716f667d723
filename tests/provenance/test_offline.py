"""Without a network the Hub's client does not repeat its requests: it looks into the cache, and one line says it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants

from polypseg.errors import PolypSegError, UsageError
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance import fetch as hub
from polypseg.provenance.fetch import hub_is_reachable, resolve_id, without_retries_when_offline
from polypseg.provenance.local import local_folder
from polypseg.weights.loading import load_encoder_weights


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub at a port where nobody listens, an empty cache, no proxy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    close_session()  # the client reads the proxies when it is made
    yield
    close_session()


def test_unreachable_hub_means_the_cache_only_and_no_longer_than_needed(unreachable):
    assert not hub_is_reachable()
    with without_retries_when_offline():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False), (None, False)])
@pytest.mark.parametrize("proxy", [False, True])
def test_a_hub_that_answers_is_asked_and_a_busy_or_silent_one_is_not(
    unreachable, monkeypatch, caplog, status, reachable, proxy
):
    monkeypatch.setattr(hub, "_REACH_SECONDS", 0.2)
    with answering(status) as address:
        if proxy:
            monkeypatch.setenv("http_proxy", address)
            monkeypatch.setenv("no_proxy", "example.org")
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid" if proxy else address)
        assert hub_is_reachable() is reachable
        assert ("503" in caplog.text) == (status == 503)
        with without_retries_when_offline():
            assert constants.HF_HUB_OFFLINE is not reachable


@contextmanager
def answering(status: int | None) -> Iterator[str]:
    """The address of a server that answers every request with a status, or takes connections and is silent."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if status is None:
                time.sleep(0.5)
                return
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_timm_weights_without_a_network_fail_at_once_with_one_line(unreachable):
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet10t", decoder_channels=8, image_size=64))
    begun = time.monotonic()
    with pytest.raises(PolypSegError, match=r"timm:resnet10t\.c3_in1k is not in the cache and the Hub cannot"):
        load_encoder_weights(model, "timm:resnet10t.c3_in1k")
    assert time.monotonic() - begun < 30  # the client's own repeats last a hundred seconds


def test_a_models_page_is_understood_and_a_revisions_page_answered():
    for address in ("https://huggingface.co/me/model", "http://hf.co/me/model/", "https://huggingface.co/me/model/"):
        assert resolve_id(address) == "me/model"
    with pytest.raises(UsageError, match="give me/model and the revision v1"):
        resolve_id("https://huggingface.co/me/model/tree/v1")
    with pytest.raises(UsageError, match="give me/model and the revision main"):
        resolve_id("https://huggingface.co/me/model/blob/main/config.json")


def test_a_runs_folder_stands_for_the_model_in_it(tmp_path):
    (tmp_path / "best").mkdir()
    assert local_folder(tmp_path) == tmp_path
    (tmp_path / "best" / "config.json").write_text("{}")
    assert local_folder(tmp_path) == tmp_path / "best"
    (tmp_path / "config.json").write_text("{}")
    assert local_folder(tmp_path) == tmp_path
