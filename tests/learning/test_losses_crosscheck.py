"""PPO's, GRPO's and REINFORCE's losses against independent implementations and closed forms."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Independent, Normal

from noisear_rl.learning.losses import generalized_advantages, group_advantages, ppo_loss, reinforce_loss

B, N, A = 12, 4, 3


def random_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    mean, old_mean, actions = draw(B, N, A) * 0.3, draw(B, N, A) * 0.3, draw(B, N, A)
    log_std = (draw(B, N, A) * 0.1).requires_grad_()
    old_log_prob = Independent(Normal(old_mean, torch.ones_like(old_mean)), 1).log_prob(actions)
    return mean.requires_grad_(), log_std, actions, old_log_prob, draw(B, N)


@pytest.mark.parametrize("clip_range", [0.2, 0.5])
def test_ppo_equals_torchrl(clip_range):
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.objectives import ClipPPOLoss

    mean, log_std, actions, old_log_prob, advantages = random_batch(1)
    own_mean, own_log_std = (x.detach().clone().requires_grad_() for x in (mean, log_std))
    loss = ppo_loss(
        Independent(Normal(own_mean, own_log_std.exp()), 1).log_prob(actions), old_log_prob, advantages, clip_range
    )
    loss.backward()

    class Given(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_std = torch.nn.Parameter(mean.detach()), torch.nn.Parameter(log_std.detach())

        def forward(self, observation):
            return self.mean, self.log_std.exp()

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(Given(), in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=lambda loc, scale: Independent(Normal(loc, scale), 1),
            return_log_prob=True,
        ),
    )
    module = ClipPPOLoss(actor, None, clip_epsilon=clip_range, entropy_bonus=False, reduction="mean")
    module.set_keys(sample_log_prob="old_log_prob")
    data = TensorDict(
        {
            "observation": torch.zeros(B, N, 1),
            "action": actions,
            "old_log_prob": old_log_prob,
            "advantage": advantages[..., None],
        },
        batch_size=[B, N],
    )
    expected = module(data)["loss_objective"] * N  # theirs averages over patches, ours sums
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    theirs = dict(actor.named_parameters())
    for name, own in (("mean", own_mean), ("log_std", own_log_std)):
        other = next(p for key, p in theirs.items() if key.endswith(name))
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-8)


def test_ppo_equals_the_formula_of_stable_baselines3():
    mean, log_std, actions, old_log_prob, advantages = random_batch(2)
    log_prob = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    ratio = torch.exp(log_prob - old_log_prob)
    first = advantages * ratio
    second = advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    expected = -torch.min(first, second).mean() * N
    torch.testing.assert_close(ppo_loss(log_prob, old_log_prob, advantages, 0.2), expected)


def test_ppo_begins_as_reinforce():
    """At ratio 1 both gradients are the same, and a critic behind the advantages gets none."""
    mean, log_std, actions, _, _ = random_batch(3)
    log_prob = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    episodic = torch.randn(B, dtype=torch.float64, requires_grad=True)
    clipped = ppo_loss(log_prob, log_prob.detach(), episodic[:, None].expand(B, N), 0.2)
    first = torch.autograd.grad(clipped, [mean, episodic], retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(reinforce_loss(log_prob, episodic), [mean, episodic], allow_unused=True)
    torch.testing.assert_close(first[0], second[0])
    assert first[1] is None and second[1] is None


def trl_grpo(log_prob, old_log_prob, advantages, low, high, kind):
    """``GRPOTrainer._compute_loss`` unbound: a patch is a token of a completion after a prompt of one token."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    same = lambda value, **_: value
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_prob, torch.zeros_like(log_prob), None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, sync_gradients=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        loss_type=kind,
        importance_sampling_level="token",
        epsilon_low=low,
        epsilon_high=high,
        beta=0.0,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=N,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    tokens = torch.ones(len(log_prob), N, dtype=torch.long)
    inputs = {"prompt_ids": tokens[:, :1], "prompt_mask": tokens[:, :1], "completion_ids": tokens}
    inputs |= {"completion_mask": tokens, "advantages": advantages, "old_per_token_logps": old_log_prob}
    inputs["num_items_in_batch"] = tokens.sum()
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


