"""Images without training: methods side by side on the same seeds, and a policy's noise in a user's own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from noisear_rl import cli
from noisear_rl import sample as sampling
from noisear_rl.denoisers.shapes.architecture import ASSETS
from noisear_rl.gaussian import standard_noise
from noisear_rl.images import to_uint8
from tests.conftest import random_policy

PROMPTS = ("a photo of a red circle", "a photo of two squares")
OPTIONS = ["--denoiser", "shapes-turbo", "--denoiser-options", "dtype", "float32"]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    random_policy().save_pretrained(folder)
    return folder


def test_side_by_side(tmp_path, policy_folder, turbo, capsys, monkeypatch):
    """Files and grid hold the samplers' noises and images: prompts and methods by row, seeds by column."""
    figures, save = [], sampling.save_figure
    monkeypatch.setattr(sampling, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    out, seeds = tmp_path / "out", [3, 4]
    cli.main(
        ["sample", *PROMPTS, "--policy", str(policy_folder), "--seeds", "3", "4", "--output-dir", str(out), *OPTIONS]
    )
    assert str(out / "comparison.png") in capsys.readouterr().out
    noise, policy = load_file(out / "noise.safetensors"), random_policy()
    text = turbo.encode([prompt for prompt in PROMPTS for _ in seeds])
    assert torch.equal(noise["gaussian"], standard_noise(seeds * 2, (4, 8, 8)))
    expected = policy.noise(policy.sample(text.policy_embeds, text.policy_mask, seeds=seeds * 2))
    torch.testing.assert_close(noise["policy"], expected, rtol=1e-4, atol=1e-5)

    methods = ("gaussian", "policy")
    names = [f"{prompt}-{method}-{seed}.png" for prompt in (0, 1) for method in methods for seed in seeds]
    assert sorted(path.name for path in out.glob("*.png")) == sorted([*names, "comparison.png"])
    files = {name: np.asarray(Image.open(out / name)).astype(int) for name in names}
    for method in methods:
        images = turbo.denoise(noise[method], text)
        drawn = [files[f"{prompt}-{method}-{seed}.png"] for prompt in (0, 1) for seed in seeds]
        for image, pixels in zip(images, drawn, strict=True):
            assert np.abs(to_uint8(image).astype(int) - pixels).max() <= 1  # up to rounding
    assert len({pixels.tobytes() for pixels in files.values()}) == 8

    (figure,) = figures
    assert len(figure.axes) == 8
    for name, cell in zip(names, figure.axes, strict=True):  # row by row
        np.testing.assert_array_equal(cell.get_images()[0].get_array(), files[name])
    titles = [cell.get_title(loc="left") for cell in figure.axes]
    assert titles[::2] == [f"{name}: {prompt}" for prompt in PROMPTS for name in ("Gaussian", "policy")]
    shown = np.asarray(Image.open(out / "comparison.png").convert("RGB"))
    assert shown.shape[:2] == tuple(round(120 * inches) for inches in figure.get_size_inches()[::-1])
    for cell in figure.axes:  # the file shows the image of each cell; other images differ by more than 20
        drawn, image = cell_pixels(cell, shown), Image.fromarray(cell.get_images()[0].get_array())
        resized = np.asarray(image.resize(drawn.shape[1::-1], Image.Resampling.NEAREST))
        assert np.abs(drawn.astype(int) - resized).mean() < 8


def cell_pixels(cell, shown):
    """The part of a saved figure ``(H, W, 3)`` that one cell covers."""
    left, bottom, right, top = (round(x) for x in cell.get_window_extent().extents)
    return shown[len(shown) - top : len(shown) - bottom, left:right]


def test_temperature_and_rejected_arguments(tmp_path, policy_folder, capsys):
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
        ([" "], "empty prompt"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
    with pytest.raises(SystemExit):
        run(PROMPTS[0], "--policy", str(policy_folder), "--temperature", "0")
    assert "temperature must be positive" in capsys.readouterr().err


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
