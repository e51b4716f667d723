"""The page as a user meets it: in Chromium, against the package's own masks, with and without a network."""

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from marks import first_fast
from polypseg.data.images import decode_frame
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.hub.web_page import BUILT, PageServer, assemble_page, export_page
from polypseg.inference.segmenter import Segmenter
from web_model import model_folder

CHROMIUM = Path("/usr/bin/chromium")
WEB = Path(__file__).resolve().parents[2] / "web"
SCREENSHOTS = os.environ.get("POLYPSEG_SCREENSHOTS")
"""A folder that receives a picture of every state that is looked at, and the times."""
READY = "html[data-engine]"
PATIENCE = 120_000

pytestmark = pytest.mark.skipif(not (BUILT / "build.json").is_file(), reason="the page is not built: run `make web`")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("web") / "model")


@pytest.fixture(scope="module")
def content(model) -> dict[str, bytes]:
    return assemble_page(model)


@pytest.fixture(scope="module")
def frame() -> bytes:
    """A PNG of a synthetic frame, at a size that needs resizing in both directions."""
    pixels, _ = synthesize_frame(CAMERAS["a"], seed=0, index=1)
    return png(Image.fromarray(pixels).resize((413, 331)))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def driver():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(driver):
    browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
    yield browser
    browser.close()


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def opened(browser, address: str, **options):
    """A page of a fresh profile; messages of the console, errors and requests to elsewhere fail the test."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 860}} | options))
    context.set_default_timeout(PATIENCE)
    page, troubles = context.new_page(), []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    context.on(
        "request",
        lambda request: None if request.url.startswith((address, "blob:", "data:")) else troubles.append(request.url),
    )
    page.goto(address)
    try:
        yield page
    finally:
        context.close()
    assert not [words for words in troubles if "ERR_CONNECTION_REFUSED" not in words]


def wait_until_ready(page) -> None:
    page.wait_for_selector(READY, state="attached")


def wait_until_kept(page) -> None:
    page.wait_for_selector("html[data-offline]", state="attached")


def give(page, name: str, data: bytes) -> None:
    page.set_input_files("#files", {"name": name, "mimeType": "application/octet-stream", "buffer": data})


def shown_mask(page) -> np.ndarray:
    """The mask as the page gives it away."""
    page.wait_for_selector("#view:not([aria-busy]) >> visible=true")
    page.wait_for_selector("#save-mask:enabled")
    with page.expect_download() as download:
        page.click("#save-mask")
    assert download.value.suggested_filename.endswith("_mask.png")
    return np.asarray(Image.open(download.value.path())) > 127


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return 2 * (one & two).sum() / (one.sum() + two.sum())


def record(name: str, value: object) -> None:
    """A measurement that nothing asserts: printed, and kept beside the pictures."""
    print(f"{name}: {value}")
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        (Path(SCREENSHOTS) / f"{name.replace(' ', '_')}.txt").write_text(f"{value}\n")


def keep_picture(page, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def test_mask_is_pythons_and_every_control_works(browser, content, model, frame):
    segmenter = Segmenter.from_pretrained(model)
    image = decode_frame(frame, name="frame.png")
    (expected,) = segmenter.predict([image])
    assert 0.01 < expected.share < 0.9
    with running(PageServer(content)) as address:
        began = time.perf_counter()
        with opened(browser, address) as page:
            keep_picture(page, "wide-loading")
            give(page, "frame one.png", frame)  # before the model is there: the page keeps it
            mask = shown_mask(page)
            record("seconds to the first mask", round(time.perf_counter() - began, 2))
            assert mask.shape == expected.mask.shape and dice(mask, expected.mask) >= 0.99
            assert page.evaluate("crossOriginIsolated")
            assert re.fullmatch(r"wasm [2-4]", page.get_attribute("html", "data-engine"))
            assert "not a medical device" in page.inner_text(".notice").lower()
            assert re.search("mean Dice|has not been measured", page.inner_text("#quality"))
            assert page.inner_text("#fraction") == f"{100 * mask.mean():.1f} %"
            assert page.inner_text("#area") == f"{mask.sum():,} px"
            assert page.inner_text("#lesions") == str(len(expected.lesions))
            assert page.inner_text("#highest") == f"{expected.probability.max():.2f}"
            assert "Polyp area" in page.get_attribute("#overlay", "aria-label")
            keep_picture(page, "wide-outline")

            page.focus("#threshold")
            for _ in range(5):
                page.keyboard.press("+")
            assert page.inner_text("#threshold-value") == "0.75"
            (strict,) = segmenter.predict([image], threshold=0.75)
            assert strict.area < expected.area
            assert dice(shown_mask(page), strict.mask) >= 0.99
            page.click("#reset")
            assert page.inner_text("#threshold-value") == "0.50"

            for key, visible in (("2", ["mask"]), ("3", ["frame", "overlay"]), ("1", ["overlay"])):
                page.keyboard.press(key)
                shown = [name for name in ("frame", "overlay", "mask") if page.is_visible(f"#{name}")]
                assert shown == visible, key
            with page.expect_download() as download:
                page.keyboard.press("d")
            assert download.value.suggested_filename == "frame one_overlay.png"
            overlay = Image.open(download.value.path()).convert("RGB")
            assert overlay.width == image.width and overlay.height > image.height  # the words stand below
            outside = ~expected.mask
            drawn = np.asarray(overlay)[: image.height][outside] != np.asarray(image)[outside]
            assert drawn.any(axis=1).mean() < 0.5
            page.keyboard.press("?")
            assert page.is_visible("#keys")
            page.keyboard.press("Escape")


def test_page_works_after_its_server_stopped(browser, content, frame):
    server = PageServer(content)
    with running(server) as address, opened(browser, address) as page:
        wait_until_kept(page)
        give(page, "frame.png", frame)
        before = shown_mask(page)
        server.shutdown()
        server.server_close()
        page.reload()
        wait_until_ready(page)
        assert page.evaluate("crossOriginIsolated")
        give(page, "frame.png", frame)
        np.testing.assert_array_equal(shown_mask(page), before)


@pytest.mark.slow
def test_another_model_at_the_same_address_replaces_the_kept_one(browser, content, model):
    other = assemble_page(model, threshold=0.3)
    server = PageServer(content)
    port = server.server_port
    with running(server) as address, opened(browser, address) as page:
        wait_until_kept(page)
        server.shutdown()
        server.server_close()
        with running(PageServer(other, port=port)):
            page.reload()
            wait_until_ready(page)
            assert page.inner_text("#threshold-value") == "0.30"


@pytest.mark.slow
def test_plain_host_without_headers_runs_on_one_thread_and_on_more_later(browser, content, frame, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    space = export_page(content, tmp_path / "space")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(space)))
    with running(server) as address, opened(browser, address) as page:
        give(page, "frame.png", frame)
        before = shown_mask(page)
        assert not page.evaluate("crossOriginIsolated") and page.get_attribute("html", "data-engine") == "wasm 1"
        wait_until_kept(page)
        page.reload()
        wait_until_ready(page)
        assert page.evaluate("crossOriginIsolated")
        assert re.fullmatch(r"wasm [2-4]", page.get_attribute("html", "data-engine"))
        give(page, "frame.png", frame)
        assert dice(shown_mask(page), before) > 0.999


def test_folder_is_listed_and_refused_files_say_why(browser, content, model, frame, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "a.png").write_bytes(frame)
    image = Image.open(io.BytesIO(frame))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "b turned.jpg", quality=95, exif=exif)
    Image.new("I;16", (20, 20)).save(folder / "c deep.png")
    Image.new("RGBA", (20, 20), (200, 10, 10, 128)).save(folder / "d clear.png")
    image.convert("CMYK").save(folder / "e print.jpg")
    image.save(folder / "f frame.tif")
    image.convert("RGBA").save(folder / "g opaque.png")
    (folder / "h notes.png").write_text("no picture")
    (folder / "readme.txt").write_text("left out")
    reasons = {"c": "16 bits", "d": "transparent", "e": "CMYK", "f": "TIFF", "h": "no picture"}
    with running(PageServer(content)) as address, opened(browser, address) as page:
        page.set_input_files("#folders", folder)
        page.wait_for_selector("#save-table:enabled")
        assert page.inner_text("#list-title") == "8 pictures, 5 refused"
        rows = {row.split("/")[-1][0]: row for row in page.locator("#rows tr").all_inner_texts()}
        assert set(rows) == set("abcdefgh")
        assert all(words in rows[letter] for letter, words in reasons.items())
        assert re.sub(r"^\S+", "", rows["g"].replace("g opaque", "x")) == re.sub(
            r"^\S+", "", rows["a"].replace("a.png", "x.png")
        )
        page.keyboard.press("3")
        keep_picture(page, "wide-folder")
        page.locator("#rows button", has_text="b turned").click()
        page.wait_for_selector("#notes li")
        assert "rotation" in page.inner_text("#notes")
        (expected,) = Segmenter.from_pretrained(model).predict(
            [decode_frame((folder / "b turned.jpg").read_bytes(), name="b")]
        )
        assert dice(shown_mask(page), expected.mask) >= 0.99
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#error >> visible=true")
        assert "16 bits" in page.inner_text("#error") and page.is_disabled("#save-mask")
        keep_picture(page, "wide-refused")
        page.keyboard.press("+")
        with page.expect_download() as download:
            page.click("#save-table")
        lines = Path(download.value.path()).read_text().splitlines()
        assert len(lines) == 9 and lines[0].startswith("name,width,height,threshold,polyp_pixels")
        assert lines[1].split(",")[3] == "0.55"


@pytest.mark.slow
def test_camera_is_segmented_frozen_and_stopped(driver, content, frame, tmp_path):
    image = Image.open(io.BytesIO(frame)).resize((320, 240))
    clip = tmp_path / "clip.mjpeg"
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    clip.write_bytes(buffer.getvalue() * 10)
    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags += ["--no-sandbox", f"--use-file-for-fake-video-capture={clip}"]
    browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
    try:
        with running(PageServer(content)) as address, opened(browser, address) as page:
            wait_until_ready(page)
            page.click("#camera")
            limit = time.monotonic() + PATIENCE / 1000
            while int(page.get_attribute("html", "data-camera-frames") or 0) < 8:  # one number may go unseen
                assert time.monotonic() < limit
                page.wait_for_timeout(50)
            record("camera", page.inner_text("#time"))
            assert "frames/s" in page.inner_text("#time")
            page.click("#freeze")
            mask = shown_mask(page)
            assert mask.shape[1] / mask.shape[0] == pytest.approx(4 / 3, abs=0.02)
            keep_picture(page, "wide-camera")
            page.click("#camera")
            assert page.get_attribute("#camera", "aria-pressed") == "false"
    finally:
        browser.close()


def test_camera_that_is_not_there_is_explained(browser, content):
    with running(PageServer(content)) as address, opened(browser, address) as page:
        page.click("#camera")
        page.wait_for_selector("#error >> visible=true")
        assert re.search("camera", page.inner_text("#error").lower())


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (color) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...rgba(color)].map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (rgba(color)[3] === 255) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = [21, ""];
  const texts = "p, dt, dd, h1, h2, button:enabled, .views span, .scale span, th, td, li, label, output, figcaption";
  for (const e of document.querySelectorAll(texts)) {
    if (!e.offsetParent || !e.textContent.trim()) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
  }
  return worst;
}"""


