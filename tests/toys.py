"""An identity denoiser and rewards with known optima: problems that algorithms must solve before diffusion."""

from collections.abc import Sequence

import gymnasium
import torch

from noisear_rl.denoisers import Conditioning
from noisear_rl.rewards import WeightedReward

PROMPTS = ("up", "down")


class NoDenoiser:
    """Returns the noise itself as the image, so that a reward is a known function of the noise."""

    name, revision, num_inference_steps, guidance_scale, nfe = "none", "none", 1, 1.0, 1
    text_shape = (2, 8)

    def __init__(self, latent_shape: tuple[int, int, int], patch_size: int):
        self.latent_shape, self.patch_size = latent_shape, patch_size
        self.image_size = latent_shape[1]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows = [torch.randn(2, 8, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        text = torch.stack(rows)
        return Conditioning(list(prompts), text, torch.ones(len(prompts), 2, dtype=torch.bool), {"text": text})

    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        return noise[:, :1].expand(-1, 3, -1, -1).contiguous()

    denoise_differentiably = denoise

    def denoise_with_latents(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.denoise(noise, conditioning), noise


class Bounded(NoDenoiser):
    """An identity denoiser with pixels in [0, 1]."""

    def denoise(self, noise, conditioning, seeds=None):
        return super().denoise(noise, conditioning).sigmoid()


def projections(images):
    """Unit-variance projections of the upper and the lower patch, ``(B, 2)``."""
    return images[:, 0].unflatten(1, (2, -1)).sum((2, 3)) / (images[0, 0].numel() / 2) ** 0.5


class Target:
    """Bandit: the upper projection should be 3. ``-(a - 3)²``: -10 for Gaussian noise, -1 at best (unit variance)."""

    name, statistics, gaussian, best = "target", (0.0, 1.0), -10.0, -1.0

    def score(self, images, prompts):
        return -((projections(images)[:, 0] - 3) ** 2)


class Echo:
    """The lower projection should be twice the upper one: -5 for Gaussian noise, -1 at best. Needs memory."""

    name, statistics, gaussian, best = "echo", (0.0, 1.0), -5.0, -1.0

    def score(self, images, prompts):
        a, b = projections(images).unbind(1)
        return -((b - 2 * a) ** 2)


class Obey:
    """The upper projection should be 2 or -2, as the prompt says: -5 for Gaussian noise, -1 at best."""

    name, statistics, gaussian, best = "obey", (0.0, 1.0), -5.0, -1.0

    def score(self, images, prompts):
        sign = torch.tensor([1.0 if prompt == "up" else -1.0 for prompt in prompts], device=images.device)
        return -((projections(images)[:, 0] - 2 * sign) ** 2)


def register(reward, latent_shape=(1, 8, 4), patch_size=4, prompts=PROMPTS, denoiser=None):
    """Registers an environment with two patches and returns its id."""
    name = f"{type(reward).__name__}{latent_shape[1]}-v0"
    gymnasium.registry.pop(name, None)
    kwargs = {
        "denoiser": denoiser or NoDenoiser(latent_shape, patch_size),
        "reward": WeightedReward([(reward, 1.0)]),
        "prompts": prompts,
    }
    entry = "noisear_rl.envs.noise_env:NoiseEnv", "noisear_rl.envs.noise_vector_env:NoiseVectorEnv"
    gymnasium.register(name, entry_point=entry[0], vector_entry_point=entry[1], kwargs=kwargs)
    return name


def progress(reward, value):
    """0 for Gaussian noise, 1 at the optimum."""
    return (value - reward.gaussian) / (reward.best - reward.gaussian)
