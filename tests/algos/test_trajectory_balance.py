"""Trajectory balance reaches the known optimum, wherever its episodes come from, resumes, and refuses what it must."""

import math

import pytest
import torch

from noisear_rl.algos import trajectory_balance
from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.algos.trajectory_balance import TrajectoryBalanceConfig
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig, load_policy
from tests import toys
from tests.resuming import assert_same_run, kill_and_resume

SIZES = {"latent_shape": (1, 4, 2), "patch_size": 2}
SMALL = NoiseARConfig(d_model=16, d_ff=16, n_layers=1, n_heads=2, log_variance="shared")
BETA = 0.8


class Bowl:
    """``±x - x²/4`` of each element above, as the prompt says, and ``-x²/2`` of each element below."""

    name, statistics = "bowl", (0.0, 1.0)

    def score(self, images, prompts):
        upper, lower = images[:, 0].flatten(1).chunk(2, 1)  # (B, 4) each
        sign = torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts], device=images.device)
        return (sign[:, None] * upper - upper.square() / 4 - lower.square() / 2).sum(1)


def config(folder, reward=None, **options):
    defaults = {"prompts_per_update": 2, "samples_per_prompt": 32, "policy": SMALL, "beta": BETA, "save_every": 100}
    env_id = toys.register(reward or Bowl(), **SIZES)
    return TrajectoryBalanceConfig(env_id, output_dir=folder, **(defaults | options))


def assert_tilted(policy, times=1):
    """The elements have mean and variance of ``p · exp(times · r / β) / Z``, to 5 %, where ``p`` is N(0, I)."""
    denoiser = toys.NoDenoiser(**SIZES)
    strength = times / BETA
    upper, lower = 1 / (1 + strength / 2), 1 / (1 + strength)  # variances
    for prompt, sign in (("up", 1), ("down", -1)):
        text = denoiser.encode([prompt] * 64)
        patches = policy.sample(text.policy_embeds, text.policy_mask, seeds=range(64)).patches
        gaussian = policy.exact_distribution(patches, text.policy_embeds, text.policy_mask).base_dist
        mean = sign * strength * upper
        expected = torch.stack([torch.full((4,), mean), torch.zeros(4)])
        torch.testing.assert_close(gaussian.mean.mean(0), expected, rtol=0, atol=0.05 * abs(mean))
        assert (gaussian.mean - gaussian.mean.mean(0)).square().mean().sqrt() < 0.05  # whatever the patches before
        expected = torch.tensor([[upper], [lower]]).expand(2, 4)
        torch.testing.assert_close(gaussian.variance.mean(0), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("replay", ["none", "own and on disk"])
def test_reaches_the_tilted_gaussian(tmp_path, replay):
    options = {"updates": 14, "step": "fixed", "target_kl": 1.0, "fisher_episodes": 64, "replayed_prompts": 0}
    if replay != "none":  # rollouts of Gaussian noise have the same optimum
        collecting = {"num_prompts": 2, "samples_per_prompt": 64, "prompts_per_shard": 2}
        collect(CollectConfig(toys.register(Bowl(), **SIZES), output_dir=tmp_path / "rollouts", **collecting))
        options |= {"replayed_prompts": 2, "replay_updates": 2, "rollouts": tmp_path / "rollouts"}
    policy = trajectory_balance.train(config(tmp_path / "run", **options))
    assert_tilted(policy)
    records = read_records(tmp_path / "run")
    upper, lower = 1 / (1 + 0.5 / BETA), 1 / (1 + 1 / BETA)
    log_z = 2 * math.log(upper) + 2 * upper / BETA**2 + 2 * math.log(lower)  # of four elements each
    assert records[-1]["losses/log_z"] == pytest.approx(log_z, abs=0.05)
    assert records[-1]["losses/first_loss"] < 0.01 * records[0]["losses/first_loss"]
    replayed = {record["charts/replayed_episodes"] for record in records}
    assert replayed == ({0} if replay == "none" else {64})


def test_tilts_the_policy_at_the_start(tmp_path):
    """With ``prior="initial"``, tilting twice tilts by twice the reward."""
    options = {"updates": 14, "step": "fixed", "target_kl": 1.0, "fisher_episodes": 64, "replayed_prompts": 0}
    trajectory_balance.train(config(tmp_path / "once", **options))
    options |= {"init_from": str(tmp_path / "once"), "prior": "initial"}
    assert_tilted(trajectory_balance.train(config(tmp_path / "twice", **options)), times=2)


@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_resumed_equals_uninterrupted(tmp_path, optimizer):
    """The episodes that it replays are part of a checkpoint."""
    options = {"optimizer": optimizer, "samples_per_prompt": 8, "updates": 5, "save_every": 2, "replay_updates": 2}
    whole = trajectory_balance.train(config(tmp_path / "a", **options))
    resumed = kill_and_resume(trajectory_balance.train, config(tmp_path / "b", **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")
    assert [record["charts/replayed_episodes"] for record in read_records(tmp_path / "b")] == [0, 16, 16, 16, 16]
    assert load_policy(tmp_path / "a").config == whole.config


class Constant(Bowl):
    """The same reward for every image."""

    name = "constant"

    def score(self, images, prompts):
        return torch.full((len(images),), 0.7)


def test_where_rewards_do_not_differ_the_optimum_is_the_prior(tmp_path):
    policy = trajectory_balance.train(config(tmp_path, Constant(), updates=4, samples_per_prompt=8))
    assert max(record["losses/approx_kl"] for record in read_records(tmp_path)) < 1e-6
    text = toys.NoDenoiser(**SIZES).encode(["up"])
    assert policy.kl_divergence(torch.zeros(1, 2, 4), text.policy_embeds, text.policy_mask).sum() < 1e-6


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 2, not 1: log Z"):
        trajectory_balance.train(config(tmp_path / "run", samples_per_prompt=1))
    with pytest.raises(FileNotFoundError, match="holds no rollouts"):
        trajectory_balance.train(config(tmp_path / "run", rollouts=tmp_path))
    with pytest.raises(ValueError, match="are given, but replayed_prompts is 0"):
        trajectory_balance.train(config(tmp_path / "run", rollouts=tmp_path, replayed_prompts=0))
    with pytest.raises(ValueError, match="beta must be positive"):
        config(tmp_path / "run", beta=0.0)
    collecting = {"num_prompts": 2, "samples_per_prompt": 2, "prompts_per_shard": 2}
    collect(CollectConfig(toys.register(Bowl(), **SIZES), output_dir=tmp_path / "rollouts", **collecting))
    with pytest.raises(ValueError, match=r"another denoiser or reward \(reward .*'bowl'.*, not .*'constant'"):
        trajectory_balance.train(config(tmp_path / "run", Constant(), rollouts=tmp_path / "rollouts"))
