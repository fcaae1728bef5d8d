"""Preference optimisation on collected rollouts: DPO and its relatives, by trl's names.

    L = -log σ( β [ log π(x_w)/π_ref(x_w) - log π(x_l)/π_ref(x_l) ] )       (Rafailov et al. 2023, equation 7)

``x_w`` and ``x_l`` are noises of one prompt, of which the first earned more; log-probabilities are summed over all
patches (NoiseAR, appendix D). The reference is frozen: the policy at the start, or N(0, I). Prompts of held-out pairs
are never trained on; with ``patience``, training stops when the accuracy on these pairs no longer rises, and the policy
with the best accuracy is kept.

    noisear collect --output-dir runs/rollouts
    noisear dpo --config shapes/dpo --rollouts runs/rollouts

Several processes share the pairs of a batch (``noisear_rl/distributed.py``); their number changes no result.

Shapes: ``R`` rollouts, ``b`` pairs of a batch in this process, ``N`` patches, ``A`` elements per patch.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.distributions import Independent, kl_divergence
from tqdm.auto import tqdm

from noisear_rl.algos.collect import CollectConfig, collect
from noisear_rl.command import run_script
from noisear_rl.config import (
    Float,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    check_config,
    parse_config,
)
from noisear_rl.data.preference_pairs import PreferencePairs, Strategy, preference_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import Denoiser, DenoiserOptions, check_denoiser, load_denoiser
from noisear_rl.distributed import Part, is_main, process, same_everywhere, shard, sum_gradients
from noisear_rl.envs import check_env_id
from noisear_rl.gaussian import kl_to_gaussian
from noisear_rl.learning.guards import Guard
from noisear_rl.learning.natural_gradient import Optimizer, PolicyOptimizer
from noisear_rl.learning.preference_losses import (
    Loss,
    PairLogProbs,
    Strength,
    check_losses,
    options_of_trl,
    preference_loss,
    trl_metrics,
)
from noisear_rl.learning.run import Counters, Run, split_by_prompt
from noisear_rl.learning.text_pathway import fit_text
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, Precision, initial_policy, text_encoder_of
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.rewards import check_reward
from noisear_rl.seeds import Stream, stream_rng
from noisear_rl.trust import values_from

if TYPE_CHECKING:
    import trl

VALIDATION_BATCH = 256  # held-out pairs per forward pass


@dataclass
class DPOConfig:
    """Options of preference optimisation."""

    rollouts: Path = Path("runs/rollouts")
    """Folder that `noisear collect` wrote."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32` or `path FOLDER`."""
    init_from: str | None = None
    """Checkpoint, run folder, `shapes/NAME` or Hub id to start from; unset for a fresh policy (Gaussian noise)."""
    reference: Literal["initial", "gaussian"] = "initial"
    """The frozen reference: `initial` (the policy at the start) or `gaussian` (N(0, I))."""
    policy: NoiseARConfig = field(default_factory=lambda: NoiseARConfig(log_variance="fixed"))
    """A fresh policy, in the rollouts' sizes."""
    output_dir: Path = Path("runs/dpo")
    """Run folder."""
    threshold: NonNegativeFloat = 0.3
    """Rewards of a pair differ by more than this."""
    strategy: Strategy = "best_worst"
    """`best_worst` (one pair per prompt) or `all_above_margin`."""
    loss_type: tuple[Loss, ...] = ("sigmoid",)
    """trl's names: `sigmoid`, `hinge`, `ipo`, `robust`, `apo_zero`, `sft` (NLL of the preferred noise), …"""
    loss_weights: tuple[Float, ...] | None = None
    """One weight per loss; unset for 1 each."""
    beta: PositiveFloat = 0.1
    """Inverse temperature, in 1/nats of the whole noise: the loss saturates at a margin of about 1/beta."""
    label_smoothing: Fraction = 0.0
    """Share of flipped labels (`robust`, `aot`), epsilon of `exo_pair`."""
    discopop_tau: PositiveFloat = 0.05
    """Temperature of `discopop`."""
    epochs: PositiveInt = 4
    """Passes over the pairs, at most."""
    batch_size: PositiveInt = 128
    """Pairs per update."""
    optimizer: Optimizer = "adam"
    """`adam` (at `learning_rate`), `natural` (steps of `target_kl`) or `adaptive_adam`."""
    learning_rate: NonNegativeFloat = 1e-4
    """Adam's learning rate."""
    target_kl: PositiveFloat = 0.05
    """Size of a natural step in nats per noise."""
    max_grad_norm: PositiveFloat = 1.0
    """Adam's gradients are clipped to this norm."""
    held_out_share: Share = 0.1
    """Share of the prompts whose pairs are only validated on."""
    held_out_pairs: PositiveInt = 2048
    """Held-out pairs per evaluation, at most."""
    evaluate_every: PositiveInt = 20
    """Updates between evaluations on held-out pairs."""
    patience: NonNegativeInt = 10
    """Stop after this many evaluations without better held-out accuracy and keep the best policy; 0 keeps the last."""
    max_kl: PositiveFloat | None = None
    """Stop beyond this KL to the reference, in nats per noise: a loss that never saturates would run away."""
    rounds: PositiveInt = 1
    """Rounds of training; each after the first trains on new rollouts of the same prompts, by the policy so far."""
    reward_device: str | None = None
    """With `rounds`: device of the scorers, such as `cuda:1`; unset for the accelerator if there is one."""
    micro_batches: PositiveInt = 1
    """Parts that gradients are computed in, one after the other: less memory, the same result."""
    precision: Precision = "float32"
    """Of the policy: `float32`, or `bfloat16` (autocast over float32 weights; densities stay float32)."""
    compile: bool = False
    """Compile the policy (torch.compile). The first update takes longer, and results differ by rounding."""
    seed: Seed = 0
    """Seed of initialisation, held-out prompts and order."""
    save_every: PositiveInt = 200
    """Updates between checkpoints."""
    keep_checkpoints: NonNegativeInt = 0
    """Newest checkpoints to keep, besides the best; 0 keeps all."""
    resume: bool = False
    """Resume from the newest checkpoint in the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases."""

    def __post_init__(self) -> None:
        check_config(self)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # patches (2b, N, A), text (2b, L, D), text mask (2b, L)


