"""What a user may rely on when 29 GB come over a bad line: right bytes, no waste, a clear sentence."""

import errno
import gzip
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from polypseg.data import download as module
from polypseg.data.download import CHUNK, download
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import FolderInUseError, sole_writer_of

BODY = random.Random(0).randbytes(8 * CHUNK + 1234)
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.body`` with Range and If-Range, but for what the next of ``server.faults`` says."""

    server: "Server"
    trickle = False

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        fault = self.server.faults.pop(0) if self.server.faults else {}
        if "prepare" in fault:
            fault["prepare"]()
        body, etag = self.server.body, self.server.etag
        status, start = fault.get("status", 200), 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and status == 200 and "ignore_range" not in fault and self.headers.get("If-Range") == etag:
            status, start = 206, int(asked[1])
            if start >= len(body):
                status = 416
        payload = body[start:] if status in (200, 206) else b"no"
        self.send_response(status)
        for name, value in fault.get("headers", {}).items():
            self.send_header(name, value)
        if etag:
            self.send_header("ETag", etag)
        if status == 206:
            shift = fault.get("shift", 0)
            self.send_header("Content-Range", f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(body)}")
        if "no_length" not in fault:
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        payload = payload[: fault.get("cut", len(payload))]
        for k in range(len(payload) if self.trickle else 0):
            try:
                self.wfile.write(payload[k : k + 1])
            except OSError:
                return
            time.sleep(0.02)
        if self.trickle:
            return
        for offset in range(0, len(payload), CHUNK):
            try:
                self.wfile.write(payload[offset : offset + CHUNK])
            except OSError:  # the client was killed
                return
            self.server.sent += len(payload[offset : offset + CHUNK]) if status in (200, 206) else 0
            time.sleep(fault.get("pause", 0))

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag = BODY, '"one"'
        self.faults: list[dict[str, Any]] = []
        self.requests: list[dict[str, str]] = []
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}/data.zip"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """``download`` from the server to tmp_path/data.zip, with waits of milliseconds."""

    def call(**options: Any) -> Path:
        return download(server.url, **{"destination": tmp_path / "data.zip", "backoff": 0.01} | options)

    return call


def assert_only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_plain_download_leaves_the_file_and_nothing_else(server, get, tmp_path, capsys):
    assert get(sha256=SHA256.upper(), size=len(BODY)) == tmp_path / "data.zip"
    assert (tmp_path / "data.zip").read_bytes() == BODY
    assert_only(tmp_path, "data.zip")
    assert len(server.requests) == 1 and "Range" not in server.requests[0]
    assert server.requests[0]["Accept-Encoding"] == "identity"  # or offsets would count other bytes
    assert capsys.readouterr().err == ""  # no bar where nobody watches


def test_folders_are_created_and_an_unknown_hash_is_logged(get, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert get(destination=tmp_path / "a" / "b.zip").read_bytes() == BODY
    assert SHA256 in caplog.text


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(BODY)}, {}])
def test_right_file_costs_no_request(server, get, tmp_path, known):
    (tmp_path / "data.zip").write_bytes(BODY)
    get(**known)
    assert server.requests == []


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(BODY)}])
def test_wrong_file_is_replaced_only_by_a_complete_one(server, get, tmp_path, known):
    (tmp_path / "data.zip").write_bytes(b"broken")
    server.faults = [{"status": 404}]
    with pytest.raises(PolypSegError):
        get(**known)
    assert (tmp_path / "data.zip").read_bytes() == b"broken"
    get(**known)
    assert (tmp_path / "data.zip").read_bytes() == BODY


def test_cut_body_resumes_where_it_stopped(server, get, tmp_path):
    server.faults = [{"cut": 4 * CHUNK}]
    assert get(sha256=SHA256).read_bytes() == BODY
    assert server.requests[1]["Range"] == f"bytes={4 * CHUNK}-"
    assert server.requests[1]["If-Range"] == '"one"'
    assert server.sent == len(BODY)  # not one byte twice
    assert_only(tmp_path, "data.zip")


def test_cuts_after_new_bytes_do_not_use_up_the_attempts(server, get):
    server.faults = [{"cut": CHUNK}] * 6
    assert get(sha256=SHA256, attempts=1).read_bytes() == BODY
    assert len(server.requests) == 7


def test_cuts_without_new_bytes_end_with_the_remedy_and_keep_what_arrived(server, get, tmp_path):
    server.faults = [{"cut": 2 * CHUNK}] + [{"cut": 0}] * 3
    with pytest.raises(PolypSegError, match="by hand") as raised:
        get(sha256=SHA256, attempts=3)
    assert server.url in str(raised.value) and str(tmp_path / "data.zip") in str(raised.value)
    assert len(server.requests) == 4
    assert_only(tmp_path, "data.zip.part", "data.zip.part.json")
    get(sha256=SHA256)
    assert server.requests[-1]["Range"] == f"bytes={2 * CHUNK}-"


def test_body_shorter_than_the_known_size_is_not_accepted(server, get, tmp_path):
    server.body = BODY[:-1]
    with pytest.raises(PolypSegError, match=f"announces {len(BODY) - 1} bytes instead of {len(BODY)}"):
        get(size=len(BODY))
    assert_only(tmp_path)  # noticed from the announcement, not after 29 GB
    assert len(server.requests) == 1


def test_cut_body_of_unannounced_length_is_known_by_its_size(server, get):
    server.faults = [{"cut": 4 * CHUNK, "no_length": True}]
    assert get(size=len(BODY)).read_bytes() == BODY
    assert server.requests[1]["Range"] == f"bytes={4 * CHUNK}-"


def test_corrupted_byte_names_both_hashes_and_starts_afresh(server, get, tmp_path):
    server.body = bytes([BODY[0] ^ 1]) + BODY[1:]
    with pytest.raises(PolypSegError) as raised:
        get(sha256=SHA256, size=len(BODY))
    assert SHA256 in str(raised.value) and hashlib.sha256(server.body).hexdigest() in str(raised.value)
    assert_only(tmp_path)
    server.body = BODY
    get(sha256=SHA256)
    assert "Range" not in server.requests[-1]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusal_is_not_retried(server, get, tmp_path, status):
    server.faults = [{"status": status}] * 2
    with pytest.raises(PolypSegError, match=str(status)) as raised:
        get()
    assert server.url in str(raised.value) and str(tmp_path / "data.zip") in str(raised.value)
    assert len(server.requests) == 1
    assert_only(tmp_path)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_busy_server_is_retried(server, get, status):
    server.faults = [{"status": status}] * 2
    assert get(sha256=SHA256, attempts=3).read_bytes() == BODY
    assert len(server.requests) == 3


def test_retry_after_is_honored(server, get):
    server.faults = [{"status": 503, "headers": {"Retry-After": "1"}}]
    begin = time.monotonic()
    get(sha256=SHA256)
    assert 1.0 <= time.monotonic() - begin < 3.0


def test_retry_after_of_an_hour_is_reported_instead(server, get):
    server.faults = [{"status": 503, "headers": {"Retry-After": "3600"}}]
    with pytest.raises(PolypSegError, match="3600 s"):
        get()


def test_waits_double_from_backoff(server, get, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    server.faults = [{"status": 500}] * 5
    with pytest.raises(PolypSegError, match="500"):
        get(backoff=1.0)
    assert [wait for wait in waits if wait] == [1, 2, 4, 8]


def test_server_that_ignores_range_starts_again(server, get):
    server.faults = [{"cut": 4 * CHUNK}, {"ignore_range": True}]
    assert get(sha256=SHA256).read_bytes() == BODY
    assert "Range" in server.requests[1] and len(server.requests) == 2


def test_server_that_continues_at_the_wrong_byte_starts_again(server, get):
    server.faults = [{"cut": 4 * CHUNK}, {"shift": 7}]
    assert get().read_bytes() == BODY
    assert "Range" not in server.requests[2]


def test_changed_file_starts_again(server, get):
    other = random.Random(1).randbytes(len(BODY))

    def change() -> None:
        server.body, server.etag = other, '"two"'

    server.faults = [{"cut": 4 * CHUNK}, {"prepare": change, "cut": 6 * CHUNK}]
    assert get().read_bytes() == other
    assert [request.get("If-Range") for request in server.requests] == [None, '"one"', '"two"']


def test_without_validator_nothing_is_resumed(server, get):
    server.etag = ""
    server.faults = [{"cut": 4 * CHUNK}]
    assert get().read_bytes() == BODY
    assert "Range" not in server.requests[1]


def test_weak_etag_is_no_validator_but_last_modified_is(server, get):
    server.etag = ""
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.faults = [{"cut": 4 * CHUNK, "headers": {"ETag": 'W/"weak"', "Last-Modified": date}}]
    assert get().read_bytes() == BODY
    assert server.requests[1]["If-Range"] == date


@pytest.mark.parametrize("origin", ['{"url": "http://other/", "validator": "\\"one\\""}', "{broken", "[]", None])
def test_part_of_unknown_origin_is_not_continued(server, get, tmp_path, origin):
    (tmp_path / "data.zip.part").write_bytes(b"x" * CHUNK)
    if origin is not None:
        (tmp_path / "data.zip.part.json").write_text(origin)
    assert get().read_bytes() == BODY
    assert "Range" not in server.requests[0]
    assert_only(tmp_path, "data.zip")


@pytest.mark.parametrize("extra", [b"", b"too much"])
def test_part_that_reaches_the_end_is_taken_only_if_nothing_is_too_much(server, get, tmp_path, extra):
    (tmp_path / "data.zip.part").write_bytes(BODY + extra)
    (tmp_path / "data.zip.part.json").write_text(json.dumps({"url": server.url, "validator": '"one"'}))
    assert get().read_bytes() == BODY
    assert server.sent == (len(BODY) if extra else 0)
    assert_only(tmp_path, "data.zip")


def test_no_connection_fails_in_seconds_with_the_remedy(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.zip"
    begin = time.monotonic()
    with pytest.raises(PolypSegError) as raised:
        download(url, destination=tmp_path / "data.zip", backoff=0.05)
    assert 0.05 * (1 + 2 + 4 + 8) <= time.monotonic() - begin < 5
    assert f"by hand and place it at {tmp_path / 'data.zip'}" in str(raised.value) and url in str(raised.value)


def test_bad_certificate_is_not_retried(get, tmp_path, monkeypatch):
    calls = []

    def refuse(*args: Any, **options: Any) -> None:
        calls.append(args)
        raise requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")

    monkeypatch.setattr(requests.Session, "get", refuse)
    with pytest.raises(PolypSegError, match="certificate") as raised:
        get()
    assert str(tmp_path / "data.zip") in str(raised.value) and len(calls) == 1


@pytest.mark.parametrize("url", ["ftp://host/data.zip", "file:///etc/passwd", "data.zip"])
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(UsageError, match="http"):
        download(url, destination=tmp_path / "data.zip")


def test_folder_as_destination_is_refused(get, server, tmp_path):
    with pytest.raises(UsageError, match="folder"):
        get(destination=tmp_path)
    assert server.requests == []


class FullDisk(io.FileIO):
    """A file that takes no byte beyond ``room``."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def replace_open(monkeypatch: pytest.MonkeyPatch, open_part: Callable[[Path, str], Any]) -> None:
    """Open a .part for writing by ``open_part``."""
    real = Path.open

    def fake(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        writes_part = path.suffix == ".part" and mode in ("wb", "ab")
        return open_part(path, mode) if writes_part else real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", fake)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written_is_named(server, get, tmp_path, monkeypatch, code):
    def refuse(path: Path, mode: str) -> None:
        raise OSError(code, os.strerror(code), str(path))

    replace_open(monkeypatch, refuse)
    with pytest.raises(PolypSegError, match="cannot write") as raised:
        get()
    assert str(tmp_path) in str(raised.value) and "choose a folder" in str(raised.value)
    assert len(server.requests) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named(get, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(PolypSegError, match="cannot write") as raised:
        get(destination=folder / "data.zip")
    assert str(folder) in str(raised.value)


def test_disk_that_fills_up_keeps_what_arrived(server, get, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", 3 * CHUNK)
        replace_open(patch, FullDisk)
        with pytest.raises(PolypSegError, match="no space left") as raised:
            get()
    assert str(tmp_path / "data.zip") in str(raised.value) and len(server.requests) == 1
    kept = (tmp_path / "data.zip.part").stat().st_size  # pieces arrive as the network cuts them
    assert 2 * CHUNK < kept <= 3 * CHUNK
    assert get(sha256=SHA256).read_bytes() == BODY
    assert server.requests[1]["Range"] == f"bytes={kept}-"


def test_disk_too_small_is_noticed_before_the_first_byte(server, get, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(BODY) - 1))
    with pytest.raises(PolypSegError, match="Free some space") as raised:
        get()
    assert str(tmp_path / "data.zip") in str(raised.value) and f"{len(BODY):,}" in str(raised.value)
    assert len(server.requests) == 1
    assert_only(tmp_path)


def test_disk_needs_room_only_for_the_rest(server, get, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    server.faults = [{"cut": 4 * CHUNK}]
    free = iter([len(BODY), len(BODY) - 4 * CHUNK])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    assert get(sha256=SHA256).read_bytes() == BODY


def test_interrupt_keeps_the_part(server, get, tmp_path, monkeypatch):
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    server.faults = [{"cut": 4 * CHUNK}]
    with monkeypatch.context() as patch:
        patch.setattr(module.log, "info", interrupted)  # called between two requests
        with pytest.raises(KeyboardInterrupt):
            get(sha256=SHA256)
    assert (tmp_path / "data.zip.part").stat().st_size == 4 * CHUNK
    get(sha256=SHA256)
    assert server.sent == len(BODY)


def test_kill_in_the_middle_is_resumed_by_another_process(server, get, tmp_path):
    part = tmp_path / "data.zip.part"
    code = "import sys; from pathlib import Path; from polypseg.data.download import download\n"
    code += "download(sys.argv[1], destination=Path(sys.argv[2]))"
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    server.faults = [{"pause": 0.3}]
    killed = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path / "data.zip")], env=environment)
    while killed.poll() is None and not (part.exists() and part.stat().st_size >= 2 * CHUNK):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    reached = part.stat().st_size
    assert 2 * CHUNK <= reached < len(BODY) and not (tmp_path / "data.zip").exists()
    assert get(sha256=SHA256).read_bytes() == BODY
    assert server.requests[1]["Range"] == f"bytes={reached}-"
    assert_only(tmp_path, "data.zip")


