import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from noisear_rl.data.pairs import PairsConfig, build_pairs, load_pairs
from noisear_rl.data.signal_leak import signal_leak
from noisear_rl.data.weak_to_strong import inversion_coefficients, network_evaluations, weak_to_strong
from noisear_rl.denoisers.shapes.architecture import SCHEDULE
from noisear_rl.gaussian import standard_noise
from noisear_rl.rewards import load_reward
from noisear_rl.samplers.base import derived_seeds
from tests.conftest import random_policy
from tests.launching import launch

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


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [3, 10, 30, 50])
def test_compat_equals_diffusers_inverse_scheduler(steps, spacing):
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMScheduler(**SCHEDULE | {"timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    options = {k: v for k, v in SCHEDULE.items() if k != "set_alpha_to_one"}
    inverse = DDIMInverseScheduler(**options | {"timestep_spacing": spacing})
    inverse.set_timesteps(steps)
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

    scheduler = random_denoiser.first_order_schedule(steps)
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


@pytest.mark.parametrize(("strong", "weak", "rounds", "count"), [(5.5, 1.0, 1, 3), (5.5, 1.5, 1, 4), (5.5, 1.0, 2, 6)])
def test_network_evaluations_are_counted(random_denoiser, strong, weak, rounds, count):
    """Guidance 1 needs no unconditional prediction."""
    rows = []
    hook = random_denoiser.network.register_forward_hook(lambda module, inputs, outputs: rows.append(len(outputs[0])))
    try:
        conditioning, noise = random_denoiser.encode(PROMPTS), standard_noise(range(3), (4, 8, 8))
        options = {"strong_guidance": strong, "weak_guidance": weak, "rounds": rounds}
        weak_to_strong(random_denoiser, noise, conditioning, **options)
    finally:
        hook.remove()
    assert sum(rows) / len(PROMPTS) == count == network_evaluations(strong, weak, rounds)


def config(folder, **options):
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    defaults = {"prompts": str(prompts), "pairs": 10, "shard_size": 4, "batch_size": 3, "seed": 5}
    return PairsConfig(output_dir=folder, **(defaults | options))


def test_shards_resume_and_do_not_depend_on_batches(tmp_path, random_denoiser):
    pairs = build_pairs(config(tmp_path / "a"), random_denoiser)
    assert len(pairs) == 10 and sorted(pairs["seed"]) == list(range(5, 15))
    assert json.loads((tmp_path / "a/manifest.json").read_text())["strong_guidance"] == 5.5
    (tmp_path / "a/shard-00001.parquet").unlink()  # as if killed
    again = build_pairs(config(tmp_path / "a"), random_denoiser)
    assert pairs.to_list() == again.to_list()
    row = pairs[7]
    conditioning = random_denoiser.encode([row["prompt"]])
    target = weak_to_strong(random_denoiser, standard_noise([row["seed"]], (4, 8, 8)), conditioning)
    np.testing.assert_allclose(target.flatten(), row["target"], atol=2e-3)


@pytest.mark.slow
def test_several_processes_write_the_same(tmp_path):
    """Processes share the shards; a repeated prompt in a file counts once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    options = ["--denoiser", "shapes", "--prompts", str(prompts), "--pairs", "7", "--shard-size", "2"]
    script = ["-m", "noisear_rl.data.pairs", *options, "--denoiser-options", "dtype", "float32", "--output-dir"]
    for count in (1, 2, 3):
        launch(count, *script, tmp_path / str(count))
    launch(2, *script, tmp_path / "accelerate", by_accelerate=True)
    one, *others = (load_pairs(tmp_path / name) for name in ("1", "2", "3", "accelerate"))
    assert one["prompt"][:] == [PROMPTS[i % 3] for i in range(7)]
    for other in others:
        assert other["prompt"][:] == one["prompt"][:] and other["seed"][:] == one["seed"][:]
        np.testing.assert_allclose(np.array(one["target"][:]), np.array(other["target"][:]), atol=2e-3)


def prompts_and_seeds(count, seed=5):
    """Those of the pairs of :func:`config`."""
    return [PROMPTS[i % 3] for i in range(count)], list(range(seed, seed + count))


def test_filter_keeps_what_the_reward_prefers(tmp_path, shapes, monkeypatch):
    """Exactly the pairs whose target's image scores higher; neither image is denoised with the noise's own seed."""
    denoise, given = shapes.denoise, []
    options = {"filter_reward": "shapes-match", "num_inference_steps": 10, "pairs": 6, "seed": 19}
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "denoise", lambda noise, text, seeds: given.extend(seeds) or denoise(noise, text, seeds))
        kept = build_pairs(config(tmp_path, **options), shapes)
    prompts, seeds = prompts_and_seeds(6, seed=19)
    conditioning, noise = shapes.encode(prompts), standard_noise(seeds, (4, 8, 8))
    target = weak_to_strong(shapes, noise, conditioning, num_inference_steps=10)
    images = shapes.denoise(torch.cat([noise, target]), shapes.encode(prompts * 2))
    before, after = load_reward("shapes-match").score(images, prompts * 2).chunk(2)
    assert (after - before).abs().min() > 1e-3  # no pair is decided by rounding
    preferred = (after > before).nonzero()[:, 0].tolist()
    assert 0 < len(preferred) < 6
    assert (kept["seed"][:], kept["prompt"][:]) == ([seeds[i] for i in preferred], [prompts[i] for i in preferred])
    np.testing.assert_allclose(np.array(kept["target"][:]), target[preferred].flatten(1), atol=2e-3)
    assert sorted(given) == sorted(derived_seeds(seeds, 0) * 2)


def leak(folder, **options):
    return config(folder, **({"kind": "signal_leak", "filter_reward": "shapes-match", "min_reward": 0.5} | options))


def test_signal_leak_is_the_forward_processes_mean_of_good_images(tmp_path, turbo):
    kept = build_pairs(leak(tmp_path), turbo)
    assert json.loads((tmp_path / "manifest.json").read_text())["noise_scale"] == 0.8
    prompts, seeds = prompts_and_seeds(10)
    images, latents = turbo.denoise_with_latents(standard_noise(seeds, (4, 8, 8)), turbo.encode(prompts))
    scores = load_reward("shapes-match").score(images, prompts)
    assert (scores - 0.5).abs().min() > 1e-4  # no image is decided by rounding
    good = (scores >= 0.5).nonzero()[:, 0].tolist()
    assert 0 < len(good) < 10 and kept["seed"][:] == [seeds[i] for i in good]
    scheduler = turbo.pipeline.scheduler
    level = 1.5 * scheduler.alphas_cumprod[scheduler.timesteps[0]].sqrt()
    np.testing.assert_allclose((level * latents[good]).flatten(1), np.array(kept["target"][:]), atol=2e-3)


def test_later_rounds_start_from_the_leak_and_are_good_more_often(tmp_path, turbo):
    options = {"pairs": 24, "batch_size": 8, "shard_size": 16}
    rounds = [len(build_pairs(leak(tmp_path / str(n), rounds=n, **options), turbo)) for n in (1, 2)]
    assert rounds[1] - rounds[0] > 1.1 * rounds[0]
    again = build_pairs(leak(tmp_path / "again", rounds=2, pairs=24, batch_size=24, shard_size=24), turbo)
    assert again.num_rows == rounds[1]


def test_signal_leak_of_a_policys_noise(tmp_path, turbo):
    random_policy(scale=0.02).save_pretrained(tmp_path / "policy")
    options = {"pairs": 10, "batch_size": 10, "shard_size": 10}
    a = build_pairs(leak(tmp_path / "a", **options), turbo)
    b = build_pairs(leak(tmp_path / "b", **options, policy=str(tmp_path / "policy")), turbo)
    assert a["target"][:] != b["target"][:] and "layout" not in b.column_names


def test_a_policys_leaks_have_the_layouts_that_it_chose(tmp_path, turbo):
    policy = random_policy(scale=0.02, layouts=4)
    policy.save_pretrained(tmp_path / "policy")
    made = build_pairs(leak(tmp_path / "pairs", pairs=10, min_reward=0.0, policy=str(tmp_path / "policy")), turbo)
    text = turbo.encode(made["prompt"][:])
    drawn = policy.sample(text.policy_embeds, text.policy_mask, seeds=made["seed"][:]).patches
    chosen = policy.chosen_layout(drawn, text.policy_embeds, text.policy_mask)
    assert made["layout"][:] == chosen.tolist() and len(set(made["layout"][:])) > 1


def test_leaks_of_later_rounds_keep_a_good_images_layout_or_have_that_of_new_noise(turbo):
    policy = random_policy(scale=0.02, layouts=4)
    prompts, seeds = prompts_and_seeds(24)
    options = {"min_reward": 0.5, "signal_strength": 1.5, "noise_scale": 0.8, "rounds": 2}
    first, second = signal_leak(turbo, policy, load_reward("shapes-match"), prompts, seeds, **options)
    text = turbo.encode(prompts)

    def chosen(seeds):
        drawn = policy.sample(text.policy_embeds, text.policy_mask, seeds=seeds).patches
        return policy.chosen_layout(drawn, text.policy_embeds, text.policy_mask)

    new = chosen([int(np.random.default_rng([seed, 1]).integers(2**31)) for seed in seeds])
    assert first.layout.equal(chosen(seeds)) and not first.layout.equal(new)
    assert first.kept.any() and not first.kept.all()
    assert second.layout.equal(torch.where(first.kept, first.layout, new))


@pytest.mark.parametrize(("name", "value"), [("batch_size", -1), ("strong_guidance", 1e30), ("pairs", 0)])
def test_a_refused_option_leaves_the_folder_usable(name, value, tmp_path, random_denoiser):
    right = config(tmp_path / "pairs")
    wrong = config(tmp_path / "pairs")
    setattr(wrong, name, value)
    with pytest.raises(ValueError, match=f"{name} must be at"):
        build_pairs(wrong, random_denoiser)
    assert not (tmp_path / "pairs").exists()
    assert len(build_pairs(right, random_denoiser)) == right.pairs


def test_bad_input(tmp_path, random_denoiser):
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        load_pairs(tmp_path)
    build_pairs(config(tmp_path), random_denoiser)
    with pytest.raises(ValueError, match="other settings"):
        build_pairs(config(tmp_path, weak_guidance=2.0), random_denoiser)
    with pytest.raises(ValueError, match="kind must be one of"):
        build_pairs(config(tmp_path / "b", kind="strong_to_weak"), random_denoiser)
    with pytest.raises(ValueError, match="set filter_reward"):
        build_pairs(leak(tmp_path / "b", filter_reward=None), random_denoiser)
    with pytest.raises(ValueError, match="must be positive"):
        build_pairs(leak(tmp_path / "b", noise_scale=0.0), random_denoiser)
    with pytest.raises(ValueError, match="no pair passed"):
        build_pairs(leak(tmp_path / "b", min_reward=2.0), random_denoiser)
    with pytest.raises(ValueError, match="unknown inversion"):
        inversion_coefficients(schedule(10), "approximate")
    with pytest.raises(ValueError, match="at least 3 timesteps"):
        inversion_coefficients(schedule(2), "compat")


def test_a_one_step_student_has_no_schedule_for_pairs(turbo, tmp_path):
    with pytest.raises(ValueError, match=r"distilled to few steps.*ask its teacher"):
        build_pairs(PairsConfig(output_dir=tmp_path, pairs=2, denoiser="shapes-turbo"), turbo)
