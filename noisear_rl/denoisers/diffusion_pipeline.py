"""A diffusers text-to-image pipeline as a :class:`~noisear_rl.denoisers.Denoiser`.

The embedded ``shapes`` model and SDXL are the same class with other weights: the pipeline's own
``encode_prompt`` and ``__call__`` do the work, so that our images are the pipeline's images.

Shapes: ``B`` batch, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline

from noisear_rl.denoisers import Conditioning

LATENT_STATISTICS = ("latents_mean", "latents_std")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _auto_dtype(device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class DiffusionPipelineDenoiser:
    """A frozen diffusers pipeline behind the :class:`~noisear_rl.denoisers.Denoiser` protocol.

    On a CPU, reduced precision is autocast over float32 weights; elsewhere the weights themselves are cast.

    Args:
        pipeline: An SDXL-class pipeline.
        name: How it is called in records.
        patch_size: Patch side for policies.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        device: Where it runs.
        dtype: ``auto`` (half precision where the device is fast at it) or a torch dtype's name.
        micro_batch_size: Images denoised at once.

    Raises:
        ValueError: If an argument is out of range or the pipeline's class is not supported.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        name: str,
        patch_size: int,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.5,
        device: str | torch.device = "cpu",
        dtype: str = "auto",
        micro_batch_size: int = 64,
    ):
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            raise ValueError(f"{type(pipeline).__name__} is not supported yet; expected a StableDiffusionXLPipeline")
        if num_inference_steps < 1 or micro_batch_size < 1:
            raise ValueError("num_inference_steps and micro_batch_size must be at least 1")
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; expected 'auto' or one of {sorted(DTYPES)}")
        self.device = torch.device(device)
        self.dtype = _auto_dtype(self.device) if dtype == "auto" else DTYPES[dtype]
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        weights = self.dtype if self.device.type != "cpu" else torch.float32
        if any(module.dtype != weights for module in self._modules()):
            self.pipeline.to(weights)
        self.pipeline.to(self.device)
        for module in self._modules():
            module.eval().requires_grad_(False)
        self.name, self.patch_size = name, patch_size
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.micro_batch_size = micro_batch_size
        unet = pipeline.unet.config
        self.latent_shape = (unet.in_channels, unet.sample_size, unet.sample_size)
        self.image_size = unet.sample_size * pipeline.vae_scale_factor
        self.text_shape = (pipeline.tokenizer.model_max_length, unet.cross_attention_dim)
        self._cache: dict[str, Conditioning] = {}

    def _modules(self) -> list[Any]:
        return [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]

    @property
    def nfe(self) -> int:
        """Network evaluations an image costs (guidance counts twice)."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts; each distinct prompt is computed once and alone, so that batches do not matter.

        Raises:
            ValueError: If a prompt is empty.
        """
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self._encode_one(prompt)
        return Conditioning.concatenate([self._cache[prompt] for prompt in prompts])

    def _encode_one(self, prompt: str) -> Conditioning:
        if not prompt.strip():
            raise ValueError("empty prompt: say what the picture must show")
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(prompt).input_ids
        if len(ids) > tokenizer.model_max_length:
            warnings.warn(
                f"prompt of {len(ids)} tokens is cut to {tokenizer.model_max_length}: {prompt!r}", stacklevel=4
            )
        known = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        if tokenizer.unk_token_id in ids and tokenizer.unk_token_id not in known:
            warnings.warn(f"prompt holds words the text encoder does not know: {prompt!r}", stacklevel=4)
        positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=True
        )
        length = torch.arange(positive.shape[1], device=self.device)
        return Conditioning(
            [prompt],
            positive.float(),
            (length < min(len(ids), positive.shape[1]))[None],
            {
                "prompt_embeds": positive,
                "negative_prompt_embeds": negative,
                "pooled_prompt_embeds": pooled,
                "negative_pooled_prompt_embeds": negative_pooled,
            },
        )

    def _check(self, noise: torch.Tensor, conditioning: Conditioning) -> None:
        expected = (len(conditioning), *self.latent_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"expected noise {expected}, got {tuple(noise.shape)}")
        if not noise.is_floating_point():
            raise ValueError(f"expected floating-point noise, got {noise.dtype}")
        if not noise.isfinite().all():
            raise ValueError("noise holds NaN or infinite values")

    @torch.inference_mode()
    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Turns noise into images.

        Args:
            noise: ``(B, C, h, w)``, unit variance, finite. Not changed.
            conditioning: Of the same ``B`` prompts.
            seeds: One a sample, for schedulers that draw noise of their own.

        Returns:
            ``(B, 3, H, W)`` float32 in [0, 1] on the pipeline's device.

        Raises:
            ValueError: If the noise has the wrong shape or type, or is not finite.
        """
        return self.denoise_with_latents(noise, conditioning, seeds)[0]

    @torch.inference_mode()
    def denoise_with_latents(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like :meth:`denoise`; also returns the clean latents ``(B, C, h, w)`` that the images were decoded from."""
        self._check(noise, conditioning)
        images, latents = [], []
        for start in range(0, len(noise), self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            generators = None
            if seeds is not None:
                generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in list(seeds)[rows]]
            last: dict[str, torch.Tensor] = {}

            def keep(pipeline: Any, step: int, timestep: Any, tensors: dict, last: dict = last) -> dict:
                last.update(tensors)
                return tensors

            with self._autocast():
                output = self.pipeline(
                    latents=noise[rows].to(self.device, self.pipeline.unet.dtype, copy=True),
                    generator=generators,
                    num_inference_steps=self.num_inference_steps,
                    guidance_scale=self.guidance_scale,
                    output_type="pt",
                    callback_on_step_end=keep,
                    **conditioning[rows].inputs,
                )
            images.append(output.images.float().clamp(0, 1))
            latents.append(last["latents"].float())
        if not images:
            return noise.new_zeros(0, 3, self.image_size, self.image_size), noise.new_zeros(0, *self.latent_shape)
        return torch.cat(images).clone(), torch.cat(latents).clone()

    @property
    def signal_level(self) -> float:
        """``√ᾱ`` at the first timestep: how much of a clean latent the forward process leaves in the noise."""
        self.pipeline.scheduler.set_timesteps(self.num_inference_steps)
        return float(self.pipeline.scheduler.alphas_cumprod[int(self.pipeline.scheduler.timesteps[0])]) ** 0.5

    def denoise_differentiably(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Like :meth:`denoise` with a deterministic scheduler, but gradients flow from images to noise.

        Values of pixels beyond [0, 1] are kept, so that their gradient does not vanish. Memory grows with
        ``B · num_inference_steps``.
        """
        self._check(noise, conditioning)
        scheduler, vae = self.pipeline.scheduler, self.pipeline.vae
        scheduler.set_timesteps(self.num_inference_steps)
        latents = noise.to(self.device, torch.float32) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            predicted = self._predict_noise(scaled, timestep, conditioning, max(1.0, self.guidance_scale))
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        latents = latents / vae.config.scaling_factor
        if getattr(vae.config, "latents_mean", None) is not None:
            mean, std = (torch.tensor(getattr(vae.config, key)).view(1, -1, 1, 1) for key in LATENT_STATISTICS)
            latents = latents * std.to(latents) + mean.to(latents)
        with self._autocast():
            images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    @torch.inference_mode()
    def predict_noise(
        self, latents: torch.Tensor, timestep: int, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Guided prediction ``ε_u + g·(ε_c − ε_u)`` at one timestep: ``(B, C, h, w)`` float32."""
        self._check(latents, conditioning)
        return self._predict_noise(latents, timestep, conditioning, guidance_scale).clone()

    def _predict_noise(
        self, latents: torch.Tensor, timestep: int, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        guided = guidance_scale != 1
        size = (self.image_size, self.image_size)
        inputs = conditioning.inputs
        dtype = self.pipeline.unet.dtype
        ids = self.pipeline._get_add_time_ids(
            size, (0, 0), size, dtype=dtype, text_encoder_projection_dim=inputs["pooled_prompt_embeds"].shape[-1]
        )
        sides = ("negative_", "") if guided else ("",)
        outputs = []
        for side in sides:
            added = {
                "text_embeds": inputs[f"{side}pooled_prompt_embeds"],
                "time_ids": ids.to(self.device).expand(len(latents), -1),
            }
            with self._autocast():
                outputs.append(
                    self.pipeline.unet(
                        latents.to(self.device, dtype),
                        timestep,
                        encoder_hidden_states=inputs[f"{side}prompt_embeds"],
                        added_cond_kwargs=added,
                    ).sample.float()
                )
        return outputs[0] + guidance_scale * (outputs[1] - outputs[0]) if guided else outputs[0]

    def ddim_schedule(self, num_inference_steps: int) -> DDIMScheduler:
        """A DDIM scheduler on the model's own noise schedule, its timesteps set."""
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler
