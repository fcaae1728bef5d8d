"""``noisear app``: its page in headless Chromium, and the function behind its button."""

import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from noisear_rl import app, cli
from noisear_rl.app import EXAMPLE, AppConfig, draw_pair, make_draw
from noisear_rl.images import noise_to_uint8, to_uint8
from noisear_rl.policy.loading import best_shipped, load_policy
from noisear_rl.rewards import load_reward
from noisear_rl.samplers import as_sampler
from tests.conftest import random_policy, requested

ROOT = Path(__file__).parents[1]
FLOAT32 = {"dtype": "float32"}
SECONDS = 600.0  # for the page to answer on a busy machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def draw():
    return make_draw(AppConfig(denoiser_options=FLOAT32))


def images_of(html: str, what: str) -> dict[str, np.ndarray]:
    """Pixels of the images or noises of a table, by the rest of their alternative text."""
    pattern = rf'<img src="data:image/png;base64,([^"]+)"[^>]*alt="{what} from ([^"]+)">'
    opened = {alt: Image.open(io.BytesIO(base64.b64decode(data))) for data, alt in re.findall(pattern, html)}
    return {alt: np.asarray(image) for alt, image in opened.items()}


def test_both_methods_on_the_same_seeds(draw, turbo):
    """Images, noises and scores of the page are those of the samplers and the judges."""
    html, name = draw(EXAMPLE, "shapes-turbo", best_shipped(), 3, 2), best_shipped()
    reward, seeds = load_reward(app.JUDGES), [3, 4]
    images, noises = images_of(html, "Image"), images_of(html, "Noise")
    assert len(images) == len(noises) == 4
    scores = []
    for method, policy in {"Gaussian": None, name: load_policy(name)}.items():
        expected = as_sampler(turbo, policy)([EXAMPLE] * 2, seeds)
        for row, seed in enumerate(seeds):
            shown = images[f"{method}, seed {seed}"].astype(int)
            assert np.abs(shown - to_uint8(expected.images[row])).max() <= 1
            pixels = noise_to_uint8(expected.noise[row], turbo.image_size).astype(int)
            assert np.abs(noises[f"{method}, seed {seed}"] - pixels).max() <= 1
        scores.append(reward.components(expected.images, [EXAMPLE] * 2))
    rows = [[f"{scores[m][scorer][row]:.3f}" for m in (0, 1) for scorer in app.JUDGES] for row in (0, 1)]
    assert re.findall(r"<dd>([^<]+)</dd>", html) == [value for row in rows for value in row]
    means = " → ".join(f"{method['shapes-match'].mean():.3f}" for method in scores)
    assert f"shapes-match {means} on average over 2" in html and "1 network evaluation per image" in html


def test_the_same_seeds_draw_the_same_images(draw):
    once = draw(EXAMPLE, "shapes-turbo", best_shipped(), 5, 2)
    other = draw(EXAMPLE, "shapes-turbo", best_shipped(), 6, 2)
    again = draw(EXAMPLE, "shapes-turbo", best_shipped(), 5, 2)
    pixels = [images_of(html, "Image") for html in (once, other, again)]
    assert all(np.array_equal(image, pixels[2][alt]) for alt, image in pixels[0].items())
    shared = f"{best_shipped()}, seed 6"  # in another batch
    assert np.abs(pixels[0][shared].astype(int) - pixels[1][shared]).max() <= 1
    assert not np.array_equal(pixels[0]["Gaussian, seed 5"], pixels[0]["Gaussian, seed 6"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("a photo of a dog", "shapes-turbo", "shapes/ppo", 0, 1), "is not a caption of the shapes world; the nearest"),
        ((" ", "shapes-turbo", "shapes/ppo", 0, 1), "type a prompt"),
        ((EXAMPLE, "shape-turbo", "shapes/ppo", 0, 1), "did you mean &#39;shapes-turbo&#39;"),
        ((EXAMPLE, "shapes-turbo", "shapes/pop", 0, 1), "shapes/pop: no such folder"),
        ((EXAMPLE, "shapes-turbo", "shapes/ppo", -1, 1), "the first seed must be"),
        ((EXAMPLE, "shapes-turbo", "shapes/ppo", None, 1), "the first seed must be"),
        ((EXAMPLE, "json:loads", "shapes/ppo", 0, 1), "names code to run"),
        (("<img src=x onerror=alert(1)>", "shapes-turbo", "gaussian", 0, 1), "&lt;img src=x"),
    ],
)
def test_errors_are_part_of_the_page(draw, asked, message):
    html = draw(*asked)
    assert html.startswith('<p class="error" role="alert">') and message in html and "<img" not in html


