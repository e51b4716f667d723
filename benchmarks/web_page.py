"""The page of ``polypseg web`` with the shipped model in Chromium: cold first mask, frames per second, bytes.

python benchmarks/web_page.py --pictures runs/web

Needs Chromium, playwright and the built page (`make web`). Cold is a fresh profile, from the address to the mask of the
package's first sample frame; a folder of frames is then segmented by the page that is open. ``--pictures`` keeps what a
person sees, wide and on a phone.
"""

import shutil
import statistics
import tempfile
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

from PIL import Image
from typer import Option

from polypseg.cli.console import run_script
from polypseg.errors import UsageError
from polypseg.files import SAMPLE_FRAMES, read_json
from polypseg.hub.web_page import PageServer, assemble_page
from polypseg.inference.preparation import PREPROCESSOR
from polypseg.provenance.local import STARTER_FOLDER

PATIENCE = 120_000
"""Milliseconds."""


def first_mask(browser: Any, address: str, frame: Path, **options: Any) -> tuple[float, int, Any]:
    """Seconds from the address to the frame's mask in a fresh profile, bytes transferred by then, and the open page."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
    context.set_default_timeout(PATIENCE)
    page, sizes = context.new_page(), dict[str, int]()
    page.on("response", lambda one: sizes.__setitem__(one.url, int(one.headers.get("content-length", 0))))
    began = time.perf_counter()
    page.goto(address)
    page.set_input_files("#files", str(frame))
    page.wait_for_selector("#view:not([aria-busy]) >> visible=true")
    page.wait_for_selector("#save-mask:enabled")
    return time.perf_counter() - began, sum(sizes.values()), page


def frames_per_second(page: Any, count: int, *, side: int | None = None) -> float:
    """Of a folder of the sample frames, in the page that is open, listing included; ``side``: frames of this size."""
    with tempfile.TemporaryDirectory() as name:
        folder, samples = Path(name) / "frames", sorted(SAMPLE_FRAMES.glob("*.jpg"))
        folder.mkdir()
        for number in range(count):
            sample, copy = samples[number % len(samples)], folder / f"{number:03d}.jpg"
            if side is None:
                shutil.copyfile(sample, copy)
            else:
                Image.open(sample).resize((side, side)).save(copy, quality=90)
        began = time.perf_counter()
        page.set_input_files("#folders", str(folder))
        while page.locator("#rows tr").count() < count:
            page.wait_for_timeout(20)
        page.wait_for_selector("#save-table:enabled")
        return count / (time.perf_counter() - began)


def main(
    chromium: Annotated[Path, Option(help="The browser.")] = Path("/usr/bin/chromium"),
    repeats: Annotated[int, Option(min=1, help="Cold starts.")] = 5,
    frames: Annotated[int, Option(min=1, help="Frames of the folder.")] = 30,
    pictures: Annotated[Path | None, Option(help="Folder that receives pictures of the page.")] = None,
) -> None:
    """Measure the page with the shipped model."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UsageError("this needs playwright: run `python -m pip install playwright`") from error
    if not chromium.is_file():
        raise UsageError(f"{chromium} does not exist: name the browser with --chromium")
    content = assemble_page(STARTER_FOLDER)
    print(f"{len(content)} files, {sum(map(len, content.values())) / 1e6:.1f} MB stored")
    server: ThreadingHTTPServer = PageServer(content)
    Thread(target=server.serve_forever, daemon=True).start()
    address, frame = f"http://127.0.0.1:{server.server_port}", SAMPLE_FRAMES / "polypgen_1.jpg"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        seconds = []
        for number in range(repeats):
            took, moved, page = first_mask(browser, address, frame)
            seconds.append(took)
            if number == 0:
                print(f"engine {page.get_attribute('html', 'data-engine')}; {moved / 1e6:.1f} MB to the first mask")
                if pictures is not None:
                    pictures.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=pictures / "wide.png", full_page=True)
                print(f"{frames_per_second(page, frames):.1f} frames per second over a folder of {frames}")
            page.context.close()
        side = read_json(STARTER_FOLDER / PREPROCESSOR)["size"]["height"]
        _, _, page = first_mask(browser, address, frame)
        print(f"{frames_per_second(page, frames, side=side):.1f} with frames of the model's size, {side}x{side}")
        page.context.close()
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"first mask from cold: median {statistics.median(seconds):.1f} s of {repeats} ({spread})")
        if pictures is not None:
            _, _, page = first_mask(browser, address, frame, **driver.devices["Pixel 5"])
            page.screenshot(path=pictures / "phone.png", full_page=True)
            page.context.close()
        browser.close()
    server.shutdown()


if __name__ == "__main__":
    run_script(main)
