"""PPO resumes exactly, survives dropped episodes, and builds only what it uses."""

import dataclasses

import pytest
import torch

from noisear_rl.algos import ppo, reinforce
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from tests import toys
from tests.resuming import assert_same_run, kill_and_resume

SMALL = NoiseARConfig(d_model=16, d_ff=16, n_layers=1, n_heads=2, log_variance="fixed")


class Gaps(toys.Target):
    """:class:`~tests.toys.Target`, whose scorer fails on every image of the rows listed."""

    def __init__(self, rows):
        self.rows = list(rows)

    def score(self, images, prompts):
        scores = super().score(images, prompts)
        scores[self.rows] = torch.nan
        return scores


def config(folder, reward, **options) -> PPOConfig:
    defaults = {"prompts_per_update": 2, "samples_per_prompt": 8, "updates": 4, "save_every": 2, "policy": SMALL}
    return PPOConfig(toys.register(reward), output_dir=folder, **(defaults | options))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 2, "minibatches": 3, "kl_coef": 0.1},
        {"optimizer": "adam", "learning_rate": 1e-2, "advantage": "ema"},
        {"optimizer": "adaptive_adam", "advantage": "grpo", "clip_high": 0.8},
        {"advantage": "gae", "critic_batch_size": 8},
    ],
    ids=["natural", "adam", "adaptive_adam", "gae"],
)
def test_resumed_equals_uninterrupted(tmp_path, options):
    whole = ppo.train(config(tmp_path / "a", toys.Target(), **options))
    resumed = kill_and_resume(ppo.train, config(tmp_path / "b", toys.Target(), **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("episodes", "left", "minibatches"), [(10, 9, 4), (224, 217, 32), (4, 3, 8)])
def test_minibatches_of_episodes_that_are_left(tmp_path, episodes, left, minibatches):
    options = {"prompts_per_update": 1, "samples_per_prompt": episodes, "minibatches": minibatches, "epochs": 1}
    ppo.train(config(tmp_path, Gaps(range(episodes - left)), **options, updates=1, optimizer="adam"))
    record = read_records(tmp_path)[0]
    assert record["charts/dropped_episodes"] == episodes - left and record["losses/approx_kl"] > 0


def test_a_step_beyond_the_limit_ends_the_update(tmp_path):
    """Adam at a high rate moves beyond the KL at its first step; without a limit it takes all of them."""
    options = {"optimizer": "adam", "learning_rate": 0.1, "epochs": 8, "step": "fixed", "target_kl": 0.1, "updates": 1}
    ppo.train(config(tmp_path / "stopped", toys.Target(), **options))
    ppo.train(config(tmp_path / "free", toys.Target(), **options, kl_stop=1e9))
    stopped, free = (read_records(tmp_path / name)[0]["losses/approx_kl"] for name in ("stopped", "free"))
    assert 0.15 < stopped < free / 2


def test_penalties_hold_the_policy_back(tmp_path):
    options = {"updates": 8, "samples_per_prompt": 32}
    free, reference, prior = (
        read_records(tmp_path / name)[-1]["policy/kl_to_gaussian"]
        for name, extra in (("free", {}), ("reference", {"kl_coef": 5.0}), ("prior", {"kl_prior_coef": 5.0}))
        if ppo.train(config(tmp_path / name, toys.Target(), **options, **extra))
    )
    assert reference < free / 2 and prior < free / 2  # training began with N(0, I), so that both mean the same


def test_the_learning_rate_is_logged_where_there_is_one(tmp_path):
    for optimizer in ("natural", "adam"):
        ppo.train(config(tmp_path / optimizer, toys.Target(), optimizer=optimizer, updates=1))
    assert "charts/learning_rate" not in read_records(tmp_path / "natural")[0]
    assert read_records(tmp_path / "adam")[0]["charts/learning_rate"] == 2e-4


def test_the_critic_reads_whitened_text(tmp_path, monkeypatch):
    """It has the statistics of the training prompts, as the policy has, and a checkpoint keeps them."""
    made, build = [], ppo.NoiseARCritic
    monkeypatch.setattr(ppo, "NoiseARCritic", lambda config: made.append(build(config)) or made[-1])
    whitened = dataclasses.replace(SMALL, text_features="whitened", text_scale=4.0)
    options = {"advantage": "gae", "critic_batch_size": 8, "policy": whitened}
    whole = ppo.train(config(tmp_path / "a", toys.Target(), **options))
    (critic,) = made
    assert not critic.policy.needs_text_statistics
    own, policys = ([b for b in network.buffers() if b.is_floating_point()] for network in (critic.policy, whole))
    assert own and all(torch.equal(a, b) for a, b in zip(own, policys, strict=True))
    resumed = kill_and_resume(ppo.train, config(tmp_path / "b", toys.Target(), **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
@pytest.mark.parametrize("algorithm", [ppo, reinforce], ids=["ppo", "reinforce"])
def test_one_sample_per_prompt_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, algorithm, advantage):
    monkeypatch.setattr(algorithm, "make_vector_env", lambda *_, **__: pytest.fail("loaded the environment"))
    options = {"samples_per_prompt": 1, "advantage": advantage, "output_dir": tmp_path / "run"}
    settings = PPOConfig(**options) if algorithm is ppo else reinforce.ReinforceConfig(**options)
    with pytest.raises(ValueError, match=f"'{advantage}' compares .* samples_per_prompt must be at least 2, not 1"):
        algorithm.train(settings)
    assert not (tmp_path / "run").exists()


class Constant(toys.Target):
    """The same reward for every image."""

    name = "constant"

    def score(self, images, prompts):
        return torch.full((len(images),), 0.7)


@pytest.mark.parametrize("options", [{}, {"advantage": "gae"}, {"advantage": "grpo"}, {"optimizer": "adam"}], ids=str)
def test_a_constant_reward_leaves_the_policy_where_it_was(tmp_path, options):
    policy = ppo.train(config(tmp_path, Constant(), **options))
    assert all(record["policy/kl_to_gaussian"] == 0 for record in read_records(tmp_path))
    assert policy.kl_divergence(torch.randn(2, 2, 16), torch.randn(2, 2, 8)).abs().max() == 0
