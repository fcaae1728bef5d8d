"""Training in bfloat16 and with compiled networks: the same densities up to rounding, and PPO's first ratio is 1."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import kl_divergence

from noisear_rl.algos import ppo
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.natural_gradient import natural_step
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.samplers.npnet import NPNet
from tests import toys
from tests.conftest import random_policy
from tests.launching import launch
from tests.training_runs import TINY, flat, parameters, prepare, trainings

WIDE = {"latent_shape": (4, 64, 64), "patch_size": 16, "text_dim": 64}  # 1,024 elements per patch
VARIANTS = {
    "fixed": {"log_variance": "fixed"},
    "predicted": {"log_variance": "predicted", **WIDE},
    "whitened": {"text_features": "whitened", "text_dim": 32},
    "tokens": {"text_encoder": "tokens", "text_vocabulary": 50, "text_length": 9},
    "layouts": {"layouts": 3},
    "released": {"architecture": "released", "text_dim": 32},
}


def episodes(policy, count=8):
    """Noises and their prompts, ``count`` each."""
    generator, config = torch.Generator().manual_seed(0), policy.config
    text = torch.randn(count, 9, config.text_dim, generator=generator)
    if config.text_encoder == "tokens":
        text = torch.randint(50, (count, 9, 1), generator=generator)
    mask = torch.arange(9)[None] < torch.arange(count)[:, None] % 6 + 4
    if policy.needs_text_statistics:
        policy.fit_text(text, mask)
    return policy.sample(text, mask, seeds=range(count)).patches, text, mask


@pytest.mark.parametrize("variant", VARIANTS)
def test_densities_in_bfloat16_are_those_of_float32_up_to_rounding(variant):
    policy = random_policy(scale=0.05, **VARIANTS[variant])
    batch = episodes(policy)
    half = copy.deepcopy(policy).compute_in("bfloat16")
    with torch.no_grad():
        exact, found = policy.distribution(*batch), half.distribution(*batch)
    assert found.mean.dtype == found.stddev.dtype == half.log_prob(*batch).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert 0 < (found.mean - exact.mean).norm() < 0.02 * exact.mean.norm()  # a bfloat16 holds 8 bits: 0.4 %
    torch.testing.assert_close(found.stddev, exact.stddev, rtol=0.02, atol=0)
    assert torch.equal(half.exact_distribution(*batch).mean, exact.mean) and half.precision == "bfloat16"
    sample = half.sample(*batch[1:], seeds=range(8))
    again = half.log_prob(sample.patches, *batch[1:])
    torch.testing.assert_close(again, sample.log_prob, rtol=1e-3, atol=0)  # cached and teacher-forced, in nats


def test_an_untrained_policy_is_the_prior_in_bfloat16():
    policy = NoiseARPolicy(NoiseARConfig()).eval().compute_in("bfloat16")
    sample = policy.sample(torch.randn(3, 9, 256), seeds=[1, 2, 3])
    assert torch.equal(policy.noise(sample), standard_noise([1, 2, 3], (4, 8, 8)))


def test_npnet_in_bfloat16():
    npnet = NPNet(TINY)
    for parameter in npnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    noise, text = standard_noise(range(4), (4, 8, 8)), torch.randn(4, *TINY.text_shape)
    exact = npnet(noise, text)
    npnet.precision = "bfloat16"
    found = npnet(noise, text)
    assert found.dtype == torch.float32 and 0 < (found - exact).norm() < 0.01 * exact.norm()


def test_the_kl_of_a_step_is_measured_in_float32():
    """At this size, rounding to bfloat16 alone looks like a KL; a step of that length would be halved to nothing."""
    policy = random_policy(scale=0.05, log_variance="fixed", **WIDE).compute_in("bfloat16")
    patches, text, mask = episodes(policy)
    before = policy.exact_distribution(patches, text, mask)
    rounded = kl_divergence(before, policy.distribution(patches, text, mask)).sum(1).mean().item()
    (policy.log_prob(patches, text, mask).sum(1) * torch.linspace(-1, 1, 8)).mean().backward()
    kl, after = natural_step(policy, patches, text, mask, target_kl=rounded / 4)
    assert 0.5 * rounded / 4 < kl < 1.5 * rounded / 4
    assert kl == pytest.approx(kl_divergence(before, after).sum(1).mean().item(), rel=1e-4)


def first_ratios(folder, **options):
    """PPO's first ratio at every update, in patches wide enough for results to depend on the size of a batch."""
    policy = NoiseARConfig(d_model=256, d_ff=256, n_layers=1, n_heads=2, log_variance="shared")
    sizes = {"prompts_per_update": 2, "samples_per_prompt": 5, "updates": 2, "policy": policy, "target_kl": 5.0}
    name = toys.register(toys.Target(), latent_shape=(4, 64, 32), patch_size=32)
    ppo.train(ppo.PPOConfig(name, output_dir=folder, step="fixed", epochs=1, **(sizes | options)))
    records = read_records(folder)
    assert records[-1]["policy/kl_to_gaussian"] > 1  # it moved
    return [record["losses/first_ratio"] for record in records]


