"""Preference losses equal trl's own trainer, values and gradients."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from noisear_rl.learning.preference_losses import LOSSES, PairLogProbs, Strength, preference_loss

trl = pytest.importorskip("trl")
P, N = 6, 5


def trl_loss(pairs, names, weights, strength):
    """``DPOTrainer._compute_loss`` unbound: patches are the tokens of a completion after a prompt of one token."""
    from trl.trainer.dpo_trainer import DPOTrainer

    tokens = torch.zeros(2 * P, N, dtype=torch.long)
    outputs = SimpleNamespace(
        log_probs=torch.cat([pairs.chosen, pairs.rejected]),
        entropy=tokens.float(),
        mean_logits=tokens.float(),
        is_top1=tokens.bool(),
    )
    same = lambda value: value
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=names,
        loss_weights=weights,
        beta=strength.beta,
        label_smoothing=strength.label_smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=strength.discopop_tau),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    ids = torch.zeros(2 * P, N + 1, dtype=torch.long)
    mask = torch.ones_like(ids)
    completion = mask.clone()
    completion[:, 0] = 0
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": completion,
        "ref_chosen_logps": pairs.reference_chosen.sum(1),
        "ref_rejected_logps": pairs.reference_rejected.sum(1),
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


def random_pairs(seed, offset=-22.0):
    """Log-probabilities as 16 standard normal elements have them, and references nearby."""
    generator = torch.Generator().manual_seed(seed)
    policy = [offset + 2 * torch.randn(P, N, generator=generator, dtype=torch.float64) for _ in range(2)]
    reference = [part + torch.randn(P, N, generator=generator, dtype=torch.float64) for part in policy]
    return PairLogProbs(*(part.requires_grad_() for part in policy), *reference)


CASES = [((name,), (1.0,)) for name in LOSSES] + [(("sigmoid", "sft", "ipo"), (0.8, 0.3, 2.0))]


@pytest.mark.parametrize(("names", "weights"), CASES, ids=["+".join(names) for names, _ in CASES])
@pytest.mark.parametrize("strength", [Strength(0.1, 0.1, 0.05), Strength(0.7, 0.3, 0.5)], ids=["weak", "strong"])
def test_equals_trl(names, weights, strength):
    for seed in range(3):
        ours, theirs = random_pairs(seed), random_pairs(seed)
        loss = preference_loss(ours, names, weights, strength)
        expected, _ = trl_loss(theirs, list(names), list(weights), strength)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.chosen.grad, theirs.chosen.grad, rtol=1e-5, atol=1e-5)
        if names != ("sft",):
            torch.testing.assert_close(ours.rejected.grad, theirs.rejected.grad, rtol=1e-5, atol=1e-5)
            assert ours.rejected.grad.abs().max() > 0


def test_every_loss_type_of_trl_is_there():
    from trl.trainer.dpo_config import DPOConfig

    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {part for part in text.replace("`", "").split("'")[1::2] if part.isidentifier()}
    assert named == set(LOSSES)


def test_bad_input():
    pairs = random_pairs(0)
    with pytest.raises(ValueError, match="unknown loss type 'dpo'"):
        preference_loss(pairs, ["dpo"], [1.0], Strength())
    with pytest.raises(ValueError, match="one weight for each"):
        preference_loss(pairs, ["sigmoid", "sft"], [1.0], Strength())
    with pytest.raises(ValueError, match="beta must be positive"):
        preference_loss(pairs, ["sigmoid"], [1.0], Strength(beta=0.0))
    with pytest.raises(ValueError, match="exo_pair needs"):
        preference_loss(pairs, ["exo_pair"], [1.0], Strength())
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        preference_loss(pairs, ["robust"], [1.0], Strength(label_smoothing=0.5))