def test_a_second_download_of_the_same_file_is_refused_and_one_of_another_is_not(server, get, tmp_path):
    with sole_writer_of(tmp_path / "data.zip"), ThreadPoolExecutor() as pool:
        with pytest.raises(
            FolderInUseError, match=rf"data\.zip is being written by another process \(number {os.getpid()}"
        ):
            pool.submit(get).result()
        assert server.requests == []
        pool.submit(get, destination=tmp_path / "other.zip").result()
    assert_only(tmp_path, "other.zip")


# Servers that would never end


def test_a_server_that_cuts_and_then_refuses_the_rest_is_given_up(server, get):
    """5633 requests in 20 s: each cut brought new bytes, each 416 threw them away."""
    refuse = {"status": 416}
    server.faults = [{"cut": 2 * CHUNK}, refuse] * 20
    with pytest.raises(PolypSegError, match="answered 416"):
        get(attempts=3)
    assert len(server.requests) <= 6


def test_a_server_that_always_continues_at_the_wrong_byte_is_given_up(server, get):
    server.faults = [{"cut": 2 * CHUNK, "shift": 7}] * 40
    with pytest.raises(PolypSegError, match="cannot download"):
        get(attempts=3)
    assert len(server.requests) <= 6


def test_a_server_without_resumption_that_always_cuts_is_given_up(server, get):
    server.etag = ""
    server.faults = [{"cut": 2 * CHUNK}] * 40
    with pytest.raises(PolypSegError, match="connection failed"):
        get(attempts=3)
    assert len(server.requests) <= 4


