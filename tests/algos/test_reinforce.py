"""REINFORCE improves its reward, resumes exactly, and refuses what it cannot use."""

from pathlib import Path

import pytest

from noisear_rl.algos import reinforce
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig, load_policy
from tests.resuming import assert_same_run, kill_and_resume

PROMPTS = ("a photo of a red circle", "a photo of two squares")
TOP_LEFT = str(Path(__file__).parents[1] / "files/top_left.py")


def config(folder, **options):
    defaults = {
        "env_id": "NoiseAR-ShapesTurbo-v0",
        "reward": TOP_LEFT,
        "prompts": PROMPTS,
        "prompts_per_update": 2,
        "samples_per_prompt": 8,
        "updates": 4,
    }
    return ReinforceConfig(output_dir=folder, **(defaults | options))


@pytest.mark.parametrize(("optimizer", "advantage"), [("natural", "rloo"), ("adam", "ema")])
def test_resumed_equals_uninterrupted(tmp_path, optimizer, advantage):
    options = {"optimizer": optimizer, "advantage": advantage, "save_every": 2}
    whole = reinforce.train(config(tmp_path / "a", **options))
    resumed = kill_and_resume(reinforce.train, config(tmp_path / "b", **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")
    assert load_policy(tmp_path / "a").config == whole.config


def test_reinforce_improves_its_reward(tmp_path):
    """20 updates of 64 images darken the corner by more than two standard deviations of Gaussian noise."""
    options = {"samples_per_prompt": 32, "updates": 20, "target_kl": 1.0, "fisher_episodes": 32}
    reinforce.train(config(tmp_path, **options))
    rewards = [record["charts/episodic_return"] for record in read_records(tmp_path)]
    assert sum(rewards[-5:]) / 5 - rewards[0] > 1.0, rewards
    last = read_records(tmp_path)[-1]
    assert 0 < last["losses/approx_kl"] <= 1.5 and last["policy/kl_to_gaussian"] < 60
    assert list((tmp_path / "tensorboard").rglob("events.*"))


def test_kl_penalty_holds_the_policy_back(tmp_path, turbo):
    free = reinforce.train(config(tmp_path / "free", updates=6))
    held = reinforce.train(config(tmp_path / "held", updates=6, kl_prior_coef=10.0))
    text = turbo.encode(PROMPTS).policy_embeds
    patches = standard_noise(range(2), (16, 16))
    assert held.kl_divergence(patches, text).sum() < 0.5 * free.kl_divergence(patches, text).sum()


def test_reinforce_bad_input(tmp_path):
    with pytest.raises(ValueError, match="optimizer must be one of"):
        reinforce.train(config(tmp_path, optimizer="sgd"))
    with pytest.raises(ValueError, match="advantage must be one of"):
        reinforce.train(config(tmp_path / "b", advantage="critic"))
    with pytest.raises(ValueError, match="another denoiser"):
        reinforce.train(config(tmp_path / "c", policy=NoiseARConfig(text_dim=2048)))
