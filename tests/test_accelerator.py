"""What an accelerator computes is what the CPU computes, up to rounding; skipped where there is none."""

import pytest
import torch

from noisear_rl.algos import ppo
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.placement import resolve_device
from noisear_rl.gaussian import standard_noise
from noisear_rl.learning.records import read_records
from noisear_rl.policy import NoiseARConfig
from tests import tiny_pipelines
from tests.conftest import random_policy
from tests.learning.test_precision import VARIANTS, episodes
from tests.resuming import assert_same_run, kill_and_resume

DEVICE = resolve_device("auto")
PROMPTS = ("a photo of a red circle", "two blue squares", "a lighthouse at dawn")
pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cpu", reason="needs an accelerator"),
    pytest.mark.filterwarnings("ignore:prompt contains words"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_policy_draws_the_same_noise(variant):
    policy = random_policy(scale=0.05, **VARIANTS[variant])
    patches, text, mask = episodes(policy)
    text, mask = text.to(DEVICE), mask.to(DEVICE)
    sample = policy.to(DEVICE).sample(text, mask, seeds=range(len(text)))
    torch.testing.assert_close(sample.patches.cpu(), patches, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(policy.log_prob(sample.patches, text, mask), sample.log_prob, rtol=1e-4, atol=1e-3)


def images_of(name, **options):
    defaults = {"num_inference_steps": 2, "dtype": "float32", "device": DEVICE, "cache_dir": "none"}
    denoiser = DiffusionPipelineDenoiser(tiny_pipelines.build(name), name=name, **(defaults | options))
    return denoiser.denoise(standard_noise(range(3), denoiser.latent_shape), denoiser.encode(PROMPTS), [1, 2, 3]).cpu()


@pytest.mark.parametrize("options", [{}, {"offload": "model"}, {"offload": "sequential"}, {"compile": True}], ids=str)
@pytest.mark.parametrize("name", tuple(tiny_pipelines.BUILDERS))
def test_images(name, options):
    images = images_of(name, **options)
    assert images.shape[:2] == (3, 3) and images.isfinite().all()
    torch.testing.assert_close(images, images_of(name, device="cpu"), rtol=0, atol=2e-2)


def trained(folder, **options):
    sizes = {"prompts_per_update": 2, "samples_per_prompt": 8, "updates": 4, "save_every": 2}
    policy = NoiseARConfig(d_model=64, d_ff=64, n_layers=1, n_heads=2, log_variance="fixed")
    return ppo.PPOConfig("NoiseAR-ShapesTurbo-v0", output_dir=folder, policy=policy, **(sizes | options))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["natural", "adam"])
def test_ppos_first_ratio_is_exactly_1(tmp_path, precision, optimizer):
    policy = ppo.train(trained(tmp_path, precision=precision, optimizer=optimizer, micro_batches=2))
    assert next(policy.parameters()).device.type == DEVICE.type
    assert [record["losses/first_ratio"] for record in read_records(tmp_path)] == [1.0] * 4


def test_resumed_equals_uninterrupted(tmp_path):
    whole = ppo.train(trained(tmp_path / "a"))
    resumed = kill_and_resume(ppo.train, trained(tmp_path / "b"))
    assert_same_run(whole, resumed, tmp_path / "a", tmp_path / "b")
