"""The report page in headless Chromium; skipped without Chromium."""

import base64
import re
from pathlib import Path

import pytest

from tests.conftest import requested
from tests.report.test_page import PROMPTS, methods_of, report, write_evaluation, write_training


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    methods = methods_of(write_evaluation(folder / "first", images=False))
    methods["Gaussian"]["scores"]["exact"] = [[0.0] * 4] * 5 + [
        [1.0, 0.0, 0.0, 0.0]
    ]  # so that PPO's gain is significant
    prompts = ["<script>alert(1)</script>" + name for name in PROMPTS]
    run = write_evaluation(folder / "run", prompts=prompts, methods=methods)
    report(run, *(write_training(folder / f"ppo-seed-{seed}", list(range(60))) for seed in (0, 1)))
    return folder / "out/report.html"


@pytest.fixture
def page(browser, page_path):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.get(page_path.as_uri())
    return browser


def js(page, script: str, *arguments):
    return page.execute_script("return " + script, *arguments)


def soon(page, condition: str) -> bool:
    """Whether a condition is met within two seconds: the browser reports a closed dialog with a delay."""
    return page.execute_async_script(
        f"const done = arguments[0]; const end = Date.now() + 2000;"
        f"(function look() {{ if ({condition}) done(true); else if (Date.now() > end) done(false);"
        f" else setTimeout(look, 20); }})();"
    )


def click(page, selector: str, index: int = 0) -> None:
    page.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, index)