def test_no_more_is_written_than_was_announced(server, get, tmp_path):
    """5.2 GB were written where 1 MiB was announced."""
    server.faults = [{"no_length": True}]
    with pytest.raises(PolypSegError, match=rf"more than the {3 * CHUNK} bytes that were announced"):
        get(size=3 * CHUNK)
    assert_only(tmp_path)
    assert len(server.requests) == 1


def test_a_compressed_body_may_not_grow_without_end(server, get, tmp_path):
    server.body = gzip.compress(bytes(40 * CHUNK))
    server.faults = [{"headers": {"Content-Encoding": "gzip"}}]
    with pytest.raises(PolypSegError, match="that were announced"):
        get()
    assert_only(tmp_path)


def test_a_trickle_is_given_up(server, get, monkeypatch):
    """One byte in two seconds would take for ever."""
    server.body = b"x" * 400
    monkeypatch.setattr(Handler, "trickle", True, raising=False)
    began = time.monotonic()
    with pytest.raises(PolypSegError, match=r"only \d+ bytes arrived in"):
        get(timeout=0.3, attempts=2)
    assert time.monotonic() - began < 5 and len(server.requests) == 2


def test_a_body_of_unknown_length_leaves_room_on_the_disk(server, get, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=module.RESERVE - 1))
    server.faults = [{"no_length": True}]
    with pytest.raises(PolypSegError, match="does not say how many more follow"):
        get()


