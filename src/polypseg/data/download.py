"""Download one file so that an interruption costs seconds and a wrong byte never reaches its place.

Bytes gather in ``NAME.part``; ``NAME.part.json`` remembers their origin (URL and ETag or Last-Modified), so
that any later call resumes them. ``NAME`` itself appears only once size and SHA-256 are right.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import requote_uri
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from tqdm import tqdm
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, InvalidHeader
from urllib3.poolmanager import ProxyManager
from urllib3.util import Retry

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import file_sha256, sole_writer_of, sync_folder

log = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes; also the most that a cut connection or a kill loses
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
LOWEST_SPEED = 1024.0  # bytes/s over the time-out, below which a transfer counts as failed
RESERVE = 1 << 28  # bytes that a body of unannounced length leaves free on the disk
_INFLATION = 20  # times the announced bytes that a body may become where the server compresses it unasked
_MOST_REDIRECTS = 10
CONNECT_TIMEOUT = 5.0  # seconds; without a network all attempts together then fail within a minute


class _TransientError(Exception):
    """A failure that waiting may cure; ``retry_after`` is the wait in seconds that the server asks for."""

    def __init__(self, reason: str, *, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


def download(
    url: str,
    *,
    destination: Path,
    sha256: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    backoff: float = 1.0,
) -> Path:
    """Download ``url`` to the file ``destination`` and return it; a file already right costs no request.

    ``size`` is in bytes, ``timeout`` and ``backoff`` in seconds. ``attempts`` counts failures in a row, of whatever
    kind, after which the file was not longer than ever before; the wait between them doubles from ``backoff`` on,
    unless the server names one. Slower than 1 KiB/s over ``timeout`` is a failure too, and so are headers that take
    longer, redirects included. Never more is written than the server announced. Where neither size nor hash is known,
    an existing file counts as right, and an empty file or a web page as none; a wrong one stays until its successor is
    complete. Raises UsageError for anything but http and https, PolypSegError if the server refuses or stays away, the
    bytes are wrong, or the disk does not take them, FolderInUseError while another process downloads the same file. All
    but wrong bytes are kept for the next call.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"cannot download {url!r}: the address must start with http:// or https://")
    if destination.is_dir():
        raise UsageError(f"cannot download to {destination}: it is a folder; add a file name")
    part, by_hand = _part(destination), _by_hand(destination)
    checked = size is not None or sha256 is not None
    retrying = Retrying(
        retry=retry_if_exception_type(_TransientError),
        stop=stop_after_attempt(attempts),
        wait=lambda state: _wait(state, backoff=backoff),
        reraise=True,
    )
    try:
        if destination.exists():
            if not (defect := _defect(destination, sha256=sha256, size=size)):
                return destination
            log.warning("%s has %s: downloading it again", destination, defect)
        with sole_writer_of(destination):
            longest = _length(part)
            request = partial(_receive, url, destination, size=size, timeout=timeout, checked=checked)
            while not retrying(request, longest=longest):
                longest = max(longest, _length(part))
                log.info("%s: resuming at byte %d", url, _length(part))
            if defect := _defect(part, sha256=sha256, size=size):
                _discard(part)
                raise PolypSegError(f"{url} arrived with {defect} and was deleted; try again, or {by_hand}.")
            if sha256 is None:
                log.info("%s has SHA-256 %s (nothing to compare it with)", url, file_sha256(part))
            os.replace(part, destination)
            sync_folder(destination.parent)
            _discard(part)
    except _TransientError as error:
        raise PolypSegError(
            f"cannot download {url}: {error}. Check the network and try again (it resumes), or {by_hand}."
        ) from error
    except OSError as error:
        raise PolypSegError(_explain(error, destination)) from error
    return destination


class _Watch:
    """Ends the connections of a request at a deadline, whatever they wait for.

    A time-out of sockets begins again with every byte: headers, bodies of redirects and trailers may drip for ever.
    """

    def __init__(self) -> None:
        self.expired = False
        self._sockets: list[socket.socket] = []
        self._deadline, self._period = math.inf, 1.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polypseg-watch", daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for one in self._sockets:
            one.close()

    def add(self, connected: socket.socket) -> None:
        """A copy of a socket is kept: TLS takes the original away."""
        self._sockets.append(connected.dup())

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Allow what is inside that time. Raises _TransientError where it took longer, whatever it made of it."""
        self._period, self._deadline = min(seconds, self._period), time.monotonic() + seconds
        late = _TransientError(f"the server did not finish within {seconds:.0f} s")
        try:
            yield
        except requests.RequestException as error:
            if self.expired:
                raise late from error
            raise
        finally:
            self._deadline = math.inf
        if self.expired:
            raise late

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            if time.monotonic() >= self._deadline:
                self.expired = True
                for one in list(self._sockets):
                    with suppress(OSError):  # it has ended already
                        one.shutdown(socket.SHUT_RDWR)


class _WatchedAdapter(HTTPAdapter):
    """Connections that a watch can end; those through SOCKS proxies are not watched."""

    def __init__(self, watch: _Watch):
        self._pools = {"http": _watched(HTTPConnectionPool, watch), "https": _watched(HTTPSConnectionPool, watch)}
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)  # type: ignore[no-untyped-call]
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)  # type: ignore[no-untyped-call]
        if type(manager) is ProxyManager:
            manager.pool_classes_by_scheme = self._pools
        return manager


def _watched(pool: type[HTTPConnectionPool], watch: _Watch) -> type[HTTPConnectionPool]:
    """A kind of pool whose connections tell ``watch`` their sockets as soon as they have one."""
    kind: Any = pool.ConnectionCls

    class Connection(kind):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            connected: socket.socket = super()._new_conn()
            watch.add(connected)
            return connected

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


class _Session(requests.Session):
    """A session that follows no redirect by itself: it would read their bodies to the end."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        return None


