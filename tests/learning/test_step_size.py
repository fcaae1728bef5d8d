"""Steps grow where rewards confirm them, and end where they are noise."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from noisear_rl.learning.step_size import FREE_KL, RESET, StepSize, agreement


def gaussian(mean: torch.Tensor) -> Independent:
    return Independent(Normal(mean, torch.ones_like(mean)), 1)


def test_agreement_is_the_t_statistic_of_the_gain_along_the_way():
    generator = torch.Generator().manual_seed(0)
    mean, start = torch.randn(64, 3, 5, generator=generator), torch.randn(64, 3, 5, generator=generator)
    patches = mean + torch.randn(64, 3, 5, generator=generator)
    advantages = torch.randn(64, generator=generator)
    surprise = ((mean - start) * (patches - mean)).sum(-1)  # of Gaussians with unit variance, exactly
    gains = surprise.sum(1) * advantages
    expected = gains.sum() / gains.square().sum().sqrt()
    assert agreement(gaussian(mean), gaussian(start), patches, advantages) == pytest.approx(expected.item(), rel=1e-3)
    per_patch = advantages[:, None].expand(-1, 3)
    assert agreement(gaussian(mean), gaussian(start), patches, per_patch) == pytest.approx(expected.item(), rel=1e-3)


def test_agreement_has_the_sign_of_the_reward():
    mean, start = torch.full((256, 2, 4), 0.1), torch.zeros(256, 2, 4)
    patches = mean + torch.randn(256, 2, 4, generator=torch.Generator().manual_seed(0))
    reward = patches.sum((1, 2))
    reward = reward - reward.mean()
    assert agreement(gaussian(mean), gaussian(start), patches, reward) > 5
    assert agreement(gaussian(mean), gaussian(start), patches, -reward) < -5


def test_no_move_or_no_rewards_say_nothing():
    mean, patches = torch.zeros(8, 2, 4), torch.randn(8, 2, 4)
    assert agreement(gaussian(mean), gaussian(mean), patches, torch.randn(8)) is None
    assert agreement(gaussian(mean + 1), gaussian(mean), patches, torch.zeros(8)) is None


def test_noise_spends_what_is_free_in_expectation():
    """5,000 runs of 50 updates: the mean of the sum, and how rarely it reaches 2 nats."""
    rng, sums = np.random.default_rng(0), []
    for z in rng.standard_normal((5_000, 50)):
        step_size = StepSize("adaptive", 2.0)
        sums.append(sum(step_size.next(None if update == 0 else z[update]) for update in range(50)))
    free = FREE_KL * sum(1 / update for update in range(1, 51))
    assert 0.8 * free < np.mean(sums) < 1.02 * free  # a little less, because steps end at 2 nats
    assert np.mean(np.array(sums) > 2) < 0.01


def test_a_signal_lengthens_steps_and_its_end_shortens_them():
    step_size = StepSize("adaptive", 2.0)
    up = [step_size.next(agreement) for agreement in (None, 2.0, 2.0, 2.0, 2.0, 2.0)]
    assert up[0] == FREE_KL and up == sorted(up) and up[-1] == 2.0
    down = [step_size.next(0.0) for _ in range(20)]
    assert down == sorted(down, reverse=True) and down[-1] < 0.01
    assert step_size.next(2.0) == pytest.approx(
        FREE_KL / 27 * ((1 - RESET) * down[-1] * 26 / FREE_KL * math.exp(1.5) + RESET)
    )


def test_small_targets_are_never_exceeded_and_huge_agreements_are_finite():
    step_size = StepSize("adaptive", 0.03)
    assert [step_size.next(z) for z in (None, 1e6, 1e6)] == [0.03] * 3
    assert [StepSize("fixed", 0.7).next(z) for z in (None, -5.0, 5.0)] == [0.7] * 3
    with pytest.raises(ValueError, match="target_kl must be positive, got 0"):
        StepSize("adaptive", 0.0)


def test_state_restores_the_next_step():
    first, second = StepSize("adaptive", 2.0), StepSize("adaptive", 2.0)
    for z in (None, 1.3, 0.4):
        first.next(z)
    second.load_state_dict(first.state_dict())
    assert second.next(0.9) == first.next(0.9)
