import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from noisear_rl.denoisers.shapes.architecture import SCHEDULE
from noisear_rl.gaussian import standard_noise
from noisear_rl.pairs import PairsConfig, build_pairs, inversion_coefficients, load_pairs, weak_to_strong

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue cross above a red circle"]


def schedule(steps):
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("steps", "k"), [(50, 0.1098), (10, 0.3854)])
def test_strength_on_sdxl_schedule(steps, k):
    exact = inversion_coefficients(schedule(steps))
    assert exact.k == pytest.approx(k, abs=5e-5)
    assert exact.a * exact.c == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("steps", "scale"), [(50, 1.0035), (10, 1.079)])
def test_compat_scales_as_public_scripts_do(steps, scale):
    compat = inversion_coefficients(schedule(steps), "compat")
    assert compat.a * compat.c == pytest.approx(scale, abs=5e-4)


def test_compat_equals_diffusers_inverse_scheduler():
    from diffusers import DDIMInverseScheduler

    scheduler = schedule(10)
    inverse = DDIMInverseScheduler(**{k: v for k, v in SCHEDULE.items() if k != "set_alpha_to_one"})
    inverse.set_timesteps(10)
    step = inversion_coefficients(scheduler, "compat")
    x, epsilon = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    expected = inverse.step(epsilon, int(scheduler.timesteps[1]), x).prev_sample
    torch.testing.assert_close(step.c * x + step.d * epsilon, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
def test_equals_a_ddim_step_and_its_exact_inverse(random_denoiser, steps):
    conditioning = random_denoiser.encode(PROMPTS)
    noise = standard_noise(range(3), (4, 8, 8))
    untouched = noise.clone()
    target = weak_to_strong(random_denoiser, noise, conditioning, num_inference_steps=steps)
    assert torch.equal(noise, untouched)

    scheduler = random_denoiser.ddim_schedule(steps)
    t0, t1 = (int(t) for t in scheduler.timesteps[:2])
    strong = random_denoiser.predict_noise(noise, t0, conditioning, 5.5)
    lower = scheduler.step(strong, t0, noise).prev_sample
    weak = random_denoiser.predict_noise(lower, t0, conditioning, 1.0)
    a0, a1 = scheduler.alphas_cumprod[t0], scheduler.alphas_cumprod[t1]
    clean = (lower - (1 - a1).sqrt() * weak) / a1.sqrt()
    expected = a0.sqrt() * clean + (1 - a0).sqrt() * weak
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
    closed = noise + inversion_coefficients(scheduler).k * (weak - strong)
    torch.testing.assert_close(target, closed, rtol=1e-5, atol=1e-5)


def config(folder, **options):
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return PairsConfig(output_dir=folder, prompts=str(prompts), pairs=10, shard_size=4, batch_size=3, seed=5, **options)


def test_shards_resume_and_do_not_depend_on_batches(tmp_path, random_denoiser):
    whole = build_pairs(config(tmp_path / "a"), random_denoiser)
    assert len(whole) == 10 and sorted(whole["seed"]) == list(range(5, 15))
    assert json.loads((tmp_path / "a/manifest.json").read_text())["strong_guidance"] == 5.5
    (tmp_path / "a/shard-00001.parquet").unlink()  # as if killed
    again = build_pairs(config(tmp_path / "a"), random_denoiser)
    assert whole.to_list() == again.to_list()
    row = whole[7]
    conditioning = random_denoiser.encode([row["prompt"]])
    target = weak_to_strong(random_denoiser, standard_noise([row["seed"]], (4, 8, 8)), conditioning)
    np.testing.assert_allclose(target.flatten(), row["target"], atol=2e-3)


def test_filter_keeps_what_the_reward_prefers(tmp_path, shapes):
    options = {"filter_reward": "shapes-match", "num_inference_steps": 10}
    kept = build_pairs(config(tmp_path, **options), shapes)
    assert 0 < len(kept) < 10


def test_bad_input(tmp_path, random_denoiser):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        load_pairs(tmp_path)
    build_pairs(config(tmp_path), random_denoiser)
    with pytest.raises(ValueError, match="other settings"):
        build_pairs(config(tmp_path, weak_guidance=2.0), random_denoiser)
    with pytest.raises(ValueError, match="unknown inversion"):
        inversion_coefficients(schedule(10), "approximate")
    with pytest.raises(ValueError, match="at least 3 timesteps"):
        inversion_coefficients(schedule(2), "compat")
