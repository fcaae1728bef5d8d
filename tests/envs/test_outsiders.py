"""What people who know only the environment's documentation do with it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from noisear_rl.policy import NoiseARConfig, NoiseARPolicy

TURBO = "NoiseAR-ShapesTurbo-v0"


class Redness:
    """A scorer of one's own."""

    name, statistics = "redness", (0.0, 1.0)

    def score(self, images, prompts):
        return images[:, 0].mean((1, 2))


def red(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize("reward", [red, Redness()], ids=["function", "scorer"])
@pytest.mark.parametrize("vector", [False, True])
def test_a_reward_of_ones_own(reward, vector):
    env = gym.make_vec(TURBO, 1, reward=reward) if vector else gym.make(TURBO, reward=reward)
    env.reset(seed=0)
    for _ in range(16):
        _, value, *_, info = env.step(env.action_space.sample())
    key = "reward/red" if reward is red else "reward/redness"
    value, own = (float(np.ravel(x)[0]) for x in (value, info[key]))
    assert 0 < value < 1 and own == pytest.approx(value)


def test_torchrl_makes_an_environment_by_id():
    """It probes whether an environment takes ``frameskip``, and reads the text of the error."""
    libs = pytest.importorskip("torchrl.envs")
    rollout = libs.GymEnv(TURBO).rollout(16)
    assert rollout["next", "reward"].shape == (16, 1) and rollout["next", "reward"][-1] != 0
    assert rollout["next", "terminated"].flatten().tolist() == [False] * 15 + [True]


def test_unknown_options_are_type_errors_too():
    for vector in (False, True):
        with pytest.raises(TypeError, match="unknown denoiser option 'frameskip'"):
            gym.make_vec(TURBO, 1, frameskip=1) if vector else gym.make(TURBO, frameskip=1)
    with pytest.raises(ValueError, match="reward_device belongs to a reward given by name"):
        gym.make(TURBO, reward=red, reward_device="cpu")


@pytest.mark.parametrize("vector", [False, True])
def test_a_misspelt_option_of_reset_is_refused(vector):
    env = gym.make_vec(TURBO, 1) if vector else gym.make(TURBO)
    with pytest.raises(ValueError, match="unknown option 'promt' of reset; did you mean 'prompt'"):
        env.reset(options={"promt": "a photo of a red circle"})


def test_a_loaded_policy_draws_the_same_noise_twice(tmp_path):
    """Also with the authors' dropout."""
    NoiseARPolicy(NoiseARConfig(dropout=0.15)).save_pretrained(tmp_path)
    policy, text = NoiseARPolicy.from_pretrained(tmp_path), torch.randn(1, 16, 256)
    torch.nn.init.normal_(policy.network.prediction_head[-1].weight, std=0.1)
    assert torch.equal(policy.sample(text, seeds=[1]).patches, policy.sample(text, seeds=[1]).patches)
