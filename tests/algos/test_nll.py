"""NLL pretraining learns the shift of its pairs, resumes exactly, and holds out whole prompts."""

import dataclasses
from collections import Counter

import pytest
import torch

from noisear_rl.algos import nll
from noisear_rl.algos.nll import NLLConfig
from noisear_rl.data.pairs import PairsConfig, build_pairs, load_pairs
from noisear_rl.data.weak_to_strong import weak_to_strong
from noisear_rl.denoisers import load_denoiser
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from tests.resuming import assert_same_run, kill_and_resume

PROMPTS = ("a photo of a red circle", "a photo of two squares", "a photo of three crosses", "a photo of a blue cross")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    build_pairs(PairsConfig(output_dir=folder, pairs=512, num_inference_steps=5))
    return folder


def test_nll_learns_the_shift_and_resumes(tmp_path, pairs):
    options = {
        "pairs": pairs, "epochs": 10, "batch_size": 64, "learning_rate": 1e-3, "save_every": 60,
        "policy": NoiseARConfig(d_model=64, d_ff=64, n_layers=1, log_variance="fixed"),
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

    resumed = kill_and_resume(nll.train, NLLConfig(output_dir=tmp_path / "b", **options))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")


class Recording:
    """A denoiser that remembers the prompts it encoded."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def encode(self, prompts):
        self.calls.append(list(prompts))
        return self.denoiser.encode(prompts)


def test_held_out_prompts_are_never_trained_on_and_every_other_row_is(tmp_path, shapes, monkeypatch):
    build_pairs(PairsConfig(output_dir=tmp_path / "pairs", pairs=50, num_inference_steps=5, prompts=PROMPTS), shapes)
    rows = Counter(load_pairs(tmp_path / "pairs")["prompt"])
    recording = Recording(shapes)
    monkeypatch.setattr(nll, "load_denoiser", lambda *_, **__: recording)
    settings = NLLConfig(tmp_path / "pairs", output_dir=tmp_path / "run", epochs=2, batch_size=8, log_every=1000)
    nll.train(settings)
    *trained, held_out = recording.calls  # the last call validates
    seen, kept_out = Counter(prompt for batch in trained for prompt in batch), set(held_out)
    assert len(kept_out) == 1 and not kept_out & seen.keys()
    assert seen == {prompt: 2 * count for prompt, count in rows.items() if prompt not in kept_out}
    assert len(trained) == 2 * -(-sum(seen.values()) // 2 // 8)  # the last batch of an epoch is smaller, not dropped


def test_too_few_prompts_to_hold_out_are_refused(tmp_path, shapes):
    pairs = PairsConfig(output_dir=tmp_path / "pairs", pairs=4, num_inference_steps=5, prompts=PROMPTS[:1])
    build_pairs(pairs, shapes)
    with pytest.raises(ValueError, match="too few to hold out"):
        nll.train(NLLConfig(tmp_path / "pairs", output_dir=tmp_path / "run"))


def test_nll_bad_input(tmp_path, pairs):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        nll.train(NLLConfig(pairs=tmp_path, output_dir=tmp_path / "run"))
    with pytest.raises(ValueError, match="made for denoiser 'shapes', not 'sdxl'"):
        nll.train(NLLConfig(pairs=pairs, denoiser="sdxl", output_dir=tmp_path / "run"))


def test_nll_learns_the_mean_and_the_variance_of_noisy_targets(tmp_path, turbo):
    options = {
        "denoiser": "shapes-turbo",
        "filter_reward": "shapes-match",
        "min_reward": -1.0,
        "noise_scale": 0.5,
        "prompts": PROMPTS,
    }
    build_pairs(PairsConfig(kind="signal_leak", output_dir=tmp_path / "pairs", pairs=64, **options), turbo)
    settings = NLLConfig(tmp_path / "pairs", output_dir=tmp_path / "run", denoiser="shapes-turbo", epochs=125)
    policy = nll.train(
        dataclasses.replace(
            settings,
            batch_size=32,
            learning_rate=1e-2,
            policy=NoiseARConfig(d_model=64, d_ff=64, log_variance="shared"),
        )
    )
    rows = read_records(tmp_path / "run")
    assert rows[-1]["losses/nll"] < rows[0]["losses/nll"] - 0.1
    std = policy.network.log_variance.mul(0.5).exp().detach()
    assert 0.45 < std.mean() < 0.7 and std.min() > 0.4  # no less than the noise that comes on top
