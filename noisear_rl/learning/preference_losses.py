"""Preference losses by trl's names and with trl's semantics (trl 1.16, ``DPOTrainer``); a patch is a token.

All work on log-probabilities summed over the elements of a patch and, except for ``*_norm``, ``ipo`` and ``sft``,
over the patches of a noise: nats per noise. A log-ratio between two Gaussian policies has the standard deviation
``√(2·KL)`` whatever the number of elements, so trl's ``beta = 0.1`` (saturation at about ten nats) suits small and
large latents alike.

Shapes: ``P`` pairs, ``N`` patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.functional import logsigmoid

from noisear_rl.distributed import Part

if TYPE_CHECKING:
    import trl


@dataclass
class PairLogProbs:
    """Per-patch log-probabilities of preferred and rejected noises, ``(P, N)`` each, in nats.

    Attributes:
        chosen: Under the policy.
        rejected: Under the policy.
        reference_chosen: Under the frozen reference.
        reference_rejected: Under the frozen reference.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """Log-ratio to the reference, summed over patches: ``(P,)``."""
        return self.chosen.sum(1) - self.reference_chosen.sum(1)

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """Log-ratio to the reference, summed over patches: ``(P,)``."""
        return self.rejected.sum(1) - self.reference_rejected.sum(1)

    def joined(self, part: Part) -> PairLogProbs:
        """The pairs of all processes, of which these are a part."""
        return PairLogProbs(*(part.gather(values) for values in vars(self).values()))

    @staticmethod
    def concatenated(several: Sequence[PairLogProbs]) -> PairLogProbs:
        """Pairs one after the other, without gradients."""
        columns = zip(*(vars(pairs).values() for pairs in several), strict=True)
        return PairLogProbs(*(torch.cat(column).detach() for column in columns))


@dataclass(frozen=True)
class Strength:
    """Parameters of the losses.

    Attributes:
        beta: Inverse temperature of the implied reward ``β·log(π/π_ref)``; τ for ``ipo``.
        label_smoothing: Probability that a label is flipped (``robust``, ``aot``), ε of ``exo_pair``.
        discopop_tau: Temperature of ``discopop``.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


def _margin(pairs: PairLogProbs) -> torch.Tensor:
    return pairs.chosen_ratio - pairs.rejected_ratio


def _smoothed(margin: torch.Tensor, s: Strength) -> torch.Tensor:
    agree, flipped = logsigmoid(s.beta * margin), logsigmoid(-s.beta * margin)
    return -(1 - s.label_smoothing) * agree - s.label_smoothing * flipped


def sigmoid(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, equation 7)."""
    return -logsigmoid(s.beta * _margin(pairs))


