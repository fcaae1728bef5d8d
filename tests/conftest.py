"""Fixtures that several test files share."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Tests are the same on machines with an accelerator; `make test-accelerator` uses it.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.shapes import architecture
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy


@pytest.fixture(scope="session")
def shapes():
    """The embedded denoiser in float32, where equality can be exact."""
    return load_denoiser("shapes", dtype="float32")


@pytest.fixture(scope="session")
def turbo():
    """The embedded one-step denoiser in float32."""
    return load_denoiser("shapes-turbo", dtype="float32")


def random_policy(seed: int = 0, scale: float = 0.08, **options) -> NoiseARPolicy:
    """A policy far from N(0, I): every weight matrix is random."""
    torch.manual_seed(seed)
    policy = NoiseARPolicy(NoiseARConfig(**options)).eval()
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=scale)
    return policy


@pytest.fixture(scope="session")
def random_pipeline() -> StableDiffusionXLPipeline:
    """A small SDXL pipeline with random weights."""
    torch.manual_seed(0)
    first, second = architecture.build_text_encoders(architecture.build_clip())
    tokenizer = architecture.build_tokenizer()
    return StableDiffusionXLPipeline(
        vae=architecture.build_vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=architecture.build_unet(),
        scheduler=DDIMScheduler(**architecture.SCHEDULE),
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def random_denoiser(random_pipeline) -> DiffusionPipelineDenoiser:
    return DiffusionPipelineDenoiser(
        random_pipeline, name="random", patch_size=2, num_inference_steps=2, guidance_scale=3.0, dtype="float32"
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, which logs its console and its requests; without Chromium its tests are skipped."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium with chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    flags = ["headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update"]
    flags += ["disable-background-networking", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def requested(browser) -> list[str]:
    """Addresses that pages have asked for since this log was read last; not the parts of Chromium's own first tab."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [address for address in asked if not address.startswith("chrome:")]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel, built from a copy of the sources, as ``python -m build`` does."""
    pytest.importorskip("setuptools", minversion="77")
    sources, out = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "runs", "site", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(Path(__file__).parents[1], sources, symlinks=True, ignore=ignored)
    for kind in ("sdist", "wheel"):
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return out
