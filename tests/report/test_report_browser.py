"""The report as a reader sees it: in Chromium, without a network."""

from pathlib import Path

import pytest

from receipt_factory import rendered_report

CHROMIUM = Path("/usr/bin/chromium")
TEXTS = ".lead, .scope, td, td small, tbody th a, thead button, caption span, figcaption, .warning, dt, dd"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser):
    """A function that opens the report offline; any request and any message of the console fails the test."""
    contexts, troubles = [], []

    def open_page(*, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        address = rendered_report().as_uri()
        page.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else troubles.append(request.url),
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def column(page, number: int) -> list[str]:
    """The first line of each cell of a column of the main table, from above."""
    cells = page.locator(f"#table-comparison tbody tr > :nth-child({number})").all_inner_texts()
    return [cell.split("\n")[0] for cell in cells]


@pytest.mark.slow
def test_table_sorts_by_mouse_and_by_keyboard_and_says_so(open_report):
    page = open_report()
    first = column(page, 1)
    headings = page.locator("#table-comparison thead tr:last-child th")
    dice, model, rank = headings.nth(5), headings.nth(0), headings.nth(10)
    dice.locator("button").click()
    values = [float(text) for text in column(page, 6)]
    assert values == sorted(values, reverse=True) and dice.get_attribute("aria-sort") == "descending"
    dice.locator("button").click()
    assert [float(text) for text in column(page, 6)] == sorted(values)
    rank.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 11) == ["1", "2", "3"]
    assert (rank.get_attribute("aria-sort"), dice.get_attribute("aria-sort")) == ("ascending", "none")
    model.locator("button").focus()
    page.keyboard.press("Space")
    assert column(page, 1) == sorted(first)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.slow
def test_page_never_scrolls_sideways_but_tables_do(open_report, width):
    page = open_report(width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator(".scroll:has(#table-comparison)")
    inner, outer = box.evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert inner > outer if width == 360 else inner <= outer + 1
    for part in page.locator("details").all():
        part.evaluate("part => { part.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_what_is_wider_than_a_phone_says_so_and_only_that(open_report):
    hints = "box => [box.scrollWidth > box.clientWidth + 1, !box.previousElementSibling.hidden]"
    for width in (360, 1280):
        page = open_report(width=width)
        page.evaluate(
            "document.querySelectorAll('details').forEach(part => { part.open = true; })"
        )  # folded: not laid out
        for _ in range(50):  # the page looks when the browser has laid it out, which a busy machine delays
            page.wait_for_timeout(200)
            found = [box.evaluate(hints) for box in page.locator(".scroll").all()]
            if all(wider == said for wider, said in found):
                break
        assert all(wider == said for wider, said in found)
        assert width > 360 or any(wider for wider, _ in found)
    assert "swipe" in open_report(width=360).locator(".swipe:visible").first.inner_text()


def test_answer_stands_first_and_models_are_folded_until_one_is_asked_for(open_report):
    page = open_report()
    answer = page.locator("#answer p")
    assert answer.count() == 3 and answer.first.bounding_box()["y"] < 400
    models = page.locator("details.model")
    assert models.count() == 3 and not any(model.get_attribute("open") is not None for model in models.all())
    page.locator("#table-comparison tbody th a").first.click()
    opened = [model for model in models.all() if model.get_attribute("open") is not None]
    assert len(opened) == 1 and opened[0].locator("table").is_visible()


CONTRAST = """texts => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.startsWith("rgba(0, 0, 0, 0")) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = (e, color) => {
    const [a, b] = [light(color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const marks = [...document.querySelectorAll("figure text")].map(e => ratio(e, getComputedStyle(e).fill));
  return Math.min(...marks, ...[...document.querySelectorAll(texts)].map(e => ratio(e, getComputedStyle(e).color)));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_figures_keep_their_contrast_in_both_themes(open_report, scheme):
    page = open_report(scheme=scheme)
    dark = "rgb(20, 23, 26)"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert (page.evaluate(ground) == dark) == (scheme == "dark")
    assert page.evaluate(CONTRAST, TEXTS) >= 4.5
    page.locator("#theme").click()
    assert (page.evaluate(ground) == dark) == (scheme == "light")
    assert page.evaluate(CONTRAST, TEXTS) >= 4.5


def test_numbers_lead_to_their_receipts_and_folded_parts_open(open_report):
    page = open_report()
    page.locator("#table-comparison tbody tr:first-child td a").first.click()
    target = page.locator("tr:target")
    assert target.count() == 1 and "kvasir_seg.reference.test.receipt.json" in target.inner_text()
    page.goto(f"{rendered_report().as_uri()}#table-pairs")
    assert page.locator("#table-pairs").is_visible()


def test_pictures_show_the_truth_and_two_models(open_report):
    page = open_report()
    picture = page.locator(".cases svg").first
    assert picture.locator("image").evaluate("image => image.getBBox().width") > 0
    assert {"truth", "first", "second"} <= set(
        picture.locator("path").evaluate_all("paths => paths.map(path => path.getAttribute('class'))")
    )
