"""The wheel and the sdist, as somebody who has only them uses them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import noisear_rl

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77")
IGNORED = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
BUILD = "from setuptools import build_meta; build_meta.build_{}({!r})"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from a copy of the sources, as `python -m build` does."""
    sources, out = tmp_path_factory.mktemp("sources") / "copy", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, sources, symlinks=True, ignore=IGNORED)
    for kind in ("sdist", "wheel"):
        command = [sys.executable, "-c", BUILD.format(kind, str(out))]
        done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def site(built, tmp_path_factory) -> Path:
    """What pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site, folder, *arguments):
    """Python beside the unpacked wheel, in another folder."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sdist_holds_what_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("algos", "benchmarks", "configs", "envs", "tests", "noisear_rl"):
        files = {f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts}
        assert {file.relative_to(ROOT).as_posix() for file in files} <= held
    assert {"Makefile", "constraints.txt", "constraints-lowest.txt", "CHANGELOG.md", "CITATION.cff"} <= held


def test_the_wheel_is_one_package_with_metadata(site):
    (information,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"noisear_rl", information.name}
    metadata = (information / "METADATA").read_text()
    assert "\nAuthor: The noisear-rl developers\n" in metadata and "\nProject-URL: Paper, https://arxiv.org" in metadata
    extras = {"rewards", "serve", "wandb", "examples", "dev"}
    assert set(re.findall(r"^Provides-Extra: (\w+)", metadata, flags=re.M)) == extras
    assert "noisear = noisear_rl.cli:main" in (information / "entry_points.txt").read_text()


def test_the_wheel_works_in_any_folder(site, tmp_path):
    noisear = ("-m", "noisear_rl.cli")
    version = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert run(site, tmp_path, *noisear, "--version") == f"noisear-rl {version[0]}\n"
    assert run(site, tmp_path, *noisear, "config", "show", "sdxl/ppo") == (ROOT / "configs/sdxl/ppo.yaml").read_text()
    prompts = ("--prompts", "a photo of two red squares")
    size = ("--updates", "1", "--prompts-per-update", "1", "--samples-per-prompt", "4", "--output-dir", "run")
    run(site, tmp_path, *noisear, "ppo", "--config", "shapes/ppo", *prompts, *size)
    assert "env_id: NoiseAR-ShapesTurbo-v0" in (tmp_path / "run/config.yaml").read_text()
    ids = [name for name, denoiser in noisear_rl.ENVIRONMENTS.items() if denoiser.startswith("shapes")]
    code = f"""
import gymnasium, noisear_rl
assert noisear_rl.__file__.startswith({str(site)!r})
for name in {ids}:
    env = gymnasium.make(name)
    env.reset(seed=0)
    rewards = [env.step(env.action_space.sample())[1] for _ in range(16)]
    assert not any(rewards[:15]) and rewards[15]
"""
    run(site, tmp_path, "-c", code)