class RawServer:
    """Sends what a script of bytes yields to whoever asks, without any rule of HTTP."""

    def __init__(self, script: Callable[[int], Iterator[bytes]]):
        self.requests, self.sent = 0, 0
        self._script = script
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/data.zip"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                self.requests += 1
                for data in self._script(self.requests):
                    connection.sendall(data)
                    self.sent += len(data)
            except OSError:
                return

    def close(self) -> None:
        self._listening.close()


OK = b"HTTP/1.1 200 OK\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: /x%d\r\n"


def dripping(data: bytes) -> Iterator[bytes]:
    while True:
        yield data
        time.sleep(0.05)


def endless_continue(number: int) -> Iterator[bytes]:
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n" * 100


def dripping_header(number: int) -> Iterator[bytes]:
    yield OK
    yield from dripping(b"X")


def dripping_status(number: int) -> Iterator[bytes]:
    yield from dripping(b"H")


def dripping_trailer(number: int) -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    yield from dripping(b"A: b\r\n")


def dripping_chunk_length(number: int) -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from dripping(b"0")


def redirect_with_dripping_body(number: int) -> Iterator[bytes]:
    yield MOVED % number + b"Content-Length: 100000\r\n\r\n"
    yield from dripping(b"x")


def redirect_with_endless_body(number: int) -> Iterator[bytes]:
    yield MOVED % number + b"Connection: close\r\n\r\n"
    while True:
        yield b"x" * 1_000_000


