"""What does a run cost? Parameters, FLOPs, memory and disk space of every preset, counted or measured.

    python benchmarks/resources.py

Denoising networks are built from their published configurations without weights. Torch counts matrix products and
convolutions, including attention, with two FLOPs per multiply-add. Policies have the size of the paper: width 2048, one
layer, one head, 32 × 32 patches. One policy is trained and sampled, each measurement in its own process.

Training memory in float32, where P is the size of the policy's parameters in bytes and C that of the critic's:

- NLL: weights, gradients and the two moments of Adam (4 P), and the activations of a batch.
- DPO: the same, the frozen reference and the best policy so far (6 P), and the activations of a batch of pairs.
- PPO, natural gradient: weights, gradients and reference (3 P), and the critic, which is built but not trained (C); in
  addition the larger of the activations of all episodes, and 10 P with the activations of the Fisher product. The 10
  vectors at the peak of a step are the flat gradient, solution, residual, direction, last product, the graph of the
  Jacobian, and within a product its parts, their concatenation, the damping term and the sum.
- PPO, Adam and a trained critic: 5 P, 4 C, and the activations of all episodes.

Activations are the tensors that autograd saves for the backward pass: distinct storages that are not parameters. The
backward pass and the optimiser need some temporary memory in addition; the measured peaks show how much. Dropout is 0.
Writes ``benchmarks/results/resources.md``.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from published_networks import DISTINCT, NETWORKS, SDXL, Network, meta  # in this folder
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from noisear_rl.algos.dpo import DPOConfig
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.config import load_yaml
from noisear_rl.data.pairs import PairsConfig
from noisear_rl.data.weak_to_strong import network_evaluations
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.files import write_atomically
from noisear_rl.learning.losses import nll_loss, ppo_loss, reconstruction_loss
from noisear_rl.learning.natural_gradient import fisher_product, twice_differentiable
from noisear_rl.learning.preference_losses import PairLogProbs, Strength, preference_loss
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic
from noisear_rl.provenance import provenance

ROOT = Path(__file__).parents[1]
GIB, KIB = 2**30, 2**10
REFERENCE_PARAMETERS = 113.3e6  # of the authors' network for SDXL
PAPER_IMAGE, PAPER_NOISE = 2600e9, 23.12e9  # the paper's Table 3, which calls them FLOPs
PAIRS, PROMPT_BYTES, BATCH, REPEATS = 100_000, 60, 2, 5
Architecture = Literal["paper", "released"]
Task = Literal["train", "sample"]


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check(what: str, counted: float, published: float) -> None:
    """Checks the number of parameters of a network against the published one.

    Raises:
        ValueError: If the two differ by more than 1 %.
    """
    if abs(counted / published - 1) > 0.01:
        raise ValueError(f"{what} has {counted:.4g} parameters, but {published:.4g} are published")


def flops(call: Callable[[], Any]) -> dict[str, int]:
    """Counts FLOPs by operation; attention as plain products (``aten.bmm``), as not all fused kernels are counted."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


@functools.cache
def denoiser_cost(name: str) -> tuple[int, dict[str, int]]:
    """Returns the number of parameters, and the FLOPs of one network evaluation by operation."""
    network = NETWORKS[name]
    with torch.device("meta"):
        module = network.cls(**network.config).eval()
    check(name, parameters_of(module), network.parameters)
    text = {key: meta(1, *shape) for key, shape in network.conditioning.items()}
    return parameters_of(module), flops(lambda: network.evaluate(module, meta(1, *network.latent_shape), meta(1), text))


def policy_config(network: Network, architecture: Architecture) -> NoiseARConfig:
    """Returns a policy of the size of the paper."""
    return NoiseARConfig(
        latent_shape=network.latent_shape,
        patch_size=32,
        text_dim=network.conditioning["prompt_embeds"][1],
        d_model=2048,
        d_ff=4096,
        n_heads=1,
        n_layers=1,
        architecture=architecture,
    )