@contextmanager
def _answer(url: str, *, headers: dict[str, str], timeout: float, watch: _Watch) -> Iterator[requests.Response]:
    """The answer at the end of all redirects, whose bodies are not read."""
    limits = (min(timeout, CONNECT_TIMEOUT), timeout)
    with _Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, _WatchedAdapter(watch))
        with watch.limit(timeout):
            for _ in range(_MOST_REDIRECTS + 1):
                response = session.get(url, headers=headers, stream=True, timeout=limits)
                target = requests.Session.get_redirect_target(session, response)
                if target is None:
                    break
                response.close()
                url = urljoin(url, requote_uri(target))
            else:
                raise requests.TooManyRedirects(f"more than {_MOST_REDIRECTS} redirects")
        with response:
            yield response


def _receive(url: str, destination: Path, *, size: int | None, timeout: float, longest: int, checked: bool) -> bool:
    """One request and its body; False if another should follow at once, because new bytes have arrived.

    New are those beyond ``longest``, the greatest length so far: a server that makes us begin again brings none.
    ``checked``: whether size or hash will tell if the file is right.
    """
    part, by_hand = _part(destination), _by_hand(destination)
    have = _length(part)
    headers = {"Accept-Encoding": "identity"}
    if have and (validator := _validator_of(part, url)):
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    try:
        with _Watch() as watch, _answer(url, headers=headers, timeout=timeout, watch=watch) as response:
            status = f"the server answered {response.status_code} {response.reason}"
            if response.status_code == 416 and "Range" in headers:
                if response.headers.get("Content-Range") == f"bytes */{have}":
                    return True  # the last run was killed between the last byte and the rename
                _discard(part)
                raise _TransientError(f"{status} to the rest of the file")
            if response.status_code in (408, 429) or response.status_code >= 500:
                if (wait := _retry_after(response) or 0) > LONGEST_WAIT:
                    raise PolypSegError(f"cannot download {url}: {status}. Try again in {wait:.0f} s; it resumes.")
                raise _TransientError(status, retry_after=wait or None)
            if response.status_code not in (200, 206):
                raise PolypSegError(f"cannot download {url}: {status}. Open it in a browser, and {by_hand}.")
            if not checked:
                _refuse_other_answers(response, url, destination)
            _store(response, url, destination, size=size, timeout=timeout, watch=watch)
            if not checked:
                _refuse_other_content(url, destination)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise PolypSegError(f"cannot verify the certificate of {url}; {by_hand}.") from error
        if _length(part) >= max(have, longest) + CHUNK:
            return False
        raise _TransientError(f"the connection failed ({type(error).__name__})") from error
    except requests.RequestException as error:
        raise PolypSegError(f"cannot download {url}: {error}. Check the address, or {by_hand}.") from error
    return True


def _refuse_other_answers(response: requests.Response, url: str, destination: Path) -> None:
    """Raise for headers of something else than a whole file, where only they can tell."""
    length = response.headers.get("Content-Length")
    if length is not None and _whole(length) is None:
        raise _TransientError(f"the server announces {length[:40]!r} bytes")
    if response.headers.get("Content-Type", "").lower().startswith("text/html") and not _is_page(destination):
        raise PolypSegError(_a_page(url, destination))


def _refuse_other_content(url: str, destination: Path) -> None:
    """The same for what has arrived, which is deleted."""
    part = _part(destination)
    with part.open("rb") as file:
        start = file.read(512)
    if not start:
        _discard(part)
        raise _TransientError("the server sent an empty file")
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")) and not _is_page(destination):
        _discard(part)
        raise PolypSegError(_a_page(url, destination))


def _is_page(destination: Path) -> bool:
    return destination.suffix.lower() in (".html", ".htm")


def _a_page(url: str, destination: Path) -> str:
    return (
        f"{url} answers with a web page instead of {destination.name}: it may ask for a login. Open it in a browser, "
        f"and {_by_hand(destination)}."
    )


