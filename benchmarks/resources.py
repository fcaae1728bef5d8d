"""What does a run cost? Parameters, FLOPs, memory and disk space of every preset, counted or measured.

    python benchmarks/resources.py
    python benchmarks/resources.py --render    # the page again from its data

Denoising networks are built from their published configurations without weights. Torch counts matrix products and
convolutions, including attention, with two FLOPs per multiply-add. Policies have the size of the paper: width 2048, one
layer, one head, patches of a quarter of the latent. One policy is trained and sampled, each measurement in its own
process.

Training memory in float32, where P is the size of the policy's parameters in bytes and C that of the critic's:

- NLL: weights, gradients and the two moments of Adam (4 P), and the activations of a batch.
- DPO: the same, the frozen reference and the best policy so far (6 P), and the activations of a batch of pairs.
- PPO, natural gradient: the larger of weights, gradients and reference (3 P) with the activations of all episodes, and
  9 P with the activations of the Fisher product: weights, reference, gradient, solution, residual, direction, the
  product, its part and the Jacobian's. Micro-batches divide the activations, and change nothing else.
- PPO, Adam and a trained critic: 5 P, 4 C, and the activations of all episodes.

Activations are the tensors that autograd saves for the backward pass: distinct storages that are not parameters. The
backward pass and the optimiser need some temporary memory in addition; measured peaks show how much. Dropout is 0.
``on_paper.py`` adds what the paper's runs would take on 1, 8 and 64 GPUs. Writes ``resources.md`` and the numbers
behind it, ``resources.json``, in ``benchmarks/results``.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from on_paper import on_paper, on_paper_parts  # in this folder
from pages import markdown, page, parser_of, write
from published_networks import DISTINCT, GUIDED, NETWORKS, SDXL, Network, meta, parameters_of
from timing import GIB
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
from noisear_rl.denoisers.pipelines import quarters
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.learning.fisher import fisher_product
from noisear_rl.learning.losses import nll_loss, ppo_loss, reconstruction_loss
from noisear_rl.learning.preference_losses import PairLogProbs, Strength, preference_loss
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.policy.critic import NoiseARCritic
from noisear_rl.provenance import provenance

ROOT = Path(__file__).parents[1]
REFERENCE_PARAMETERS = 113.3e6  # of the authors' network for SDXL
PAPER_IMAGE, PAPER_NOISE = 2600e9, 23.12e9  # the paper's Table 3, which calls them FLOPs
PAIRS, PROMPT_BYTES, BATCH, REPEATS = 100_000, 60, 2, 5
MICRO_BATCHES = 64
MICRO = f"PPO, natural, {MICRO_BATCHES} micro-batches"
KINDS = ("NLL", "DPO", "PPO, natural", MICRO, "PPO, Adam, critic")
NETWORK_HEAD = (
    "denoiser",
    "parameters",
    "TFLOPs per evaluation",
    "evaluations",
    "TFLOPs per image",
    "weights, float16",
)
Architecture = Literal["paper", "released"]
Task = Literal["train", "sample"]


def check(what: str, counted: float, published: float) -> None:
    """Checks the number of parameters of a network against the published one.

    Raises:
        ValueError: If the two differ by more than 1 %.
    """
    if abs(counted / published - 1) > 0.01:
        raise ValueError(f"{what} has {counted:.4g} parameters, but {published:.4g} are published")


def flops(call: Callable[[], Any], gradients: bool = False) -> dict[str, int]:
    """Counts FLOPs by operation; attention as plain products (``aten.bmm``), as not all fused kernels are counted."""
    with torch.set_grad_enabled(gradients), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
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
        patch_size=quarters(network.latent_shape[1:]),
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
        "Fisher": saved_bytes(lambda: fisher_product(policy, *one, 0.01), policy),
        "critic": saved_bytes(lambda: critic(*one).square().mean(), critic),
    }


def policy_cost(name: str, architecture: Architecture = "paper") -> dict[str, float]:
    """Returns parameters, FLOPs per sample, and training memory in bytes with the presets of ``configs/``."""
    network = NETWORKS[name]
    tokens, config = network.conditioning["prompt_embeds"][0], policy_config(network, architecture)
    policy, critic = NoiseARPolicy(config).eval(), NoiseARCritic(config).eval()
    one = batch_of(policy, tokens, 1)
    sampled = sum(flops(lambda: policy.sample(one[1], one[2], seeds=[0])).values())
    scored = sum(flops(lambda: policy.log_prob(*one)).values())
    weights, head = 4 * parameters_of(policy), 4 * parameters_of(critic)
    saved, presets = activations(policy, critic, tokens), ROOT / "configs" / "sdxl"
    nll, dpo = load_yaml(NLLConfig, presets / "nll.yaml"), load_yaml(DPOConfig, presets / "dpo.yaml")
    ppo = load_yaml(PPOConfig, presets / "ppo.yaml")
    episodes = ppo.prompts_per_update * ppo.samples_per_prompt
    natural = lambda parts: max(
        3 * weights + episodes / parts * saved["PPO"], 9 * weights + ppo.fisher_episodes / parts * saved["Fisher"]
    )
    return {
        "parameters": weights / 4,
        "flops": sampled,
        "flops of a pass": scored,
        "NLL": 4 * weights + nll.batch_size * saved["NLL"],
        "DPO": 6 * weights + dpo.batch_size * saved["DPO"],
        "PPO, natural": natural(1),
        MICRO: natural(MICRO_BATCHES),
        "PPO, Adam, critic": 5 * weights + 4 * head + episodes * (saved["PPO"] + saved["critic"]),
    }


def peak_memory() -> int:
    """Returns the bytes that this process held at most (Linux); getrusage would include those of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 2**10


