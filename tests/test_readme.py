"""The README's commands parse, its code runs, its links lead somewhere, and it is short."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from noisear_rl.denoisers import load_denoiser
from tests.conftest import random_policy
from tests.documents import ROOT, arguments_of, blocks, commands, parse

PAGE = ROOT / "README.md"
README = PAGE.read_text()


@pytest.mark.parametrize("line", commands(PAGE))
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse(arguments_of(line), monkeypatch)


def test_unknown_commands_and_options_are_found(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in ("noisear fly", "python algos/fly.py", "python -m noisear_rl.data.fly"):
        with pytest.raises(AssertionError, match="fly"):
            arguments_of(line)
    for line in (
        "noisear ppo --updaets 3",
        "python algos/ppo.py --config configs/none.yaml",
        "noisear table --table 9",
    ):
        with pytest.raises(SystemExit):
            parse(arguments_of(line), monkeypatch)


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy = random_policy()
    policy.save_pretrained(tmp_path)
    code = [block.text for block in blocks(PAGE) if block.language == "python"]
    assert len(code) == 2
    for block in code:
        scope: dict[str, Any] = {}
        exec(block.replace('"runs/mine"', repr(str(tmp_path))), scope)
        assert np.asarray(scope["image"]).shape == (64, 64, 3)

    # A policy sees in a user's pipeline what it sees in ours.
    text = load_denoiser("shapes", dtype="float32").encode([scope["prompt"]])
    expected = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=[0]))
    torch.testing.assert_close(scope["latents"], expected, rtol=1e-4, atol=1e-4)


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make (\S+)`", README)
    assert targets and all(f"\n{target}:" in makefile for target in targets)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)


def test_it_is_short():
    assert len(README.splitlines()) <= 100
