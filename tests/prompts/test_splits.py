"""The split of the shapes world: nothing trains on validation or test captions, and only evaluation reads `test`."""

import dataclasses
import importlib
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

from benchmarks import text_features
from noisear_rl import cli, demo
from noisear_rl.algos.evaluate import EvaluateConfig, prompt_set
from noisear_rl.denoisers.shapes.captions import balanced_captions, captions_of, meaning, parse_caption
from noisear_rl.denoisers.shapes.train import draw_captions
from noisear_rl.prompts import resolve_prompts

ROOT = Path(__file__).parents[2]
READS_TEST = re.compile(
    r"""(?:captions_of|balanced_captions|evaluation_captions)\(\s*["']test["'] | allow_test\s*=\s*True
    | prompts["']?\s*[:=]\s*["']?test(?:-balanced)?\b | --prompts[\s"',]+test(?:-balanced)?\b""",
    re.VERBOSE,
)
REFUSED = "'{}' is kept for published results.*only `noisear evaluate` reads it. Use '{}'"


def drawn_by_training() -> dict[str, list[str]]:
    """Every source of captions that something is trained on, with its captions."""
    sources = {
        "captions_of": [c.text for c in captions_of("train")],
        "balanced_captions": [c.text for c in balanced_captions("train", 3000)],
        "draw_captions": [c.text for c in draw_captions(np.random.default_rng(0), 3000)],
        "the default of commands": resolve_prompts(None, "shapes").prompts,
        "the demo": list(demo.HARD_CAPTIONS),
        "text_features.py": [c for pair in range(len(text_features.PAIRS)) for c in text_features.captions(pair)],
        "README": re.findall(r'--prompts "([^"]+)"', (ROOT / "README.md").read_text()),
    }
    for file in (ROOT / "configs/shapes").rglob("*.yaml"):
        sources[file.name] = resolve_prompts(yaml.safe_load(file.read_text()).get("prompts"), "shapes").prompts
    for file in (ROOT / "benchmarks").glob("*.txt"):
        sources[file.name] = file.read_text().splitlines()
    return sources


def test_nothing_trains_on_validation_or_test_captions_or_their_mirrors():
    kept = {meaning(c): c.text for split in ("validation", "test") for c in captions_of(split)}
    sources = drawn_by_training()
    assert {"hard_captions.txt", "ppo_transfer.yaml", "collect_same_noise.yaml"} <= set(sources)
    for name, captions in sources.items():
        assert captions, name
        found = [kept[meaning(parse_caption(c))] for c in captions if meaning(parse_caption(c)) in kept]
        assert not found, f"{name} trains on {found[:3]}"


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        ('captions_of("test")', True),
        ("balanced_captions('test', 100)", True),
        ('evaluation_captions("test", per_category=40)', True),
        ("prompts: test", True),
        ("prompts: test-balanced", True),
        ('EvaluateConfig(prompts="test")', True),
        ("noisear evaluate --prompts test", True),
        ('["--prompts", "test"]', True),
        ("resolve_prompts(x, y, allow_test=True)", True),
        ('captions_of("train")', False),
        ("prompts: train-balanced", False),
        ("--prompts tests/own.txt", False),
        ('if split == "test" and not allow_test:', False),
    ],
)
def test_the_search_for_readers_of_the_test_split(line, reads):
    assert bool(READS_TEST.search(line)) is reads


def test_only_evaluation_reads_the_test_split():
    folders = [ROOT / name for name in ("noisear_rl", "algos", "configs", "envs", "benchmarks")]
    files = {file.resolve() for folder in folders for kind in ("*.py", "*.yaml") for file in folder.rglob(kind)}
    readers = {str(file.relative_to(ROOT)) for file in files if READS_TEST.search(file.read_text())}
    readers = {reader.removeprefix("noisear_rl/") for reader in readers}  # in an sdist, links are copies
    benchmarks = {reader for reader in readers if reader.startswith("benchmarks/")}
    assert readers - benchmarks == {"algos/evaluate.py"}
    assert len(benchmarks) <= 1  # the one that makes the table of the release


def commands_with_prompts() -> list[str]:
    """The commands with an option ``prompts``, other than ``sample``, whose prompts are taken as they are."""
    found = []
    for name, (module, _) in cli.COMMANDS.items():
        parts = [part for part in vars(importlib.import_module(module)).values() if dataclasses.is_dataclass(part)]
        own = [part for part in parts if part.__module__ == module]
        if name != "sample" and any(field.name == "prompts" for part in own for field in dataclasses.fields(part)):
            found.append(name)
    return found


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """A few rollouts of training captions."""
    folder = tmp_path_factory.mktemp("rollouts")
    few = ["--num-prompts", "4", "--samples-per-prompt", "2", "--prompts-per-shard", "4", "--same-noise"]
    cli.main(["collect", "--env-id", "NoiseAR-ShapesTurbo-v0", *few, "--output-dir", str(folder)])
    return folder


def test_every_command_but_evaluate_refuses_the_test_split(tmp_path, rollouts):
    commands = commands_with_prompts()
    assert {"pairs", "shared-noise", "collect", "reinforce", "ppo", "trajectory-balance", "evaluate"} < set(commands)
    for command in commands:
        if command == "evaluate":
            continue
        for split in ("test", "test-balanced"):
            output = "--output" if command == "reward-statistics" else "--output-dir"
            options = ["--rollouts", str(rollouts)] if command == "shared-noise" else []
            with pytest.raises(SystemExit, match=REFUSED.format(split, split.replace("test", "validation"))):
                cli.main([command, "--prompts", split, output, str(tmp_path / command / split), *options])
    with pytest.raises(ValueError, match=REFUSED.format("test", "validation")):
        gym.make("NoiseAR-ShapesTurbo-v0", prompts="test")


def test_evaluate_chooses_on_validation_and_reads_the_test_split_when_asked():
    config = EvaluateConfig(denoiser="shapes-turbo", num_prompts=12)
    assert config.prompts == "validation"
    for split in ("validation", "test"):
        found = prompt_set(dataclasses.replace(config, prompts=split))
        assert found.name == f"shapes-{split}" and len(found) == 12
        assert set(found.prompts) <= {c.text for c in captions_of(split)}