def press(page, key: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    ActionChains(page).send_keys(getattr(Keys, key)).perform()


def test_page_opens_without_errors_or_requests(page, page_path):
    page.get_log("browser"), page.get_log("performance")
    page.get(page_path.as_uri())
    assert js(page, "document.images.length") > 20
    assert js(page, "[...document.images].filter((i) => i.id !== 'viewer-image').every((i) => i.naturalWidth > 0)")
    assert page.get_log("browser") == []
    asked = requested(page)
    assert asked and all(address.startswith(("file:", "data:")) for address in asked)


def test_headers_sort_both_ways(page):
    column = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map((row) => row.cells[{}].dataset.value)"
    state = "[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map((cell) => cell.ariaSort)"
    click(page, "table:first-of-type thead button", 1)
    down = [float(value) for value in js(page, column.format(1))]
    assert down == sorted(down, reverse=True) and js(page, state)[1] == "descending"
    click(page, "table:first-of-type thead button", 1)
    up = [float(value) for value in js(page, column.format(1))]
    assert up == down[::-1] and len(set(up)) == 2 and js(page, state)[1] == "ascending"
    click(page, "table:first-of-type thead button", 0)
    assert js(page, column.format(0)) == ["Gaussian", "PPO"] and js(page, state)[:2] == ["ascending", "none"]


def test_sorting_is_numeric_with_missing_values_last(page):
    page.execute_script(
        "const rows = document.querySelectorAll('table')[1].tBodies[0]; const values = ['9', '', '100', '-5'];"
        "rows.append(...[...rows.rows].map((row) => row.cloneNode(true)));"
        "[...rows.rows].forEach((row, i) => { row.cells[1].dataset.value = values[i]; });"
    )
    values = "[...document.querySelectorAll('table')[1].tBodies[0].rows].map((row) => row.cells[1].dataset.value)"
    for expected in (["100", "9", "-5", ""], ["-5", "9", "100", ""]):
        page.execute_script("document.querySelectorAll('table')[1].tHead.rows[0].cells[1].firstElementChild.click()")
        assert js(page, values) == expected


def test_dialog_shows_the_image_and_its_scores(page):
    click(page, ".shot", 5)  # first prompt, second image of PPO, which is from the second training seed
    text = js(page, "document.getElementById('viewer').innerText")
    assert js(page, "document.getElementById('viewer').open")
    assert js(page, "document.getElementById('viewer-prompt').textContent") == "<script>alert(1)</script>first"
    assert "PPO 1" in text and "sample 1, noise seed 101" in text and "✗ wrong" in text and "colors" in text
    scores = "[...document.querySelectorAll('#viewer-scores dd')].map((part) => part.textContent)"
    assert js(page, scores) == ["0", "11"]
    shown = "document.getElementById('viewer-image').src === document.querySelectorAll('.shot img')[arguments[0]].src"
    assert js(page, shown, 5)
    press(page, "ARROW_RIGHT")
    assert js(page, shown, 6) and "PPO 0" in js(page, "document.getElementById('viewer').innerText")
    press(page, "ARROW_DOWN")  # eight images per prompt
    assert js(page, shown, 14) and js(page, "document.getElementById('viewer-prompt').textContent").endswith("second")
    press(page, "ARROW_UP"), press(page, "ARROW_LEFT")
    assert js(page, shown, 5)
    press(page, "ESCAPE")
    assert not js(page, "document.getElementById('viewer').open")
    assert soon(page, "document.activeElement.dataset.id === '5'")
    press(page, "ENTER")  # from the keyboard
    assert js(page, "document.getElementById('viewer').open")


def test_category_filter(page):
    visible = "[...document.querySelectorAll('.case')].filter((c) => c.offsetParent).map((c) => c.dataset.category)"
    assert js(page, visible).count("counting") == js(page, visible).count("colors") == 3
    click(page, '.filter [data-category="counting"]')
    assert js(page, visible) == ["counting"] * 3
    assert js(page, "document.getElementById('shown').textContent") == "3 of 6 prompts shown"
    assert js(page, "document.querySelector('.filter [aria-pressed=true]').dataset.category") == "counting"
    click(page, ".case:not([hidden]) .shot")
    press(page, "ARROW_LEFT")  # wraps around within the shown prompts
    assert "counting" in js(page, "document.getElementById('viewer').innerText")
    press(page, "ESCAPE")
    click(page, '.filter [data-category=""]')
    assert len(js(page, visible)) == 6


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_horizontal_overflow(page, width):
    size = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    inner, content = js(page, "[innerWidth, document.documentElement.scrollWidth]")
    assert content <= inner == width
    assert (
        js(page, "document.querySelector('td abbr').offsetParent.className") == "scroll"
    )  # the mark moves with its table
    if width == 360:  # the table scrolls in its own container
        assert js(page, "document.querySelector('.scroll').scrollWidth > document.querySelector('.scroll').clientWidth")
    click(page, ".shot")
    assert js(page, "document.getElementById('viewer').getBoundingClientRect().right <= innerWidth")


def test_prints(page):
    click(page, ".shot")
    pdf = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = "getComputedStyle(document.querySelector(arguments[0])).display"
    assert js(page, hidden, "#viewer") == js(page, hidden, ".filter") == "none"
    assert js(page, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_dark_scheme_keeps_contrast(page):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colors = js(page, "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])")
    paper, ink = ([int(value) for value in re.findall(r"\d+", color)][:3] for color in colors)
    assert max(paper) < 60 and min(ink) > 200


def test_text_of_strangers_runs_nothing(browser, tmp_path):
    """Neither as the page opens, nor where its script copies text: the dialog, the filter."""
    attack = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    methods = {f"{name} {attack}": method for name, method in methods_of(write_evaluation(tmp_path / "it")).items()}
    prompts = [f"{attack} {name} \"'><svg onload=document.title='owned'>" for name in PROMPTS]
    run = write_evaluation(tmp_path / "run", prompts=prompts, methods=methods)
    report(run)
    browser.get((tmp_path / "out/report.html").as_uri())
    assert js(browser, "document.body.innerText.includes('<script>')")  # it is shown as text
    click(browser, ".shot")
    press(browser, "ARROW_RIGHT")
    assert not soon(browser, "document.title === 'owned'")
    assert js(browser, "document.querySelectorAll('svg[onload], img[onerror]').length") == 0
