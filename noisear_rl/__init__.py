"""Reinforcement learning over the initial noise of diffusion models.

Importing this package registers the Gymnasium environments; it loads neither torch nor diffusers. The public names
below load what they need when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from noisear_rl.denoisers import load_denoiser
    from noisear_rl.envs import make_vector_env
    from noisear_rl.policy import NoiseARConfig, NoiseARPolicy, load_policy
    from noisear_rl.rewards import load_reward

__all__ = ["NoiseARConfig", "NoiseARPolicy", "load_denoiser", "load_policy", "load_reward", "make_vector_env"]

_HOMES = {
    "NoiseARConfig": "policy",
    "NoiseARPolicy": "policy",
    "load_denoiser": "denoisers",
    "load_policy": "policy",
    "load_reward": "rewards",
    "make_vector_env": "envs",
}

__version__: str

ENVIRONMENTS = {
    "NoiseAR-Shapes-v0": "shapes",
    "NoiseAR-ShapesTurbo-v0": "shapes-turbo",
    "NoiseAR-SDXL-v0": "sdxl",
    "NoiseAR-DreamShaper-v0": "dreamshaper",
    "NoiseAR-HunyuanDiT-v0": "hunyuan-dit",
    "NoiseAR-PixArtSigma-v0": "pixart-sigma",
    "NoiseAR-SD3-v0": "sd3",
    "NoiseAR-SD35Medium-v0": "sd3.5-medium",
    "NoiseAR-SD35LargeTurbo-v0": "sd3.5-large-turbo",
    "NoiseAR-SDXLTurbo-v0": "sdxl-turbo",
    "NoiseAR-SDXLLightning-v0": "sdxl-lightning",
    "NoiseAR-SanaSprint-v0": "sana-sprint",
    "NoiseAR-SanaSprintSmall-v0": "sana-sprint-0.6b",
    "NoiseAR-FluxDev-v0": "flux-dev",
    "NoiseAR-FluxSchnell-v0": "flux-schnell",
    "NoiseAR-Flux2Klein-v0": "flux2-klein",
    "NoiseAR-ZImageTurbo-v0": "z-image-turbo",
    "NoiseAR-QwenImage-v0": "qwen-image",
    "NoiseAR-Wan-v0": "wan",
}

for _id, _denoiser in ENVIRONMENTS.items():
    gymnasium.register(
        _id,
        entry_point="noisear_rl.envs.noise_env:NoiseEnv",
        vector_entry_point="noisear_rl.envs.noise_vector_env:NoiseVectorEnv",
        kwargs={"denoiser": _denoiser},
    )


def __getattr__(name: str) -> Any:
    """Loads a public name from the folder that holds it; ``__version__`` is ``0.0.0`` where nothing is installed."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("noisear-rl")
        except PackageNotFoundError:
            return "0.0.0"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