@pytest.mark.parametrize("case", first_fast([(375, "light"), (375, "dark"), (1280, "dark")]), ids=str)
def test_page_fits_and_stays_legible(browser, content, frame, case):
    width, scheme = case
    view = {"viewport": {"width": width, "height": 780}, "color_scheme": scheme}
    with running(PageServer(content)) as address, opened(browser, address, **view) as page:
        keep_picture(page, f"{width}-{scheme}-empty")
        give(page, "a long name of a frame that must be broken somewhere_0123456789_0123456789.png", frame)
        shown_mask(page)
        for key in "123":
            page.keyboard.press(key)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, where
        keep_picture(page, f"{width}-{scheme}-both")
        page.click("#theme")
        ratio, where = page.evaluate(CONTRAST)
        assert ratio >= 4.5, where
        nameless = "e => e.offsetParent && !(e.textContent.trim() || e.labels?.length || e.ariaLabel)"
        controls = "button, input, select, canvas"
        assert page.eval_on_selector_all(controls, f"all => all.filter({nameless}).length") == 0


@pytest.mark.slow
@pytest.mark.skipif("POLYPSEG_LONG" not in os.environ, reason="slow in software: `make test-long` runs it")
def test_webgpu_gives_the_same_mask_where_there_is_an_adapter(driver, content, model, frame):
    flags = ["--no-sandbox", "--enable-unsafe-webgpu", "--ignore-gpu-blocklist", "--enable-gpu"]
    flags += ["--enable-features=Vulkan", "--use-vulkan=swiftshader", "--use-webgpu-adapter=swiftshader"]
    browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=flags)
    try:
        with running(PageServer(content)) as address:
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"{address}/?engine=webgpu")
            if not page.evaluate("navigator.gpu?.requestAdapter().then(Boolean) ?? false"):
                pytest.skip("this Chromium has no WebGPU adapter")
            page.wait_for_selector(READY, state="attached", timeout=PATIENCE)
            assert page.get_attribute("html", "data-engine") == "webgpu 1"
            give(page, "frame.png", frame)
            page.wait_for_selector("#save-mask:enabled", timeout=PATIENCE)
            (expected,) = Segmenter.from_pretrained(model).predict([decode_frame(frame, name="frame.png")])
            assert dice(shown_mask(page), expected.mask) >= 0.99
            context.close()
    finally:
        browser.close()


# -- the build ----------------------------------------------------------------------------------------------


def test_bundles_name_no_other_host_and_runtime_is_the_packages():
    build = json.loads((BUILT / "build.json").read_text())
    for name in build["files"]:
        if name.endswith((".js", ".mjs", ".html", ".css", ".webmanifest")):
            hosts = set(re.findall(r"https?://([\w.-]+)", (BUILT / name).read_text(encoding="utf-8")))
            assert hosts <= {"web.dev"}, name  # where onnxruntime-web's warning points to
    lock = json.loads((WEB / "package-lock.json").read_text())["packages"]["node_modules/onnxruntime-web"]
    assert build["onnxruntime_web"] == lock["version"]
    assert set(build["files"]) | {"build.json"} == {
        path.relative_to(BUILT).as_posix() for path in BUILT.rglob("*") if path.is_file()
    }
    for name, row in build["files"].items():
        assert hashlib.sha256((BUILT / name).read_bytes()).hexdigest() == row["sha256"], name
    package = WEB / "node_modules" / "onnxruntime-web" / "dist"
    if shutil.which("node") and package.is_dir():
        for row in build["vendored"].values():
            assert hashlib.sha256((package / row["file"]).read_bytes()).hexdigest() == row["sha256"]
