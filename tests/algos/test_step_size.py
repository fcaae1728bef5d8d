"""Both on-policy algorithms stop where rewards are noise, and learn where a little of them is signal."""

import numpy as np
import pytest
import torch

from noisear_rl.algos import ppo, reinforce
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from tests import toys

ALGORITHMS = {"ppo": (ppo.train, ppo.PPOConfig), "reinforce": (reinforce.train, reinforce.ReinforceConfig)}
SMALL = NoiseARConfig(d_model=32, d_ff=64, n_layers=1, log_variance="fixed")
SIZES = {"latent_shape": (1, 8, 8), "patch_size": 4}


class Weak:
    """A projection of the noise, in noise of four times its spread; or that noise alone."""

    name, statistics = "weak", (0.0, 1.0)

    def __init__(self, slope: float):
        self.slope = slope

    def score(self, images, prompts):
        seeds = (images.double().sum((1, 2, 3)).abs() * 1e9).long()  # independent of the projection, equal on resuming
        luck = [torch.randn((), generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        return self.slope * images[:, 0, :4].sum((1, 2)) / 32**0.5 + 4 * torch.stack(luck)


class Constant(Weak):
    def score(self, images, prompts):
        return torch.full((len(images),), 0.7)


def learn(folder, algorithm, reward, **options):
    train, config = ALGORITHMS[algorithm]
    env_id = toys.register(reward, **SIZES)
    policy = train(config(env_id, output_dir=folder, **({"policy": SMALL, "save_every": 100} | options)))
    return policy, read_records(folder)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pure_noise_moves_less_than_2_nats_in_50_updates(tmp_path, algorithm, seed):
    """With default settings, but for the number of images. Fixed steps of ``target_kl`` go 100 nats."""
    options = {"updates": 51, "samples_per_prompt": 16, "seed": seed}
    _, records = learn(tmp_path, algorithm, Weak(slope=0), **options)
    assert 0 < records[-1]["policy/kl_to_gaussian"] < 2, records  # measured before the 51st update
    assert records[-1]["policy/step_kl"] < 0.05


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_constant_reward_moves_nothing(tmp_path, algorithm):
    policy, records = learn(tmp_path, algorithm, Constant(slope=0), updates=3, samples_per_prompt=8)
    assert policy.kl_divergence(torch.randn(2, 4, 16), torch.randn(2, 2, 8)).abs().max() == 0
    assert not any("policy/agreement" in record for record in records)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_signal_of_a_sixteenth_of_the_variance_is_learned(tmp_path, algorithm):
    """Both kinds of steps raise the projection by more than five standard deviations in 40 updates of 256 images."""
    _, records = learn(tmp_path, algorithm, Weak(slope=1), updates=40)
    returns = [record["charts/episodic_return"] for record in records]
    assert np.mean(returns[-5:]) - np.mean(returns[:3]) > 5, returns
    agreements = [record["policy/agreement"] for record in records[1:]]
    assert np.mean(agreements) > 1 and max(record["policy/step_kl"] for record in records) == 2.0


def test_adam_is_as_cautious(tmp_path):
    """Adam's rate falls with the square root of the step's KL: pure noise moves it less than fixed rates do."""
    options = {"updates": 20, "samples_per_prompt": 16, "optimizer": "adam", "learning_rate": 1e-2}
    adaptive, fixed = (
        learn(tmp_path / step, "reinforce", Weak(slope=0), step=step, **options)[1] for step in ("adaptive", "fixed")
    )
    assert adaptive[-1]["policy/kl_to_gaussian"] < fixed[-1]["policy/kl_to_gaussian"] / 5
    assert adaptive[-1]["charts/learning_rate"] == fixed[-1]["charts/learning_rate"] == 1e-2
