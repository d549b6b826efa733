"""The report in headless Chromium: it sorts, filters, answers the mouse, and keeps to itself."""

import os
import shutil

import pytest

from deadbench.analysis.pages.report import write_report

pytestmark = pytest.mark.subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; `apt-get install chromium` for the test of the report in a browser")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        try:
            browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{CHROMIUM} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def report(result_set, read, tmp_path):
    """A page with every plot and table."""
    spectrum = {"lambda_mean": 1.0, "num_parameters": 1000, "hidden_size": 64, "spectrum_floor": 1e-17}
    models = [
        ("deep", "layernorm", 13.5),
        ("shallow", "rmsnorm", 0.1),
        (EVIL, "layernorm", 9.0),
        ("none", "rmsnorm", None),
    ]
    rows = []
    for model, family, depth in models:
        lambda_v = None if depth is None else 10.0**-depth
        common = spectrum | {"family": family, "lambda_v": lambda_v, "depth": depth, "depth_predicted": 13.0}
        rows += [read(model, "random", **common)]
        rows += [read(model, revision=f"step{s}", checkpoint_step=s, **common) for s in (1, 10)]
    rows += [read("broken", status="failed", error="out of memory")]
    taps = [{"block": b, "sigma_min": 0.1, "sigma_median": 1.0, "floor": 1e-7, "state": "preserved"} for b in range(5)]
    location = result_set(
        rows, {i: [10.0 / (k + 1) for k in range(64)] for i in range(12)}, blocks=dict.fromkeys(range(12), taps)
    )
    write_report(location, tmp_path / "report.html")
    return tmp_path / "report.html"


@pytest.fixture(params=["light", "dark"])
def page(browser, report, request):
    """The page as opened, with a record of what it said and asked for."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=request.param)
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.said.append(f"exception: {error}"))
    page.on("dialog", lambda dialog: (page.said.append("dialog"), dialog.dismiss()))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(report.as_uri())
    page.wait_for_function("window.plotsDrawn >= document.querySelectorAll('.plot').length", timeout=60_000)
    yield page
    if folder := os.environ.get("DEADBENCH_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/report-{request.param}.png", full_page=True)
    page.close()


def column(page, name):
    place = page.locator("#board th").evaluate_all(f"heads => heads.findIndex(h => h.dataset.name === '{name}')") + 1
    rows = page.locator(f"#board tbody tr:not([hidden]) td:nth-child({place})")
    return rows.all_text_contents()


def test_the_page_works_and_stays_at_home(page):
    # Sorting: numbers as numbers, missing values last both ways.
    assert column(page, "depth") == ["13.50", "9.00", "0.10", "-", "-"]
    depth = page.locator("#board th[data-name=depth] button")
    depth.click()
    assert column(page, "depth") == ["13.50", "9.00", "0.10", "-", "-"]
    depth.click()
    assert page.locator("#board th[data-name=depth]").get_attribute("aria-sort") == "ascending"
    assert column(page, "depth") == ["0.10", "9.00", "13.50", "-", "-"]
    page.locator("#board th[data-name=model] button").click()
    assert column(page, "model") == [EVIL, "broken", "deep", "none", "shallow"]

    # Filtering, by a family and by words.
    page.locator("select[name=family]").select_option("rmsnorm")
    assert column(page, "model") == ["none", "shallow"]
    page.locator(".filters input").fill("shal")
    assert column(page, "model") == ["shallow"]
    assert "1 of 5" in page.locator(".filters").text_content()

    # Hovering a point of a plot shows its values.
    page.locator(".plot >> nth=2").scroll_into_view_if_needed()
    page.locator(".plot >> nth=2 >> css=.mark-symbol path[aria-roledescription='point'] >> nth=0").hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "family" in page.locator("#vg-tooltip-element").text_content()

    # A click on it leads to the model's row.
    page.locator(".plot >> nth=2 >> css=.mark-symbol path[aria-roledescription='point'] >> nth=0").click(force=True)
    page.wait_for_function("location.hash.startsWith('#row-')")
    assert page.locator("#board tr:target").count() == 1

    assert page.locator("body").evaluate("body => body.ownerDocument.images.length") == 0, "a name made an element"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_it_fits_a_phone_and_paper(browser, report):
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(report.as_uri())
    page.wait_for_function("window.plotsDrawn >= document.querySelectorAll('.plot').length", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # However far the leaderboard is scrolled, one sees whose row it is; and whether a claim holds, without scrolling.
    page.locator("#board").evaluate("table => { table.parentElement.scrollLeft = 500; }")
    left, width = page.locator("#board tbody tr:first-child td.pinned").evaluate(
        "cell => [cell.getBoundingClientRect().left, cell.getBoundingClientRect().width]"
    )
    assert 0 <= left < 40
    assert 40 < width < 180
    holds = page.locator("#claims-table td.yes, #claims-table td.no").first
    assert holds.evaluate("cell => cell.getBoundingClientRect().right") < 360
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("nav").is_hidden()
    assert page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()
