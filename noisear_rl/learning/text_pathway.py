"""How a policy reads its prompts: text statistics before training, and cross-talk between prompts during it.

Shapes: ``B`` episodes, ``N`` patches, ``A`` elements per patch, ``L`` text tokens, ``D`` text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import parameters_to_vector

from noisear_rl.learning.fisher import assign_parameters
from noisear_rl.learning.losses import reinforce_loss
from noisear_rl.policy import NoiseARPolicy
from noisear_rl.prompts.reader import PromptReader
from noisear_rl.seeds import Stream, stream_rng

STATISTICS_PROMPTS, ENCODE_BATCH = 1024, 64
EPISODES, OTHERS, RELATIVE_STEP = 64, 16, 1e-3  # of one prompt, other prompts, and the step's share of the parameters


def fit_text(policy: NoiseARPolicy, reader: PromptReader, prompts: Sequence[str], seed: int) -> None:
    """Fits the text statistics of a policy that whitens its text, on up to 1,024 of the training prompts.

    Does nothing for a policy that needs no statistics or has them, so that resuming and fine-tuning keep them.

    Args:
        policy: The policy.
        reader: Reads the prompts.
        prompts: Training prompts.
        seed: Seed of the choice among them.
    """
    if not policy.needs_text_statistics:
        return
    distinct = list(dict.fromkeys(prompts))
    order = stream_rng(seed, Stream.TEXT_STATISTICS).permutation(len(distinct))[:STATISTICS_PROMPTS]
    chosen = [distinct[i] for i in order]
    batches = range(0, len(chosen), ENCODE_BATCH)
    read = [reader.read_prompts(chosen[i : i + ENCODE_BATCH]) for i in batches]
    policy.fit_text(torch.cat([text.cpu() for text, _ in read]), torch.cat([mask.cpu() for _, mask in read]))


def cross_talk(
    policy: NoiseARPolicy,
    patches: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    advantages: torch.Tensor,
    groups: torch.Tensor,
) -> float:
    """The share by which a small gradient step on one prompt moves the others' noise.

    1: the policy does not distinguish prompts, and opposite rewards cancel. 0: it learns them independently.

    Args:
        policy: The policy; its parameters are restored, its gradients are not touched.
        patches: ``(B, N, A)`` of an update's episodes.
        text: ``(B, L, D)``.
        text_mask: ``(B, L)``.
        advantages: ``(B,)``.
        groups: ``(B,)`` integers; episodes of one prompt share a number.

    Returns:
        ``⟨Δ_other, Δ_own⟩ / ⟨Δ_own, Δ_own⟩`` of the means' shifts on the same patches, averaged over up to 16 other
        prompts; NaN if there is only one prompt or the step moves nothing.
    """
    own = (groups == groups[0]).nonzero()[:EPISODES, 0]
    first = [int((groups == group).nonzero()[0, 0]) for group in groups.unique().tolist()]
    others = [row for row in first if groups[row] != groups[0]][:OTHERS]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    loss = reinforce_loss(policy.log_prob(patches[own], text[own], text_mask[own]), advantages[own])
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    if not others or not gradient.any() or not gradient.isfinite().all():
        return float("nan")

    def means() -> torch.Tensor:
        """Means under every prompt's text, on the same patches: ``(1 + others, own, N, A)``."""
        count = len(own)
        read = [(text[row].expand(count, -1, -1), text_mask[row].expand(count, -1)) for row in (int(own[0]), *others)]
        return torch.stack([policy.exact_distribution(patches[own], *one).mean for one in read])

    with torch.no_grad():
        start, before = parameters_to_vector(parameters), means()
        step = RELATIVE_STEP * start.norm() / gradient.norm() * gradient
        assign_parameters(parameters, start - step)
        shift = (means() - before).flatten(1)
        assign_parameters(parameters, start)
    return (shift[1:] @ shift[0] / (shift[0] @ shift[0])).mean().item()
