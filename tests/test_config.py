"""Configurations refuse wrong values when they are made, whether from a file, the command line or Python."""

import dataclasses

import numpy as np
import pytest

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
from noisear_rl.config import ConfigError, check_config, from_mapping, load_yaml, parse_config, to_mapping
from noisear_rl.data.pairs import PairsConfig
from noisear_rl.data.shared_noise import SharedNoiseConfig
from noisear_rl.demo import DemoConfig
from noisear_rl.evaluation.paper_tables import TableConfig
from noisear_rl.evaluation.reward_statistics import StatisticsConfig
from noisear_rl.policy import NoiseARConfig
from noisear_rl.report.page import ReportConfig
from noisear_rl.rewards import RewardConfig
from noisear_rl.sample import SampleConfig
from noisear_rl.samplers.by_name import SearchConfig
from noisear_rl.samplers.npnet import NPNetConfig

CONFIGS = [
    CollectConfig, DemoConfig, DPOConfig, EvaluateConfig, NLLConfig, NoiseARConfig, NPNetConfig, NPNetTrainingConfig,
    PairsConfig, PPOConfig, PriorConfig, ReinforceConfig, ReportConfig, RewardGradientConfig, SampleConfig,
    SearchConfig, SharedNoiseConfig, StatisticsConfig, TableConfig, TrajectoryBalanceConfig,
]  # fmt: skip

