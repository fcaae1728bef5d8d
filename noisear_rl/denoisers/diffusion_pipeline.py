"""Wraps a diffusers pipeline as a :class:`~noisear_rl.denoisers.Denoiser`.

The embedded ``shapes`` model and SDXL use the same class with different weights: the pipeline's own
``encode_prompt`` and ``__call__`` do the work, so that the images equal those of the bare pipeline.

Shapes: ``B`` batch, noise ``(B, C, h, w)``, images ``(B, 3, H, W)``; of videos ``(B, C, t, h, w)`` and
``(B, T, 3, H, W)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Self, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from noisear_rl.denoisers import Conditioning
from noisear_rl.denoisers.loop import ProbeScheduler, last_latents, scheduled_by, unclamped
from noisear_rl.denoisers.micro_batches import in_micro_batches
from noisear_rl.denoisers.pipelines import check_guidance, interface_of, quarters
from noisear_rl.denoisers.placement import DTYPES, Dtype, Offload, place, resolve_device, resolve_dtype
from noisear_rl.denoisers.prompt_encoder import PromptEncoder


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
        patch_size: Patch side for policies; ``None`` for a quarter of the noise's height and width, which gives 16
            patches, or 16 for every three latent frames of a video.
        height: Height of the images in pixels; 0 for the model's own.
        width: Width of the images in pixels; 0 for the model's own.
        num_frames: Frames of a video; 0 for the class's own number. Ignored for images.
        max_sequence_length: Tokens of a prompt at most, of classes that let one choose; 0 for the class's own number.
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
        patch_size: int | tuple[int, ...] | None = None,
        height: int = 0,
        width: int = 0,
        num_frames: int = 0,
        max_sequence_length: int = 0,
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
        self.name, self.revision = name, revision
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self._guidance = self.interface.guidance_of(pipeline)
        if self._guidance == "none" and guidance_scale != 1:
            raise ValueError(f"{name} was distilled without guidance: guidance_scale must be 1, not {guidance_scale}")
        self.micro_batch_size = micro_batch_size
        self._pixels, self._frames, self.latent_shape = self.interface.sizes(pipeline, height, width, num_frames)
        self.image_size: int | tuple[int, int] = self._pixels if len(set(self._pixels)) > 1 else self._pixels[0]
        self.patch_size = patch_size or quarters(self.latent_shape[1:])
        self.drop_text_encoders = drop_text_encoders
        kept = None if embedding_dtype == "auto" else DTYPES[embedding_dtype]
        folder = f"{revision}-{str(self.dtype).removeprefix('torch.')}" + (f"-{embedding_dtype}" if kept else "")
        folder += f"-{max_sequence_length}" if max_sequence_length else ""
        negative = self._guidance == "free"
        self._encoder = PromptEncoder(
            pipeline, self.interface, self.device, cache_dir, folder, kept, max_sequence_length, negative
        )
        self.text_shape = (self._encoder.length, int(self.network.config[self.interface.text_width]))

    @property
    def nfe(self) -> int:
        """Network evaluations per image (classifier-free guidance counts twice)."""
        return self.num_inference_steps * (2 if self._guidance == "free" and self.guidance_scale > 1 else 1)

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
            frames = (self._frames,) if self._frames else ()
            return noise.new_zeros(0, *frames, 3, *self._pixels), noise.new_zeros(0, *self.latent_shape)

        def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            generators = None
            if seeds is not None:
                generators = [torch.Generator().manual_seed(int(seed)) for seed in list(seeds)[rows]]
            with last_latents(self.pipeline.scheduler) as latents:
                images = self._call(self.pipeline, noise[rows], conditioning[rows], generator=generators)
            clean = self.interface.unpack(latents[0].float(), self.latent_shape)
            if self.interface.latent_scale:
                clean = clean / self.pipeline.scheduler.config[self.interface.latent_scale]
            return images.float().clamp(0, 1), clean

        images, latents = zip(*in_micro_batches(self, len(noise), run), strict=True)
        return torch.cat(images).clone(), torch.cat(latents).clone()

    def _call(
        self, call: Callable[..., Any], noise: torch.Tensor, conditioning: Conditioning, **options: Any
    ) -> torch.Tensor:
        """The pipeline's own loop, from noise to images."""
        interface, (height, width) = self.interface, self._pixels
        steps = options.setdefault("num_inference_steps", self.num_inference_steps)
        guidance = options.pop("guidance_scale", self.guidance_scale)
        options[interface.guidance_argument] = guidance + interface.guidance_offset
        options = {"height": height, "width": width, "output_type": "pt"} | dict(interface.options) | options
        if interface.few_steps:
            options |= interface.few_steps(steps)
        if self._frames:
            options["num_frames"] = self._frames
        dtype = torch.float32 if interface.float32_latents else self.network.dtype
        latents = noise.to(self.device, dtype, copy=True)
        if interface.packs_noise:
            latents = interface.pack(latents)
        with self._autocast():
            return call(latents=latents, **options, **interface.arguments(conditioning.inputs, guidance))[0]

    @property
    def signal_level(self) -> float:
        """``√ᾱ`` at the first timestep: the factor of the clean latent that the forward process leaves in the noise.

        0 for flow matching, whose schedules start from pure noise.
        """
        scheduler = self.pipeline.scheduler
        if not hasattr(scheduler, "alphas_cumprod") or self._predicts() == "flow":
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
        with unclamped(self.pipeline):
            return self._call(undecorated, noise, conditioning)

    def _predicts(self) -> str:
        """What the network predicts: ``epsilon``, ``v_prediction``, or ``flow`` for the velocity of flow matching."""
        kind = self.pipeline.scheduler.config.get("prediction_type", "flow").removesuffix("_prediction")
        kind = {"v": "v_prediction"}.get(kind, kind)
        if kind not in ("epsilon", "v_prediction", "flow"):
            raise ValueError(f"{self.name} predicts {kind!r}; single predictions need one of ε, v or a velocity")
        return kind

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
            ValueError: If the latents do not match, the network predicts neither ε nor v nor a velocity, or the model
                was distilled without guidance and ``guidance_scale`` is not 1.
        """
        self._check(latents, conditioning)
        check_guidance(guidance_scale)
        scheduler, kind = self.pipeline.scheduler, self._predicts()
        if self._guidance == "none" and guidance_scale != 1:
            raise ValueError(f"{self.name} was distilled without guidance: a prediction's must be 1")

        def run(rows: slice) -> torch.Tensor:
            probe = ProbeScheduler(scheduler.config, timestep)
            options = {"guidance_scale": guidance_scale, "num_inference_steps": 1, "output_type": "latent"}
            with scheduled_by(self.pipeline, probe):
                self._call(self.pipeline, latents[rows], conditioning[rows], **options)
            return self.interface.unpack(probe.prediction.float(), self.latent_shape)

        predicted = torch.cat(in_micro_batches(self, len(latents), run)).clone()
        if kind == "v_prediction":
            alpha = float(scheduler.alphas_cumprod[int(timestep)])
            predicted = alpha**0.5 * predicted + (1 - alpha) ** 0.5 * latents.to(predicted)
        return predicted

    def first_order_schedule(self, num_inference_steps: int) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
        """A deterministic first-order scheduler on the model's own noise schedule, with its timesteps set.

        DDIM with ε-prediction, or Euler for flow matching.

        Raises:
            ValueError: If the network predicts neither ε nor v nor a velocity, or the model is a few-step student,
                whose timesteps allow no such schedule.
        """
        config, steps = self.pipeline.scheduler.config, num_inference_steps
        if self._predicts() == "flow":
            if "flow_shift" in config:  # a multistep scheduler
                flow = FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], shift=config["flow_shift"])
            else:
                flow = FlowMatchEulerDiscreteScheduler.from_config(config)
            if self.interface.shift:  # as the pipeline's own call
                mu = self.interface.shift_of(self.pipeline, self.latent_shape, steps)
                flow.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
            else:
                flow.set_timesteps(steps)
            return flow
        ddim = DDIMScheduler.from_config(config, prediction_type="epsilon", clip_sample=False, thresholding=False)
        ddim.set_timesteps(num_inference_steps)
        if int(ddim.timesteps.max()) >= ddim.config.num_train_timesteps:
            raise ValueError(f"{self.name} was distilled to few steps; for a longer schedule, ask its teacher")
        return ddim
