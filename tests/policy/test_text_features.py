"""Whitened text: decorrelated, part of the checkpoint, and no change to the one density."""

import pytest
import torch

from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.layers import Whitening
from tests.conftest import random_policy

WHITENED = {"text_features": "whitened", "text_scale": 4.0}
TEXT = torch.randn(6, 16, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 256) + 3.0
MASK = torch.arange(16) < torch.tensor([16, 4, 9, 12, 7, 16])[:, None]


def test_whitened_tokens_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5000, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 5.0
    layer = Whitening(12, ridge=1e-9)
    assert torch.equal(layer(tokens), tokens)  # not fitted yet
    layer.fit(tokens)
    white = layer(tokens)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(12), rtol=0, atol=2e-3)
    torch.testing.assert_close(white.mean(0), torch.zeros(12), rtol=0, atol=1e-3)


def test_a_ridge_keeps_directions_without_variance_small():
    tokens = torch.zeros(100, 4)
    tokens[:, 0] = torch.randn(100, generator=torch.Generator().manual_seed(0))
    layer = Whitening(4, ridge=0.01)
    layer.fit(tokens)
    assert layer.transform.isfinite().all() and layer.transform.diag()[1:].max() < 1000
    for constant in (torch.ones(10, 4), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="at least two different tokens"):
            Whitening(4).fit(constant)


@pytest.mark.parametrize("fitted", [False, True])
def test_an_untrained_policy_is_the_gaussian_prior(fitted):
    policy = NoiseARPolicy(NoiseARConfig(**WHITENED)).eval()
    if fitted:
        policy.fit_text(TEXT, MASK)
    sample = policy.sample(TEXT, MASK, seeds=range(6))
    assert torch.equal(policy.noise(sample), standard_noise(range(6), (4, 8, 8)))
    assert policy.kl_divergence(sample.patches, TEXT, MASK).abs().max() == 0


def test_one_density_and_one_checkpoint(tmp_path):
    policy = random_policy(**WHITENED)
    policy.fit_text(TEXT, MASK)
    sample = policy.sample(TEXT, MASK, seeds=range(6))
    torch.testing.assert_close(policy.log_prob(sample.patches, TEXT, MASK), sample.log_prob, rtol=1e-4, atol=1e-3)
    uncached = policy.sample(TEXT, MASK, seeds=range(6), use_cache=False)
    torch.testing.assert_close(sample.patches, uncached.patches, rtol=1e-4, atol=1e-4)
    padded = TEXT.clone()
    padded[~MASK] = 1e3  # padding counts neither in the statistics nor in the density
    torch.testing.assert_close(policy.log_prob(sample.patches, padded, MASK), sample.log_prob, rtol=1e-4, atol=1e-3)

    policy.save_pretrained(tmp_path)
    loaded = NoiseARPolicy.from_pretrained(str(tmp_path)).eval()
    assert not loaded.needs_text_statistics and loaded.config == policy.config
    assert torch.equal(loaded.log_prob(sample.patches, TEXT, MASK), policy.log_prob(sample.patches, TEXT, MASK))


def test_what_is_refused():
    with pytest.raises(ValueError, match="text_scale must be positive"):
        NoiseARConfig(text_scale=0.0)
    with pytest.raises(ValueError, match="text_features must be one of"):
        NoiseARConfig(text_features="white")
    with pytest.raises(ValueError, match="belong to architecture='paper'"):
        NoiseARConfig(architecture="released", text_features="whitened")