def _store(
    response: requests.Response, url: str, destination: Path, *, size: int | None, timeout: float, watch: _Watch
) -> None:
    """Write the body: behind the bytes that a 206 continues, else from zero."""
    part, have = _part(destination), _length(_part(destination))
    if response.status_code == 206:
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            _discard(part)
            raise _TransientError("the server continued at the wrong byte")
        start, announced = have, found[2]
    else:
        start, announced = 0, response.headers.get("Content-Length", "*")
    encoded = "Content-Encoding" in response.headers  # then lengths and offsets are those of other bytes
    total = None if encoded else _whole(announced)
    if size is not None and total not in (None, size):
        raise PolypSegError(
            f"{url} announces {total} bytes instead of {size}: the server has another file. "
            f"Find the right one and place it at {destination}."
        )
    total = size if total is None else total
    if total is not None and total - have > (free := shutil.disk_usage(part.parent).free):
        raise PolypSegError(
            f"{destination} needs {total - have:,} more bytes and its folder has {free:,} left. "
            "Free some space or choose another folder; what has arrived is kept."
        )
    bar = tqdm(
        total=total,
        initial=start,
        desc=destination.name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None,
    )
    with part.open("ab" if start else "wb") as file, bar:
        if not start:  # only after the truncation: old bytes must never stand beside a new validator
            etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
            validator = etag if etag and not etag.startswith("W/") else modified
            origin = {"url": url, "validator": "" if encoded else validator}
            _origin(part).write_text(json.dumps(origin), encoding="utf-8")
        most = total
        if most is None and encoded and (length := _whole(announced)) is not None:
            most = _INFLATION * length
        written = start
        try:
            for chunk in _body(response, timeout=timeout, watch=watch):
                written += len(chunk)
                if most is not None and written > most:
                    break
                if most is None:
                    _leave_room(part, written, arrived=len(chunk))
                file.write(chunk)
                bar.update(len(chunk))
        finally:
            file.flush()
            os.fsync(file.fileno())
    if most is not None and written > most:
        _discard(part)
        raise PolypSegError(
            f"{url} sends more than the {total or announced} bytes that were announced: what arrived was deleted. "
            f"Find the right file and place it at {destination}."
        )
    if total is not None and _length(part) < total and not encoded:
        raise requests.ConnectionError("the body ended early")


def _body(response: requests.Response, *, timeout: float, watch: _Watch) -> Iterator[bytes]:
    """The body in pieces as they arrive. Raises _TransientError where they arrive more slowly than LOWEST_SPEED."""
    since, received = time.monotonic(), 0
    while True:
        with watch.limit(1.5 * timeout):  # the socket notices silence before; this is for what drips between pieces
            try:
                chunk = response.raw.read1(CHUNK, decode_content=True)
            except HTTPError as error:  # urllib3's, which requests translates only for its own readers
                raise requests.ConnectionError(error) from error
        if not chunk:
            return
        received += len(chunk)
        if (passed := time.monotonic() - since) >= timeout:
            if received < LOWEST_SPEED * passed:
                raise _TransientError(f"only {received} bytes arrived in {passed:.0f} s")
            since, received = time.monotonic(), 0
        yield chunk


def _leave_room(part: Path, written: int, *, arrived: int) -> None:
    """Raise PolypSegError before a body of unknown length fills the disk; asked at first and once every 16 MiB."""
    before, step = written - arrived, 1 << 24
    if (before == 0 or before // step != written // step) and (free := shutil.disk_usage(part.parent).free) < RESERVE:
        raise PolypSegError(
            f"{part} has {written:,} bytes, the server does not say how many more follow, and {free:,} are left on the "
            "disk. Free some space or choose another folder; what has arrived is kept."
        )


def _whole(text: str) -> int | None:
    """A number of bytes as headers give it; None for anything else."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _part(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def _origin(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _origin(part).unlink(missing_ok=True)


def _validator_of(part: Path, url: str) -> str:
    """The ETag or date under which ``part`` began; empty if unknown or if it began from another address."""
    try:
        origin = json.loads(_origin(part).read_text(encoding="utf-8"))
        return str(origin["validator"]) if origin["url"] == url else ""
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def _defect(path: Path, *, sha256: str | None, size: int | None) -> str:
    """What is wrong with the bytes of ``path``; empty if nothing."""
    if size is not None and (found := path.stat().st_size) != size:
        return f"{found} bytes instead of {size}"
    if sha256 is not None and (digest := file_sha256(path)) != sha256.lower():
        return f"SHA-256 {digest} instead of {sha256.lower()}"
    return ""


def _retry_after(response: requests.Response) -> float | None:
    """What the server asks to wait, in seconds."""
    try:
        return Retry().get_retry_after(response.raw)
    except InvalidHeader:
        return None


def _wait(state: RetryCallState, *, backoff: float) -> float:
    """Seconds until the next attempt."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _TransientError) and error.retry_after is not None:
        return error.retry_after
    return wait_exponential(multiplier=backoff, max=LONGEST_WAIT)(state)


def _by_hand(destination: Path) -> str:
    return f"download it by hand and place it at {destination}"


def _explain(error: OSError, destination: Path) -> str:
    """One sentence for an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {destination}: free some and run this again; it resumes where it stopped."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot write to {destination.parent} ({error.strerror}): choose a folder that you may write to."
    return f"cannot write {destination}: {error.strerror or error}."
