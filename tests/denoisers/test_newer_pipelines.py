"""Flow and few-step pipelines: schedules, guidance, sizes and weights where they differ from Stable Diffusion's."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from noisear_rl.data.weak_to_strong import weak_to_strong
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.pipelines import interface_of, quarters
from noisear_rl.denoisers.presets import PRESETS
from noisear_rl.gaussian import standard_noise
from tests import tiny_pipelines

PROMPTS = ("a photo of a red circle", "two blue squares")
FLOW = ("sd3", "flux-dev", "flux-schnell", "z-image-turbo", "qwen-image", "wan", "flux2-klein")
pytestmark = pytest.mark.filterwarnings("ignore:prompt contains words")


def wrap(name, pipeline=None, **options):
    preset = PRESETS[name]
    options = {"guidance_scale": preset.guidance_scale, "num_inference_steps": 3} | options
    own = tiny_pipelines.OPTIONS.get(name, {}) | {"dtype": "float32", "cache_dir": "none"}
    return DiffusionPipelineDenoiser(pipeline or tiny_pipelines.build(name), name=name, **own | options)


@pytest.mark.parametrize("name", FLOW)
def test_gradients(name):
    """The same images with gradients, and the directional derivative of finite differences."""
    denoiser = wrap(name, num_inference_steps=2)
    conditioning, noise = denoiser.encode(PROMPTS), standard_noise([1, 2], denoiser.latent_shape)
    processors = {key: getattr(denoiser.pipeline, key, None) for key in ("image_processor", "video_processor")}
    leaf = noise.clone().requires_grad_()
    images = denoiser.denoise_differentiably(leaf, conditioning)
    torch.testing.assert_close(images.clamp(0, 1), denoiser.denoise(noise, conditioning), rtol=0, atol=1e-5)
    assert all(getattr(denoiser.pipeline, key, None) is own for key, own in processors.items())
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) / images[0].numel() ** 0.5
    (gradient,) = torch.autograd.grad((images * weights).sum(), leaf)
    direction = standard_noise([3, 4], denoiser.latent_shape)
    with torch.no_grad():
        ahead, behind = (
            (denoiser.denoise_differentiably(noise + step * direction, conditioning) * weights).sum()
            for step in (1e-2, -1e-2)
        )
    assert ((ahead - behind) / 2e-2).item() == pytest.approx((gradient * direction).sum().item(), rel=0.1, abs=0.02)


@pytest.mark.parametrize("name", FLOW)
def test_latents_and_schedule_are_the_pipelines(name):
    """Euler's steps along the schedule, from predictions alone, end at the latents of the pipeline's own loop."""
    denoiser = wrap(name, num_inference_steps=4)
    if name == "wan":  # a multistep scheduler's own; with Euler's, the loop is comparable
        denoiser.pipeline.scheduler = denoiser.first_order_schedule(4)
    conditioning, noise = denoiser.encode(PROMPTS), standard_noise([1, 2], denoiser.latent_shape)
    _, expected = denoiser.denoise_with_latents(noise, conditioning)
    assert expected.shape == noise.shape and denoiser.signal_level == 0
    schedule, latents = denoiser.first_order_schedule(4), noise
    for i, time in enumerate(schedule.timesteps.tolist()):
        velocity = denoiser.predict_noise(latents, time, conditioning, denoiser.guidance_scale)
        latents = latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * velocity
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flux-dev", "z-image-turbo", "qwen-image", "wan"])
def test_weak_to_strong_noise(name):
    """A step of Euler down the pipeline's schedule with strong guidance, and back up with weak."""
    denoiser = wrap(name)
    conditioning, noise = denoiser.encode(PROMPTS), standard_noise([1, 2], denoiser.latent_shape)
    target = weak_to_strong(denoiser, noise, conditioning, num_inference_steps=5, strong_guidance=4.0)
    schedule = denoiser.first_order_schedule(5)
    time, step = float(schedule.timesteps[0]), schedule.sigmas[1] - schedule.sigmas[0]
    lower = noise + step * denoiser.predict_noise(noise, time, conditioning, 4.0)
    torch.testing.assert_close(target, lower - step * denoiser.predict_noise(lower, time, conditioning, 1.0))
    unguided = weak_to_strong(denoiser, noise, conditioning, num_inference_steps=5, strong_guidance=1.0)
    assert (target - unguided).abs().max() > 1e-3


