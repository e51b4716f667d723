"""The browser app under many requests: its memory reaches a plateau."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from test_space import save_native_dpt
from trial import Kind, forked, last_words

from polypseg.hub.space import SpaceModel, export_space

SHAPE = (576, 720, 3)
LARGEST_GROWTH = 5.0
"""MB by which the second half of the requests may grow the process."""


def resident() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 1e6


def load_app(path: Path) -> Any:
    """The module of an exported app, which gradio looks up by its name."""
    spec = importlib.util.spec_from_file_location("exported_space", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def many_requests(folder: Path, found: Path, *, requests: int) -> None:
    """Ask an app of its own for so many different frames over HTTP and note the memory after each."""
    warnings.simplefilter("ignore")
    os.environ["GRADIO_TEMP_DIR"], os.environ["GRADIO_ANALYTICS_ENABLED"] = str(folder / "uploads"), "False"
    from gradio_client import Client, handle_file

    model = save_native_dpt(folder / "model", seed=0)
    shown = SpaceModel(id=str(model), title="tiny", licence="Apache-2.0", note="random weights")
    space = load_app(export_space(folder / "space", models=[shown]) / "app.py")
    space.demo.launch(quiet=True, prevent_thread_lock=True, server_name="127.0.0.1", max_file_size=space.LARGEST_UPLOAD)
    client = Client(space.demo.local_url, verbose=False, download_files=False)
    rng = np.random.default_rng(0)
    memory = []
    for number in range(requests):
        path = folder / f"{number % 2}.png"
        Image.fromarray(rng.integers(0, 256, SHAPE, dtype=np.uint8)).save(path, compress_level=1)
        client.predict(handle_file(str(path)), "tiny", 0.5, api_name="/show_one")
        memory.append(resident())
    found.write_text(" ".join(f"{value:.1f}" for value in memory))


def app_memory(kind: Kind, folder: Path, *, requests: int) -> None:
    """Half of the requests warm the app up; each quarter of the rest is a try that must not grow it."""
    folder.mkdir()
    code = forked(lambda: many_requests(folder, folder / "found", requests=requests), folder / "log")
    if code:
        kind.count(f"exit code {code}: {last_words(folder / 'log')}")
        return
    memory = [float(value) for value in (folder / "found").read_text().split()]
    half = requests // 2
    settled = np.median(memory[half - half // 4 : half])
    for part in np.array_split(np.array(memory[half:]), 4):
        grown = float(np.median(part) - settled)
        kind.count(None if grown <= LARGEST_GROWTH else f"{grown:.1f} MB more than after {half} requests")
    kind.means += f"; {settled:.0f} MB after {half} requests, {memory[-1]:.0f} MB after {requests}"


def kinds(folder: Path, *, scale: float) -> Iterator[tuple[Kind, Callable[[Kind], None]]]:
    """Every kind of this file and what tries it; ``scale`` 1 is the whole campaign."""
    yield (
        Kind("memory of the app", f"requests of frames of {SHAPE[1]} x {SHAPE[0]} over HTTP, each another"),
        lambda kind: app_memory(kind, folder / "app", requests=max(40, round(200 * scale))),
    )
