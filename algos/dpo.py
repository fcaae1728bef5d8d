"""Preference optimisation on collected rollouts: DPO and its relatives, by trl's names.

    L = -log σ( β [ log π(x_w)/π_ref(x_w) - log π(x_l)/π_ref(x_l) ] )       (Rafailov et al. 2023, equation 7)

``x_w`` and ``x_l`` are noises of one prompt of which the first earned more; log-probabilities are summed over all
patches (NoiseAR, appendix D). The reference is frozen: the policy training began with, or N(0, I). Prompts of
held-out pairs are never trained on; with ``patience``, training stops when the accuracy on these pairs no longer rises,
and the policy that was best on them is what remains.

    python algos/collect.py --output-dir runs/rollouts
    python algos/dpo.py --config configs/shapes/dpo.yaml --rollouts runs/rollouts
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.distributions import Independent, kl_divergence
from tqdm.auto import tqdm

from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.config import parse_config
from noisear_rl.data.preference_pairs import preference_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import Denoiser, load_denoiser
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.natural_gradient import PolicyOptimizer
from noisear_rl.learning.preference_losses import PairLogProbs, Strength, check_losses, preference_loss
from noisear_rl.learning.run import Counters, Run
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, initial_policy

if TYPE_CHECKING:
    import trl


@dataclass
class DPOConfig:
    """Options of preference optimisation."""

    rollouts: Path = Path("runs/rollouts")
    """Folder that `algos/collect.py` wrote."""
    denoiser_options: dict[str, str] = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    init_from: str | None = None
    """Checkpoint, run folder or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    reference: str = "initial"
    """The frozen reference: `initial` (what training begins with) or `gaussian` (N(0, I))."""
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="fixed"))
    """A fresh policy, in the rollouts' sizes."""
    output_dir: Path = Path("runs/dpo")
    """Run folder."""
    threshold: float = 0.3
    """Rewards of a pair differ by more than this."""
    strategy: str = "best_worst"
    """`best_worst` (one pair a prompt) or `all_above_margin`."""
    loss_type: tuple[str, ...] = ("sigmoid",)
    """trl's names: `sigmoid`, `hinge`, `ipo`, `robust`, `apo_zero`, `sft` (NLL of the preferred noise), …"""
    loss_weights: tuple[float, ...] | None = None
    """One weight a loss; unset for 1 each."""
    beta: float = 0.1
    """Inverse temperature, in 1/nats of the whole noise: the loss saturates at a margin of about 1/beta."""
    label_smoothing: float = 0.0
    """Share of flipped labels (`robust`, `aot`), epsilon of `exo_pair`."""
    discopop_tau: float = 0.05
    """Temperature of `discopop`."""
    epochs: int = 4
    """Passes over the pairs, at most."""
    batch_size: int = 128
    """Pairs an update."""
    optimizer: str = "adam"
    """`adam` (at `learning_rate`), `natural` (steps of `target_kl`) or `adaptive_adam`."""
    learning_rate: float = 1e-4
    """Adam's learning rate."""
    target_kl: float = 0.05
    """Size of a natural step in nats a whole noise."""
    max_grad_norm: float = 1.0
    """Adam's gradients are clipped to this norm."""
    held_out_share: float = 0.1
    """Share of the prompts whose pairs are only validated on."""
    evaluate_every: int = 20
    """Updates between evaluations on held-out pairs."""
    patience: int = 10
    """Stop after so many evaluations without a better held-out accuracy, and keep the best; 0 keeps the last policy."""
    max_kl: float | None = None
    """Stop beyond this KL to the reference, in nats a whole noise: a loss that never saturates would run away."""
    rounds: int = 1
    """Beyond 1: collect new rollouts of the same prompts with the policy so far and go on, so many times in all."""
    seed: int = 0
    """Seed of initialisation, held-out prompts and order."""
    save_every: int = 200
    """Updates between checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""


def from_trl(arguments: trl.DPOConfig, **options) -> DPOConfig:
    """Takes over what a ``trl.DPOConfig`` says about the loss and its optimisation.

    Args:
        arguments: trl's configuration; what concerns language models alone is ignored.
        **options: Fields of :class:`DPOConfig` that trl does not know, such as ``rollouts``.

    Raises:
        ValueError: If it asks for what is not here: ``f_divergence_type``, ``ld_alpha``, ``use_weighting`` or
            ``sync_ref_model``.
    """
    refused = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False, "sync_ref_model": False}
    for name, default in refused.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"trl.DPOConfig({name}={getattr(arguments, name)!r}) is not supported; leave {default!r}")
    taken = {
        "loss_type": tuple(arguments.loss_type),
        "loss_weights": None if arguments.loss_weights is None else tuple(arguments.loss_weights),
        "beta": arguments.beta,
        "label_smoothing": arguments.label_smoothing,
        "discopop_tau": arguments.discopop_tau,
        "learning_rate": arguments.learning_rate,
        "epochs": int(arguments.num_train_epochs),
        "batch_size": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
        "max_grad_norm": arguments.max_grad_norm,
        "seed": arguments.seed,
    }
    return DPOConfig(**(taken | options))


def train(config: DPOConfig, denoiser: Denoiser | None = None) -> NoiseARPolicy:
    """Trains on one folder of rollouts and returns the policy in eval mode; see the module's docstring.

    Args:
        config: Options.
        denoiser: Whose text embeddings to use, if the rollouts' denoiser has no name of its own.
    """
    weights = config.loss_weights or (1.0,) * len(config.loss_type)
    strength = Strength(config.beta, config.label_smoothing, config.discopop_tau)
    check_losses(config.loss_type, weights, strength)
    if config.reference not in ("initial", "gaussian"):
        raise ValueError(f"reference must be 'initial' or 'gaussian', not {config.reference!r}")

    # Data: every rollout's patches; text embeddings are computed once and kept by the denoiser.
    rollouts = load_rollouts(config.rollouts)
    torch.manual_seed(config.seed)
    policy = initial_policy(config.init_from, config.policy, rollouts.policy_sizes, str(config.rollouts))
    pairs = preference_pairs(rollouts, config.threshold, config.strategy, config.seed)
    print(pairs, flush=True)
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb)
    denoiser = denoiser or load_denoiser(rollouts.manifest["denoiser"], **config.denoiser_options)
    names = list(dict.fromkeys(rollouts.prompts))
    row_of = {prompt: i for i, prompt in enumerate(names)}
    prompt_of = np.array([row_of[prompt] for prompt in rollouts.prompts])  # (R,)
    patches = rollouts.patches()  # (R, N, A)

    # Prompts of held-out pairs are not trained on.
    order = np.random.default_rng([config.seed, 3]).permutation(len(names))
    is_held_out = np.isin(prompt_of[pairs.chosen], order[: max(1, int(config.held_out_share * len(names)))])
    train_pairs, held_out_pairs = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    held_out_pairs = np.random.default_rng([config.seed, 5]).permutation(held_out_pairs)[:2048]
    if not len(train_pairs) or not len(held_out_pairs):
        raise ValueError(f"{len(pairs)} pairs are too few to hold some out: collect more prompts or lower threshold")

    # Policy in eval mode: no dropout, so that log-ratios to the frozen reference start at exactly 0.
    policy = policy.to(run.device)
    reference = copy.deepcopy(policy) if config.reference == "initial" else NoiseARPolicy(policy.config).to(run.device)
    reference.eval().requires_grad_(False)
    optimizer = PolicyOptimizer(
        policy,
        config.optimizer,
        target_kl=config.target_kl,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
    )
    best = copy.deepcopy(policy)
    parts = {"optimizer": optimizer, "best": best}
    counters = run.load(policy, **parts) if config.resume else Counters()
    began = time.time() - counters.seconds
    updates_per_epoch = -(-len(train_pairs) // config.batch_size)
    updates = config.epochs * updates_per_epoch

    def score(chosen_pairs: np.ndarray) -> tuple[PairLogProbs, tuple, Independent, Independent]:
        rows = np.concatenate([pairs.chosen[chosen_pairs], pairs.rejected[chosen_pairs]])
        text = denoiser.encode([names[i] for i in prompt_of[rows]]).to(run.device)
        batch = patches[rows].float().to(run.device), text.policy_embeds, text.policy_mask
        own = policy.distribution(*batch)
        with torch.no_grad():
            frozen = reference.distribution(*batch)
        log_probs = [density.log_prob(batch[0]).chunk(2) for density in (own, frozen)]
        return PairLogProbs(*log_probs[0], *log_probs[1]), batch, own, frozen

    def metrics(scored: PairLogProbs) -> dict[str, float]:
        chosen, rejected = config.beta * scored.chosen_ratio, config.beta * scored.rejected_ratio
        loss = preference_loss(scored, config.loss_type, weights, strength)
        return {
            "loss": loss.item(),
            "rewards/chosen": chosen.mean().item(),
            "rewards/rejected": rejected.mean().item(),
            "rewards/margins": (chosen - rejected).mean().item(),
            "rewards/accuracies": (chosen > rejected).float().mean().item(),
            "logps/chosen": scored.chosen.sum(1).mean().item(),
            "logps/rejected": scored.rejected.sum(1).mean().item(),
        }

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        # A loss that sorts a batch (aot) needs all pairs at once; log-probabilities need not be.
        scored, drifts = [], []
        for chunk in np.array_split(held_out_pairs, -(-len(held_out_pairs) // 256)):
            part, _, own, frozen = score(chunk)
            scored.append(dataclasses.astuple(part))
            drifts.append(torch.stack([kl_to_gaussian(own), kl_divergence(own, frozen)]))
        together = PairLogProbs(*(torch.cat(part) for part in zip(*scored, strict=True)))
        to_gaussian, to_reference = torch.cat(drifts, 1).sum(2).mean(1).tolist()
        drift = {"policy/kl_to_gaussian": to_gaussian, "policy/kl_to_reference": to_reference}
        return {f"eval/{key}": value for key, value in metrics(together).items()} | drift

    bar = tqdm(range(counters.step, updates), initial=counters.step, total=updates, desc="dpo", unit="update")
    for update in bar:
        if 0 < config.patience <= counters.stale:
            break
        epoch, index = divmod(update, updates_per_epoch)
        order = np.random.default_rng([config.seed, 4, epoch]).permutation(train_pairs)
        scored, batch, *_ = score(order[index * config.batch_size : (index + 1) * config.batch_size])
        loss = preference_loss(scored, config.loss_type, weights, strength)
        policy.zero_grad(set_to_none=True)
        loss.backward()
        kl = optimizer.step(*batch)

        # Records, early stopping and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        if counters.step % config.evaluate_every == 0 or counters.step == updates:
            record = metrics(scored) | held_out() | {"losses/approx_kl": kl}
            accuracy = record["eval/rewards/accuracies"]
            if counters.best is None or accuracy > counters.best:
                counters.best, counters.stale = accuracy, 0
                best.load_state_dict(policy.state_dict())
            else:
                counters.stale += 1
            run.log(record, counters.step)
            bar.set_postfix(accuracy=f"{record['rewards/accuracies']:.3f}", held_out=f"{accuracy:.3f}")
            if config.max_kl is not None and record["policy/kl_to_reference"] > config.max_kl:
                break
        if counters.step % config.save_every == 0:
            run.save(policy, counters, **parts)
    if config.patience > 0:
        policy.load_state_dict(best.state_dict())
    run.save(policy, counters, **parts)
    print(f"held-out pair accuracy: {counters.best:.3f} at best in {counters.step} updates", flush=True)
    run.close()
    return policy


def iterate(config: DPOConfig, denoiser: Denoiser | None = None) -> NoiseARPolicy:
    """``rounds`` times: train, then collect with what was trained. Round ``i`` lies in ``output_dir/round-i``."""
    first = load_rollouts(config.rollouts)
    manifest, prompts = first.manifest, tuple(dict.fromkeys(first.prompts))
    policy, rollouts, start = None, config.rollouts, config.init_from
    for number in range(config.rounds):
        folder = config.output_dir / f"round-{number}"
        if number:
            rollouts = folder / "rollouts"
            again = CollectConfig(
                env_id=manifest["env_id"],
                denoiser_options=config.denoiser_options,
                reward=manifest.get("reward_spec"),
                prompts=prompts,
                policy=start,
                output_dir=rollouts,
                num_prompts=len(prompts),
                samples_per_prompt=manifest["samples_per_prompt"],
                seed=manifest["seed"] + number,
            )
            collect(again)
        policy = train(dataclasses.replace(config, rollouts=rollouts, output_dir=folder, init_from=start), denoiser)
        start = str(folder)
    assert policy is not None
    return policy


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(DPOConfig, argv, __doc__)
    if config.rounds > 1:
        iterate(config)
    else:
        train(config)
    print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    main()