def endless_redirects(number: int) -> Iterator[bytes]:
    yield MOVED % number + b"Content-Length: 0\r\nConnection: close\r\n\r\n"


def redirect_to_a_file(number: int) -> Iterator[bytes]:
    yield b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"


def empty(number: int) -> Iterator[bytes]:
    yield OK + b"Content-Length: 0\r\n\r\n"


def negative(number: int) -> Iterator[bytes]:
    yield OK + b"Content-Length: -5\r\nConnection: close\r\n\r\nabc"


def superscript(number: int) -> Iterator[bytes]:
    yield OK + "Content-Length: \u00b2\r\nConnection: close\r\n\r\nabc".encode("latin1")


def login(number: int) -> Iterator[bytes]:
    yield OK + b"Content-Type: text/html; charset=utf-8\r\nContent-Length: 6\r\n\r\n login"


def unnamed_login(number: int) -> Iterator[bytes]:
    yield OK + b"Content-Length: 23\r\n\r\n\n<!DOCTYPE html><html>\n"


@pytest.mark.parametrize(
    ("script", "match", "requests_at_most"),
    [
        (endless_continue, "did not finish within", 2),
        (dripping_status, "cannot download", 2),
        (dripping_header, "did not finish within", 2),
        pytest.param(dripping_trailer, "did not finish within", 2, marks=pytest.mark.slow),
        (dripping_chunk_length, "cannot download", 2),
        (redirect_with_dripping_body, "more than 10 redirects", 11),
        pytest.param(redirect_with_endless_body, "more than 10 redirects", 11, marks=pytest.mark.slow),
        (endless_redirects, "more than 10 redirects", 11),
        (redirect_to_a_file, "No connection adapters", 1),
        (empty, "the server sent an empty file", 2),
        (negative, "the server announces '-5' bytes", 2),
        (superscript, "the server announces '\u00b2' bytes", 2),
        (login, r"answers with a web page instead of data\.zip: it may ask for a login", 1),
        (unnamed_login, "answers with a web page", 1),
    ],
)
def test_answers_that_never_end_or_are_no_file_are_given_up(tmp_path, script, match, requests_at_most):
    server, began = RawServer(script), time.monotonic()
    try:
        with pytest.raises(PolypSegError, match=match) as caught:
            download(server.url, destination=tmp_path / "data.zip", timeout=0.4, attempts=2, backoff=0.01)
    finally:
        server.close()
    assert "\n" not in str(caught.value) and time.monotonic() - began < 8
    assert server.requests <= requests_at_most
    assert not (tmp_path / "data.zip").exists()