def batch_of(policy: NoiseARPolicy, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns random patches ``(rows, N, A)``, text ``(rows, L, D)`` and its mask ``(rows, L)``."""
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    text = torch.randn(rows, tokens, policy.config.text_dim)
    return torch.randn(rows, policy.n_patches, policy.patch_dim), text, mask


def growing_prefix_flops(config: NoiseARConfig, tokens: int) -> int:
    """Counts the FLOPs of sampling as in the authors' code, which recomputes text, prefix and heads at every patch."""
    total = 0
    for length in range(1, 17):
        with torch.device("meta"):
            policy = NoiseARPolicy(replace(config, latent_shape=(config.latent_shape[0], 32, 32 * length)))
        patches, text = meta(1, length, policy.patch_dim), meta(1, tokens, config.text_dim)

        def step(policy: NoiseARPolicy = policy, patches: torch.Tensor = patches, text: torch.Tensor = text) -> None:
            features = policy.features(patches, text, None)
            policy.network.heads(features)

        total += sum(flops(step).values())
    return total


def saved_bytes(call: Callable[[], Any], module: nn.Module) -> int:
    """Returns the bytes of the distinct storages that autograd saves, excluding parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # kept alive so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(storage.nbytes() for address, storage in found.items() if address not in own)


def nll_of(policy: NoiseARPolicy, patches: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the NLL loss with its reconstruction term."""
    distribution = policy.distribution(patches, text, mask)
    return nll_loss(distribution, patches) + 0.2 * reconstruction_loss(distribution, patches, torch.randn_like(patches))


def activations(policy: NoiseARPolicy, critic: NoiseARCritic, tokens: int) -> dict[str, int]:
    """Returns the bytes saved per sample: a pair for NLL and DPO, otherwise an episode."""
    one, two = batch_of(policy, tokens, 1), batch_of(policy, tokens, 2)

    def dpo() -> torch.Tensor:
        chosen, rejected = policy.log_prob(*two).chunk(2)
        pairs = PairLogProbs(chosen, rejected, chosen.detach(), rejected.detach())
        return preference_loss(pairs, ("sigmoid",), (1.0,), Strength())

    def ppo() -> torch.Tensor:
        log_prob = policy.log_prob(*one)
        return ppo_loss(log_prob, log_prob.detach(), torch.ones_like(log_prob), 0.5)

    return {
        "NLL": saved_bytes(lambda: nll_of(policy, *one), policy),
        "DPO": saved_bytes(dpo, policy),
        "PPO": saved_bytes(ppo, policy),
        "Fisher": saved_bytes(lambda: fisher_product(policy, twice_differentiable(policy, *one), 0.01), policy),
        "critic": saved_bytes(lambda: critic(*one).square().mean(), critic),
    }


def policy_cost(name: str, architecture: Architecture = "paper") -> dict[str, float]:
    """Returns parameters, FLOPs per sample and training memory in GiB with the presets of ``configs/``."""
    network = NETWORKS[name]
    tokens, config = network.conditioning["prompt_embeds"][0], policy_config(network, architecture)
    policy, critic = NoiseARPolicy(config).eval(), NoiseARCritic(config).eval()
    one = batch_of(policy, tokens, 1)
    sampled = sum(flops(lambda: policy.sample(one[1], one[2], seeds=[0])).values())
    weights, head = 4 * parameters_of(policy), 4 * parameters_of(critic)
    saved, presets = activations(policy, critic, tokens), ROOT / "configs" / "sdxl"
    nll, dpo = load_yaml(NLLConfig, presets / "nll.yaml"), load_yaml(DPOConfig, presets / "dpo.yaml")
    ppo = load_yaml(PPOConfig, presets / "ppo.yaml")
    episodes, measured = ppo.prompts_per_update * ppo.samples_per_prompt, ppo.fisher_episodes
    return {
        "parameters": weights / 4,
        "flops": sampled,
        "NLL": (4 * weights + nll.batch_size * saved["NLL"]) / GIB,
        "DPO": (6 * weights + dpo.batch_size * saved["DPO"]) / GIB,
        "PPO, natural": (3 * weights + head + max(episodes * saved["PPO"], 10 * weights + measured * saved["Fisher"]))
        / GIB,
        "PPO, Adam, critic": (5 * weights + 4 * head + episodes * (saved["PPO"] + saved["critic"])) / GIB,
    }


def measure(task: Task) -> dict[str, float]:
    """Measures median seconds and peak memory of this process for training or sampling with the authors' network."""
    policy = NoiseARPolicy(policy_config(SDXL, "released"))
    check("the authors' network", parameters_of(policy), REFERENCE_PARAMETERS)
    patches, text, mask = batch_of(policy, 77, BATCH)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        nll_of(policy.train(), patches, text, mask).backward()
        optimizer.step()

    calls: dict[Task, Callable[[], Any]] = {
        "train": train,
        "sample": lambda: policy.eval().sample(text, mask, seeds=range(BATCH)),
    }
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        calls[task]()
        seconds.append(time.perf_counter() - began)
    status = Path("/proc/self/status").read_text()  # Linux only; getrusage would include the memory of the parent
    peak = int(status.split("VmHWM:")[1].split()[0]) * KIB / GIB
    return {"seconds": float(np.median(seconds)), "GiB": peak}


def table(title: str, *rows: tuple[Any, ...]) -> str:
    """Formats a Markdown table: a sentence, then the header and the rows."""
    lines = ["| " + " | ".join(str(cell) for cell in cells) + " |" for cells in rows]
    return "\n".join([title, "", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def denoisers() -> str:
    rows = []
    for title in tqdm(DISTINCT, desc="denoisers"):
        name = title.split(",")[0]
        count, counted = denoiser_cost(name)
        total, nfe = sum(counted.values()) / 1e12, 2 * PRESETS[name].num_inference_steps
        image, weights = f"{nfe * total:.0f}", f"{2 * count / GIB:.1f} GiB"
        rows.append((title, f"{count / 1e9:.2f} G", f"{total:.2f}", nfe, image, weights))
    head = ("denoiser", "parameters", "TFLOPs per evaluation", "evaluations", "TFLOPs per image", "weights, float16")
    title = "Denoisers at 1024 × 1024 pixels; guidance doubles the evaluations. A multiply-add is two FLOPs."
    return table(title, head, *rows)


def policies() -> str:
    kinds, rows = ("NLL", "DPO", "PPO, natural", "PPO, Adam, critic"), []
    for title in tqdm(DISTINCT, desc="policies"):
        cost = policy_cost(title.split(",")[0])
        numbers = f"{cost['parameters'] / 1e6:.0f} M", f"{cost['flops'] / 1e9:.1f}"
        rows.append((title, *numbers, *(f"{cost[kind]:.1f}" for kind in kinds)))
    head = ("policy for", "parameters", "GFLOPs per sample", *(f"{kind}, GiB" for kind in kinds))
    title = "Policies of the size of the paper (width 2048, one layer), float32, batch sizes of `configs/sdxl`."
    theirs = growing_prefix_flops(policy_config(SDXL, "released"), 77) / 1e9
    ours = policy_cost("sdxl", "released")["flops"] / 1e9
    return table(title, head, *rows) + (
        f"\n\nThe authors' network ({REFERENCE_PARAMETERS / 1e6:.1f} M) samples with {ours:.1f} GFLOPs here, and with "
        f"{theirs:.1f} if everything is recomputed at every patch, as in their code. Table 3 of the paper states "
        f"{PAPER_NOISE / 1e9:.2f} per noise and {PAPER_IMAGE / 1e9:.0f} per image; it seems to count a "
        "multiply-add once."
    )


def pairs() -> str:
    sizes = {title: PAIRS * (2 * int(np.prod(n.latent_shape)) + PROMPT_BYTES) / GIB for title, n in DISTINCT.items()}
    disk = ", ".join(f"{size:.1f} GiB ({title})" for title, size in sizes.items())
    config = load_yaml(PairsConfig, ROOT / "configs/sdxl/pairs.yaml")
    count = network_evaluations(config.strong_guidance, config.weak_guidance, config.rounds)
    return (
        f"{PAIRS:,} weak-to-strong pairs: {count * PAIRS:,} evaluations, {count} per pair, as guidance 1 needs no "
        f"unconditional prediction. On disk: {disk}."
    )


def measured() -> str:
    rows = []
    for task, title in (("train", f"an NLL step with Adam, batch {BATCH}"), ("sample", f"{BATCH} noises")):
        command = [sys.executable, __file__, "--measure", task]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append((title, f"{found['seconds']:.2f}", f"{found['GiB']:.2f} GiB"))
    title = "Measured: the authors' network at full size, float32, on a CPU."
    return table(title, ("task", "seconds", "peak memory of the process"), *rows)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=("train", "sample"), help="measure one task in this process and stop")
    if (task := parser.parse_args().measure) is not None:
        print(json.dumps(measure(task)))
        return
    page = [denoisers(), policies(), pairs(), measured(), f"Command: `python benchmarks/resources.py`. {provenance()}"]
    text = "\n\n".join(page) + "\n"
    write_atomically(ROOT / "benchmarks/results/resources.md", text)
    print(text)


if __name__ == "__main__":
    main()