def hinge(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """RSO's hinge on the normalised likelihood (Liu et al. 2023)."""
    return torch.relu(1 - s.beta * _margin(pairs))


def ipo(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """IPO (Azar et al. 2023, equation 17), with log-ratios averaged over patches."""
    return (_margin(pairs) / pairs.chosen.shape[1] - 1 / (2 * s.beta)) ** 2


def exo_pair(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """EXO on pairs (Ji et al. 2024, equation 16); needs ``label_smoothing > 0``."""
    margin = s.beta * _margin(pairs)
    smoothing = torch.full_like(margin, s.label_smoothing)
    better, worse = logsigmoid(margin), logsigmoid(-margin)
    return better.exp() * (better - torch.log1p(-smoothing)) + worse.exp() * (worse - smoothing.log())


def nca_pair(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """NCA on pairs (Chen et al. 2024)."""
    chosen, rejected = s.beta * pairs.chosen_ratio, s.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased if labels are flipped with ``label_smoothing``."""
    margin = s.beta * _margin(pairs)
    clean, flipped = (1 - s.label_smoothing) * logsigmoid(margin), s.label_smoothing * logsigmoid(-margin)
    return (flipped - clean) / (1 - 2 * s.label_smoothing)


def bco_pair(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """BCO's binary classifier on pairs (Jung et al. 2024), without its reward shift, as trl has it."""
    return -logsigmoid(s.beta * pairs.chosen_ratio) - logsigmoid(-s.beta * pairs.rejected_ratio)


def sppo_hard(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """SPPO with hard labels (Wu et al. 2024, equation 4.7)."""
    return (pairs.chosen_ratio - 0.5 / s.beta) ** 2 + (pairs.rejected_ratio + 0.5 / s.beta) ** 2


def aot(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """AOT on paired margins (Melnyk et al. 2024): compares sorted margins of policy and reference."""
    own = (pairs.chosen.sum(1) - pairs.rejected.sum(1)).sort().values
    reference = (pairs.reference_chosen.sum(1) - pairs.reference_rejected.sum(1)).sort().values
    return _smoothed(own - reference, s)


def aot_unpaired(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """AOT without pairing: compares the sorted log-ratios of chosen and of rejected noises."""
    return _smoothed(pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values, s)


def apo_zero(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, equation 7): chosen up, rejected down."""
    return 1 - torch.sigmoid(s.beta * pairs.chosen_ratio) + torch.sigmoid(s.beta * pairs.rejected_ratio)


def apo_down(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """APO-down (D'Oosterlinck et al. 2024, equation 8): both down, rejected further."""
    return torch.sigmoid(s.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(s.beta * _margin(pairs))


def discopop(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """DiscoPOP (Lu et al. 2024, equation 5): logistic and exponential loss, blended by the margin."""
    margin = s.beta * _margin(pairs)
    blend = torch.sigmoid(margin / s.discopop_tau)
    return -logsigmoid(margin) * (1 - blend) + torch.exp(-margin) * blend


def sft(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """NLL of the preferred noise alone, a patch: what NoiseAR calls the simple NLL loss (appendix D)."""
    return -pairs.chosen.mean(1)


def sigmoid_norm(pairs: PairLogProbs, s: Strength) -> torch.Tensor:
    """DPO with log-ratios averaged over patches."""
    return -logsigmoid(s.beta * _margin(pairs) / pairs.chosen.shape[1])


Loss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
LOSSES: dict[str, Callable[[PairLogProbs, Strength], torch.Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
        discopop, sft, sigmoid_norm,
    )
}  # fmt: skip
assert set(get_args(Loss)) == set(LOSSES)


def check_losses(names: Sequence[str], weights: Sequence[float], strength: Strength) -> None:
    """Refuses what :func:`preference_loss` cannot compute.

    Raises:
        ValueError: If a name is unknown, weights do not fit, or the strength is out of a loss's range.
    """
    if unknown := [name for name in names if name not in LOSSES]:
        raise ValueError(f"unknown loss type {unknown[0]!r}; expected one of {sorted(LOSSES)}")
    if not names or len(weights) != len(names):
        raise ValueError(f"expected one weight for each of {list(names)}, got {list(weights)}")
    if strength.beta <= 0:
        raise ValueError(f"beta must be positive, got {strength.beta}")
    if not 0 <= strength.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {strength.label_smoothing}")
    if "exo_pair" in names and strength.label_smoothing == 0:
        raise ValueError("exo_pair needs label_smoothing > 0, such as 1e-3: its target's entropy is infinite at 0")


def preference_loss(
    pairs: PairLogProbs, names: Sequence[str], weights: Sequence[float], strength: Strength
) -> torch.Tensor:
    """Weighted sum of losses, each averaged over pairs.

    Raises:
        ValueError: See :func:`check_losses`.
    """
    check_losses(names, weights, strength)
    parts = [weight * LOSSES[name](pairs, strength).mean() for name, weight in zip(names, weights, strict=True)]
    return torch.stack(parts).sum()


def trl_metrics(scored: PairLogProbs, loss: torch.Tensor, beta: float) -> dict[str, float]:
    """What trl logs of a batch, by its names; a reward is ``β`` times the log-ratio to the reference."""
    chosen, rejected = beta * scored.chosen_ratio, beta * scored.rejected_ratio
    return {
        "loss": loss.item(),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).float().mean().item(),
        "logps/chosen": scored.chosen.sum(1).mean().item(),
        "logps/rejected": scored.rejected.sum(1).mean().item(),
    }


def options_of_trl(arguments: trl.DPOConfig) -> dict[str, Any]:
    """What a ``trl.DPOConfig`` says about the loss and its optimisation, by the names of our ``DPOConfig``.

    Raises:
        ValueError: If it asks for what is not supported here: ``f_divergence_type``, ``ld_alpha``, ``use_weighting`` or
            ``sync_ref_model``.
    """
    refused = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False, "sync_ref_model": False}
    for name, default in refused.items():
        if getattr(arguments, name) != default:
            raise ValueError(f"trl.DPOConfig({name}={getattr(arguments, name)!r}) is not supported; leave {default!r}")
    return {
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