# An entry of a file, and what the message must say of it.
WRONG = [
    (PPOConfig, "updates: ten", "updates must be an integer, not 'ten'"),
    (PPOConfig, "updates: 1.5", "updates must be an integer, not 1.5"),
    (PPOConfig, "updates: null", "updates must be an integer, not None"),
    (PPOConfig, "updates: [3]", r"updates must be an integer, not \[3\]"),
    (PPOConfig, "updates: yes", "updates must be an integer, not True"),
    (PPOConfig, "updates: -1", "updates must be at least 1, not -1"),
    (PPOConfig, "updates: 10000000000000", "updates must be at most 1000000000, not"),
    (PPOConfig, "target_kl: .nan", "target_kl must be a finite number, not nan"),
    (PPOConfig, "target_kl: 0", "target_kl must be positive, not 0"),
    (PPOConfig, "clip_range: .nan", "clip_range must be a finite number, not nan"),
    (PPOConfig, "clip_range: .inf", "clip_range must be a finite number, not inf"),
    (PPOConfig, "clip_range: wide", "clip_range must be a number, not 'wide'"),
    (PPOConfig, "damping: -1", "damping must be at least 0, not -1"),
    (PPOConfig, "max_grad_norm: -1", "max_grad_norm must be positive, not -1"),
    (PPOConfig, "save_every: 0", "save_every must be at least 1, not 0"),
    (PPOConfig, "seed: -1", "seed must be at least 0, not -1"),
    (PPOConfig, "seed: 99999999999999999999", "seed must be below"),
    (PPOConfig, "cg_iterations: 0", "cg_iterations must be at least 1"),
    (PPOConfig, "fisher_episodes: 0", "fisher_episodes must be at least 1"),
    (PPOConfig, "critic_steps: 0", "critic_steps must be at least 1"),
    (PPOConfig, "gae_lambda: 1.1", "gae_lambda must be at most 1, not 1.1"),
    (PPOConfig, "resume: maybe", "resume must be a boolean"),
    (PPOConfig, "output_dir: null", "output_dir must be a path, not None"),
    (PPOConfig, "advantage: x", r"advantage must be one of \(.*'gae'\), not 'x'"),
    (PPOConfig, "optimizer: adm\nupdates: 0", "updates must .*; optimizer must be one of .*did you mean 'adam'"),
    (PPOConfig, "upd: 1", "unknown key 'upd'; did you mean 'updates'"),
    (PPOConfig, "1: 2", "unknown key 1"),
    (PPOConfig, "updates: 1\nupdates: 2", "line 2: key 'updates' is repeated"),
    (PPOConfig, "policy: {d_model: 8, d_model: 16}", "key 'd_model' is repeated"),
    (PPOConfig, "env_id: CartPole-v1", "env_id: 'CartPole-v1' is no noise environment"),
    (PPOConfig, "env_id: NoiseAR-Shape-v0", "unknown environment .*did you mean 'NoiseAR-Shapes-v0'"),
    (PPOConfig, "reward: shapes-mach", "unknown reward 'shapes-mach'; did you mean 'shapes-match'"),
    (PPOConfig, "reward: 5", r"reward must be text \(or unset\), not 5"),
    (PPOConfig, "prompts: 3", "prompts must be text or a list"),
    (PPOConfig, "prompts: [a, 1]", "prompts must be text .*, not 1"),
    (PPOConfig, "denoiser_options: [1]", "denoiser_options: expected options by name"),
    (PPOConfig, "denoiser_options: {dtype: [1]}", "denoiser_options: option dtype must be one text or number"),
    (PPOConfig, "policy: runs/nll", "unknown key 'policy'; did you mean 'init_from'"),
    (PPOConfig, "samples: 4", "unknown key 'samples'; did you mean 'samples_per_prompt'"),
    (CollectConfig, "init_from: runs/nll", "unknown key 'init_from'; did you mean 'policy'"),
    (EvaluateConfig, "env_id: NoiseAR-SDXL-v0", "unknown key 'env_id'; did you mean 'denoiser'"),
    (PriorConfig, "collect: {init_from: runs/nll}", "collect: unknown key 'init_from'; did you mean 'policy'"),
    (PPOConfig, "policy: 3", "policy must be an instance of NoiseARConfig, not 3"),
    (PPOConfig, "policy: {d_model: -1}", "policy: d_model must be at least 1, not -1"),
    (PPOConfig, "policy: {d_model: 10}", r"policy: d_model \(10\) must be even"),
    (PPOConfig, "policy: {dropout: 1}", "policy: dropout must be below 1"),
    (PPOConfig, "policy: {latent_shape: [4, 0]}", "policy: latent_shape must be at least 1, not 0"),
    (PPOConfig, "- 1", r"expected a mapping of option names to values, not \[1\]"),
    (PPOConfig, "false", "expected a mapping of option names to values, not False"),
    (PPOConfig, "a: [", "line 1: "),
    (PPOConfig, "\0", "not a YAML file"),
    (NLLConfig, "held_out_share: 2", "held_out_share must be below 1, not 2"),
    (NLLConfig, "batch_size: 0", "batch_size must be at least 1, not 0"),
    (NLLConfig, "denoiser: nope", "denoiser: unknown denoiser 'nope'"),
    (NLLConfig, "denoiser: shape", "did you mean 'shapes'"),
    (DPOConfig, "epochs: 0", "epochs must be at least 1, not 0"),
    (DPOConfig, "loss_type: [sigmoid, dpo]", "loss_type must be one of .*, not 'dpo'"),
    (DPOConfig, "max_kl: -1", "max_kl must be positive"),
    (EvaluateConfig, "num_prompts: 0", "num_prompts must be at least 1"),
    (EvaluateConfig, "scorers: [shapes-exact, shapes-mach]", "did you mean 'shapes-match'"),
    (EvaluateConfig, "search: {step_size: 2}", "search: step_size must be at most 1, not 2"),
    (PairsConfig, "strong_guidance: .inf", "strong_guidance must be a finite number"),
    (PairsConfig, "strong_guidance: 1e30", "strong_guidance must be at most 1000"),
    (PairsConfig, "weak_guidance: 0.5", "weak_guidance must be at least 1"),
    (PairsConfig, "batch_size: -1", "batch_size must be at least 1, not -1"),
    (PriorConfig, "ppo: {updates: 0}", "ppo: updates must be at least 1, not 0"),
    (RewardConfig, "normalize: none", "'weights' is missing"),
    (RewardConfig, "weights: {}", "`weights` is empty"),
    (RewardConfig, "weights: {shapes-match: heavy}", "weights must be a number, not 'heavy'"),
    (RewardConfig, "weights: {shapes-match: .nan}", "weights must be a finite number, not nan"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "text", "message"), WRONG)
def test_files_with_wrong_values(cls, text, message, tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"preset\.yaml: .*{message}") as caught:
        load_yaml(cls, path)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