def test_guidance_of_classes_that_can_do_without():
    """Z-Image's scale for no guidance is 0; FLUX.2 that was not distilled has classifier-free guidance."""
    noise = standard_noise([1, 2], (4, 16, 16))
    denoiser = wrap("z-image-turbo", guidance_scale=4.0)
    bare = denoiser.pipeline(
        prompt=list(PROMPTS), latents=noise.clone(), guidance_scale=3.0, height=32, width=32, num_inference_steps=3,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(denoiser.denoise(noise, denoiser.encode(PROMPTS)), bare, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    pipeline, noise = tiny_pipelines.flux2_klein(distilled=False), standard_noise([1, 2], (16, 8, 8))
    base = wrap("flux2-klein", pipeline, guidance_scale=4.0)
    bare = pipeline(
        prompt=list(PROMPTS), latents=noise.clone(), guidance_scale=4.0, height=32, width=32, num_inference_steps=3,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(base.denoise(noise, base.encode(PROMPTS)), bare, rtol=0, atol=1e-5)
    assert (denoiser.nfe, base.nfe, wrap("flux-dev").nfe, wrap("sana-sprint").nfe) == (6, 6, 3, 3)
    for name in ("flux-schnell", "flux2-klein"):
        with pytest.raises(ValueError, match=f"{name} was distilled without guidance: guidance_scale must be 1, not 3"):
            wrap(name, guidance_scale=3.0)


def test_sizes():
    """Height, width and frames; the patches of a shape that is not square."""
    wide = wrap("sdxl", height=32, width=64)
    assert (wide.latent_shape, wide.image_size, wide.patch_size) == ((4, 16, 32), (32, 64), (4, 8))
    assert wide.denoise(standard_noise([0], wide.latent_shape), wide.encode(PROMPTS[:1])).shape == (1, 3, 32, 64)
    video = wrap("wan", num_frames=5, width=96)
    assert (video.latent_shape, video.patch_size) == ((4, 2, 8, 12), (2, 2, 3))
    assert video.denoise(standard_noise([0], video.latent_shape), video.encode(PROMPTS[:1])).shape == (1, 5, 3, 64, 96)
    assert video.denoise(standard_noise([], video.latent_shape), video.encode(PROMPTS)[:0]).shape == (0, 5, 3, 64, 96)
    assert quarters((21, 60, 104)) == (3, 15, 26) and quarters((128, 128)) == 32
    with pytest.raises(ValueError, match="height must be a multiple of 4 pixels for a FluxPipeline, not 30"):
        wrap("flux-dev", height=30)
    with pytest.raises(ValueError, match="num_frames must be 1 more than a multiple of 4, not 8"):
        wrap("wan", num_frames=8)


@pytest.mark.parametrize("name", ["flux-dev", "z-image-turbo", "qwen-image", "flux2-klein", "sana-sprint", "wan"])
def test_length_of_prompts(name):
    """The option's number of tokens; what counts of them is what the class's own encoder says."""
    denoiser = wrap(name, max_sequence_length=60)
    text = denoiser.encode(PROMPTS)
    assert denoiser.text_shape[0] == 60 and text.policy_embeds.shape[1:] == denoiser.text_shape
    assert text.policy_mask.any(1).all()
    alone = denoiser.encode(PROMPTS[1:])
    assert torch.equal(alone.policy_embeds[0], text.policy_embeds[1])
    assert torch.equal(alone.policy_mask[0], text.policy_mask[1])


def test_packing_is_the_pipelines():
    latents = standard_noise([1, 2], (4, 6, 8))
    for name in ("flux-dev", "qwen-image", "flux2-klein", "sdxl"):
        pipeline = tiny_pipelines.build(name)
        interface = interface_of(pipeline)
        packed = interface.pack(latents)
        if name == "flux2-klein":
            assert torch.equal(packed, pipeline._pack_latents(latents))
        elif name != "sdxl":
            assert torch.equal(packed, pipeline._pack_latents(latents, *latents.shape))
        assert torch.equal(interface.unpack(packed, (4, 6, 8)), latents)


def test_students_of_sdxl(tmp_path):
    """SDXL-Lightning: another UNet's weights, from a file, and Euler's scheduler with trailing timesteps."""
    folder = tmp_path / "pipeline"
    pipeline = tiny_pipelines.build("sdxl")
    pipeline.save_pretrained(folder)
    other = {name: value + 0.01 for name, value in pipeline.unet.state_dict().items()}
    save_file(other, tmp_path / "unet.safetensors")
    options = {"path": str(folder), "dtype": "float32", "cache_dir": "none"}
    plain = load_denoiser("sdxl-lightning", **options)
    student = load_denoiser("sdxl-lightning", unet=str(tmp_path / "unet.safetensors"), **options)
    assert isinstance(student, DiffusionPipelineDenoiser)
    assert all(torch.equal(value, other[name]) for name, value in student.network.state_dict().items())
    assert student.revision != plain.revision and student.revision.startswith(plain.revision)
    scheduler = student.pipeline.scheduler
    assert isinstance(scheduler, EulerDiscreteScheduler) and scheduler.config.timestep_spacing == "trailing"
    assert (student.num_inference_steps, student.nfe) == (4, 4)
    noise, text = standard_noise([1], student.latent_shape), student.encode(PROMPTS[:1])
    assert not torch.allclose(student.denoise(noise, text), plain.denoise(noise, text), atol=1e-3)
    with pytest.raises(FileNotFoundError, match=r"unet: .*none\.safetensors: no such file"):
        load_denoiser("sdxl-lightning", unet=str(tmp_path / "none.safetensors"), **options)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({"weight": torch.zeros(1)}, tmp_path / "wrong.safetensors")
    for name in ("broken", "wrong"):
        with pytest.raises(ValueError, match="does not hold this UNet's weights"):
            load_denoiser("sdxl-lightning", unet=str(tmp_path / f"{name}.safetensors"), **options)
    with pytest.raises(ValueError, match="scheduler must be one of"):
        load_denoiser("sdxl-lightning", scheduler="ddim", **options)
