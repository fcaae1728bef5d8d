"""ComfyUI node "NoiseAR latent": the initial noise of a policy instead of Gaussian noise.

Copy this file to `ComfyUI/custom_nodes/` and `pip install noisear-rl` into ComfyUI's environment. Connect `noise` and
`latent` to SamplerCustomAdvanced; KSampler takes no noise, and draws its own. The text goes through the checkpoint's
CLIP, so the policy must have been trained for a model with the same text encoders (SDXL, Stable Diffusion 1 and 2).
Image i of a batch has the seed `seed + i`: the noise of `noisear sample --seeds`. Weights such as `(red:1.2)` are
ComfyUI's, and no policy was trained with them. Only the first 77 tokens count.

Shapes: `B` images, `L` tokens, `D` text width, noise `(B, C, h, w)`.
"""

from functools import lru_cache
from typing import Any

import torch

from noisear_rl import NoiseARPolicy, load_policy

SEEDS = 2**64


def read_text(clip: Any, prompt: str, text_encoder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a policy reads of a prompt: text `(1, L, D)` float32, and a mask `(1, L)`, true where a token counts.

    Args:
        clip: ComfyUI's CLIP.
        prompt: The prompt.
        text_encoder: As in the policy's configuration: `denoiser` or `tokens`.

    Raises:
        ValueError: If the prompt is empty, or the policy reads another encoder.
    """
    if not prompt.strip():
        raise ValueError("NoiseAR latent: type a prompt")
    if text_encoder not in ("denoiser", "tokens"):
        raise ValueError(f"NoiseAR latent: this policy reads {text_encoder!r}, and ComfyUI's CLIP does not give that")
    tokens, empty = clip.tokenize(prompt), clip.tokenize("")
    name = "l" if "l" in tokens else next(iter(tokens))  # SDXL's two tokenizers agree on everything but padding
    ids, end = [token for token, *_ in tokens[name][0]], empty[name][0][1][0]  # an empty text is start, end, padding
    count = ids.index(end) + 1
    if text_encoder == "tokens":
        text = torch.tensor(ids, dtype=torch.float32)[None, :, None]
        text[:, count:] = 0  # as noisear_rl pads
    else:
        text = clip.encode_from_tokens(tokens)[:, : len(ids)].float()
    return text, (torch.arange(len(ids), device=text.device) < count)[None]


class PolicyNoise:
    """ComfyUI's NOISE: `seed`, and `generate_noise` of a latent image."""

    def __init__(self, policy: NoiseARPolicy, text: torch.Tensor, mask: torch.Tensor, seed: int):
        self.policy, self.text, self.mask, self.seed = policy, text, mask, seed

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """The noise `(B, C, h, w)` for a batch of latents, of unit variance before training, as ComfyUI's own.

        Raises:
            ValueError: If the latents have another size than the policy's.
        """
        samples, expected = input_latent["samples"], tuple(self.policy.config.latent_shape)
        if tuple(samples.shape[1:]) != expected:
            raise ValueError(
                f"NoiseAR latent: this policy draws noise of {expected}, not {tuple(samples.shape[1:])}: connect the "
                "output `latent`"
            )
        rows = input_latent.get("batch_index") or range(len(samples))
        seeds = [(self.seed + int(row)) % SEEDS for row in rows]
        text, mask = (x.expand(len(seeds), *x.shape[1:]) for x in (self.text, self.mask))
        policy = self.policy.to(text.device)
        return policy.noise(policy.sample(text, mask, seeds=seeds)).to("cpu", samples.dtype)


class NoiseARLatent:
    """The node."""

    CATEGORY = "sampling/custom_sampling/noise"
    RETURN_TYPES = ("NOISE", "LATENT")
    RETURN_NAMES = ("noise", "latent")
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """ComfyUI's description of the inputs."""
        return {
            "required": {
                "clip": ("CLIP",),
                "text": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "policy": ("STRING", {"default": "", "tooltip": "Checkpoint, run folder or Hub id"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": SEEDS - 1, "control_after_generate": True}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def draw(
        self, clip: Any, text: str, policy: str, seed: int, batch_size: int
    ) -> tuple[PolicyNoise, dict[str, torch.Tensor]]:
        """The noise, and an empty latent image of the policy's size.

        Raises:
            ValueError: If an input is missing or does not fit the policy.
            FileNotFoundError: If there is no such policy.
        """
        if not policy.strip():
            raise ValueError("NoiseAR latent: name a policy: a checkpoint, a run folder or a Hub id")
        loaded = cached_policy(policy.strip())
        read, mask = read_text(clip, text, loaded.config.text_encoder)
        latent = torch.zeros(batch_size, *loaded.config.latent_shape)
        return PolicyNoise(loaded, read, mask, seed), {"samples": latent}


@lru_cache(maxsize=2)
def cached_policy(path: str) -> NoiseARPolicy:
    """A policy in eval mode; loaded once."""
    return load_policy(path)


NODE_CLASS_MAPPINGS = {"NoiseARLatent": NoiseARLatent}
NODE_DISPLAY_NAME_MAPPINGS = {"NoiseARLatent": "NoiseAR latent"}
