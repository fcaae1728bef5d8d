"""Writes ``docs/images/app.png``, an image of the page of ``noisear app``: ``python benchmarks/app_screenshot.py``.

Needs Chromium with ChromeDriver, selenium and Gradio; a minute on two CPU cores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from noisear_rl.app import AppConfig, launch

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "app.png"
PORT, WIDTH, HEIGHT, SECONDS = 7869, 1100, 1250, 300.0


def main() -> None:
    """Opens the page, draws, and writes the image."""
    page, address = launch(AppConfig(images=4, port=PORT))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", f"window-size={WIDTH},{HEIGHT}", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        chrome.get(address)
        wait = WebDriverWait(chrome, SECONDS)
        wait.until(lambda chrome: chrome.execute_script("return Boolean(document.querySelector('#draw'))"))
        chrome.execute_script("document.querySelector('#draw').click()")
        loaded = (
            "const shown = [...document.querySelectorAll('#result img')];"
            "return shown.length > 0 && shown.every((image) => image.naturalWidth > 0)"
        )
        wait.until(lambda chrome: chrome.execute_script(loaded))
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        chrome.save_screenshot(str(OUTPUT))
    finally:
        chrome.quit()
        page.close()
    print(OUTPUT)


if __name__ == "__main__":
    main()
