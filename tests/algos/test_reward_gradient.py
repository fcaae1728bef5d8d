"""Reward gradients learn, resume exactly, and take the denoiser's options."""

from pathlib import Path

import pytest

from noisear_rl.algos import reward_gradient
from noisear_rl.algos.reward_gradient import RewardGradientConfig
from noisear_rl.learning.records import read_records
from tests.resuming import assert_same_run, kill_and_resume

PROMPTS = ("a photo of a red circle", "a photo of two squares")
TOP_LEFT = str(Path(__file__).parents[1] / "files/top_left.py")


def config(folder, **options):
    defaults = {"reward": TOP_LEFT, "prompts": PROMPTS, "prompts_per_update": 2, "samples_per_prompt": 8, "updates": 12}
    return RewardGradientConfig(output_dir=folder, **(defaults | options))


@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_reward_gradients_learn(tmp_path, optimizer):
    reward_gradient.train(config(tmp_path, optimizer=optimizer, learning_rate=3e-3, target_kl=2.0, fisher_episodes=16))
    logged = read_records(tmp_path)
    returns = [record["charts/episodic_return"] for record in logged]
    assert returns[-1] > returns[0] + 1.0, returns
    assert ("charts/learning_rate" in logged[0]) == (optimizer == "adam")  # a natural step has none


@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_resumed_equals_uninterrupted(tmp_path, optimizer):
    options = {"optimizer": optimizer, "samples_per_prompt": 2, "updates": 4, "save_every": 2}
    whole = reward_gradient.train(config(tmp_path / "a", **options))
    resumed = kill_and_resume(reward_gradient.train, config(tmp_path / "b", **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


def test_options_reach_the_denoiser(tmp_path):
    with pytest.raises(ValueError, match="dtype"):
        reward_gradient.train(config(tmp_path, denoiser_options={"dtype": "float31"}))