def test_bodies_of_redirects_are_not_read(tmp_path):
    """2 GB had come."""
    server = RawServer(redirect_with_endless_body)
    with pytest.raises(PolypSegError):
        download(server.url, destination=tmp_path / "data.zip", timeout=0.4, attempts=1)
    server.close()
    assert server.sent <= 11 * 16_000_000  # what lies in the buffers of sockets


def test_redirects_are_followed_with_range_and_to_other_servers(server, tmp_path):
    other = RawServer(lambda number: iter([b"HTTP/1.1 302 Found\r\nLocation: " + server.url.encode() + b"\r\n\r\nxx"]))
    server.faults = [{"cut": 3 * CHUNK}]
    download(other.url, destination=tmp_path / "data.zip", sha256=SHA256, backoff=0.01)
    other.close()
    assert (tmp_path / "data.zip").read_bytes() == BODY
    assert [request.get("Range") for request in server.requests] == [None, f"bytes={3 * CHUNK}-"]


def test_a_known_empty_file_and_a_wanted_page_are_files(tmp_path):
    for script, name, options in ((empty, "a.bin", {"size": 0}), (login, "b.html", {})):
        server = RawServer(script)
        assert download(server.url, destination=tmp_path / name, **options).is_file()
        server.close()


def test_no_watch_is_left_and_every_socket_was_watched(get, monkeypatch):
    watched = []
    add = module._Watch.add

    def note(watch: Any, connected: socket.socket) -> None:
        add(watch, connected)
        watched.extend(watch._sockets)

    monkeypatch.setattr(module._Watch, "add", note)
    for _ in range(3):
        get().unlink()
    assert len(watched) == 3 and all(one.fileno() == -1 for one in watched)
    assert not [one for one in threading.enumerate() if one.name == "polypseg-watch"]
