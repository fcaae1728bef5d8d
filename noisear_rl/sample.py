"""Draws images from Gaussian noise and from a policy's noise side by side, without any training.

    noisear sample "a photo of a red circle left of a blue square"    # the best policy that comes with the library
    noisear sample "a photo of two squares" --denoiser shapes-turbo --policy runs/ppo
    noisear sample "a lighthouse at dawn" --denoiser sdxl --policy OWNER/POLICY --seeds 0 1 2 3

A seed is the same Gaussian draw in both rows; a policy shifts and scales it. Writes ``comparison.png``, one PNG per
image, and ``noise.safetensors`` with the noises ``(P·S, C, h, w)`` of each method, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from noisear_rl.command import run_script
from noisear_rl.config import PositiveFloat, Seed, check_config, parse_config
from noisear_rl.denoisers import EMBEDDED, Denoiser, DenoiserName, DenoiserOptions, embed_all, load_denoiser
from noisear_rl.files import atomic
from noisear_rl.images import to_uint8
from noisear_rl.policy import NoiseARPolicy, load_policy
from noisear_rl.policy.loading import best_shipped
from noisear_rl.report.plots import save_figure
from noisear_rl.samplers import GAUSSIAN, as_sampler


@dataclass
class SampleConfig:
    """Options of sampling."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts that describe the images."""
    policy: str | None = None
    """Checkpoint, run folder, name of a policy that comes with the library (`shapes/NAME`) or Hub id; `gaussian` for
    Gaussian noise only. Unset, the embedded denoisers use the best one that comes with the library, and others Gaussian
    noise only."""
    denoiser: DenoiserName = "shapes"
    """Name or folder of the denoiser."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3)
    """Seeds of the noise: one image per seed, prompt and method."""
    temperature: PositiveFloat | None = None
    """Factor on the policy's standard deviation; unset for its own."""
    layout_temperature: PositiveFloat | None = None
    """Of a policy with layouts: above its own, layouts differ more, and more images are wrong; unset for its own."""
    output_dir: Path = Path("runs/sample")
    """Folder for the images and the noise."""
    denoiser_options: DenoiserOptions = field(default_factory=dict)
    """Overrides for the denoiser, such as `dtype float32`, `path FOLDER` or `num_inference_steps 30`."""

    def __post_init__(self) -> None:
        check_config(self)


def draw(
    denoiser: Denoiser, policy: NoiseARPolicy | None, prompts: Sequence[str], seeds: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws noises ``(P·S, C, h, w)`` and their images ``(P·S, 3, H, W)``, prompt by prompt.

    Args:
        denoiser: Frozen diffusion model.
        policy: ``None`` for Gaussian noise.
        prompts: ``P`` prompts.
        seeds: ``S`` seeds, the same for every prompt.
    """
    drawn = as_sampler(denoiser, policy)([prompt for prompt in prompts for _ in seeds], [*seeds] * len(prompts))
    return drawn.noise, drawn.images


def policy_of(config: SampleConfig) -> str | None:
    """Path or name of the policy to sample from; ``None`` for Gaussian noise only."""
    if config.policy is None:
        return best_shipped() if config.denoiser in EMBEDDED else None
    return None if config.policy == "gaussian" else config.policy


def sample(config: SampleConfig) -> Path:
    """Writes the images and the noise; returns the path of the comparison.

    Raises:
        ValueError: If there is no prompt or seed, the temperature is not positive, or the policy does not fit the
            denoiser.
    """
    if not config.prompts or not config.seeds:
        raise ValueError('expected at least one prompt and one seed: noisear sample "a photo of two squares"')
    denoiser = load_denoiser(config.denoiser, **config.denoiser_options)
    embed_all(denoiser, config.prompts)
    methods: dict[str, NoiseARPolicy | None] = {GAUSSIAN: None}
    if name := policy_of(config):
        policy = load_policy(name)
        as_sampler(denoiser, policy)  # fails early on a mismatched checkpoint
        policy.set_temperatures(config.temperature, config.layout_temperature)
        methods["policy"] = policy
    drawn = {name: draw(denoiser, policy, config.prompts, config.seeds) for name, policy in methods.items()}

    config.output_dir.mkdir(parents=True, exist_ok=True)
    rows, columns = len(config.prompts) * len(methods), len(config.seeds)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns + 0.6, 2.2 * rows), dpi=120, squeeze=False)
    for m, (name, (_, images)) in enumerate(drawn.items()):
        for i, image in enumerate(images):
            prompt, column = divmod(i, columns)
            pixels = to_uint8(image)
            Image.fromarray(pixels).save(config.output_dir / f"{prompt}-{name.lower()}-{config.seeds[column]}.png")
            cell = axes[prompt * len(methods) + m, column]
            cell.imshow(pixels)
            cell.set(xticks=[], yticks=[])
            if column == 0:
                cell.set_title(f"{name}: {config.prompts[prompt]}", loc="left", fontsize=9)
    figure.tight_layout()
    path = config.output_dir / "comparison.png"
    save_figure(figure, path)
    noises = {name.lower(): noise.contiguous() for name, (noise, _) in drawn.items()}
    with atomic(config.output_dir / "noise.safetensors") as temporary:
        save_file(noises, temporary)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = parse_config(SampleConfig, argv, __doc__)
    print(f"images: {sample(config)}; policy: {policy_of(config) or 'none, Gaussian noise only'}")


if __name__ == "__main__":
    run_script(main)
