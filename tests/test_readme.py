"""The README's commands exist, its code runs, and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from noisear_rl.algos.collect import CollectConfig
from noisear_rl.algos.dpo import DPOConfig
from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.config import parse_config
from noisear_rl.data.pairs import PairsConfig
from noisear_rl.data.shared_noise import SharedNoiseConfig
from noisear_rl.denoisers import load_denoiser
from tests.conftest import random_policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = {
    "noisear pairs": PairsConfig,
    "noisear_rl.shared_noise": SharedNoiseConfig,
    "algos/nll.py": NLLConfig,
    "algos/reinforce.py": ReinforceConfig,
    "algos/ppo.py": PPOConfig,
    "algos/collect.py": CollectConfig,
    "algos/dpo.py": DPOConfig,
    "algos/evaluate.py": EvaluateConfig,
}


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy = random_policy()
    policy.save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        scope = {}
        exec(block.replace('"runs/transfer"', repr(str(tmp_path))), scope)
        assert np.asarray(scope["image"]).shape == (64, 64, 3)

    # A policy sees in a user's pipeline what it sees in ours.
    text = load_denoiser("shapes", dtype="float32").encode([scope["prompt"]])
    expected = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=[0]))
    torch.testing.assert_close(scope["latents"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("line", re.findall(r"^python (.*?)(?:\s{2,}#.*)?$", README, flags=re.M))
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(line) if word != "-m"]
    assert parse_config(CONFIGS[words[0]], words[1:], None)


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