def measure(task: Task) -> dict[str, float]:
    """Measures CPU seconds and peak memory of this process for training or sampling with the authors' network."""
    policy = NoiseARPolicy(policy_config(SDXL, "released"))
    check("the authors' network", parameters_of(policy), REFERENCE_PARAMETERS)
    patches, text, mask = batch_of(policy, 77, BATCH)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-5, fused=True)

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
        began = time.process_time()
        calls[task]()
        seconds.append(time.process_time() - began)
    return {"seconds": float(np.median(seconds)), "GiB": peak_memory() / GIB}


def measured() -> dict[str, dict[str, float]]:
    """Runs :func:`measure` in processes of their own."""
    found = {}
    for task in ("train", "sample"):
        command = [sys.executable, __file__, "--measure", task]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[task] = json.loads(output.splitlines()[-1])
    return found


def count() -> dict[str, Any]:
    """Returns everything that the page shows; a process per policy, as graphs with counted tensors are not freed."""
    names = {title: title.split(",")[0] for title in DISTINCT}
    networks = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        policies = dict(zip(names, processes.map(policy_cost, names.values()), strict=True))
    for title, name in tqdm(names.items(), desc="denoisers"):
        parameters, counted = denoiser_cost(name)
        evaluations = PRESETS[name].num_inference_steps * (2 if name in GUIDED else 1)
        networks[title] = {"parameters": parameters, "flops": sum(counted.values()), "evaluations": evaluations}
    config = load_yaml(PairsConfig, ROOT / "configs/sdxl/pairs.yaml")
    per_pair = network_evaluations(config.strong_guidance, config.weak_guidance, config.rounds)
    elements = {title: int(np.prod(network.latent_shape)) for title, network in DISTINCT.items()}
    sdxl = policies[next(iter(names))]
    return {
        "denoisers": networks,
        "policies": policies,
        "authors": {
            "parameters": REFERENCE_PARAMETERS,
            "ours": policy_cost("sdxl", "released")["flops"],
            "theirs": growing_prefix_flops(policy_config(SDXL, "released"), 77),
        },
        "pairs": {title: 2 * size + PROMPT_BYTES for title, size in elements.items()},
        "evaluations per pair": per_pair,
        "measured": measured(),
        "on paper": on_paper(int(sdxl["parameters"]), sdxl["flops"], sdxl["flops of a pass"], per_pair),
    }


def table(record: dict[str, Any]) -> str:
    """Renders the page from the record."""
    networks = [
        [
            title,
            f"{n['parameters'] / 1e9:.2f} G",
            f"{n['flops'] / 1e12:.2f}",
            n["evaluations"],
            f"{n['evaluations'] * n['flops'] / 1e12:.0f}",
            f"{2 * n['parameters'] / GIB:.1f} GiB",
        ]
        for title, n in record["denoisers"].items()
    ]
    policies = [
        [title, f"{cost['parameters'] / 1e6:.0f} M", f"{cost['flops'] / 1e9:.1f}"]
        + [f"{cost[kind] / GIB:.1f}" for kind in KINDS]
        for title, cost in record["policies"].items()
    ]
    authors, per_pair = record["authors"], record["evaluations per pair"]
    disk = ", ".join(f"{PAIRS * size / GIB:.1f} GiB ({title})" for title, size in record["pairs"].items())
    found = record["measured"]
    tasks = [
        [what, f"{found[task]['seconds']:.2f}", f"{found[task]['GiB']:.2f} GiB"]
        for task, what in (("train", f"an NLL step with Adam, batch {BATCH}"), ("sample", f"{BATCH} noises"))
    ]
    return page(
        [
            "Denoisers at 1024 × 1024 pixels (sdxl-turbo: 512 × 512; wan: 81 frames of 480 × 832); guidance by two "
            "predictions doubles the evaluations. A multiply-add is two FLOPs.",
            markdown(NETWORK_HEAD, networks),
            "Policies of the size of the paper (width 2048, one layer), float32, batch sizes of `configs/sdxl`.",
            markdown(("policy for", "parameters", "GFLOPs per sample", *(f"{kind}, GiB" for kind in KINDS)), policies),
            f"The authors' network ({authors['parameters'] / 1e6:.1f} M) samples with {authors['ours'] / 1e9:.1f} "
            f"GFLOPs here, and with {authors['theirs'] / 1e9:.1f} if everything is recomputed at every patch, as in "
            f"their code. Table 3 of the paper states {PAPER_NOISE / 1e9:.2f} per noise and {PAPER_IMAGE / 1e9:.0f} "
            "per image; it seems to count a multiply-add once.",
            f"{PAIRS:,} weak-to-strong pairs: {per_pair * PAIRS:,} evaluations, {per_pair} per pair, as guidance 1 "
            f"needs no unconditional prediction. On disk: {disk}.",
            "Measured: the authors' network at full size, float32, on a CPU.",
            markdown(("task", "CPU seconds", "peak memory of the process"), tasks),
            *on_paper_parts(record["on paper"]),
        ],
        "resources",
        record["provenance"],
    )


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--measure", choices=("train", "sample"), help="measure one task in this process and stop")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    write("resources", table, None if arguments.render else {"provenance": provenance()} | count())


if __name__ == "__main__":
    main()
