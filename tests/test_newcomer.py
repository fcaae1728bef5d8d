"""A newcomer's first hour with nothing but the wheel: install, demo, a reward, a denoiser, PPO, a page of the results.

Sizes are small; `-s` prints the seconds of every step. The requirements are those of this environment, so that nothing
is downloaded.
"""

import json
import os
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import pytest

import noisear_rl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CAPTIONS = ("a photo of two red squares", "a photo of a blue circle left of a yellow square")

REWARD = """
def score(images, prompts):
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
"""

STEPPED = """
import gymnasium as gym
import noisear_rl
assert "site-packages" in noisear_rl.__file__ and "newcomer" in noisear_rl.__file__, noisear_rl.__file__
for name in {ids}:
    env = gym.make(name)
    env.reset(seed=0)
    rewards = [env.step(env.action_space.sample())[1] for _ in range(16)]
    assert not any(rewards[:15]) and rewards[15], (name, rewards)
"""


class Walk:
    """A virtual environment outside of the repository, and a folder to work in."""

    def __init__(self, folder: Path):
        self.bin, self.home = folder / "newcomer/bin", folder / "work"
        self.home.mkdir()

    def __call__(self, step: str, program: str, *arguments: object) -> str:
        """Runs a program of the environment, prints the step's seconds, and returns what the program wrote."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command, began = [str(self.bin / program), *map(str, arguments)], time.time()
        done = subprocess.run(command, cwd=self.home, env=environment, capture_output=True, text=True)
        print(f"{time.time() - began:6.0f} s  {step}", flush=True)
        assert done.returncode == 0, f"{step}: {done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, f"{step}: {done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def walk(built, tmp_path_factory):
    """Installs the wheel; its requirements are found where this Python has them."""
    folder, began = tmp_path_factory.mktemp("hour"), time.time()
    venv.create(folder / "newcomer", with_pip=True)
    (site,) = (folder / "newcomer/lib").glob("python*/site-packages")
    before = {path.name for path in site.iterdir()}
    (wheel,) = built.glob("*.whl")
    walk = Walk(folder)
    walk("pip install (without the requirements)", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    installed = {path.name for path in site.iterdir()} - before
    assert "noisear_rl" in installed and len(installed) == 2, installed  # and its metadata
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    print(f"{time.time() - began:6.0f} s  virtual environment and installation")
    return walk


def rewards_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["charts/episodic_return"] for line in lines if "charts/episodic_return" in line]


def test_first_look(walk):
    """What a newcomer types before anything else."""
    assert walk("noisear --version", "noisear", "--version") == f"noisear-rl {noisear_rl.__version__}\n"
    assert "noisear demo" in walk("noisear doctor", "noisear", "doctor")
    assert "noisear ppo --config shapes/ppo" in walk("noisear configs", "noisear", "configs")
    assert "usage: noisear demo " in walk("noisear demo --help", "noisear", "demo", "--help")
    walk("noisear sample", "noisear", "sample", CAPTIONS[0], "--seeds", 0)
    assert (walk.home / "runs/sample/comparison.png").exists()


def test_every_embedded_environment(walk):
    ids = [name for name, denoiser in noisear_rl.ENVIRONMENTS.items() if denoiser.startswith("shapes")]
    walk("gym.make and an episode of each", "python", "-c", STEPPED.format(ids=ids))


def test_demo(walk):
    size = ("--pairs", 64, "--updates", 2, "--samples", 8, "--held-out-prompts", 12)
    assert "NLL + REINFORCE" in walk("noisear demo, small", "noisear", "demo", *size)
    assert (walk.home / "runs/demo/report.png").exists()


def test_own_reward(walk):
    (walk.home / "redness.py").write_text(REWARD)
    size = ("--updates", 4, "--prompts-per-update", 1, "--samples-per-prompt", 32, "--output-dir", "runs/red")
    options = ("--denoiser", "shapes-turbo", "--reward", "redness.py", "--prompts", CAPTIONS[1])
    walk("own reward: noisear ppo", "noisear", "ppo", *options, *size)
    assert len(rewards_of(walk.home / "runs/red")) == 4


def test_own_denoiser(walk):
    """The example, as a file of one's own in the folder where the command runs; PPO learns on it."""
    (walk.home / "mine.py").write_text((ROOT / "examples/own_denoiser.py").read_text())
    options = ("--denoiser", "mine:OwnDenoiser", "--reward", "brightness", "--prompts", "dark sea", "bright day")
    walk("own denoiser: noisear ppo", "noisear", "ppo", *options, "--updates", 12, "--output-dir", "runs/mine")
    rewards = rewards_of(walk.home / "runs/mine")
    assert rewards[-1] > rewards[0] + 0.02, rewards  # of a range of 1; 256 images know their mean to a few thousandths


def test_ppo_evaluation_and_report(walk):
    (walk.home / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    options = ("--config", "shapes/ppo", "--prompts", "captions.txt", "--updates", 4, "--samples-per-prompt", 32)
    walk("noisear ppo", "noisear", "ppo", *options)
    options = ("--methods", "PPO=runs/ppo", "best-of-2", "--denoiser", "shapes-turbo", "--prompts", "captions.txt")
    walk("noisear evaluate", "noisear", "evaluate", *options, "--samples", 4)
    assert "PPO" in walk("noisear table", "noisear", "table", "runs/evaluate")
    walk("noisear report", "noisear", "report", "runs/evaluate", "runs/ppo", "-o", "report.html")
    page = (walk.home / "report.html").read_text()
    assert "<html" in page and CAPTIONS[0] in page
