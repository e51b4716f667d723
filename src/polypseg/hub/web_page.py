"""The page that segments inside the browser: put together for one model, served on this machine, or written as a Space.

``make web`` builds its code from ``web/`` into ``_web``, which the wheel carries; what depends on the model (its ONNX
file, its figures in ``page.json``, the list of files of the service worker) is added here.
"""

import gzip
import hashlib
import json
import math
import socket
import webbrowser
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from polypseg.errors import UsageError, unknown_name
from polypseg.evaluation.receipt import find_receipts
from polypseg.files import atomic_path, explain_write_errors, read_json
from polypseg.inference.runtimes import ONNX_FILES
from polypseg.provenance.license import model_license
from polypseg.provenance.origin import UNKNOWN, WeightsOrigin

BUILT = Path(__file__).resolve().parents[1] / "_web"
PAGE, BUILD, SERVICE_WORKER = "page.json", "build.json", "service_worker.js"
_BICUBIC = 3
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json; charset=utf-8",
    ".webmanifest": "application/manifest+json; charset=utf-8",
    ".svg": "image/svg+xml",
    ".gz": "application/gzip",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
}
_ISOLATION = {
    # The browser shares memory between WASM's threads only on pages that nobody else can look into.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
_HEADERS = _ISOLATION | {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in the page itself
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's mean Dice on one test, as its receipt says."""

    dataset: str
    """Title, and which part of it."""
    images: int
    dice: float
    low: float | None
    high: float | None
    """95 % interval; None where the receipt has none."""


def stated_scores(folder: Path) -> list[Score]:
    """The mean Dice of every receipt in a model folder and below it, by path; empty without receipts.

    Raises UsageError for a receipt of other weights than those that ``config.json`` records.
    """
    ours = WeightsOrigin.of_folder(folder).sha256
    scores = []
    for path, receipt in find_receipts(folder).items():
        theirs = receipt.model_sha256
        if ours and theirs and theirs != ours:
            raise UsageError(f"{path} is of other weights ({theirs[:12]}, not {ours[:12]}): evaluate again")
        dice = receipt.plain_dice
        if dice is None or dice.mean is None:
            continue
        dataset = receipt.dataset
        part = "" if (dataset.split, dataset.part) == ("full", "full") else f" {dataset.part}"
        scores.append(
            Score(dataset=f"{dataset.title}{part}", images=receipt.n, dice=dice.mean, low=dice.low, high=dice.high)
        )
    return scores


# Putting the page together ---------------------------------------------------------------------------------


def assemble_page(
    model: Path, *, precision: str = "fp32", threshold: float = 0.5, min_area: int = 64, built: Path = BUILT
) -> dict[str, bytes]:
    """Path -> content of every file of the page for one model folder.

    ``precision``: which of the folder's ``onnx`` files, see ONNX_FILES. ``threshold``: where the slider is first.
    ``min_area``: pixels that a counted lesion has at least. Raises UsageError when the page is not built, the folder
    has no such file, or its frames are to be prepared in another way than the page's (squash, bicubic, normalize).
    """
    if not 0 < threshold < 1 or min_area < 1:
        raise UsageError("the threshold lies between 0 and 1 (both excluded), the minimum area is at least 1 pixel")
    build = _read_build(built)
    network = _network_of(model, precision)
    content = {name: (built / name).read_bytes() for name in build["files"]}
    content["model/network.onnx.gz"] = gzip.compress(network.read_bytes(), compresslevel=6, mtime=0)
    facts = _facts(model, content, precision=precision) | {"threshold": threshold, "min_area": min_area}
    digests = {name: _sha256(data) for name, data in content.items()}
    version = _sha256(json.dumps([facts, digests], sort_keys=True).encode())[:16]
    content[PAGE] = json.dumps({"version": version} | facts, indent=1, allow_nan=False).encode()
    content[SERVICE_WORKER] = _file_list(version, facts, content, build) + content[SERVICE_WORKER]
    return content


def _read_build(built: Path) -> dict[str, Any]:
    if not (built / BUILD).is_file():
        raise UsageError(
            f"the page is not built ({built} is missing): run `make web` in the checkout, which needs Node.js 20 or "
            "newer with npm; a released wheel brings it along"
        )
    content: dict[str, Any] = read_json(built / BUILD)
    return content


def _network_of(model: Path, precision: str) -> Path:
    if precision not in ONNX_FILES:
        raise unknown_name("precision", precision, ONNX_FILES)
    if not (model / "config.json").is_file():
        raise UsageError(f"{model} is no model folder: it has no config.json")
    network = model / ONNX_FILES[precision]
    if not network.is_file():
        raise UsageError(f"{network} does not exist: the page needs the model in ONNX form, at {precision}")
    return network


def _facts(model: Path, content: Mapping[str, bytes], *, precision: str) -> dict[str, Any]:
    origin = WeightsOrigin.of_folder(model)
    name = model.resolve().name if origin.model_id == UNKNOWN else origin.repo_name
    terms = model_license(origin)
    side, mean, std = _preparation(model / "preprocessor_config.json")

    def large(path: str) -> dict[str, Any]:
        return {"path": path, "sha256": _sha256(content[path]), "bytes": len(content[path])}

    return {
        "model": {
            "name": name,
            "license": terms.name or terms.identifier,
            "size": side,
            "mean": mean,
            "std": std,
            "precision": precision,
            "network": large("model/network.onnx.gz"),
        },
        "scores": [asdict(score) for score in stated_scores(model)],
        "runtime": {"wasm": large("runtime/ort-wasm.wasm.gz"), "webgpu": large("runtime/ort-webgpu.wasm.gz")},
    }


def _preparation(path: Path) -> tuple[int, list[float], list[float]]:
    """Side, mean and standard deviation of an image processor that the page can follow exactly."""
    settings = read_json(path)
    size = settings.get("size") or {}
    side: Any = size.get("height")
    expected = {
        "resample": _BICUBIC,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "keep_aspect_ratio": False,
        "do_pad": False,
    }
    other = [key for key, value in expected.items() if (settings.get(key, value) or False) != value]
    if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255):
        other.append("rescale_factor")
    if not isinstance(side, int) or size.get("width") != side:
        other.append("size")
    if other:
        raise UsageError(
            f"{path}: the page squashes frames to a square by Pillow's bicubic filter and normalizes them, but this "
            f"model asks for something else: {', '.join(other)}"
        )
    return int(side), list(settings["image_mean"]), list(settings["image_std"])


def _file_list(version: str, facts: Mapping[str, Any], content: Mapping[str, bytes], build: Mapping[str, Any]) -> bytes:
    """The line above the service worker's code that says which files it keeps."""
    large = [facts["runtime"]["wasm"], facts["model"]["network"]]
    later = [facts["runtime"]["webgpu"]]
    apart = {file["path"] for file in large + later} | {SERVICE_WORKER}
    apart |= {name for name, file in build["files"].items() if file["later"]}
    small = {name: _sha256(data) for name, data in content.items() if name not in apart}
    lists = {
        "version": version,
        "small": small,
        "large": [f"{file['path']}?sha256={file['sha256']}" for file in large],
        "later": [f"{file['path']}?sha256={file['sha256']}" for file in later],
    }
    return f"const POLYPSEG = {json.dumps(lists)};\n".encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def page_weight(content: Mapping[str, bytes]) -> str:
    """What travels at the first use and what is stored, in words."""
    facts = json.loads(content[PAGE])
    later = {facts["runtime"]["webgpu"]["path"], *(name for name in content if name.endswith("notices.txt.gz"))}
    first = sum(len(data) for name, data in content.items() if name not in later)
    stored = sum(len(data) for data in content.values())
    gpu = facts["runtime"]["webgpu"]["bytes"]
    return (
        f"{first / 1e6:.1f} MB travel at first use, {gpu / 1e6:.1f} MB more where WebGPU is tried; "
        f"{stored / 1e6:.1f} MB stored"
    )


# Serving it on this machine --------------------------------------------------------------------------------


class PageServer(ThreadingHTTPServer):
    """Serves the files of a page from memory to browsers of this machine; nothing can be sent to it."""

    daemon_threads = True

    def __init__(self, content: Mapping[str, bytes], *, port: int = 0):
        """``port`` 0 takes a free one. Raises UsageError for a port that is taken."""
        self.content = content
        self.digests = {name: _sha256(data) for name, data in content.items()}
        self._connections: set[Any] = set()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot serve at 127.0.0.1:{port} ({error}): choose another port") from error

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that ended."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Stop listening and end what browsers keep open, so that nothing is answered any more."""
        super().server_close()
        for connection in tuple(self._connections):
            with suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "polypseg", ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # A page of somewhere else whose name was turned to this address must not read anything (DNS rebinding).
        if self.headers.get("Host") not in {f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")}:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return
        address = urlsplit(self.path)
        name = address.path.removeprefix("/") or "index.html"
        data = self.server.content.get(name)
        if data is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        tag = f'"{self.server.digests[name]}"'
        known = self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK)
        for header in _HEADERS.items():
            self.send_header(*header)
        pinned = address.query == f"sha256={self.server.digests[name]}"
        self.send_header("Cache-Control", "max-age=31536000, immutable" if pinned else "no-cache")
        self.send_header("ETag", tag)
        if not known:
            self.send_header("Content-Type", _TYPES[Path(name).suffix])
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body and not known:
            self.wfile.write(data)

    def _refuse(self, status: HTTPStatus) -> None:
        body = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what is looked at is nobody's business."""


def serve_page(content: Mapping[str, bytes], *, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C. Raises UsageError for a port that is taken."""
    with PageServer(content, port=port) as server:
        print(f"the page is at {server.address} until Ctrl-C; {page_weight(content)}", flush=True)
        if open_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


# Writing it as a Space -------------------------------------------------------------------------------------


def export_page(content: Mapping[str, bytes], output: Path, *, title: str = "Polyp segmentation") -> Path:
    """Write the page as a static Hugging Face Space, which any other host of files serves as well; return the folder.

    A second export replaces what the first wrote and leaves the rest, so the folder may be a clone of the Space. Raises
    UsageError for a folder that holds something else or a title that a Space would not show.
    """
    if output.exists() and not (output / PAGE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is no page of this command: choose another folder")
    if len(title) > 60:
        raise UsageError(f"the title has {len(title)} characters: a Space shows at most 60")
    files = dict(content) | dict(_space_files(content, title=title))
    with explain_write_errors(output):
        for old in _written_before(output):
            (output / old).unlink(missing_ok=True)
        for name, data in files.items():
            with atomic_path(output / name) as temporary:
                temporary.write_bytes(data)
    return output


def _written_before(output: Path) -> Iterator[str]:
    """Model and runtime files of an earlier export."""
    for folder in ("model", "runtime", "licenses"):
        yield from (path.relative_to(output).as_posix() for path in sorted((output / folder).glob("*")))


def _space_files(content: Mapping[str, bytes], *, title: str) -> Iterator[tuple[str, bytes]]:
    facts = json.loads(content[PAGE])
    header = {
        "title": title,
        "emoji": "🔬",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "static",
        "app_file": "index.html",
        "license": "apache-2.0",
        "pinned": False,
        "short_description": "Polyp segmentation for research; no medical device",
        "custom_headers": {name.lower(): value for name, value in _ISOLATION.items()}
        | {"cross-origin-resource-policy": "cross-origin"},
    }
    scores = "\n".join(
        f"- {score['dataset']}, {score['images']} images: mean Dice {_with_interval(score)}"
        for score in facts["scores"]
    )
    text = f"""# {title}

Outlines polyps in colonoscopy frames **inside the browser**: no picture leaves the machine, and once loaded the page
works without a network.

**For research only. This is not a medical device** and must not be used for diagnosis, screening, treatment or the
management of patients.

Model: {facts["model"]["name"]}, license {facts["model"]["license"]}.
{scores or "How good it is has not been measured."}

The page's code is Apache-2.0; `licenses/` holds the license of onnxruntime-web (MIT), which runs the model. The folder
needs no server of its own: any host of static files over https will do. With the two headers
`Cross-Origin-Opener-Policy: same-origin` and `Cross-Origin-Embedder-Policy: require-corp` the model uses several
threads from the first visit, without them from the second.
"""
    head = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    yield "README.md", f"---\n{head}---\n\n{text}".encode()
    yield ".gitattributes", b"*.gz filter=lfs diff=lfs merge=lfs -text\n"


def _with_interval(score: Mapping[str, Any]) -> str:
    interval = "" if score["low"] is None else f" (95 % interval {score['low']:.3f} to {score['high']:.3f})"
    return f"{score['dice']:.3f}{interval}"
