"""Published pipeline classes with tiny random weights: the complete loop, the bare pipeline's images, errors."""

import dataclasses
import inspect
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

import noisear_rl
from noisear_rl.algos import collect, dpo, evaluate, nll, ppo
from noisear_rl.config import load_yaml
from noisear_rl.data.pairs import PairsConfig, build_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.pipelines import interface_of
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.gaussian import standard_noise
from noisear_rl.policy import NoiseARConfig, NoiseARPolicy
from tests import tiny_pipelines

ROOT = Path(__file__).parents[2]
PROMPTS = ("a photo of a red circle", "two blue squares", "a lighthouse at dawn")
NAMES = tuple(tiny_pipelines.BUILDERS)
NO_GUIDANCE = ("flux-schnell", "flux2-klein")  # distilled without it
NO_PAIRS = {name: "distilled without guidance" for name in NO_GUIDANCE} | {"sana-sprint": "predicts 'trigflow'"}
ONE_BY_ONE = ("sdxl-turbo", "z-image-turbo", "qwen-image", "wan", *NO_GUIDANCE, "flux-dev", "sana-sprint")
IDS = {denoiser: name for name, denoiser in noisear_rl.ENVIRONMENTS.items()}
SMALL = NoiseARConfig(d_model=32, d_ff=32, n_heads=4, n_layers=1, log_variance="shared")
pytestmark = pytest.mark.filterwarnings("ignore:prompt contains words")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for ``from_pretrained`` for every pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in NAMES:
        tiny_pipelines.build(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module", params=NAMES)
def denoiser(request, folders):
    return load_denoiser(request.param, **options_of(request.param, folders), num_inference_steps=3)


def options_of(name, folders):
    """What a tiny pipeline of this class needs."""
    own = tiny_pipelines.OPTIONS.get(name, {})
    return {"path": str(folders / name), "dtype": "float32", "cache_dir": "none"} | own


def bare_arguments(denoiser, pipeline, noise):
    """How a user passes the same noise, size and guidance to the pipeline itself."""
    guidance, name = denoiser.guidance_scale, denoiser.name
    height, width = np.broadcast_to(denoiser.image_size, 2).tolist()
    found = {"latents": noise.clone(), "guidance_scale": guidance, "height": height, "width": width}
    if name in ("hunyuan-dit", "pixart-sigma", "sana-sprint"):
        found["use_resolution_binning"] = False
    if name == "sana-sprint":
        found["intermediate_timesteps"] = None  # of two steps only
    if name == "z-image-turbo":
        found["guidance_scale"] = guidance - 1  # its scale for no guidance is 0
    if name == "flux-schnell":
        found["max_sequence_length"] = 256  # its card's
    if name == "wan":
        found["num_frames"] = denoiser.denoise(noise[:0], denoiser.encode(["a"])[:0]).shape[1]
    if name == "qwen-image":
        found |= {"true_cfg_scale": found.pop("guidance_scale"), "negative_prompt": " "}
    if name.startswith("flux-") or name == "qwen-image":
        found["latents"] = pipeline._pack_latents(found["latents"], *noise.shape)
    return found


def test_images_are_the_bare_pipelines(denoiser, folders):
    """The pipeline's own call with a prompt equals our encoding and denoising from the same noise."""
    pipeline = DiffusionPipeline.from_pretrained(folders / denoiser.name)
    if PRESETS[denoiser.name].scheduler == "dpm":
        pipeline.scheduler = type(denoiser.pipeline.scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = standard_noise(range(3), denoiser.latent_shape)
    for i, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt=prompt,
            num_inference_steps=3,
            generator=[torch.Generator().manual_seed(i)],
            output_type="pt",
            **bare_arguments(denoiser, pipeline, noise[i : i + 1]),
        )[0]
        images = denoiser.denoise(noise[i : i + 1], denoiser.encode([prompt]), [i])
        torch.testing.assert_close(images, expected.float().clamp(0, 1), rtol=0, atol=1e-5)


def test_batches_do_not_matter_and_inputs_stay(denoiser):
    noise, conditioning = standard_noise(range(3), denoiser.latent_shape), denoiser.encode(PROMPTS)
    untouched = noise.clone()
    whole = denoiser.denoise(noise, conditioning, [1, 2, 3])
    assert torch.equal(noise, untouched)
    frames = (9,) if denoiser.name == "wan" else ()
    assert whole.shape == (3, *frames, 3, denoiser.image_size, denoiser.image_size) and whole.std() > 0.01
    single = [denoiser.denoise(noise[i : i + 1], conditioning[[i]], [i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat(single), whole, rtol=0, atol=1e-4)
    swapped = denoiser.denoise(noise, denoiser.encode(PROMPTS[::-1]), [1, 2, 3])
    assert not torch.allclose(swapped[0], whole[0], atol=1e-4)  # the prompt matters


def test_running_out_of_memory_halves_the_batch(denoiser, monkeypatch):
    """The network, like an allocator, rejects more than four rows: two images where guidance doubles the batch."""
    noise, conditioning = standard_noise(range(5), denoiser.latent_shape), denoiser.encode([*PROMPTS, *PROMPTS[:2]])
    seeds = range(5)
    expected = denoiser.denoise(noise, conditioning, seeds)
    forward, refused = denoiser.network.forward, []

    @torch.compiler.disable
    def limited(hidden_states, *arguments, **keywords):
        if len(hidden_states) > 4:
            refused.append(len(hidden_states))
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        return forward(hidden_states, *arguments, **keywords)

    def limited_by_name(*arguments, **keywords):
        first = next(iter(inspect.signature(forward).parameters))
        return limited(keywords.pop(first), **keywords) if first in keywords else limited(*arguments, **keywords)

    monkeypatch.setattr(denoiser.network, "forward", limited_by_name)
    monkeypatch.setattr(denoiser, "micro_batch_size", 5)
    with pytest.warns(UserWarning, match="out of memory with 5 images"):
        images = denoiser.denoise(noise, conditioning, seeds)
    assert refused == [5 if denoiser.name in ONE_BY_ONE else 10] and denoiser.micro_batch_size == 2
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)

    def never(*arguments, **keywords):
        raise torch.OutOfMemoryError("nothing fits")

    monkeypatch.setattr(denoiser.network, "forward", never)
    with pytest.raises(torch.OutOfMemoryError), warnings.catch_warnings(action="ignore"):
        denoiser.denoise(noise, conditioning)


def test_bad_noise(denoiser):
    conditioning = denoiser.encode(PROMPTS)
    shape = (3, *denoiser.latent_shape)
    with pytest.raises(ValueError, match="expected noise"):
        denoiser.denoise(torch.zeros(3, denoiser.latent_shape[0], 4, 4), conditioning)
    with pytest.raises(ValueError, match="floating-point"):
        denoiser.denoise(torch.zeros(shape, dtype=torch.long), conditioning)
    with pytest.raises(ValueError, match="NaN"):
        denoiser.denoise(torch.full(shape, torch.nan), conditioning)
    with pytest.raises(ValueError, match="empty prompt"):
        denoiser.encode([" "])


def test_prediction_is_linear_in_the_guidance(denoiser):
    """Predictions along the first-order schedule are linear in classifier-free guidance and depend on any."""
    noise, conditioning = standard_noise(range(3), denoiser.latent_shape), denoiser.encode(PROMPTS)
    if denoiser.name == "sana-sprint":
        with pytest.raises(ValueError, match="predicts 'trigflow'"):
            denoiser.first_order_schedule(4)
        return
    schedule = denoiser.first_order_schedule(4)
    time_ = float(schedule.timesteps[0])
    if denoiser.name in NO_GUIDANCE:
        assert denoiser.predict_noise(noise, time_, conditioning, 1.0).shape == noise.shape
        with pytest.raises(ValueError, match="distilled without guidance"):
            denoiser.predict_noise(noise, time_, conditioning, 3.0)
        return
    low, high = (denoiser.predict_noise(noise, time_, conditioning, g) for g in (1.0, 3.0))
    middle = denoiser.predict_noise(noise, time_, conditioning, 2.0)
    if denoiser.name not in ("flux-dev", "qwen-image"):  # an input of the network; rescaled to the conditional norm
        torch.testing.assert_close(middle, (low + high) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(low, high, atol=1e-4)


def test_the_complete_loop(denoiser, tmp_path):
    """Encode, sample, pairs, one NLL step, collected rollouts, one DPO step, and evaluation."""
    name, path = denoiser.name, str(denoiser.pipeline.config._name_or_path)
    options = {"path": path, "num_inference_steps": "2", "dtype": "float32", "cache_dir": "none"}
    options |= tiny_pipelines.OPTIONS.get(name, {})
    config = PairsConfig(name, prompts=PROMPTS, pairs=6, num_inference_steps=10, output_dir=tmp_path / "pairs")
    if name in NO_PAIRS:  # the rest of the loop needs none: the next test
        with pytest.raises(ValueError, match=NO_PAIRS[name]):
            build_pairs(config, denoiser)
        return
    pairs = build_pairs(dataclasses.replace(config, batch_size=4, shard_size=4), denoiser)
    assert len(pairs) == 6
    targets = torch.tensor(pairs["target"][:]).unflatten(1, denoiser.latent_shape)
    shift = targets - standard_noise(pairs["seed"][:], denoiser.latent_shape)
    assert shift.abs().max() > 1e-3

    run = {"denoiser_options": options, "policy": SMALL}
    made = nll.NLLConfig(tmp_path / "pairs", output_dir=tmp_path / "nll", denoiser=name, epochs=1, batch_size=4, **run)
    policy = nll.train(made)
    assert policy.config.latent_shape == denoiser.latent_shape and policy.n_patches == 16
    fresh = NoiseARPolicy(policy.config)
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), fresh.parameters(), strict=True))
    text = denoiser.encode(PROMPTS)
    sample = policy.sample(text.policy_embeds, text.policy_mask, seeds=[1, 2, 3])
    again = policy.log_prob(sample.patches, text.policy_embeds, text.policy_mask)
    torch.testing.assert_close(again, sample.log_prob, rtol=1e-4, atol=1e-3)

    rows = evaluate.run(
        evaluate.EvaluateConfig(
            (f"nll={tmp_path / 'nll'}",),
            name,
            str(write_prompts(tmp_path)),
            samples=2,
            scorers=("jpeg-compressibility", "brightness"),
            output_dir=tmp_path / "evaluation",
            denoiser_options=options,
        )
    )
    assert "nll" in rows and (tmp_path / "evaluation/results.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_reinforcement_learning_through_the_environment(name, folders, tmp_path):
    """PPO, rollouts and DPO through the environment id, as with the published weights."""
    options = options_of(name, folders) | {"num_inference_steps": "2"}
    shared = {"env_id": IDS[name], "denoiser_options": options, "reward": "brightness", "prompts": PROMPTS}
    sizes = {"prompts_per_update": 2, "samples_per_prompt": 4, "updates": 1, "policy": SMALL}
    policy = ppo.train(ppo.PPOConfig(output_dir=tmp_path / "ppo", **shared, **sizes))
    assert (
        policy.kl_divergence(torch.zeros(1, 16, policy.patch_dim), torch.randn(1, 5, policy.config.text_dim)).sum() > 0
    )
    rollouts = {"num_prompts": 3, "samples_per_prompt": 3, "prompts_per_shard": 2, "policy": str(tmp_path / "ppo")}
    collect.collect(collect.CollectConfig(output_dir=tmp_path / "rollouts", **shared, **rollouts))
    assert len(load_rollouts(tmp_path / "rollouts").dataset) == 9
    made = {"rollouts": tmp_path / "rollouts", "init_from": str(tmp_path / "ppo"), "denoiser_options": options}
    dpo.train(dpo.DPOConfig(output_dir=tmp_path / "dpo", threshold=0.0, epochs=1, **made))
    if name in NO_PAIRS:  # others: the test before
        scored = {"samples": 2, "scorers": ("brightness",), "output_dir": tmp_path / "evaluation"}
        judged = evaluate.EvaluateConfig((f"ppo={tmp_path / 'ppo'}",), name, str(write_prompts(tmp_path)), **scored)
        assert "| ppo |" in evaluate.run(dataclasses.replace(judged, denoiser_options=options))


def write_prompts(folder):
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_noise_has_unit_variance_for_every_scheduler(scheduler):
    """Euler schedulers scale it by ``init_noise_sigma``; with seeds, their draws do not depend on the batch."""
    pipeline = tiny_pipelines.build("sdxl")
    pipeline.scheduler = scheduler(**tiny_pipelines.SDXL_SCHEDULE)
    denoiser = DiffusionPipelineDenoiser(
        pipeline, name="sdxl", num_inference_steps=4, dtype="float32", cache_dir="none"
    )
    assert pipeline.scheduler.init_noise_sigma > 5
    noise, conditioning = standard_noise(range(3), denoiser.latent_shape), denoiser.encode(PROMPTS)
    images = denoiser.denoise(noise, conditioning, [5, 6, 7])
    bare = pipeline(
        list(PROMPTS),
        latents=noise.clone(),
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        num_inference_steps=4,
        guidance_scale=5.5,
        height=32,
        width=32,
        output_type="pt",
    ).images
    torch.testing.assert_close(images, bare.clamp(0, 1), rtol=0, atol=1e-5)
    single = denoiser.denoise(noise[2:], conditioning[[2]], [7])
    torch.testing.assert_close(single, images[2:], rtol=0, atol=1e-4)


def test_unknown_classes_are_refused():
    class Other:
        pass

    with pytest.raises(ValueError, match="Other is not supported"):
        interface_of(Other())


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("shapes")])
def test_missing_weights_say_what_to_download(name, tmp_path, monkeypatch):
    """Without a network the error comes quickly and names the model, the command and the folder."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        load_denoiser(name)
    assert time.perf_counter() - began < 5
    message = str(caught.value)
    assert PRESETS[name].path in message and "hf download" in message and "path=FOLDER" in message


def test_prompt_embeddings_are_kept_on_disk(folders, tmp_path):
    options = {"path": str(folders / "sdxl"), "num_inference_steps": 2, "dtype": "float32", "cache_dir": str(tmp_path)}
    first = load_denoiser("sdxl", **options)
    expected = first.encode(PROMPTS)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(PROMPTS) + 1  # including the empty prompt
    second = load_denoiser("sdxl", **options)

    def not_again(*arguments, **keywords):
        raise AssertionError("encoded again")

    second.pipeline.encode_prompt = not_again
    found = second.encode(PROMPTS)
    assert all(torch.equal(found.inputs[key], value) for key, value in expected.inputs.items())
    files[0].write_bytes(files[0].read_bytes()[:20])  # damaged: counts as missing
    third = load_denoiser("sdxl", **options)
    assert torch.equal(third.encode(PROMPTS).policy_embeds, expected.policy_embeds)


def test_presets_are_the_papers():
    assert {PRESETS[name].num_inference_steps for name in ("sdxl", "dreamshaper", "hunyuan-dit")} == {50}
    pairs = load_yaml(PairsConfig, ROOT / "configs/sdxl/pairs.yaml")
    assert (pairs.pairs, pairs.strong_guidance, pairs.weak_guidance, pairs.num_inference_steps) == (100000, 5.5, 1, 50)
    pretraining = load_yaml(nll.NLLConfig, ROOT / "configs/sdxl/nll.yaml")
    assert (pretraining.epochs, pretraining.batch_size, pretraining.learning_rate) == (10, 40, 6.25e-5)
    assert pretraining.policy.d_model == 2048 and pretraining.policy.n_layers == 1