def train(config: DPOConfig, denoiser: Denoiser | None = None) -> NoiseARPolicy:
    """Trains on one folder of rollouts and returns the policy in eval mode; see the module's docstring.

    Args:
        config: Options.
        denoiser: Supplies the text embeddings, if the rollouts' denoiser cannot be loaded by name.

    Raises:
        ValueError: If an option is out of range, or there are too few pairs to hold some out.
        FileNotFoundError: If there are no rollouts.
        FileExistsError: If the run folder holds a run and ``resume`` is false.
    """
    check_config(config)
    weights = config.loss_weights or (1.0,) * len(config.loss_type)
    strength = Strength(config.beta, config.label_smoothing, config.discopop_tau)
    check_losses(config.loss_type, weights, strength)
    if config.micro_batches > 1 and {"aot", "aot_unpaired"} & set(config.loss_type):
        raise ValueError("aot sorts the pairs of a batch, which micro-batches would tear apart: set micro_batches to 1")
    process()  # joins the others

    # Data: every rollout's patches; each prompt's text is computed once and kept.
    rollouts = load_rollouts(config.rollouts)
    pairs = preference_pairs(rollouts, config.threshold, config.strategy, config.seed)
    if is_main():
        print(pairs, flush=True)
    torch.manual_seed(config.seed)
    with values_from(config.rollouts / "manifest.json"):  # which may name code
        denoiser = denoiser or load_denoiser(rollouts.manifest["denoiser"], **config.denoiser_options)
    reader = PromptReader(text_encoder_of(config.init_from, config.policy), denoiser)
    sizes = rollouts.policy_sizes | reader.sizes
    policy = initial_policy(config.init_from, config.policy, sizes, str(config.rollouts))
    prompts, patches = rollouts.prompts, rollouts.patches()  # (R,), (R, N, A)
    reader.embed_all(prompts)

    # Prompts of held-out pairs are not trained on.
    _, held_out_rows = split_by_prompt(prompts, config.held_out_share, config.seed)
    is_held_out = np.isin(pairs.chosen, held_out_rows)
    train_pairs, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    held_out = stream_rng(config.seed, Stream.HELD_OUT_ROWS).permutation(held_out)[: config.held_out_pairs]
    if not len(train_pairs) or not len(held_out):
        raise ValueError(f"{len(pairs)} pairs are too few to hold some out: collect more prompts or lower threshold")

    # Policy in eval mode: no dropout, so that log-ratios to the frozen reference start at exactly 0.
    run = Run(config.output_dir, config, resume=config.resume, wandb=config.wandb, may_change=("epochs",))
    policy = policy.to(run.device)
    fit_text(policy, reader, [prompts[row] for row in pairs.chosen[train_pairs]], config.seed)
    same_everywhere(policy)
    policy.compute_in(config.precision, config.compile)
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
    guard = Guard(policy, counters, optimizer, config.target_kl)
    began = time.time() - counters.seconds

    updates_per_epoch = -(-len(train_pairs) // config.batch_size)
    updates = config.epochs * updates_per_epoch
    left = range(counters.step, updates)
    bar = tqdm(left, initial=counters.step, total=updates, desc="dpo", unit="update", disable=not is_main())
    for update in bar:
        if 0 < config.patience <= counters.stale:
            break
        epoch, index = divmod(update, updates_per_epoch)
        order = stream_rng(config.seed, Stream.BATCH_ORDER, epoch).permutation(train_pairs)
        rows = order[index * config.batch_size : (index + 1) * config.batch_size]

        # Loss and step.
        mine, loss, scores = shard(len(rows)), torch.zeros((), device=run.device), []
        batch = batch_of(rows[mine.rows], pairs, patches, prompts, reader, run.device)
        policy.zero_grad(set_to_none=True)
        for part in mine.local().split(config.micro_batches):
            both = np.concatenate([part.rows, part.rows + len(mine.rows)])  # chosen, then rejected
            own, _, _ = score(policy, reference, (batch[0][both], batch[1][both], batch[2][both]))
            scored = own.joined(part)  # the loss sees the pairs of all processes; gradients flow into our own
            part_loss = len(scored.chosen) / len(rows) * preference_loss(scored, config.loss_type, weights, strength)
            part_loss.backward()
            loss += part_loss.detach()
            scores.append(scored)
        sum_gradients(policy)
        places = np.concatenate([mine.places, mine.places + len(rows)])
        kl = guard.step(*batch, part=Part(np.arange(len(places)), places, 2 * len(rows)))  # undone if it blows up

        # Records, early stopping and checkpoints.
        counters.step, counters.seconds = update + 1, time.time() - began
        if counters.step % config.evaluate_every == 0 or counters.step == updates:
            record = trl_metrics(PairLogProbs.concatenated(scores), loss, config.beta) | {"losses/approx_kl": kl}
            record |= guard.record
            ours = shard(len(held_out))
            chunks = np.array_split(held_out[ours.rows], -(-len(ours.rows) // VALIDATION_BATCH))
            batches = (batch_of(chunk, pairs, patches, prompts, reader, run.device) for chunk in chunks)
            validated, drift = validate(policy, reference, batches, ours)
            held_out_loss = preference_loss(validated, config.loss_type, weights, strength)
            metrics = trl_metrics(validated, held_out_loss, config.beta)
            record |= {f"eval/{key}": value for key, value in metrics.items()} | drift
            if config.optimizer != "natural":
                record["charts/learning_rate"] = optimizer.learning_rate
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
        if counters.step % config.save_every == 0 or run.stopping:
            run.save(policy, counters, **parts)
    if config.patience > 0:
        policy.load_state_dict(best.state_dict())
    run.save(policy, counters, **parts)
    if is_main():
        print(f"held-out pair accuracy: {counters.best:.3f} at best in {counters.step} updates", flush=True)
    run.close()
    return policy


def batch_of(
    rows: np.ndarray,
    pairs: PreferencePairs,
    patches: torch.Tensor,
    prompts: Sequence[str],
    reader: PromptReader,
    device: torch.device,
) -> Batch:
    """The chosen rollouts of ``b`` pairs, then the rejected ones."""
    rollouts = np.concatenate([pairs.chosen[rows], pairs.rejected[rows]])  # (2b,)
    text, mask = reader.read_prompts([prompts[i] for i in rollouts])
    return patches[rollouts].float().to(device), text.to(device), mask.to(device)


def score(
    policy: NoiseARPolicy, reference: NoiseARPolicy, batch: Batch, exact: bool = False
) -> tuple[PairLogProbs, Independent, Independent]:
    """Log-probabilities of pairs under policy and reference, and the two distributions; ``exact`` has no gradient."""
    own = (policy.exact_distribution if exact else policy.distribution)(*batch)
    with torch.no_grad():
        frozen = (reference.exact_distribution if exact else reference.distribution)(*batch)
    (chosen, rejected), (reference_chosen, reference_rejected) = (
        density.log_prob(batch[0]).chunk(2)  # (b, N) each
        for density in (own, frozen)
    )
    return PairLogProbs(chosen, rejected, reference_chosen, reference_rejected), own, frozen


@torch.no_grad()
def validate(
    policy: NoiseARPolicy, reference: NoiseARPolicy, batches: Iterable[Batch], part: Part | None = None
) -> tuple[PairLogProbs, dict[str, float]]:
    """Scores held-out pairs, all of them together since some losses sort a batch (``aot``), and measures the drift.

    Args:
        policy: The policy.
        reference: The frozen reference.
        batches: Pairs of this process.
        part: Which of the pairs of all processes they are; ``None`` for all of them, in a single process.
    """
    scores, drifts = [], []
    for batch in batches:
        scored, own, frozen = score(policy, reference, batch, exact=True)
        scores.append(scored)
        drifts.append(torch.stack([kl_to_gaussian(own), kl_divergence(own, frozen)]))  # (2, 2b, N)
    together = PairLogProbs.concatenated(scores)
    part = part or shard(len(together.chosen))
    to_gaussian, to_reference = part.mean(torch.cat(drifts, 1).sum(2).mean(1)).tolist()
    return together.joined(part), {"policy/kl_to_gaussian": to_gaussian, "policy/kl_to_reference": to_reference}


def iterate(config: DPOConfig, denoiser: Denoiser | None = None) -> NoiseARPolicy:
    """Trains ``rounds`` times, each time on rollouts of the policy so far; round ``i`` is in ``output_dir/round-i``."""
    first = load_rollouts(config.rollouts)
    manifest, prompts = first.manifest, tuple(dict.fromkeys(first.prompts))
    with values_from(config.rollouts / "manifest.json"):  # which may name code
        check_env_id(str(manifest.get("env_id")))
        check_denoiser(str(manifest.get("env_denoiser") or "shapes"))
        check_reward(str(manifest.get("reward_spec") or "brightness"))
    policy, rollouts, start = None, config.rollouts, config.init_from
    for number in range(config.rounds):
        folder = config.output_dir / f"round-{number}"
        if number:
            rollouts = folder / "rollouts"
            again = CollectConfig(
                env_id=manifest["env_id"],
                denoiser=manifest.get("env_denoiser"),
                denoiser_options=config.denoiser_options,
                reward=manifest.get("reward_spec"),
                reward_device=config.reward_device,
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


def from_trl(arguments: trl.DPOConfig, **options: Any) -> DPOConfig:
    """Builds options from what a ``trl.DPOConfig`` says about the loss and its optimisation.

    Args:
        arguments: trl's configuration; what concerns only language models is ignored.
        **options: Fields of :class:`DPOConfig` that trl does not have, such as ``rollouts``.

    Raises:
        ValueError: If it asks for what :func:`~noisear_rl.learning.preference_losses.options_of_trl` refuses.
    """
    return DPOConfig(**(options_of_trl(arguments) | options))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(DPOConfig, argv, __doc__)
    if config.rounds > 1:
        iterate(config)
    else:
        train(config)
    if is_main():
        print(f"policy: {config.output_dir}")


if __name__ == "__main__":
    run_script(main)