def test_files_that_are_not_utf8(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_bytes(b"output_dir: \xff")
    with pytest.raises(ConfigError, match=r"preset\.yaml: not a YAML file: .*utf-8"):
        load_yaml(PPOConfig, path)


def test_long_values_are_cut(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("updates: " + "x" * 4096)
    with pytest.raises(ConfigError) as caught:
        load_yaml(PPOConfig, path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_number_is_checked_in_python_too(cls):
    """No field takes NaN, a negative infinity, text or nothing for a number."""
    default = cls()
    check_config(default)
    assert from_mapping(cls, to_mapping(default)) == default
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if type(value) not in (int, float):
            continue
        for wrong in (float("nan"), float("-inf"), -1.5, "ten", True, [value]):
            if wrong == -1.5 and field.name in ("entropy_coef", "min_reward"):
                continue  # any finite number will do
            with pytest.raises(ConfigError, match=f"{cls.__name__}: {field.name} must be "):
                cls(**{field.name: wrong})


def test_numbers_of_other_libraries_and_of_yaml():
    config = PPOConfig(updates=np.int64(3), learning_rate="1e-4", clip_range=np.float32(0.5), target_kl=1)
    assert (config.updates, config.learning_rate, config.clip_range, config.target_kl) == (3, 1e-4, 0.5, 1.0)
    assert type(config.updates) is int and type(config.clip_range) is float
    assert PPOConfig(prompts=["a b"], output_dir="runs/x") == PPOConfig(prompts=("a b",), output_dir="runs/x")


def test_environments_of_modules():
    with pytest.raises(ConfigError, match="PPOConfig: env_id: 'nowhere:X-v0': module 'nowhere' cannot be imported"):
        PPOConfig(env_id="nowhere:X-v0")
    assert PPOConfig(env_id="noisear_rl:NoiseAR-Shapes-v0").env_id == "noisear_rl:NoiseAR-Shapes-v0"


def test_wrong_values_assigned_later_are_found_before_a_run_starts(tmp_path):
    from noisear_rl.learning.run import Run

    config = PPOConfig(output_dir=tmp_path / "run")
    config.policy.d_model = -2
    with pytest.raises(ConfigError, match="PPOConfig: policy: d_model must be at least 1, not -2"):
        Run(config.output_dir, config)
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "-1"], "updates must be at least 1, not -1"),
        (["--policy.d-model", "-2"], "d_model must be at least 1, not -2"),
        (["--updates", "ten"], "--updates"),
        (["--reward", "shapes-mach"], "'shapes-match'"),
    ],
)
def test_wrong_options_on_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(PPOConfig, arguments, "test")
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("ppo", ["--prompts", "a photo of a red squid"], "the nearest one is 'a photo of a red square'"),
        ("ppo", ["--prompts", "trian"], "'trian' is neither a file nor one of"),
        ("ppo", ["--denoiser-options", "num_inference_steps", "0"], "num_inference_steps must be a number from 1 to"),
        ("ppo", ["--denoiser-options", "guidance_scale", "nan"], "guidance_scale must be a number from 0 to"),
        ("evaluate", ["--prompts", "a photo of a red squid"], "the nearest one is 'a photo of a red square'"),
        ("evaluate", ["--methods", "best-of-99999999"], "at most 100,000"),
        ("evaluate", ["--methods", "P=shapes/nll,shapes/nll"], "is named twice"),
        ("pairs", ["--filter-reward", "shapes-match", "--prompts", "a red squid"], "the nearest one is"),
        ("reward-statistics", ["--prompts", "a photo of a red squid"], "the nearest one is"),
    ],
)
def test_prompts_and_methods_before_anything_is_drawn(command, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError), match=message):
        cli.main([command, *options])
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.safetensors"))


def test_a_judge_from_a_file(tmp_path):
    """The scorer of `judge.py` is called `judge`, in the results too."""
    (tmp_path / "judge.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    options = ["--denoiser", "shapes-turbo", "--samples", "2", "--num-prompts", "6"]
    options += ["--output-dir", str(tmp_path / "o"), "--scorers", str(tmp_path / "judge.py"), "shapes-match"]
    cli.main(["evaluate", *options])
    assert "judge judge" in (tmp_path / "o" / "table.md").read_text()


def test_entries_of_a_mapping_are_added_to_those_of_a_preset(tmp_path):
    """``--denoiser-options path DIR`` keeps what the preset says of other options."""
    preset = tmp_path / "preset.yaml"
    preset.write_text("denoiser_options: {micro_batch_size: 8, dtype: bfloat16}\n")
    given = ["--config", str(preset), "--denoiser-options", "path", "DIR", "dtype", "float32"]
    parsed = parse_config(PPOConfig, given, "test")
    assert parsed.denoiser_options == {"micro_batch_size": 8, "dtype": "float32", "path": "DIR"}
    assert parse_config(PPOConfig, given[:2], "test").denoiser_options == {"micro_batch_size": 8, "dtype": "bfloat16"}
    preset.write_text("collect:\n  denoiser_options: {micro_batch_size: 8}\n")
    given = ["--config", str(preset), "--collect.denoiser-options", "path", "DIR"]
    prior = parse_config(PriorConfig, given, "test")
    assert prior.collect.denoiser_options == {"micro_batch_size": 8, "path": "DIR"}