# "luspo" sums over tokens, as we do; the others average over them, which is the same where all completions are as long.
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.5, None), (0.5, 1.0)])
def test_grpo_equals_trl(kind, low, high):
    pytest.importorskip("trl")
    for seed in range(3):
        mean, _, actions, old_log_prob, rewards = random_batch(seed)
        rewards, group = rewards[:, 0], torch.arange(B) % 3
        grouped = rewards.view(-1, 3).T  # (prompts, generations), and trl's formula with scale_rewards="group"
        expected = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).T.reshape(-1)
        advantages = group_advantages(rewards, group, "grpo")
        torch.testing.assert_close(advantages, expected)

        log_prob = Independent(Normal(mean, torch.ones_like(mean)), 1).log_prob(actions)
        loss = ppo_loss(log_prob, old_log_prob, advantages[:, None].expand(-1, N), low, high)
        theirs, metrics = trl_grpo(log_prob, old_log_prob, expected, low, low if high is None else high, kind)
        theirs = theirs if kind == "luspo" else N * theirs
        torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-8)
        gradients = [torch.autograd.grad(x, mean, retain_graph=True)[0] for x in (loss, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
        clipped = [metrics[f"clip_ratio/{side}_mean"][0] for side in ("low", "high")]
        assert min(clipped) > 0  # both sides count


def test_the_upper_clip_range_is_for_ratios_above_1():
    """Clip-higher leaves the gradient of good episodes that have become likelier, and of no others."""
    ratio = torch.tensor([[1.4], [1.4], [0.4], [0.4], [3.0]])
    log_prob, advantages = ratio.log().requires_grad_(), torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]])
    for high, expected in ((None, [0, 1, 1, 0, 0]), (1.0, [1, 1, 1, 0, 0])):
        loss = ppo_loss(log_prob, torch.zeros_like(log_prob), advantages, 0.2, high)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        assert (gradient != 0).int()[:, 0].tolist() == expected


def test_ppo_refuses_shapes_that_would_broadcast():
    log_prob = torch.zeros(B, N)
    with pytest.raises(ValueError, match="one shape"):
        ppo_loss(log_prob, log_prob, torch.zeros(B, 1), 0.2)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_with_a_reward_at_the_end(gae_lambda):
    """``A_i = Σ_k λ^k δ_{i+k}`` written out; λ = 1 is ``R - V_i``, λ = 0 the one-step difference."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(B, generator=generator), torch.randn(B, N, generator=generator)
    advantages, returns = generalized_advantages(rewards, values, gae_lambda)
    padded = torch.cat([values, rewards[:, None]], 1)  # nothing beyond the end
    for i in range(N):
        expected = sum(gae_lambda**k * (padded[:, i + k + 1] - padded[:, i + k]) for k in range(N - i))
        torch.testing.assert_close(advantages[:, i], expected)
    torch.testing.assert_close(returns, advantages + values)
    if gae_lambda == 1:
        torch.testing.assert_close(advantages, rewards[:, None] - values)


def test_reinforce_is_the_gradient_of_the_expected_reward():
    """``R(x) = x²`` under N(μ, 1): ``E[R] = μ² + 1``. The estimator agrees with finite differences of E[R]."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(400_000, 1, 1, generator=generator, dtype=torch.float64)
    actions = (mean + noise).detach()
    rewards = actions[:, 0, 0] ** 2
    log_prob = Independent(Normal(mean, torch.ones_like(actions)), 1).log_prob(actions)  # (B, 1)
    advantages = group_advantages(rewards, torch.arange(len(rewards)) % 100, "rloo")
    (gradient,) = torch.autograd.grad(-reinforce_loss(log_prob, advantages), mean)
    expected = lambda value: ((value + noise) ** 2).mean().item()
    finite = (expected(0.701) - expected(0.699)) / 0.002
    assert gradient.item() == pytest.approx(finite, abs=0.03)
    assert gradient.item() == pytest.approx(1.4, abs=0.03)
