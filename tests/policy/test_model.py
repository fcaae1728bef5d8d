import copy

import pytest
import torch
import yaml
from torch.distributions import Normal

from noisear_rl.gaussian import kl_to_gaussian, standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
from tests.conftest import random_policy

TEXT = torch.randn(8, 16, 256, generator=torch.Generator().manual_seed(1))
MASK = torch.arange(16)[None] < torch.arange(4, 12)[:, None]


def test_untrained_policy_is_the_gaussian_prior_exactly():
    policy = NoiseARPolicy(NoiseARConfig()).eval()
    sample = policy.sample(TEXT, MASK, seeds=range(8))
    assert torch.equal(policy.noise(sample), standard_noise(range(8), (4, 8, 8)))
    assert torch.equal(sample.log_prob, Normal(0.0, 1.0).log_prob(sample.patches).sum(-1))
    assert policy.kl_divergence(sample.patches, TEXT, MASK).abs().max() == 0


@pytest.mark.parametrize("architecture", ["paper", "released"])
def test_cached_equals_uncached_and_batch_equals_single(architecture):
    policy = random_policy(architecture=architecture)
    cached = policy.sample(TEXT, MASK, seeds=range(8))
    plain = policy.sample(TEXT, MASK, seeds=range(8), use_cache=False)
    single = [policy.sample(TEXT[i : i + 1], MASK[i : i + 1], seeds=[i]).patches for i in range(8)]
    assert (policy.noise(cached) - standard_noise(range(8), (4, 8, 8))).abs().mean() > 0.1  # far from the prior
    torch.testing.assert_close(cached.patches, plain.patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(cached.patches, torch.cat(single), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["paper", "released"])
def test_repeated_prompts_are_read_once_and_give_the_same_numbers(architecture):
    policy, rows = random_policy(architecture=architecture), [0, 1, 1, 0, 2, 0, 1, 2]
    mask = MASK.clone()
    mask[2] = mask[0]  # rows 0 and 2 differ in their text alone, 1 and 3 in their mask alone
    text, mask = TEXT[[0, 1, 2, 1]], mask[[0, 1, 2, 3]]
    many = [*rows, 3, 3, 3]
    patches = torch.randn(len(many), 16, 16, generator=torch.Generator().manual_seed(2))
    read, encode = [], policy.network.encode
    policy.network.encode = lambda text, mask: read.append(len(text)) or encode(text, mask)
    log_prob = policy.log_prob(patches, text[many], mask[many])
    log_prob.sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    single = torch.cat([policy.log_prob(patches[i : i + 1], text[[j]], mask[[j]]) for i, j in enumerate(many)])
    single.sum().backward()
    assert read == [4] + [1] * len(many)
    torch.testing.assert_close(log_prob, single, rtol=1e-5, atol=1e-4)
    for ours, expected in zip(gradients, (p.grad for p in policy.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    policy.log_prob(patches, TEXT[0].expand(11, -1, -1) + torch.arange(11)[:, None, None], None)
    policy.train().log_prob(patches, text[many], mask[many])  # dropout of a text layer would be shared
    assert read[-2:] == [11, 11]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_log_prob_scores_what_sample_draws(dtype, tolerance, temperature):
    policy = random_policy(temperature=temperature).to(dtype)
    sample = policy.sample(TEXT, MASK, seeds=range(8))
    scored = policy.log_prob(sample.patches, TEXT, MASK)
    assert sample.patches.dtype == scored.dtype == torch.float32
    torch.testing.assert_close(scored, sample.log_prob, rtol=tolerance, atol=0)


def test_temperature_scales_the_standard_deviation():
    warm, cold = random_policy(temperature=1.0), random_policy(temperature=0.5)
    patches = standard_noise(range(8), (16, 16))
    a, b = (p.distribution(patches, TEXT).base_dist for p in (warm, cold))
    torch.testing.assert_close(b.stddev, a.stddev * 0.5)
    assert torch.equal(a.mean, b.mean)


def test_a_patch_depends_only_on_earlier_patches():
    policy = random_policy()
    patches = standard_noise(range(8), (16, 16))
    changed = patches.clone()
    changed[:, 7] += 1
    before, after = (policy.distribution(x, TEXT, MASK).base_dist.mean for x in (patches, changed))
    assert torch.equal(before[:, :8], after[:, :8])
    assert ((before - after)[:, 8:].abs().amax(-1) > 1e-4).all()


def test_masked_text_does_not_matter():
    policy = random_policy()
    other = torch.where(MASK[..., None], TEXT, torch.randn_like(TEXT))
    a, b = (policy.sample(text, MASK, seeds=range(8)).patches for text in (TEXT, other))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (policy.sample(other, seeds=range(8)).patches - a).abs().max() > 1e-3


def test_kl_is_closed_form():
    policy, other = random_policy(0), random_policy(1)
    patches = standard_noise(range(8), (16, 16))
    p, q = (m.distribution(patches, TEXT).base_dist for m in (policy, other))
    variance_ratio = (p.stddev / q.stddev) ** 2
    expected = 0.5 * (variance_ratio + ((p.mean - q.mean) / q.stddev) ** 2 - 1 - variance_ratio.log()).sum(-1)
    torch.testing.assert_close(policy.kl_divergence(patches, TEXT, other=other), expected)
    expected = 0.5 * (p.mean**2 + p.variance - 1 - p.variance.log()).sum(-1)
    torch.testing.assert_close(policy.kl_divergence(patches, TEXT), expected)
    torch.testing.assert_close(kl_to_gaussian(policy.distribution(patches, TEXT)), expected)


def test_kl_estimates_the_log_ratio_of_samples():
    policy = random_policy(scale=0.04)
    text = TEXT[:1].expand(1024, -1, -1)
    sample = policy.sample(text, seeds=range(1024))
    ratio = (sample.log_prob - Normal(0.0, 1.0).log_prob(sample.patches).sum(-1)).sum(1)
    kl = policy.kl_divergence(sample.patches, text).sum(1)
    standard_error = (ratio - kl).std() / 32
    assert abs((ratio - kl).mean()) < 4 * standard_error
    assert kl.mean() > 1


def test_any_rank_and_channel_count():
    for shape, patch_size in (((8, 4, 6, 6), 2), ((3, 20), 5)):
        policy = random_policy(latent_shape=shape, patch_size=patch_size)
        sample = policy.sample(TEXT, seeds=range(8))
        assert policy.noise(sample).shape == (8, *shape)
        torch.testing.assert_close(policy.log_prob(sample.patches, TEXT), sample.log_prob, rtol=1e-4, atol=0)


def test_positions_and_fixed_variance():
    policy = random_policy(positions="sinusoidal", log_variance="fixed")
    assert "network.pos_encoding" not in dict(policy.named_parameters())
    assert "network.pos_encoding" in dict(random_policy().named_parameters())
    gaussian = policy.distribution(standard_noise(range(8), (16, 16)), TEXT).base_dist
    assert (gaussian.stddev == 1).all()


def test_hub_round_trip(tmp_path):
    policy = random_policy(n_layers=1, temperature=0.7)
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.config == policy.config and not loaded.training
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())


def test_the_card_says_what_the_policy_is(tmp_path):
    policy = random_policy(n_layers=1, temperature=0.7)
    policy.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front, text = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["library_name"] == "noisear-rl" and "noise-prior" in yaml.safe_load(front)["tags"]
    assert "More Information Needed" not in card and "4 × 8 × 8 (256 numbers) in 16 patches" in text
    assert f"| parameters | {sum(p.numel() for p in policy.parameters()):,} |" in text
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert NoiseARConfig(**options) == policy.config
    assert 'load_policy("me/mine")' in str(policy.generate_model_card(place="me/mine"))


def test_bad_input():
    policy = random_policy()
    patches = standard_noise(range(8), (16, 16))
    with pytest.raises(ValueError, match=r"expected patches \(8, 16, 16\), got \(8, 15, 16\)"):
        policy.log_prob(patches[:, :15], TEXT)
    with pytest.raises(ValueError, match="NaN"):
        policy.log_prob(torch.where(patches > 2, torch.nan, patches), TEXT)
    with pytest.raises(ValueError, match="another denoiser"):
        policy.sample(TEXT[..., :128])
    with pytest.raises(ValueError, match="text mask"):
        policy.sample(TEXT, MASK[:, :8])
    with pytest.raises(ValueError, match="7 seeds for 8"):
        policy.sample(TEXT, seeds=range(7))
    for options, message in (
        ({"architecture": "gpt"}, "architecture must be one of"),
        ({"patch_size": 3}, "does not divide"),
        ({"n_heads": 3}, "divisible"),
        ({"temperature": 0.0}, "temperature"),
        ({"positions": "rotary"}, "positions"),
    ):
        with pytest.raises(ValueError, match=message):
            NoiseARConfig(**options)


def test_bad_files(tmp_path):
    policy = random_policy()
    policy.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    complete = weights.read_bytes()
    weights.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_policy(tmp_path)
    weights.write_bytes(complete)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"paper"', '"released"'))
    with pytest.raises(ValueError, match="not the weights of a policy with"):
        load_policy(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no policy"):
        load_policy(empty)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy(tmp_path / "none")


def test_dropout_is_active_only_in_train_mode():
    policy = random_policy(dropout=0.5)
    patches = standard_noise(range(8), (16, 16))
    assert torch.equal(policy.log_prob(patches, TEXT), policy.log_prob(patches, TEXT))
    noisy = copy.deepcopy(policy).train()
    assert not torch.equal(noisy.log_prob(patches, TEXT), noisy.log_prob(patches, TEXT))