@pytest.mark.parametrize("micro_batches", [1, 10])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ppos_first_ratio_is_exactly_1(tmp_path, precision, micro_batches):
    assert first_ratios(tmp_path, precision=precision, micro_batches=micro_batches) == [1.0, 1.0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


NAMES = ("ppo-natural", "ppo-adam", "ppo-gae", "reinforce", "trajectory-balance", "dpo", "reward-gradient", "nll")
NAMES += ("npnet",)
STILL = {name: {"target_kl": 1e-12} for name in ("ppo-natural", "reinforce", "trajectory-balance")}
UPDATES, BFLOAT16 = 3, {"precision": "bfloat16"}


@pytest.mark.parametrize("name", NAMES)
def test_trainings_in_bfloat16(data, tmp_path, name):
    """They go where those in float32 go, up to rounding; micro-batches change no more than that."""
    train = trainings(data, UPDATES)[name]
    options = {"start": STILL.get(name, {"learning_rate": 0.0}), "exact": {}, "half": BFLOAT16}
    options["parts"] = {"micro_batches": 3, **BFLOAT16}
    start, exact, half, parts = (flat(train(tmp_path / key, **more).state_dict()) for key, more in options.items())
    way = (exact - start).norm()
    assert 0 < (half - exact).norm() < 0.15 * way and (half - parts).norm() < 0.1 * way


@pytest.mark.slow
def test_two_processes_train_in_bfloat16_as_one(data, tmp_path):
    names = ("ppo-natural", "dpo", "nll")
    asked = [f"{name}:precision={json.dumps('bfloat16')}" for name in names]
    launch(2, "tests/training_runs.py", data, tmp_path / "two", str(UPDATES), *asked)
    for name in names:
        own, other = (flat(load_file(parameters(tmp_path / "two", name, rank))) for rank in (0, 1))
        whole = flat(trainings(data, UPDATES)[name](tmp_path / name, **BFLOAT16).state_dict())
        assert torch.equal(own, other) and (own - whole).norm() < 1e-3 * whole.norm()
    ratios = [record["losses/first_ratio"] for record in read_records(tmp_path / "two/ppo-natural")]
    assert ratios == pytest.approx([1.0] * UPDATES, abs=1e-3)  # two minibatches: their sizes differ


@pytest.mark.slow
def test_a_compiled_policy_is_the_same_up_to_rounding():
    policy = random_policy(scale=0.05, log_variance="predicted", **WIDE)
    patches, text, mask = episodes(policy)
    compiled = copy.deepcopy(policy).compute_in("float32", compile=True)
    gradients = []
    for network in (policy, compiled):
        (network.log_prob(patches, text, mask).sum(1) * torch.linspace(-1, 1, 8)).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()
    with torch.no_grad():
        exact, found = policy.distribution(patches, text, mask), compiled.distribution(patches, text, mask)
    assert not torch.equal(exact.mean, found.mean)  # it did compile: rounding differs
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-4, atol=1e-5)
    sample, other = (network.sample(text, mask, seeds=range(8)).patches for network in (policy, compiled))
    assert torch.equal(sample, other)
    kl, _ = natural_step(compiled, patches, text, mask, target_kl=0.1)  # has second derivatives
    assert 0.05 < kl < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-natural", "dpo", "nll"])
def test_compiled_trainings(data, tmp_path, name):
    train = trainings(data, UPDATES)[name]
    exact, found = (flat(train(tmp_path / str(on), compile=on).state_dict()) for on in (False, True))
    assert not torch.equal(exact, found) and (exact - found).norm() < 1e-4 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ppos_first_ratio_is_exactly_1_if_compiled(tmp_path, precision):
    assert first_ratios(tmp_path, precision=precision, compile=True, micro_batches=2) == [1.0, 1.0]
