import pytest
import torch
from torch.distributions import Independent, Normal

from noisear_rl.learning.losses import (
    group_advantages,
    nll_loss,
    reconstruction_loss,
    reinforce_loss,
    standardized,
    trajectory_balance_loss,
)


def gaussian(mean, std):
    return Independent(Normal(mean, std), 1)


def test_nll_of_a_standard_gaussian():
    target = torch.randn(3, 16, 16)
    expected = 0.5 * (target.square().mean() + torch.log(torch.tensor(2 * torch.pi)))
    torch.testing.assert_close(nll_loss(gaussian(torch.zeros(3, 16, 16), torch.ones(3, 16, 16)), target), expected)


def test_nll_is_least_at_the_truth():
    target = 1.5 + 0.3 * torch.randn(2000, 1, 4, generator=torch.Generator().manual_seed(0))
    at = lambda mean, std: nll_loss(gaussian(torch.full_like(target, mean), torch.full_like(target, std)), target)
    best = at(1.5, 0.3)
    assert all(best < at(*other) for other in ((1.4, 0.3), (1.6, 0.3), (1.5, 0.25), (1.5, 0.36)))


def test_nll_over_noisy_targets_is_the_expectation():
    mean, std, target = torch.randn(1, 2, 3), torch.rand(1, 2, 3) + 0.5, torch.randn(1, 2, 3)
    noise = torch.randn(200_000, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = nll_loss(gaussian(mean, std), target + 0.8 * noise)
    torch.testing.assert_close(nll_loss(gaussian(mean, std), target, 0.8), drawn, rtol=0, atol=0.01)


def test_reconstruction_is_bias_squared_plus_variance():
    mean, std = torch.full((5000, 1, 4), 0.5), torch.full((5000, 1, 4), 0.2)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    loss = reconstruction_loss(gaussian(mean, std), torch.zeros_like(mean), noise)
    torch.testing.assert_close(loss, torch.tensor(0.5**2 + 0.2**2), rtol=0.01, atol=0)


def test_reconstruction_reaches_mean_and_deviation():
    mean, std = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4, requires_grad=True)
    reconstruction_loss(gaussian(mean, std), torch.ones(2, 3, 4), torch.randn(2, 3, 4)).backward()
    assert mean.grad.abs().min() > 0 and std.grad.abs().min() > 0


def test_baselines():
    rewards, groups = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0]), torch.tensor([4, 4, 4, 7, 7])
    assert group_advantages(rewards, groups, "none").tolist() == rewards.tolist()
    assert group_advantages(rewards, groups, "ema", 2.0).tolist() == [-1, 0, 1, 8, 18]
    grpo = group_advantages(rewards, groups, "grpo")
    torch.testing.assert_close(grpo, torch.tensor([-1.0, 0.0, 1.0, -(0.5**0.5), 0.5**0.5]), rtol=0, atol=2e-4)
    assert group_advantages(torch.full((4,), 0.7), torch.tensor([0, 0, 1, 1]), "grpo").abs().max() < 1e-2
    assert group_advantages(rewards, groups, "rloo").tolist() == [-1.5, 0, 1.5, -10, 10]
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(rewards[:4], groups[:4], "rloo")
    with pytest.raises(ValueError, match="unknown advantage"):
        group_advantages(rewards, groups, "critic")


