"""The README's commands parse and run, its code runs, and its links lead somewhere."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import noisear_rl
from noisear_rl import cli
from noisear_rl.denoisers import EMBEDDED, load_denoiser
from tests.conftest import random_policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)  # language, text
LINES = [
    line.removeprefix("$ ").strip()
    for language, text in BLOCKS
    if language != "python"
    for line in text.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if re.match(r"(noisear|python)\s", line)]
# Options that make a command fast; they follow the README's own and override them.
TINY = {
    "sample": "--seeds 0",
    "pairs": "--pairs 16 --rounds 1 --batch-size 16 --num-inference-steps 2",
    "shared-noise": "--noises 2 --prompts 'a photo of a red circle' 'a photo of two squares'",
    "nll": "--epochs 1 --batch-size 8",
    "reinforce": "--updates 1 --prompts-per-update 1 --samples-per-prompt 4",
    "ppo": "--updates 1 --prompts-per-update 2 --samples-per-prompt 4",
    "trajectory-balance": "--updates 1 --prompts-per-update 2 --samples-per-prompt 4",
    "collect": "--num-prompts 8 --samples-per-prompt 4",
    "train-prior": "--collect.num-prompts 8 --collect.samples-per-prompt 4 --shared-noise.noises 2 "
    "--shared-noise.min-reward -1 --shared-noise.prompts 'a photo of a red circle' 'a photo of two squares' "
    "--nll.epochs 1 --nll.held-out-share 0.5 --ppo.updates 1 --ppo.prompts-per-update 2",
    "dpo": "--epochs 1 --batch-size 4 --threshold 0.001",
    "reward-gradient": "--updates 1 --prompts-per-update 2",
    "reward-statistics": "--num-prompts 4",
    "npnet": "--epochs 1 --batch-size 8",
    "evaluate": "--num-prompts 4 --samples 2",
    "table": "",
    "report": "--max-images 4",
}
SLOW = {"demo", "train-shapes"}  # minutes at any size
READERS = (
    "sample",
    "evaluate",
    "table",
    "report",
)  # the README may show them before the commands that write their input


def arguments_of(line: str) -> list[str]:
    """Arguments of ``noisear`` for a line ``noisear COMMAND …``, ``python FILE …`` or ``python -m MODULE …``."""
    program, *words = shlex.split(line, comments=True)
    if program == "python":
        module, *words = [word for word in words if word != "-m"]
        module = f"noisear_rl.{module.removesuffix('.py').replace('/', '.').removeprefix('noisear_rl.')}"
        names = [name for name, (known, _) in cli.COMMANDS.items() if known == module]
        assert names, f"{line}: no command runs {module}"
        words = names + words
    assert words[0] in cli.COMMANDS, f"{line}: unknown command"
    return words


class Parsed(Exception):
    """Carries the configuration of a command out of its ``main``."""


def parse(arguments, monkeypatch):
    """The configuration that a command makes of its arguments, without running it."""
    module = importlib.import_module(cli.COMMANDS[arguments[0]][0])
    owner, name = (
        (module, "parse_config") if hasattr(module, "parse_config") else (argparse.ArgumentParser, "parse_args")
    )
    original = getattr(owner, name)

    def stop(*values):
        raise Parsed(original(*values))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Parsed) as parsed:
            cli.main(arguments)
    return parsed.value.args[0]


def folders_read(arguments) -> set[str]:
    """The ``runs/…`` folders among the arguments, without the output."""
    kept = [word for flag, word in zip(["", *arguments], arguments, strict=False) if flag not in ("--output-dir", "-o")]
    return set(re.findall(r"\bruns/[\w.-]+", " ".join(kept)))


@pytest.mark.parametrize("line", COMMANDS)
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


def test_commands_run_in_a_small_size(tmp_path, monkeypatch):
    """All of them in one folder, in the README's order, so that each reads what others wrote."""
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name != "runs":
            (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    order = lambda line: READERS.index(name) if (name := arguments_of(line)[0]) in READERS else -1
    ran: set[str] = set()
    left_out: set[str] = set()
    for line in sorted(COMMANDS, key=order):
        arguments = arguments_of(line)
        config = parse(arguments, monkeypatch)
        output = getattr(config, "output_dir", None) or getattr(config, "output", None)
        denoiser = getattr(config, "denoiser", None) or noisear_rl.ENVIRONMENTS.get(getattr(config, "env_id", ""))
        if arguments[0] in SLOW or denoiser not in (None, *EMBEDDED) or folders_read(arguments) & left_out:
            left_out.add(str(output))
            continue
        try:
            cli.main(arguments + shlex.split(TINY[arguments[0]]))
        except SystemExit as error:
            pytest.fail(f"{line}: {error}")
        assert output is None or Path(output).exists(), line
        ran.add(arguments[0])
    assert {"pairs", "nll", "ppo", "evaluate", "table", "report"} <= ran


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    policy = random_policy()
    policy.save_pretrained(tmp_path)
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert len(blocks) == 2
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block.replace('"runs/transfer"', repr(str(tmp_path))), scope)
        assert np.asarray(scope["image"]).shape == (64, 64, 3)

    # A policy sees in a user's pipeline what it sees in ours.
    text = load_denoiser("shapes", dtype="float32").encode([scope["prompt"]])
    expected = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=[0]))
    torch.testing.assert_close(scope["latents"], expected, rtol=1e-4, atol=1e-4)


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