def test_policies_of_the_page(draw, tmp_path):
    random_policy(text_dim=64).save_pretrained(tmp_path / "other")
    assert "its text_dim is 64" in draw(EXAMPLE, "shapes-turbo", str(tmp_path / "other"), 0, 1)
    random_policy().save_pretrained(tmp_path / "mine")
    html = draw(EXAMPLE, "shapes-turbo", str(tmp_path / "mine"), 0, 1)
    assert list(images_of(html, "Image")) == ["Gaussian, seed 0", f"{tmp_path / 'mine'}, seed 0"]
    assert list(images_of(draw(EXAMPLE, "shapes-turbo", "gaussian", 7, 1), "Image")) == ["Gaussian, seed 7"]


def test_other_machines_choose_among_what_is_offered():
    draw = make_draw(AppConfig(host="0.0.0.0", policy="gaussian", denoiser_options=FLOAT32))
    assert "is not offered here" in draw(EXAMPLE, "/", "gaussian", 0, 1)
    assert "is not offered here" in draw(EXAMPLE, "shapes-turbo", "owner/policy", 0, 1)
    assert "Gaussian, seed 0" in draw(EXAMPLE, "shapes-turbo", "gaussian", 0, 1)


def test_large_images_are_scaled_down():
    shown = app.shown(np.zeros((1024, 768, 3), np.uint8))
    assert (shown.width, shown.height) == (384, 512) and shown.uri.startswith("data:image/webp")


def test_denoisers_without_a_default_reward(random_denoiser):
    drawn = draw_pair(random_denoiser, {"Gaussian": None, "mine": random_policy()}, None, "a red square", [0])
    assert [method.scores for method in drawn] == [{}, {}] and drawn[1].kl > 0
    assert not torch.equal(drawn[0].images, drawn[1].images)


def test_wrong_options_end_before_the_page_opens(tmp_path, monkeypatch, capsys):
    random_policy(text_dim=64).save_pretrained(tmp_path)
    for options, message in (
        (["--policy", str(tmp_path)], "its text_dim is 64"),
        (["--port", "70000"], "port must be at most 65535"),
        (["--images", "17"], "images must be at most 16"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["app", *options])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not there
    with pytest.raises(SystemExit, match=r"pip install 'noisear-rl\[app\]'"):
        cli.main(["app"])


@pytest.fixture(scope="module")
def page(browser):
    """The page of a command that runs, opened once; its browser's logs are not read yet."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'noisear-rl[app]'")
    port = free_port()
    options = ["--images", "2", "--port", str(port), "--denoiser-options", "dtype", "float32"]
    command = [sys.executable, "-m", "noisear_rl.cli", "app", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = next((line.split()[-1] for line in server.stdout if line.startswith("the page is at ")), None)
            assert address == f"http://127.0.0.1:{port}/"
            browser.get_log("browser"), browser.get_log("performance")
            browser.get(address)
            wait_for(browser, "document.querySelector('#draw') && document.querySelector('#prompt textarea')")
            yield browser
            browser.get("about:blank")
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)  # what it says at the end, too
    assert server.returncode == 0


def wait_for(page, condition: str) -> None:
    end = time.monotonic() + SECONDS
    while not page.execute_script(f"return Boolean({condition})"):
        assert time.monotonic() < end, f"{condition[:200]}: not within {SECONDS:g} s"
        time.sleep(0.1)


CONTENT = (
    "[...document.querySelectorAll('#result img, #result .error')].map((part) => part.src ?? part.innerText).join()"
)


def click_draw(page, button: str = "#draw") -> None:
    """Clicks, and waits until the page shows something else."""
    before = page.execute_script(f"return {CONTENT}")
    page.execute_script("document.querySelector(arguments[0]).click()", button)
    wait_for(page, f"{CONTENT} && {CONTENT} !== {json.dumps(before)}")


def sources(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('#result img')].map((image) => image.src)")


def type_prompt(page, text: str) -> None:
    from selenium.webdriver import Keys

    field = page.find_element("css selector", "#prompt textarea")
    field.send_keys(Keys.CONTROL + "a")
    field.send_keys(text)  # a call of its own, which releases the key


def test_page_draws_pairs_and_asks_no_other_machine(page):
    click_draw(page)
    wait_for(page, "[...document.querySelectorAll('#result img')].every((image) => image.naturalWidth === 64)")
    assert len(sources(page)) == 8  # two seeds, two methods, image and noise
    heads = page.execute_script("return [...document.querySelectorAll('#result th')].map((head) => head.textContent)")
    assert heads == ["Seed", "Gaussian", best_shipped(), "0", "1"]
    drawn = sources(page)
    click_draw(page, "#next")
    assert not set(drawn) & set(sources(page))
    assert page.execute_script("return document.querySelector('#result tbody th').textContent") == "2"

    type_prompt(page, "a photo of a dog")
    click_draw(page)
    alert = page.execute_script("return document.querySelector('#result [role=alert]').textContent")
    assert "'a photo of a dog' is not a caption of the shapes world; the nearest one is" in alert and not sources(page)
    type_prompt(page, "a photo of two red squares")
    click_draw(page)
    assert page.execute_script("return document.querySelector('#result caption').textContent") == (
        "a photo of two red squares"
    )

    assert page.get_log("browser") == []
    asked = requested(page)
    assert asked and all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in asked)
