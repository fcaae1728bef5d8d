import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from noisear_rl import cli
from noisear_rl.algos.collect import CollectConfig
from noisear_rl.algos.dpo import DPOConfig
from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.npnet import NPNetTrainingConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.algos.prior import PriorConfig
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.algos.reward_gradient import RewardGradientConfig
from noisear_rl.algos.trajectory_balance import TrajectoryBalanceConfig
from noisear_rl.checkpoints import list_checkpoints
from noisear_rl.config import ConfigError, check_config, from_mapping, load_yaml, parse_config, to_mapping
from noisear_rl.data.pairs import PairsConfig
from noisear_rl.data.shared_noise import SharedNoiseConfig
from noisear_rl.files import read_entries
from noisear_rl.learning import run as run_module
from noisear_rl.learning.records import read_records
from noisear_rl.learning.run import Counters, Run, next_prompts, split_by_prompt
from noisear_rl.policy import NoiseARConfig
from noisear_rl.rewards import RewardConfig
from tests.conftest import random_policy

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass
class Options:
    """Options of a test."""

    rate: float = 0.1
    """How fast."""
    names: tuple[str, ...] = ("a",)
    """Which."""
    policy: NoiseARConfig = field(default_factory=NoiseARConfig)
    """Sizes."""
    output_dir: Path = Path("runs/x")
    """Where."""


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("rate: 1e-3\nnames: [b, c]\noutput_dir: somewhere\npolicy:\n  d_model: 64\n")
    config = parse_config(Options, ["--config", str(path), "--names", "d", "--policy.n-layers", "3"], "test")
    assert config == Options(1e-3, ("d",), NoiseARConfig(d_model=64, n_layers=3), Path("somewhere"))
    assert from_mapping(Options, to_mapping(config)) == config


def test_unknown_keys_name_the_nearest(tmp_path, capsys):
    path = tmp_path / "preset.yaml"
    path.write_text("ratee: 1\n")
    with pytest.raises(ConfigError, match="unknown key 'ratee'; did you mean 'rate'"):
        parse_config(Options, ["--config", str(path)], "test")
    path.write_text("policy:\n  d_modell: 1\n")
    with pytest.raises(ConfigError, match="'d_modell'; did you mean 'd_model'"):
        parse_config(Options, ["--config", str(path)], "test")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse_config(Options, ["--config", str(tmp_path / "none.yaml")], "test")
    with pytest.raises(SystemExit):
        parse_config(Options, ["--ratee", "1"], "test")
    assert "--rate" in capsys.readouterr().err


