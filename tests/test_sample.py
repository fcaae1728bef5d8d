"""Images without training: methods side by side on the same seeds, and a policy's noise in a user's own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from noisear_rl import cli
from noisear_rl.denoisers import load_denoiser
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.gaussian import standard_noise
from tests.conftest import random_policy

PROMPTS = ("a photo of a red circle", "a photo of two squares")
OPTIONS = ["--denoiser", "shapes-turbo", "--denoiser-options", "dtype", "float32"]


@pytest.fixture
def policy_folder(tmp_path):
    random_policy().save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_side_by_side(tmp_path, policy_folder, capsys):
    out = tmp_path / "out"
    cli.main(
        ["sample", *PROMPTS, "--policy", str(policy_folder), "--seeds", "3", "4", "--output-dir", str(out), *OPTIONS]
    )
    assert str(out / "comparison.png") in capsys.readouterr().out
    assert Image.open(out / "comparison.png").size[0] > 100
    assert len(list(out.glob("?-*-?.png"))) == 8
    noise = load_file(out / "noise.safetensors")
    assert torch.equal(noise["gaussian"], standard_noise([3, 4, 3, 4], (4, 8, 8)))
    denoiser = load_denoiser("shapes-turbo", dtype="float32")
    text = denoiser.encode([PROMPTS[1]])
    policy = random_policy()
    expected = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=[3]))
    torch.testing.assert_close(noise["policy"][2:3], expected, rtol=1e-4, atol=1e-5)
    images = denoiser.denoise(noise["policy"][2:3], text)
    drawn = np.asarray(Image.open(out / "1-policy-3.png")) / 255
    np.testing.assert_allclose(drawn, images[0].permute(1, 2, 0), atol=0.01)


def test_temperature_and_rejected_arguments(tmp_path, policy_folder):
    other = tmp_path / "other"
    random_policy(text_dim=64).save_pretrained(other)
    run = lambda *arguments: cli.main(["sample", *arguments, "--output-dir", str(tmp_path / "out"), *OPTIONS])
    run(PROMPTS[0], "--policy", str(policy_folder), "--temperature", "0.01", "--seeds", "1", "2")
    cold = load_file(tmp_path / "out/noise.safetensors")["policy"]
    run(PROMPTS[0], "--policy", str(policy_folder), "--seeds", "1", "2")
    warm = load_file(tmp_path / "out/noise.safetensors")["policy"]
    assert (cold[0] - cold[1]).abs().max() < 0.3 < (warm[0] - warm[1]).abs().max()
    for arguments, message in (
        ([], "expected at least one prompt and one seed"),
        ([PROMPTS[0], "--policy", str(other)], "its text_dim is 64"),
        ([PROMPTS[0], "--policy", str(tmp_path / "none")], "no such folder"),
        ([PROMPTS[0], "--policy", str(policy_folder), "--temperature", "0"], "temperature must be positive"),
        ([" "], "empty prompt"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)


def test_a_policys_noise_in_a_users_own_pipeline(shapes):
    """As in the README: a plain pipeline, its own prompt embeddings, the policy's noise as its latents."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(ASSETS / "pipeline", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    policy = random_policy()
    text = pipeline.encode_prompt(PROMPTS[0], device="cpu", do_classifier_free_guidance=False)[0]
    mask = shapes.encode([PROMPTS[0]]).policy_mask
    latents = policy.noise(policy.sample(text, mask, seeds=[7]))
    options = {"num_inference_steps": shapes.num_inference_steps, "guidance_scale": shapes.guidance_scale}
    image = pipeline(PROMPTS[0], latents=latents, output_type="pt", **options).images
    expected = shapes.denoise(latents, shapes.encode([PROMPTS[0]]))
    torch.testing.assert_close(image.clamp(0, 1), expected, rtol=0, atol=1e-5)
