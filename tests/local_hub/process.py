"""The Hub as a process of its own, for tests whose clients are processes too: they read HF_ENDPOINT when imported."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from .store import find_problems

TESTS = Path(__file__).resolve().parents[1]


@dataclass
class HubProcess:
    """A running Hub: its data, its address, and the process."""

    root: Path
    xet: bool
    url: str
    process: Any
    """A ``subprocess.Popen``, or what stands for one."""
    start: Callable[..., Any] = subprocess.Popen

    def environment(self, home: Path, *, token: str | None = "hf_write") -> dict[str, str]:
        """The environment of a client whose caches are below `home`; without a token it is nobody."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        loopback = "127.0.0.1,localhost"
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home.resolve()),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_XET_TELEMETRY_ENABLED": "0",
            "DO_NOT_TRACK": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": loopback,
            "no_proxy": loopback,
            **({"HF_TOKEN": token} if token else {}),
            **({} if self.xet else {"HF_HUB_DISABLE_XET": "1"}),
        }

    def control(self, match: str, action: str, **options: object) -> None:
        """Let something go wrong; see `faults` for the actions and their options."""
        self._call("POST", "/_control", {"match": match, "action": action, **options})

    def clear(self) -> None:
        """Forget all faults and all requests."""
        self._call("DELETE", "/_control")
        self._call("DELETE", "/_requests")

    def requests(self, match: str = "") -> list[dict[str, Any]]:
        """The requests so far whose "METHOD /path?query" holds a match of the regular expression."""
        log = self._call("GET", "/_requests")
        return [record for record in log if re.search(match, f"{record['method']} {record['path']}")]

    def wait_for(self, match: str, *, seconds: float = 20.0) -> None:
        """Return as soon as such a request has come; TimeoutError after a while."""
        end = time.monotonic() + seconds
        while not self.requests(match):
            if time.monotonic() > end:
                raise TimeoutError(f"no request {match!r} within {seconds} s")
            time.sleep(0.02)

    def problems(self) -> list[str]:
        """What in the data on disk contradicts itself; [] for a Hub that is in order, running or killed."""
        return find_problems(self.root)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        """Start again at the same address with the same data."""
        self.kill()
        self.process = _start(self.root, port=int(self.url.rsplit(":", 1)[1]), xet=self.xet, start=self.start)[0]

    def _call(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with build_opener(ProxyHandler({})).open(Request(self.url + path, data, method=method), timeout=10) as answer:
            return json.load(answer)


def _start(root: Path, *, port: int, xet: bool, start: Callable[..., Any]) -> tuple[Any, str]:
    # The server watches its standard input and ends with whoever started it.
    command = [sys.executable, "-m", "local_hub", "--root", str(root), "--port", str(port), "--end-with-stdin"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = start(command + ["--xet"] * xet, cwd=TESTS, env=environment, **streams)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"the Hub did not start: exit code {process.wait()}")
    return process, url


@contextmanager
def running_hub(
    root: Path, *, xet: bool = False, port: int = 0, start: Callable[..., Any] = subprocess.Popen
) -> Iterator[HubProcess]:
    """A Hub with its data in `root`, on a free port for 0; it is killed at the end, the data stay."""
    root = root.resolve()  # the server runs in another folder
    process, url = _start(root, port=port, xet=xet, start=start)
    hub = HubProcess(root, xet, url, process, start)
    try:
        yield hub
    finally:
        hub.kill()
