"""Algorithms learn, resume exactly, and refuse what they cannot use."""

import dataclasses
from pathlib import Path

import pytest
import torch

from noisear_rl.algos import nll, reinforce, reward_gradient
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.algos.reward_gradient import RewardGradientConfig
from noisear_rl.data.pairs import PairsConfig, build_pairs, load_pairs
from noisear_rl.data.weak_to_strong import weak_to_strong
from noisear_rl.denoisers import load_denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.run import read_records
from noisear_rl.policy import NoiseARConfig, load_policy

PROMPTS = ("a photo of a red circle", "a photo of two squares")


TOP_LEFT = str(Path(__file__).parents[1] / "files/top_left.py")


def config(folder, **options):
    defaults = {
        "reward": TOP_LEFT,
        "prompts": PROMPTS,
        "prompts_per_update": 2,
        "samples_per_prompt": 8,
        "updates": 4,
    }
    return ReinforceConfig(output_dir=folder, **(defaults | options))


@pytest.mark.parametrize(("optimizer", "advantage"), [("natural", "rloo"), ("adam", "ema")])
def test_resumed_equals_uninterrupted(tmp_path, optimizer, advantage):
    options = {"optimizer": optimizer, "advantage": advantage, "save_every": 2}
    whole = reinforce.train(config(tmp_path / "a", **options))
    reinforce.train(config(tmp_path / "b", **options, updates=2))
    resumed = reinforce.train(config(tmp_path / "b", **options, resume=True))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for a, b in zip(read_records(tmp_path / "a"), read_records(tmp_path / "b"), strict=True):
        a.pop("charts/SPS"), b.pop("charts/SPS")
        assert a == pytest.approx(b, abs=1e-4)
    assert load_policy(tmp_path / "a").config == whole.config


def test_reinforce_improves_its_reward(tmp_path):
    """30 updates of 64 images darken the corner by more than two standard deviations of Gaussian noise."""
    options = {"samples_per_prompt": 32, "updates": 30, "target_kl": 1.0}
    reinforce.train(config(tmp_path, **options))
    rewards = [record["charts/episodic_return"] for record in read_records(tmp_path)]
    assert sum(rewards[-5:]) / 5 - rewards[0] > 1.0, rewards
    last = read_records(tmp_path)[-1]
    assert 0 < last["losses/approx_kl"] <= 1.5 and last["policy/kl_to_gaussian"] < 60
    assert list((tmp_path / "tensorboard").rglob("events.*"))


def test_kl_penalty_holds_the_policy_back(tmp_path):
    free = reinforce.train(config(tmp_path / "free", updates=6))
    held = reinforce.train(config(tmp_path / "held", updates=6, kl_prior_coef=10.0))
    text = load_denoiser("shapes").encode(PROMPTS).policy_embeds
    patches = standard_noise(range(2), (16, 16))
    assert held.kl_divergence(patches, text).sum() < 0.5 * free.kl_divergence(patches, text).sum()


def test_reinforce_bad_input(tmp_path):
    with pytest.raises(ValueError, match="unknown optimizer"):
        reinforce.train(config(tmp_path, optimizer="sgd"))
    with pytest.raises(ValueError, match="unknown advantage"):
        reinforce.train(config(tmp_path / "b", advantage="critic"))
    with pytest.raises(ValueError, match="another denoiser"):
        reinforce.train(config(tmp_path / "c", policy=NoiseARConfig(text_dim=2048)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    build_pairs(PairsConfig(output_dir=folder, pairs=1024, num_inference_steps=5))
    return folder


def test_nll_learns_the_shift_and_resumes(tmp_path, pairs):
    options = {
        "pairs": pairs, "epochs": 5, "batch_size": 64, "learning_rate": 1e-3, "save_every": 75,
        "policy": NoiseARConfig(log_variance="fixed"),
    }  # fmt: skip
    whole = nll.train(NLLConfig(output_dir=tmp_path / "a", **options))
    logged = read_records(tmp_path / "a")
    assert logged[-1]["losses/nll"] < logged[0]["losses/nll"]
    assert logged[-1]["policy/kl_to_gaussian"] > 0.01

    # The learned mean points along the average shift of the pairs.
    denoiser = load_denoiser("shapes")
    prompts = load_pairs(pairs)["prompt"][:128]
    conditioning = denoiser.encode(prompts)
    noise = standard_noise(range(10_000, 10_128), denoiser.latent_shape)
    shift = (weak_to_strong(denoiser, noise, conditioning, num_inference_steps=5) - noise).mean(0)
    sample = whole.sample(conditioning.policy_embeds, conditioning.policy_mask, seeds=range(128))
    learned = (whole.noise(sample) - standard_noise(range(128), denoiser.latent_shape)).mean(0)
    cosine = torch.nn.functional.cosine_similarity(shift.flatten(), learned.flatten(), dim=0)
    assert cosine > 0.5

    # Killed in between and resumed: the same policy.
    killed = NLLConfig(output_dir=tmp_path / "b", **options)
    steps = []
    save = nll.Run.save

    def stop_after_first(self, *arguments, **parts):
        save(self, *arguments, **parts)
        steps.append(1)
        raise KeyboardInterrupt

    nll.Run.save = stop_after_first
    try:
        with pytest.raises(KeyboardInterrupt):
            nll.train(killed)
    finally:
        nll.Run.save = save
    resumed = nll.train(dataclasses.replace(killed, resume=True))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_nll_bad_input(tmp_path, pairs):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        nll.train(NLLConfig(pairs=tmp_path, output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="made for denoiser 'shapes', not 'sdxl'"):
        nll.train(NLLConfig(pairs=pairs, denoiser="sdxl", output_dir=tmp_path / "run"))


@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_reward_gradients_learn(tmp_path, optimizer):
    options = {"optimizer": optimizer, "learning_rate": 3e-3, "target_kl": 2.0}
    settings = RewardGradientConfig(
        reward=TOP_LEFT, prompts=PROMPTS, output_dir=tmp_path, prompts_per_update=2, samples_per_prompt=8, updates=12
    )
    reward_gradient.train(dataclasses.replace(settings, **options))
    returns = [record["charts/episodic_return"] for record in read_records(tmp_path)]
    assert returns[-1] > returns[0] + 1.0, returns


def test_nll_learns_the_mean_and_the_variance_of_noisy_targets(tmp_path, turbo):
    options = {
        "denoiser": "shapes-turbo",
        "filter_reward": "shapes-match",
        "min_reward": -1.0,
        "noise_scale": 0.5,
        "prompts": PROMPTS,
    }
    build_pairs(PairsConfig(kind="signal_leak", output_dir=tmp_path / "pairs", pairs=64, **options), turbo)
    settings = NLLConfig(tmp_path / "pairs", output_dir=tmp_path / "run", denoiser="shapes-turbo", epochs=250)
    policy = nll.train(
        dataclasses.replace(settings, batch_size=32, learning_rate=1e-2, policy=NoiseARConfig(log_variance="shared"))
    )
    rows = read_records(tmp_path / "run")
    assert rows[-1]["losses/nll"] < rows[0]["losses/nll"] - 0.1
    std = policy.network.log_variance.mul(0.5).exp().detach()
    assert 0.45 < std.mean() < 0.7 and std.min() > 0.4  # no less than the noise that comes on top
