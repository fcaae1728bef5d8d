"""Denoising seeds differ from every noise seed, and what samplers report is what was denoised."""

import math

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

from noisear_rl.data.signal_leak import signal_leak
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.envs.noise_task import ACTION_BOUND
from noisear_rl.gaussian import standard_noise
from noisear_rl.patches import patchify
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from noisear_rl.rewards import WeightedReward
from noisear_rl.samplers import BestOf, GaussianSampler, PolicySampler
from noisear_rl.samplers.base import derived_seeds
from noisear_rl.samplers.npnet import NPNet, NPNetConfig, NPNetSampler
from noisear_rl.samplers.reno import Reno
from noisear_rl.samplers.search import ZerothOrderSearch
from tests import tiny_pipelines
from tests.toys import NoDenoiser, Target

PROMPTS, SEEDS = ["up", "down", "up"], [3, 2**40, 11]
SHAPE = (4, 8, 8)
POLICY = {"latent_shape": SHAPE, "patch_size": 4, "text_dim": 8}
SWIN = {"patch_size": 2, "window_size": 2, "d_model": 8, "depths": (1,), "n_heads": (2,)}


class Recorder(NoDenoiser):
    """Keeps the noises and denoising seeds that it was given."""

    signal_level = 0.1

    def __init__(self):
        super().__init__(SHAPE, 4)
        self.noises, self.seeds = [], []

    def denoise(self, noise, conditioning, seeds=None):
        self.noises.append(noise.clone())
        self.seeds.append(seeds)
        return super().denoise(noise, conditioning)

    def denoise_with_latents(self, noise, conditioning, seeds=None):
        return self.denoise(noise, conditioning, seeds), noise


def build(name, denoiser):
    gaussian, reward = GaussianSampler(denoiser), WeightedReward([(Target(), 1.0)])
    return {
        "gaussian": lambda: gaussian,
        "policy": lambda: PolicySampler(denoiser, NoiseARPolicy(NoiseARConfig(**POLICY)).eval()),
        "npnet": lambda: NPNetSampler(denoiser, NPNet(NPNetConfig(SHAPE, denoiser.text_shape, **SWIN)).eval()),
        "best_of": lambda: BestOf(gaussian, 3, reward),
        "search": lambda: ZerothOrderSearch(gaussian, denoiser, reward, iterations=2, neighbours=2),
        "reno": lambda: Reno(BestOf(gaussian, 2, reward), denoiser, reward, iterations=2),
        "search_of_best": lambda: ZerothOrderSearch(BestOf(gaussian, 3, reward), denoiser, reward, iterations=2),
    }[name]()


@pytest.mark.parametrize("name", ["gaussian", "policy", "npnet", "best_of", "search", "reno", "search_of_best"])
def test_default_denoising_seeds_are_no_noise_seeds(name):
    """The same for all candidates of a sample; given seeds are used as they are."""
    denoiser = Recorder()
    sampler = build(name, denoiser)
    sampler(PROMPTS, SEEDS)
    assert denoiser.seeds and all(list(seeds) == derived_seeds(SEEDS, 0) for seeds in denoiser.seeds)
    noise_seeds = {*SEEDS, *(seed for i in range(1, 5) for seed in derived_seeds(SEEDS, i))}
    noise_seeds |= {seed for i in range(1, 3) for j in range(1, 3) for seed in derived_seeds(SEEDS, i, j)}
    assert not noise_seeds & set(denoiser.seeds[0])
    denoiser.seeds.clear()
    sampler(PROMPTS, SEEDS, denoising_seeds=[7, 8, 9])
    assert denoiser.seeds and all(list(seeds) == [7, 8, 9] for seeds in denoiser.seeds)


def test_signal_leaks_use_derived_denoising_seeds():
    denoiser, options = Recorder(), {"min_reward": -100.0, "signal_strength": 1.0, "noise_scale": 0.5, "rounds": 2}
    signal_leak(denoiser, None, WeightedReward([(Target(), 1.0)]), PROMPTS, SEEDS, **options)
    assert [list(seeds) for seeds in denoiser.seeds] == [derived_seeds(SEEDS, 0)] * 2


def test_a_stochastic_schedulers_first_draw_is_not_the_initial_noise(monkeypatch):
    pipeline = tiny_pipelines.build("sdxl")
    pipeline.scheduler = EulerAncestralDiscreteScheduler(**tiny_pipelines.SDXL_SCHEDULE)
    denoiser = DiffusionPipelineDenoiser(
        pipeline, name="sdxl", num_inference_steps=2, dtype="float32", cache_dir="none"
    )
    drawn, draw = [], ancestral.randn_tensor
    monkeypatch.setattr(ancestral, "randn_tensor", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    samples = GaussianSampler(denoiser)(["a red circle"] * 2, SEEDS[:2])
    assert drawn[0].shape == samples.noise.shape
    cosine = torch.cosine_similarity(drawn[0].flatten(1), samples.noise.flatten(1))
    assert cosine.abs().max() < 0.2  # 1 if the seeds were the same


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_reported_noise_and_kl_are_those_of_the_denoised_noise(temperature):
    """Samplers do not clip: noise far beyond the environment's bounds reaches the denoiser."""
    denoiser = Recorder()
    policy = NoiseARPolicy(NoiseARConfig(**POLICY, temperature=temperature)).eval()
    samples = PolicySampler(denoiser, policy)(PROMPTS, SEEDS)
    assert torch.equal(denoiser.noises[0], samples.noise)
    torch.testing.assert_close(samples.noise, temperature * standard_noise(SEEDS, SHAPE))
    assert (samples.noise.abs().max() > ACTION_BOUND) == (temperature > 1)
    text = denoiser.encode(PROMPTS)
    along = policy.kl_divergence(patchify(denoiser.noises[0], 4), text.policy_embeds, text.policy_mask).sum(1)
    torch.testing.assert_close(samples.kl_to_gaussian, along)
    closed = 0.5 * math.prod(SHAPE) * (temperature**2 - 1 - 2 * math.log(temperature))
    torch.testing.assert_close(samples.kl_to_gaussian, torch.full((3,), closed))
