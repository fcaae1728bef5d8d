"""The wheel and the sdist, as somebody who has only them uses them."""

import itertools
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import noisear_rl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
    for folder in ("algos", "benchmarks", "configs", "docs", "envs", "examples", "tests", "noisear_rl"):
        files = {f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts}
        assert {file.relative_to(ROOT).as_posix() for file in files} <= held
    assert {"Makefile", "mkdocs.yml", "constraints.txt", "constraints-lowest.txt"} <= held
    assert {"CHANGELOG.md", "CITATION.cff"} <= held


def test_the_wheel_is_one_package_with_metadata(site):
    (information,) = site.glob("*.dist-info")
    assert {path.name for path in site.iterdir()} == {"noisear_rl", information.name}
    metadata = (information / "METADATA").read_text()
    assert "\nAuthor: The noisear-rl developers\n" in metadata and "\nProject-URL: Paper, https://arxiv.org" in metadata
    assert set(re.findall(r"^Provides-Extra: (\w+)", metadata, flags=re.M)) == set(PROJECT["optional-dependencies"])
    assert "noisear = noisear_rl.cli:main" in (information / "entry_points.txt").read_text()


def test_the_wheel_works_in_any_folder(site, tmp_path):
    noisear = ("-m", "noisear_rl.cli")
    assert run(site, tmp_path, *noisear, "--version") == f"noisear-rl {PROJECT['version']}\n"
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


def pins(file: str) -> dict[str, Version]:
    """Version by package of a file of constraints."""
    lines = [Requirement(line) for line in (ROOT / file).read_text().splitlines() if line and line[0] != "#"]
    assert all(len(line.specifier) == 1 and str(line.specifier).startswith("==") for line in lines)
    return {canonicalize_name(line.name): Version(str(line.specifier)[2:]) for line in lines}


def test_constraints_name_every_requirement_with_a_bound():
    """The lowest versions are the bounds themselves (their first release), the tested ones fit."""
    lines = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    bounds: dict[str, Version] = {}
    for requirement in map(Requirement, lines):
        name, bound = canonicalize_name(requirement.name), str(requirement.specifier).removeprefix(">=")
        if bound:
            assert bounds.setdefault(name, Version(bound)) == Version(bound), f"{name} has two bounds"
    lowest, tested = pins("constraints-lowest.txt"), pins("constraints.txt")
    behind = {"griffelib", "mkdocstrings", "pymdown-extensions", "jax", "scipy"}  # what mkdocstrings and Minari need
    assert set(lowest) == set(tested) - behind == set(bounds)
    assert all(tested[name] >= bound for name, bound in bounds.items())
    untested = {"torch"}  # see pyproject.toml
    for name in set(bounds) - untested:
        assert lowest[name].release[: len(bounds[name].release)] == bounds[name].release, name
    assert all(lowest[name] >= bounds[name] for name in untested)
