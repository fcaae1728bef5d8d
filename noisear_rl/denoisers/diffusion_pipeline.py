"""Wraps a diffusers text-to-image pipeline as a :class:`~noisear_rl.denoisers.Denoiser`.

The embedded ``shapes`` model and SDXL use the same class with different weights: the pipeline's own
``encode_prompt`` and ``__call__`` do the work, so that the images equal those of the bare pipeline.

Shapes: ``B`` batch, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, get_args

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from noisear_rl.denoisers import Conditioning
from noisear_rl.denoisers.pipelines import ProbeScheduler, check_guidance, interface_of, last_latents, scheduled_by
from noisear_rl.denoisers.placement import DTYPES, Dtype, Offload, place, resolve_device, resolve_dtype
from noisear_rl.denoisers.prompt_encoder import PromptEncoder

LATENT_STATISTICS = ("latents_mean", "latents_std")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class DiffusionPipelineDenoiser:
    """A frozen diffusers pipeline behind the :class:`~noisear_rl.denoisers.Denoiser` protocol.

    On a CPU, reduced precision is autocast over float32 weights, unless the weights have that precision already; on
    other devices the weights themselves are cast.
    When memory runs out, ``micro_batch_size`` is halved with a warning; the results stay the same. ``copy.deepcopy``
    returns the same object, so that ``gym.make(denoiser=...)``, which copies its arguments, copies no weights.

    Args:
        pipeline: A pipeline of a class in :data:`noisear_rl.denoisers.pipelines.INTERFACES`, or of a subclass.
        name: Name in records.
        revision: Revision of the weights in records and in the cache of prompt embeddings.
        patch_size: Patch side for policies; ``None`` for the one that gives 16 patches.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale; 1 means no guidance.
        device: Device to run on; ``auto`` for the accelerator if there is one.
        dtype: ``auto`` (half precision on devices that are fast at it) or the name of a torch dtype.
        micro_batch_size: Images per forward pass.
        cache_dir: Where prompt embeddings are kept between runs: a folder, ``none``, or ``auto`` for
            ``~/.cache/noisear-rl`` if the text encoders are large.
        embedding_dtype: Dtype that prompt embeddings are kept in, in memory and on disk; ``auto`` for that of the text
            encoders: half precision on accelerators, and float32 on a CPU.
        drop_text_encoders: Free the text encoders once a command has embedded its prompts (:meth:`embed_all`); a prompt
            that comes later is refused.
        offload: ``model`` keeps only the running component on the accelerator, ``sequential`` only the running layer:
            the least memory, and much slower.
        vae_slicing: Decodes images one by one.
        vae_tiling: Decodes images in overlapping tiles, which changes them a little at the seams.
        attention_slicing: Computes attention in parts (UNets).
        compile: Compiles the denoising network on first use.

    Raises:
        ValueError: If an argument is out of range or the pipeline's class is not supported.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        name: str,
        revision: str = "unknown",
        patch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.5,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        micro_batch_size: int = 64,
        cache_dir: str = "auto",
        embedding_dtype: Dtype = "auto",
        drop_text_encoders: bool = False,
        offload: Offload = "none",
        vae_slicing: bool = False,
        vae_tiling: bool = False,
        attention_slicing: bool = False,
        compile: bool = False,
    ) -> None:
        self.interface = interface_of(pipeline)
        if num_inference_steps < 1 or micro_batch_size < 1:
            raise ValueError("num_inference_steps and micro_batch_size must be at least 1")
        check_guidance(guidance_scale)
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        for option, value, allowed in (("offload", offload, Offload), ("embedding_dtype", embedding_dtype, Dtype)):
            if value not in get_args(allowed):
                raise ValueError(f"{option} must be one of {get_args(allowed)}, not {value!r}")
        if compile and offload == "sequential":
            raise ValueError("compile needs the whole network on a device: set offload to 'model' or 'none'")
        if offload == "sequential" and type(pipeline).__name__.startswith("HunyuanDiT"):
            raise ValueError(
                "a layer of Hunyuan-DiT reads weights of others, which sequential offloading moves away: "
                "set offload to 'model'"
            )
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        if getattr(pipeline, "watermark", None) is not None:
            pipeline.watermark = None  # images are scored exactly as they were denoised
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        cast = self.device.type != "cpu" or all(module.dtype == self.dtype for module in modules)
        weights = self.dtype if cast else torch.float32
        if any(module.dtype != weights for module in modules):
            pipeline.to(weights)
        for module in modules:
            module.eval().requires_grad_(False)
        self.device = place(pipeline, self.device, offload)
        if vae_slicing:
            pipeline.vae.enable_slicing()
        if vae_tiling:
            pipeline.vae.enable_tiling()
        if attention_slicing:
            pipeline.enable_attention_slicing()
        self.network = getattr(pipeline, self.interface.network)
        if compile:
            self.network.compile()
        size = self.network.config.sample_size
        self.name, self.revision, self.patch_size = name, revision, patch_size or max(1, size // 4)
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.micro_batch_size = micro_batch_size
        self.latent_shape = (self.network.config.in_channels, size, size)
        self.image_size = size * pipeline.vae_scale_factor
        self.drop_text_encoders = drop_text_encoders
        kept = None if embedding_dtype == "auto" else DTYPES[embedding_dtype]
        folder = f"{revision}-{str(self.dtype).removeprefix('torch.')}" + (f"-{embedding_dtype}" if kept else "")
        self._encoder = PromptEncoder(pipeline, self.interface, self.device, cache_dir, folder, kept)
        self.text_shape = (self._encoder.length, int(self.network.config[self.interface.text_width]))

    @property
    def nfe(self) -> int:
        """Network evaluations per image (guidance counts twice)."""
        return self.num_inference_steps * (2 if self.guidance_scale > 1 else 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts; each distinct prompt is computed once and by itself, so that batches do not matter.

        Raises:
            ValueError: If there is no prompt, or a prompt is empty.
        """
        return self._encoder.encode(prompts)

    def embed_all(self, prompts: Sequence[str]) -> None:
        """Embeds all prompts of a run and frees the text encoders, if the option ``drop_text_encoders`` is set."""
        if self.drop_text_encoders:
            self._encoder.keep_only(prompts)

    def _check(self, noise: torch.Tensor, conditioning: Conditioning) -> None:
        expected = (len(conditioning), *self.latent_shape)
        if tuple(noise.shape) != expected:
            raise ValueError(f"expected noise {expected}, got {tuple(noise.shape)}")
        if not noise.is_floating_point():
            raise ValueError(f"expected floating-point noise, got {noise.dtype}")
        if not noise.isfinite().all():
            raise ValueError("noise contains NaN or infinite values")

    def denoise(
        self, noise: torch.Tensor, conditioning: Conditioning, seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Turns noise into images.

        Args:
            noise: ``(B, C, h, w)``, unit variance, finite. Not modified.
            conditioning: Of the same ``B`` prompts.
            seeds: One per sample, for schedulers that draw their own noise: on the CPU, the same for all devices.

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
        """Like :meth:`denoise`, but also returns the clean latents ``(B, C, h, w)`` of the images."""
        self._check(noise, conditioning)
        if not len(noise):
            return noise.new_zeros(0, 3, self.image_size, self.image_size), noise.new_zeros(0, *self.latent_shape)

        def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            generators = None
            if seeds is not None:
                generators = [torch.Generator().manual_seed(int(seed)) for seed in list(seeds)[rows]]
            with last_latents(self.pipeline.scheduler) as latents:
                images = self._call(self.pipeline, noise[rows], conditioning[rows], generator=generators)
            return images.float().clamp(0, 1), latents[0].float()

        images, latents = zip(*self._in_micro_batches(len(noise), run), strict=True)
        return torch.cat(images).clone(), torch.cat(latents).clone()

    def _call(
        self, call: Callable[..., Any], noise: torch.Tensor, conditioning: Conditioning, **options: Any
    ) -> torch.Tensor:
        """The pipeline's own loop, from noise to images."""
        defaults = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "height": self.image_size,
            "width": self.image_size,
            "output_type": "pt",
        }
        latents = noise.to(self.device, self.network.dtype, copy=True)
        with self._autocast():
            return call(
                latents=latents, **(defaults | dict(self.interface.options) | options), **conditioning.inputs
            ).images

    def _in_micro_batches(self, count: int, run: Callable[[slice], Any]) -> list[Any]:
        """Results of ``run`` on successive slices, which shrink when memory runs out."""
        results: list[Any] = []
        start = 0
        while start < count:
            size = min(self.micro_batch_size, count - start)
            try:
                results.append(run(slice(start, start + size)))
                start += size
                continue
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not any(s in str(error) for s in NO_MEMORY):
                    raise
                if size == 1:
                    error.add_note("A single image does not fit into memory: try offload, vae_tiling or another dtype.")
                    raise
            # Outside the handler, so that the tensors of the failed call are freed.
            self.micro_batch_size = size // 2
            warnings.warn(
                f"out of memory with {size} images per forward pass; continuing with {size // 2}", stacklevel=3
            )
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results

    @property
    def signal_level(self) -> float:
        """``√ᾱ`` at the first timestep: the factor of the clean latent that the forward process leaves in the noise.

        0 for flow matching, whose schedules start from pure noise.
        """
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            return 0.0
        scheduler.set_timesteps(self.num_inference_steps)
        return float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])]) ** 0.5

    def denoise_differentiably(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Like :meth:`denoise` with a deterministic scheduler, but differentiable with respect to the noise.

        Pixel values outside [0, 1] are kept, so that their gradients do not vanish. Memory grows with
        ``B · num_inference_steps``.
        """
        self._check(noise, conditioning)
        undecorated = inspect.unwrap(type(self.pipeline).__call__).__get__(self.pipeline)  # without its no_grad
        latents = self._call(undecorated, noise, conditioning, output_type="latent")
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        if getattr(vae.config, "latents_mean", None) is not None:
            mean, std = (torch.tensor(getattr(vae.config, key)).view(1, -1, 1, 1) for key in LATENT_STATISTICS)
            latents = latents * std.to(latents) + mean.to(latents)
        with self._autocast():
            images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return images.float() / 2 + 0.5

    @torch.inference_mode()
    def predict_noise(
        self, latents: torch.Tensor, timestep: float, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Guided prediction ``ε_u + g·(ε_c - ε_u)`` at one timestep of :meth:`first_order_schedule`.

        Args:
            latents: ``(B, C, h, w)`` at that timestep.
            timestep: In units of the training schedule.
            conditioning: Of the same ``B`` prompts.
            guidance_scale: At least 1; 1 is the conditional prediction.

        Returns:
            ``(B, C, h, w)`` float32: ε, converted if the network predicts v, or the velocity ``ε - z0`` of a
            flow-matching model.

        Raises:
            ValueError: If the latents do not match, or the network predicts neither ε nor v nor a velocity.
        """
        self._check(latents, conditioning)
        check_guidance(guidance_scale)
        scheduler = self.pipeline.scheduler
        kind = scheduler.config.get("prediction_type", "flow")
        if kind not in ("epsilon", "v_prediction", "flow"):
            raise ValueError(f"{self.name} predicts {kind!r}; expected ε, v or a velocity")

        def run(rows: slice) -> torch.Tensor:
            probe = ProbeScheduler(scheduler.config, timestep)
            options = {"guidance_scale": guidance_scale, "num_inference_steps": 1, "output_type": "latent"}
            with scheduled_by(self.pipeline, probe):
                self._call(self.pipeline, latents[rows], conditioning[rows], **options)
            return probe.prediction.float()

        predicted = torch.cat(self._in_micro_batches(len(latents), run)).clone()
        if kind == "v_prediction":
            alpha = float(scheduler.alphas_cumprod[int(timestep)])
            predicted = alpha**0.5 * predicted + (1 - alpha) ** 0.5 * latents.to(predicted)
        return predicted

    def first_order_schedule(self, num_inference_steps: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """A deterministic first-order scheduler on the model's own noise schedule, with its timesteps set.

        DDIM with ε-prediction, or Euler for flow matching.

        Raises:
            ValueError: If the model is a few-step student, whose timesteps allow no such schedule.
        """
        config = self.pipeline.scheduler.config
        if isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            flow = FlowMatchEulerDiscreteScheduler.from_config(config)
            flow.set_timesteps(num_inference_steps)
            return flow
        ddim = DDIMScheduler.from_config(config, prediction_type="epsilon", clip_sample=False, thresholding=False)
        ddim.set_timesteps(num_inference_steps)
        if int(ddim.timesteps.max()) >= ddim.config.num_train_timesteps:
            raise ValueError(f"{self.name} was distilled to few steps; for a longer schedule, ask its teacher")
        return ddim
