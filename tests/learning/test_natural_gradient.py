import pytest
import torch
from torch.distributions import kl_divergence

from noisear_rl.learning.fisher import conjugate_gradient, fisher_product
from noisear_rl.learning.losses import reinforce_loss
from noisear_rl.learning.natural_gradient import PolicyOptimizer, natural_step
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from tests.conftest import random_policy

SMALL = {
    "latent_shape": (1, 2, 2),
    "patch_size": 1,
    "text_dim": 4,
    "d_model": 8,
    "d_ff": 8,
    "n_heads": 2,
    "n_layers": 1,
}


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(12), torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(
        conjugate_gradient(lambda v: matrix @ v, target.clone(), 40, 1e-20), torch.linalg.solve(matrix, target)
    )


@pytest.mark.parametrize("micro_batches", [1, 2, 9])  # nine parts of five episodes are five
@pytest.mark.parametrize("log_variance", ["predicted", "shared", "fixed"])
def test_fisher_product_is_the_hessian_of_the_kl(log_variance, micro_batches):
    policy = random_policy(scale=0.3, log_variance=log_variance, **SMALL)
    text, patches = torch.randn(5, 3, 4), torch.randn(5, 4, 1)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    fixed = policy.distribution(patches, text)

    def kl(*parameters):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            moved = torch.func.functional_call(
                _Distribution(policy),
                {f"policy.{n}": p for n, p in zip(names, parameters, strict=True)},
                (patches, text),
            )
        old = torch.distributions.Normal(fixed.base_dist.mean.detach(), fixed.base_dist.stddev.detach())
        return torch.distributions.kl_divergence(old, torch.distributions.Normal(*moved)).sum((1, 2)).mean()

    start = tuple(p.detach() for p in policy.parameters())
    torch.manual_seed(0)
    vector = tuple(torch.randn_like(p) for p in start)
    _, expected = torch.autograd.functional.vhp(kl, start, vector)
    product = fisher_product(policy, patches, text, None, damping=0.0, micro_batches=micro_batches)
    product = product(torch.cat([v.reshape(-1) for v in vector]))
    torch.testing.assert_close(product, torch.cat([e.reshape(-1) for e in expected]), rtol=1e-3, atol=1e-3)


class _Distribution(torch.nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, patches, text):
        gaussian = self.policy.distribution(patches, text).base_dist
        return gaussian.mean, gaussian.stddev


@pytest.mark.parametrize("log_variance", ["predicted", "shared", "fixed"])
def test_step_has_the_kl_it_was_asked_for_and_points_downhill(log_variance):
    policy = NoiseARPolicy(NoiseARConfig(log_variance=log_variance)).eval()
    text = torch.randn(4, 16, 256).repeat_interleave(16, 0)
    patches = policy.sample(text, seeds=range(64)).patches
    advantages = patches[:, 3].mean(-1)  # large where patch 3 is
    loss = reinforce_loss(policy.log_prob(patches, text), advantages)
    loss.backward()
    with torch.no_grad():
        before = policy.distribution(patches, text)
    kl, after = natural_step(policy, patches, text, None, target_kl=0.5)
    assert 0.3 < kl <= 0.75
    with torch.no_grad():
        measured = kl_divergence(before, policy.distribution(patches, text)).sum(1).mean().item()
    assert kl == pytest.approx(measured, rel=1e-3)
    assert kl == pytest.approx(kl_divergence(before, after).sum(1).mean().item(), rel=1e-3)
    assert reinforce_loss(policy.log_prob(patches, text), advantages) < loss


@pytest.mark.parametrize(("curvature", "expected"), [(1.0, 1.0), (4.0, 1.0), (0.5, 0.5)])
def test_a_step_towards_a_minimum_is_neither_lengthened_nor_too_long(curvature, expected):
    """On ``½ κ (μ - 1)²`` of every mean the step is ``-F⁻¹ g``, that is κ, or ends at the minimum."""
    policy = NoiseARPolicy(NoiseARConfig(log_variance="fixed", **SMALL)).eval()
    text, patches = torch.randn(5, 3, 4), torch.zeros(5, 4, 1)
    measure = lambda: 0.5 * curvature * (policy.distribution(patches, text).mean - 1).square().sum((1, 2)).mean()
    measure().backward()
    options = {"target_kl": 100.0, "damping": 1e-6, "iterations": 60}
    kl, after = natural_step(policy, patches, text, None, **options, loss=lambda: measure().item())
    assert after.mean.mean().item() == pytest.approx(expected, abs=0.05)
    assert kl == pytest.approx(2 * expected**2, rel=0.1)  # of four patches


def test_no_gradient_no_step_and_nan_is_refused():
    policy = random_policy(**SMALL)
    text, patches = torch.randn(5, 3, 4), torch.randn(5, 4, 1)
    before = [p.clone() for p in policy.parameters()]
    assert natural_step(policy, patches, text, None, target_kl=1.0)[0] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    policy.log_prob(patches, text).sum().backward()
    next(p for p in policy.parameters() if p.grad is not None).grad.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        natural_step(policy, patches, text, None, target_kl=1.0)


@pytest.mark.parametrize("kind", ["natural", "adam"])
def test_the_kl_of_several_steps_is_measured_from_the_policy_that_sampled(kind):
    policy = random_policy(log_variance="fixed", **SMALL)
    text, patches = torch.randn(6, 3, 4), torch.randn(6, 4, 1)
    with torch.no_grad():
        old = policy.distribution(patches, text)
    optimizer = PolicyOptimizer(policy, kind, target_kl=0.1, learning_rate=0.01)
    for _ in range(3):
        policy.zero_grad()
        policy.distribution(patches, text).mean.sum().backward()
        kl = optimizer.step(patches, text, None, old)
        with torch.no_grad():
            expected = kl_divergence(old, policy.distribution(patches, text)).sum(1).mean().item()
        assert kl == pytest.approx(expected, rel=1e-3)
    assert kl > 0.2 or kind == "adam"  # three steps of 0.1 in one direction are longer than one
