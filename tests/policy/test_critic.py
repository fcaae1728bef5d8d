"""The critic sees what a value may depend on, starts at 0, and learns a known value."""

from typing import Any

import torch

from noisear_rl.policy import NoiseARConfig
from noisear_rl.policy.critic import NoiseARCritic

SIZES: dict[str, Any] = {
    "latent_shape": (1, 4, 4),
    "patch_size": 2,
    "text_dim": 6,
    "d_model": 16,
    "d_ff": 32,
    "n_heads": 2,
}


def random_critic() -> NoiseARCritic:
    torch.manual_seed(0)
    critic = NoiseARCritic(NoiseARConfig(**SIZES)).eval()
    for parameter in critic.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return critic


def test_untrained_critic_is_0():
    critic = NoiseARCritic(NoiseARConfig(**SIZES))
    assert critic(torch.randn(3, 4, 4), torch.randn(3, 5, 6)).abs().max() == 0


def test_a_value_depends_on_the_prefix_and_the_text_alone():
    critic, patches, text = random_critic(), torch.randn(3, 4, 4), torch.randn(3, 5, 6)
    values = critic(patches, text)
    assert values.shape == (3, 4)
    for i in range(4):
        changed = patches.clone()
        changed[:, i] += 1.0
        same = critic(changed, text) == values
        assert same[:, : i + 1].all() and not same[:, i + 1 :].any()  # column i sees i patches
    assert not (critic(patches, text + 1.0 * torch.arange(6)) == values).any()
    mask = torch.tensor([[True, True, True, False, False]]).expand(3, -1)
    padded = text.clone()
    padded[:, 3:] = 7.0
    torch.testing.assert_close(critic(patches, text, mask), critic(patches, padded, mask))
    torch.testing.assert_close(critic(patches[1:2], text[1:2]), values[1:2])  # batch = single


def test_critic_learns_a_known_value():
    """The return is the first patch's mean: unknown before it, known after it."""
    critic = NoiseARCritic(NoiseARConfig(**SIZES))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    text = torch.zeros(256, 5, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        patches = torch.randn(256, 4, 4, generator=generator)
        returns = patches[:, 0].mean(-1, keepdim=True)
        loss = (critic(patches, text) - returns).square().mean(0)  # (N,)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    variance = 0.25  # of a mean of four
    assert 0.8 * variance < loss[0] < 1.3 * variance and loss[1:].max() < 0.1 * variance, loss
