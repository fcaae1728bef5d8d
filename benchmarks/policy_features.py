"""How far does a natural-gradient step of given KL move along the signal, depending on the policy's input features?

    python benchmarks/policy_features.py
    python benchmarks/policy_features.py --render    # the page again from its data

The reward is linear in the noise, ``R = 0.5 <u, x> + N(0, 1)`` with a random unit vector ``u`` for each of four
captions, so progress is the mean of the policy along ``u``, without any denoising. ``tabular`` moves one free mean
vector per caption, the bound for a policy that shares nothing between captions. Writes ``policy_features.md`` and the
numbers behind it, ``policy_features.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pages import SEEDS, markdown, page, publish  # in this folder
from torch import nn
from tqdm.auto import tqdm

from noisear_rl.demo import HARD_CAPTIONS
from noisear_rl.denoisers import Conditioning, load_denoiser
from noisear_rl.learning.losses import group_advantages, reinforce_loss
from noisear_rl.learning.natural_gradient import natural_step
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy

UPDATES, SAMPLES, KL = 16, 64, 1.0
FULL_PREFIX = 10.0  # undoes the small initialisation of the patch encoder
Positions = Literal["learned", "sinusoidal"]
VARIANTS: dict[str, tuple[Positions, float]] = {
    "learned positions, small prefix (default)": ("learned", 1.0),
    "sinusoidal positions, small prefix": ("sinusoidal", 1.0),
    "learned positions, full-size prefix": ("learned", FULL_PREFIX),
    "sinusoidal positions, full-size prefix": ("sinusoidal", FULL_PREFIX),
}


def signal(seed: int) -> torch.Tensor:
    """Returns unit vectors ``(captions, 256)``."""
    directions = torch.randn(len(HARD_CAPTIONS), 256, generator=torch.Generator().manual_seed(seed))
    return directions / directions.norm(dim=1, keepdim=True)


def advantages(noise: torch.Tensor, groups: torch.Tensor, seed: int, update: int) -> torch.Tensor:
    """Returns standardised advantages ``(B,)`` of noises ``(B, 256)`` of captions ``groups (B,)``."""
    generator = torch.Generator().manual_seed(10_000 * seed + update)
    rewards = 0.5 * (noise * signal(seed)[groups]).sum(1) + torch.randn(len(noise), generator=generator)
    centred = group_advantages(rewards, groups, "rloo")
    return centred / centred.std()


def tabular(seed: int, groups: torch.Tensor) -> tuple[float, float]:
    """Returns progress along the signal and KL in nats for one free mean per caption."""
    means = torch.zeros(len(HARD_CAPTIONS), 256)
    for update in range(UPDATES):
        noise = torch.randn(len(groups), 256, generator=torch.Generator().manual_seed(77 + 1000 * seed + update))
        weights = advantages(means[groups] + noise, groups, seed, update)
        gradient = torch.zeros_like(means).index_add_(0, groups, weights[:, None] * noise)
        means += gradient * (2 * KL / gradient.square().sum(1).mean()).sqrt()
    return (means * signal(seed)).sum(1).mean().item(), 0.5 * means.square().sum(1).mean().item()


def network(
    positions: Positions, prefix: float, seed: int, groups: torch.Tensor, conditioning: Conditioning
) -> tuple[float, float]:
    """Returns progress along the signal and KL in nats for a policy network."""
    torch.manual_seed(seed)
    policy = NoiseARPolicy(NoiseARConfig(log_variance="fixed", positions=positions)).eval()
    encoder = policy.network.latent_patch_encoder
    assert isinstance(encoder, nn.Linear)
    with torch.no_grad():
        encoder.weight.mul_(prefix)
    text, mask = conditioning.policy_embeds, conditioning.policy_mask
    for update in range(UPDATES):
        first = 1_000_000 * seed + 1000 * update
        patches = policy.sample(text, mask, seeds=range(first, first + len(groups))).patches
        weights = advantages(patches.flatten(1), groups, seed, update)
        policy.zero_grad()
        reinforce_loss(policy.log_prob(patches, text, mask), weights).backward()
        natural_step(policy, patches, text, mask, target_kl=KL)
    patches = policy.sample(text, mask, seeds=range(50_000, 50_000 + len(groups))).patches
    means = policy.distribution(patches, text, mask).base_dist.mean.flatten(1).detach()
    return (means * signal(seed)[groups]).sum(1).mean().item(), 0.5 * means.square().sum(1).mean().item()


def measure() -> dict[str, Any]:
    """Returns progress and KL of every variant by seed."""
    groups = torch.arange(len(HARD_CAPTIONS)).repeat_interleave(SAMPLES)
    conditioning = load_denoiser("shapes").encode([HARD_CAPTIONS[g] for g in groups])
    results = {"tabular": [tabular(seed, groups) for seed in SEEDS]}
    for name, (positions, prefix) in tqdm(VARIANTS.items(), desc="variants"):
        results[name] = [network(positions, prefix, seed, groups, conditioning) for seed in SEEDS]
    return {"progress and KL": results}


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    rows = []
    for name, values in record["progress and KL"].items():
        progress, kl = np.array(values).T
        rows.append([name, f"{progress.mean():.2f}", f"{progress.std(ddof=1):.2f}", f"{kl.mean():.1f}"])
    return page(
        [
            f"Mean of the noise along the signal after {UPDATES} natural-gradient steps of {KL} nats on "
            f"{len(HARD_CAPTIONS)} captions x {SAMPLES} samples; mean and standard deviation over {len(SEEDS)} seeds.",
            markdown(["policy", "along the signal", "std of seeds", "KL to N(0, I)"], rows),
        ],
        "policy_features",
        record["provenance"],
    )


if __name__ == "__main__":
    publish("policy_features", __doc__, table, measure)