def test_closed_choices_are_refused_when_parsed(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("optimizer: natrual\n")
    with pytest.raises(ConfigError, match=r"preset\.yaml: optimizer must be one of .*; did you mean 'natural'"):
        parse_config(PPOConfig, ["--config", str(path)], "test")
    with pytest.raises(SystemExit):
        parse_config(PPOConfig, ["--advantage", "leave_one_out"], "test")
    with pytest.raises(ValueError, match=r"loss_type must be one of .*, not 'dpo'"):
        from_mapping(DPOConfig, {"loss_type": ["sigmoid", "dpo"]})
    with pytest.raises(ValueError, match="reference must be one of"):  # a dataclass built in Python
        Run(tmp_path / "run", DPOConfig(reference="none"))
    with pytest.raises(ValueError, match="micro_batches must be at least 1, not 0"):
        Run(tmp_path / "run", PPOConfig(micro_batches=0))
    assert not (tmp_path / "run").exists()
    check_config(PPOConfig(optimizer="adaptive_adam", advantage="gae"))


def test_prompts_are_cycled_in_shuffled_order():
    names = [str(i) for i in range(5)]
    seen = [name for update in range(10) for name in next_prompts(names, 3, update, seed=1)]
    rounds = [tuple(seen[i : i + 5]) for i in range(0, 30, 5)]
    assert all(sorted(part) == names for part in rounds) and len(set(rounds)) > 3
    assert next_prompts(names, 9, 0, seed=1) == list(rounds[0])


def test_held_out_prompts_are_on_one_side():
    prompts = [f"prompt {i % 7}" for i in range(40)]
    train, held_out = split_by_prompt(prompts, 0.3, seed=0)
    assert sorted([*train, *held_out]) == list(range(40))
    names = [{prompts[i] for i in rows} for rows in (train, held_out)]
    assert not names[0] & names[1] and len(names[1]) == 2  # a share of the prompts, rounded down
    assert {tuple(split_by_prompt(prompts, 0.3, seed)[1]) for seed in range(5)} != {tuple(held_out)}
    for few, share in ((["one"] * 9, 0.1), (["one", "two"], 1.0)):
        with pytest.raises(ValueError, match="too few to hold out"):
            split_by_prompt(few, share, seed=0)


def test_a_run_saved_on_a_gpu_resumes_on_a_cpu(tmp_path, monkeypatch):
    policy = random_policy(n_layers=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    policy.log_prob(torch.randn(2, 16, 16), torch.randn(2, 16, 256)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's tensors are saved
    Run(tmp_path, Options()).save(policy, Counters(1), optimizer=optimizer)
    monkeypatch.undo()
    state = list_checkpoints(tmp_path)[0] / "state.pt"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(state, weights_only=True)
    fresh = torch.optim.Adam(policy.parameters(), lr=0.5)
    Run(tmp_path, Options(), resume=True).load(policy, optimizer=fresh)
    moments = next(iter(optimizer.state.values()))["exp_avg"]
    assert torch.equal(next(iter(fresh.state.values()))["exp_avg"], moments)


def test_help_comes_from_docstrings(capsys):
    with pytest.raises(SystemExit):
        parse_config(Options, ["--help"], "What it does.")
    text = capsys.readouterr().out
    assert "What it does." in text and "How fast." in text and "--config" in text


PRESETS = {
    "shapes/pairs": PairsConfig,
    "shapes/signal_leak": PairsConfig,
    "shapes/nll": NLLConfig,
    "shapes/nll_signal_leak": NLLConfig,
    "shapes/reinforce": ReinforceConfig,
    "shapes/ppo": PPOConfig,
    "shapes/grpo": PPOConfig,
    "shapes/trajectory_balance": TrajectoryBalanceConfig,
    "shapes/reinforce_transfer": ReinforceConfig,
    "shapes/dpo": DPOConfig,
    "shapes/collect": CollectConfig,
    "shapes/reward_gradient": RewardGradientConfig,
    "shapes/collect_same_noise": CollectConfig,
    "shapes/shared_noise": SharedNoiseConfig,
    "shapes/nll_shared_noise": NLLConfig,
    "shapes/prior": PriorConfig,
    "shapes/prior_small": PriorConfig,
    "shapes/ppo_transfer": PPOConfig,
    "shapes/npnet": NPNetTrainingConfig,
    "rewards/paper": RewardConfig,
    "rewards/metrics": RewardConfig,
    "rewards/reno": RewardConfig,
    "rewards/unified_reward": RewardConfig,
    "rewards/unified_reward_2": RewardConfig,
    "rewards/vqascore": RewardConfig,
}
STAGES = {"pairs": PairsConfig, "nll": NLLConfig, "collect": CollectConfig, "dpo": DPOConfig, "ppo": PPOConfig}
STAGES |= {"evaluate": EvaluateConfig, "low_memory": PPOConfig}
OTHERS = ("shapes", "rewards", "accelerate")
STAGED = [path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in OTHERS]
PRESETS |= {f"{path.parent.name}/{path.stem}": STAGES[path.stem] for path in STAGED}
PRESETS |= {f"shapes/ablations/{path.stem}": NLLConfig for path in (CONFIGS / "shapes/ablations").glob("*.yaml")}


@pytest.mark.parametrize(("name", "cls"), PRESETS.items())
def test_presets_parse(name, cls):
    assert isinstance(load_yaml(cls, CONFIGS / f"{name}.yaml"), cls)


def test_every_preset_is_tested():
    presets = set(CONFIGS.rglob("*.yaml")) - set((CONFIGS / "accelerate").iterdir())
    assert {str(p.relative_to(CONFIGS).with_suffix("")) for p in presets} == set(PRESETS)


def test_accelerate_reads_its_files():
    counts = {path.stem: load_config_from_file(str(path)) for path in (CONFIGS / "accelerate").iterdir()}
    assert {name: (c.num_machines, c.num_processes) for name, c in counts.items()} == {
        "cpu": (1, 2),
        "gpus": (1, 2),
        "two_machines": (2, 16),
    }


def test_checkpoint_round_trip(tmp_path):
    policy = random_policy(n_layers=1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    policy.log_prob(torch.randn(2, 16, 16), torch.randn(2, 16, 256)).sum().backward()
    optimizer.step()
    run = Run(tmp_path, Options())
    run.log({"x": 1.0}, 1)
    run.save(policy, Counters(1, 2, 3.0), optimizer=optimizer)
    run.log({"x": 2.0}, 2)  # logged, but killed before it was saved
    assert not list((tmp_path / "checkpoints").glob(".*"))

    with pytest.raises(FileExistsError, match="--resume"):
        Run(tmp_path, Options())
    other = random_policy(1, n_layers=1)
    fresh = torch.optim.Adam(other.parameters(), lr=0.5)
    assert Run(tmp_path, Options(), resume=True).load(other, optimizer=fresh) == Counters(1, 2, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    assert fresh.param_groups[0]["lr"] == 0.01
    first = next(iter(optimizer.state.values()))["exp_avg"]
    assert torch.equal(next(iter(fresh.state.values()))["exp_avg"], first)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    with pytest.raises(ValueError, match="another configuration"):
        Run(tmp_path, Options(), resume=True).load(random_policy(n_layers=2))


def test_provenance_of_a_run_and_of_its_resumptions(tmp_path, monkeypatch):
    starts = lambda: read_entries(tmp_path / "provenance.json")
    commit = lambda name: monkeypatch.setattr(run_module, "provenance", lambda: {"commit": name, "torch": "2"})
    monkeypatch.setattr(run_module, "command_line", lambda: "noisear ppo")
    policy = random_policy(n_layers=1)
    commit("a")
    run = Run(tmp_path, Options())
    first = {"step": 0, "commit": "a", "torch": "2", "command": "noisear ppo"}
    assert starts() == [first]  # before anything is trained
    run.log({"x": 1.0}, 1)
    run.save(policy, Counters(1))
    Run(tmp_path, Options(), resume=True).load(policy)
    again = Run(tmp_path, Options(), resume=True)
    again.load(policy)
    again.log({"x": 1.0}, 2)
    assert starts() == [first]  # nothing has changed
    commit("b")
    Run(tmp_path, Options(), resume=True).load(policy)
    assert starts() == [first]  # loads a finished run, and trains nothing
    for name in ("b", "c"):  # b is killed before it saves
        commit(name)
        resumed = Run(tmp_path, Options(), resume=True)
        resumed.load(policy)
        resumed.log({"x": 1.0}, 2)
        assert starts() == [first, first | {"step": 1, "commit": name}]


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    policy = random_policy(n_layers=1)
    run = Run(tmp_path, Options())
    run.save(policy, Counters(1))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.save(policy, Counters(2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]


def test_command_lists_and_dispatches(capsys, tmp_path):
    cli.main([])
    listing = capsys.readouterr().out
    assert all(name in listing for name in cli.COMMANDS)
    with pytest.raises(SystemExit, match="unknown command 'fly'"):
        cli.main(["fly"])
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0 and "--" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"noisear nll: .* holds no pairs"):
        cli.main(["nll", "--pairs", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("script", ["algos/nll.py", "algos/reinforce.py", "algos/evaluate.py"])
def test_scripts_run_from_the_source_tree(script):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, script, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert "--output-dir" in done.stdout


def test_every_option_has_a_docstring():
    import ast

    root = Path(__file__).parents[2]
    for file in [*(root / "algos").glob("*.py"), root / "noisear_rl/data/pairs.py", root / "noisear_rl/demo.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields = [i for i, item in enumerate(node.body) if isinstance(item, ast.AnnAssign)]
                assert fields and all(
                    isinstance(node.body[i + 1], ast.Expr) and isinstance(node.body[i + 1].value, ast.Constant)
                    for i in fields
                ), (file, node.name)


def test_counters_are_plain():
    assert dataclasses.asdict(Counters()) == {
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "reward_ema": None,
        "best": None,
        "stale": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
    }


def test_records_of_a_run_that_saved_nothing_are_forgotten(tmp_path):
    """It starts again, resumed or not: each update is logged once."""
    for resume in (True, False):
        first = Run(tmp_path, Options())
        first.log({"loss": 2.0}, 1)
        first.close()
        second = Run(tmp_path, Options(), resume=resume)
        assert second.load(random_policy()) == Counters()
        second.log({"loss": 1.0}, 1)
        second.close()
        assert [record["loss"] for record in read_records(tmp_path)] == [1.0]
