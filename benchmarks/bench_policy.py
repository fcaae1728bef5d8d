"""The rows of ``bench.py`` on the policy at its published size: sampling, an NLL step, the memory of PPO.

Shapes: ``B`` noises, ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import torch
from published_networks import SDXL  # in this folder
from resources import batch_of, flops, nll_of, peak_memory, policy_config
from timing import CPU, GIB, Seconds, interleaved

from noisear_rl.algos import ppo
from noisear_rl.denoisers import Conditioning
from noisear_rl.envs import NoiseVectorEnv
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision

BATCHES, NLL_BATCH, PRODUCT = (1, 8, 32), 40, 4096
EPISODES, MICRO_BATCHES, ENV_ID = 128, 64, "NoiseAR-Published-v0"
HALF, FULL, LIKE_AUTHORS, READING = "bfloat16", "float32", "as the authors' loop", "reading the weights"


@torch.no_grad()
def authors_loop(policy: NoiseARPolicy, text: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Samples as the published inference code does: at every patch, text, prefix and all heads anew.

    Args:
        policy: The policy, of the authors' architecture.
        text: ``(B, L, D)``.
        noise: ``(B, N, A)`` standard normal.

    Returns:
        Patches ``(B, N, A)``.
    """
    network, patches = policy.network, noise[:, :0]
    for i in range(policy.n_patches):
        prefix = torch.cat([patches, noise[:, i : i + 1]], 1)  # the last one is not read
        features = network(network.tokens(prefix), network.read(text, None))
        mean, log_variance = network.heads(features)  # (B, i + 1, A)
        std = policy.config.temperature * torch.exp(0.5 * log_variance[:, -1])
        patches = torch.cat([patches, (mean[:, -1] + std * noise[:, i])[:, None]], 1)
    return patches


@torch.no_grad()
def read_weights(policy: NoiseARPolicy) -> None:
    """Multiplies every matrix that a patch needs by a vector, as often as there are patches: no sample takes less."""
    d = policy.config.d_model
    matrices: dict[str, torch.Tensor] = {n: p for n, p in policy.network.named_parameters() if p.dim() == 2}
    for name, matrix in matrices.items():
        if name.startswith("cross_attn") and name.endswith("in_proj_weight"):
            matrices[name] = matrix[:d]  # queries; keys and values of the text are computed once
    ones = {matrix.shape[1]: torch.ones(matrix.shape[1], device=matrix.device) for matrix in matrices.values()}
    for _ in range(policy.n_patches):
        for matrix in matrices.values():
            torch.mv(matrix, ones[matrix.shape[1]])


def sampling(repeats: int, device: torch.device = CPU) -> dict[str, Any]:
    """Seconds by batch and way; and how far bfloat16 departs from float32 in standard deviations."""
    torch.manual_seed(0)
    policy = NoiseARPolicy(policy_config(SDXL, "released")).to(device).eval()
    for parameter in policy.parameters():  # the last layer of an untrained policy is 0
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.01)
    half = copy.deepcopy(policy).bfloat16()
    found: dict[str, Any] = {"seconds": {}, "difference": {}}
    for batch in BATCHES:
        text = batch_of(policy, 77, batch)[1].to(device)
        noise, seeds = patchify(standard_noise(range(batch), SDXL.latent_shape), 32).to(device), range(batch)
        ways: dict[str, Callable[[], Any]] = {
            LIKE_AUTHORS: functools.partial(authors_loop, policy, text, noise),
            FULL: functools.partial(policy.sample, text, seeds=seeds),
            HALF: functools.partial(half.sample, text, seeds=seeds),
        }
        ways |= {READING: functools.partial(read_weights, policy)}
        expected = ways[LIKE_AUTHORS]()
        torch.testing.assert_close(ways[FULL]().patches, expected, rtol=1e-3, atol=1e-3)
        found["difference"][batch] = (ways[HALF]().patches - expected).abs().max().item() / expected.std().item()
        found["seconds"][batch] = interleaved(ways, repeats, f"sampling, batch {batch}", False, device)
    return found


def nll_step(repeats: int, device: torch.device = CPU) -> dict[str, Any]:
    """Seconds of an NLL step and of a matrix product, and the FLOPs of both."""
    policy = NoiseARPolicy(policy_config(SDXL, "paper")).to(device).train()
    patches, text, mask = (tensor.to(device) for tensor in batch_of(policy, 77, NLL_BATCH))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5, fused=True)

    def step(precision: Precision = "float32") -> None:
        optimizer.zero_grad(set_to_none=True)
        nll_of(policy.compute_in(precision), patches, text, mask).backward()
        optimizer.step()

    with torch.device("meta"):
        empty = NoiseARPolicy(policy.config)
    batch = [x.to("meta") for x in (patches, text, mask)]
    count = sum(flops(lambda: nll_of(empty, *batch).backward(), gradients=True).values())
    left, right = (torch.randn(PRODUCT, PRODUCT, device=device) for _ in range(2))
    halves = left.bfloat16(), right.bfloat16()
    calls = {FULL: step, f"product, {FULL}": lambda: left @ right}
    calls |= {HALF: lambda: step("bfloat16"), f"product, {HALF}": lambda: halves[0] @ halves[1]}
    seconds: Seconds = interleaved(calls, repeats, "NLL step", device=device)
    return {"seconds": seconds, "flops": count, "product": 2 * PRODUCT**3}


class NoDenoiser:
    """A denoiser of SDXL's sizes that shows a corner of the noise: PPO with it holds the policy's memory alone."""

    name, revision, latent_shape, image_size, text_shape = "none", "none", SDXL.latent_shape, 8, (77, 2048)
    patch_size, num_inference_steps, guidance_scale, nfe, signal_level = 32, 1, 1.0, 1, 0.0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        text = torch.randn(len(prompts), *self.text_shape, generator=torch.Generator().manual_seed(0))
        return Conditioning(list(prompts), text, torch.ones(len(prompts), 77, dtype=torch.bool), {})

    def denoise(self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None) -> Any:
        return noise[:, :3, :8, :8].sigmoid()


def ppo_memory() -> None:
    """One update of PPO in this process; prints its peak memory in GiB, and what it is made of."""
    torch.set_num_threads(1)
    made = lambda num_envs=1, **options: NoiseVectorEnv(num_envs, NoDenoiser(), "brightness", **options)  # type: ignore
    gymnasium.register(ENV_ID, vector_entry_point=made)
    config = policy_config(SDXL, "paper")
    with tempfile.TemporaryDirectory() as folder:
        ppo.train(
            ppo.PPOConfig(
                env_id=ENV_ID,
                prompts=("a photo",),
                policy=NoiseARConfig(**vars(config) | {"log_variance": "shared"}),
                output_dir=Path(folder) / "run",
                updates=1,
                prompts_per_update=1,
                samples_per_prompt=EPISODES,
                epochs=1,
                micro_batches=MICRO_BATCHES,
                fisher_episodes=16,
                cg_iterations=1,  # more of them take more time and no more memory
            )
        )
    print(json.dumps({"GiB": peak_memory() / GIB}))


def memory() -> float:
    """Peak memory of PPO in GiB, in a process of its own."""
    command = [sys.executable, __file__, "--ppo-memory"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])[
        "GiB"
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ppo-memory", action="store_true", required=True, help="measure the memory of PPO and stop")
    parser.parse_args()
    ppo_memory()