def test_equal_rewards_give_no_advantage_at_all():
    """Rounding errors of equal rewards are not blown up to unit size, whatever the constant and the baseline."""
    groups = torch.arange(64) % 4
    for constant in (0.0, 0.7, -3.3, 1e6, 1e-6, 1 / 3):
        rewards = torch.full((64,), constant)
        for kind in ("ema", "rloo", "grpo"):
            advantages = group_advantages(rewards, groups, kind, ema=constant)
            assert not standardized(advantages, rewards).any(), (constant, kind)
    rewards = torch.rand(64, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(rewards, groups, "rloo")
    torch.testing.assert_close(standardized(advantages, rewards), advantages / advantages.std())
    assert not standardized(torch.zeros(1), torch.ones(1)).any()


def test_reinforce_gradient_is_advantage_times_score():
    mean = torch.zeros(4, 3, 2, requires_grad=True)
    actions, advantages = torch.randn(4, 3, 2), torch.tensor([1.0, -2.0, 0.5, 0.0], requires_grad=True)
    reinforce_loss(gaussian(mean, torch.ones(4, 3, 2)).log_prob(actions), advantages).backward()
    torch.testing.assert_close(mean.grad, -advantages.detach().view(4, 1, 1) * actions / 4)
    assert advantages.grad is None


def test_reinforce_is_unbiased():
    """The gradient of E[x²] under N(m, 1) is 2m."""
    mean = torch.tensor(0.7, requires_grad=True)
    actions = 0.7 + torch.randn(200_000, 1, 1, generator=torch.Generator().manual_seed(0))
    log_prob = gaussian(mean.expand(200_000, 1, 1), torch.ones(200_000, 1, 1)).log_prob(actions)
    rewards = actions.square().flatten()
    reinforce_loss(log_prob, group_advantages(rewards, torch.zeros(200_000).long(), "rloo")).backward()
    assert abs(-mean.grad.item() - 1.4) < 0.03


def test_advantages_do_not_broadcast():
    with pytest.raises(ValueError, match="expected advantages"):
        reinforce_loss(torch.zeros(4, 3), torch.zeros(4, 1))


def tilted(mean, std, actions, log_z=None):
    """Trajectory balance of one Gaussian patch towards ``N(0, 1) · exp(x)``, which is N(1, 1) with ``log Z = ½``."""
    prior = gaussian(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    log_ratio = gaussian(mean, std).log_prob(actions) - prior.log_prob(actions)
    rewards = actions[:, 0, 0]
    log_z = (rewards - log_ratio[:, 0]).mean().expand(len(actions)) if log_z is None else log_z
    return trajectory_balance_loss(log_ratio, rewards, log_z)


def test_trajectory_balance_is_0_at_the_tilted_gaussian_wherever_episodes_come_from():
    actions = 3 * torch.randn(50, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    assert tilted(one, one, actions).item() == pytest.approx(0, abs=1e-12)
    assert tilted(one, one, actions, torch.full((50,), 0.5)).item() == pytest.approx(0, abs=1e-12)
    assert tilted(0.9 * one, one, actions) > 1e-3 and tilted(one, 0.9 * one, actions) > 1e-3


def test_trajectory_balance_is_half_the_variance_and_its_gradient_that_of_a_kl():
    """For N(μ, σ²) against N(1, 1) the KL is ``½ (σ² + (μ - 1)² - 1) - log σ``."""
    noise = torch.randn(400_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.full((1, 1, 1), x, dtype=torch.float64, requires_grad=True) for x in (0.4, 0.8))
    actions = (mean + std * noise).detach()
    loss = tilted(mean, std, actions)
    best = gaussian(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    residual = gaussian(mean, std).log_prob(actions) - best.log_prob(actions)
    assert loss.item() == pytest.approx(0.5 * residual.var(correction=0).item(), rel=1e-9)
    loss.backward()
    assert mean.grad.item() == pytest.approx(0.4 - 1, abs=0.01)
    assert std.grad.item() == pytest.approx(0.8 - 1 / 0.8, abs=0.01)


def test_trajectory_balance_refuses_shapes_that_would_broadcast():
    for rewards, log_z in ((torch.zeros(4, 1), torch.zeros(4)), (torch.zeros(4), torch.zeros(1))):
        with pytest.raises(ValueError, match=r"expected \(B, N\), \(B,\) and \(B,\)"):
            trajectory_balance_loss(torch.zeros(4, 3), rewards, log_z)
