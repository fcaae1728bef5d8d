"""Reinforcement learning over the initial noise of diffusion models.

Importing this package registers the Gymnasium environments; it loads neither torch nor diffusers.
"""

from importlib.metadata import PackageNotFoundError, version

import gymnasium

try:
    __version__ = version("noisear-rl")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

ENVIRONMENTS = {
    "NoiseAR-Shapes-v0": "shapes",
    "NoiseAR-ShapesTurbo-v0": "shapes-turbo",
    "NoiseAR-SDXL-v0": "sdxl",
    "NoiseAR-DreamShaper-v0": "dreamshaper",
    "NoiseAR-HunyuanDiT-v0": "hunyuan-dit",
    "NoiseAR-PixArtSigma-v0": "pixart-sigma",
    "NoiseAR-SD3-v0": "sd3",
}

for _id, _denoiser in ENVIRONMENTS.items():
    gymnasium.register(
        _id,
        entry_point="noisear_rl.envs.noise_env:NoiseEnv",
        vector_entry_point="noisear_rl.envs.noise_vector_env:NoiseVectorEnv",
        kwargs={"denoiser": _denoiser},
    )
