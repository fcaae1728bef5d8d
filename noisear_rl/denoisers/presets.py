"""Denoisers by name: how published pipelines are set up, and how they are loaded."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel

from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.shapes.architecture import ASSETS


@dataclass(frozen=True)
class Preset:
    """How a published pipeline is set up (NoiseAR, appendix E).

    Attributes:
        path: Folder or Hub id.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance.
        patch_size: Patch side; ``None`` for the one that gives 16 patches.
        scheduler: ``"dpm"`` replaces the scheduler by DPMSolverMultistep, ``None`` keeps the pipeline's.
        load: Keyword arguments for ``from_pretrained``.
        student: Folder of another UNet and scheduler for the same pipeline; ``None`` for its own.
    """

    path: str
    num_inference_steps: int
    guidance_scale: float
    patch_size: int | None
    scheduler: str | None = "dpm"
    load: tuple[tuple[str, Any], ...] = ()
    student: str | None = None


_FP16 = (("variant", "fp16"), ("use_safetensors", True))
PRESETS: dict[str, Preset] = {
    "shapes": Preset(str(ASSETS / "pipeline"), 4, 4.0, 2, scheduler=None),
    "shapes-turbo": Preset(str(ASSETS / "pipeline"), 1, 1.0, 2, None, student=str(ASSETS / "turbo")),
    "sdxl": Preset("stabilityai/stable-diffusion-xl-base-1.0", 50, 5.5, 32, load=_FP16),
    "dreamshaper": Preset("Lykon/dreamshaper-xl-v2-turbo", 50, 3.5, 32, load=_FP16),
    "hunyuan-dit": Preset("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", 50, 5.5, 32),
}


def load_pipeline_denoiser(name: str, **options: Any) -> DiffusionPipelineDenoiser:
    """Builds the denoiser of a preset or of a pipeline folder; see :func:`noisear_rl.denoisers.load_denoiser`."""
    if name in PRESETS:
        preset = PRESETS[name]
    elif Path(name).is_dir():
        preset = Preset(name, 50, 5.5, None)
    else:
        raise ValueError(f"unknown denoiser {name!r}; expected one of {sorted(PRESETS)} or a pipeline folder")
    fields = {
        key: options.pop(key) for key in ("num_inference_steps", "guidance_scale", "patch_size") if key in options
    }
    preset = replace(preset, **fields)
    allowed = set(inspect.signature(DiffusionPipelineDenoiser).parameters) - {"pipeline", "name"}
    if unknown := set(options) - allowed:
        raise ValueError(f"unknown denoiser option {sorted(unknown)}; expected some of {sorted(allowed)}")
    with _quiet():
        try:
            parts = dict(preset.load)
            if preset.student is not None:
                parts["unet"] = UNet2DConditionModel.from_pretrained(preset.student, subfolder="unet")
                parts["scheduler"] = DDIMScheduler.from_pretrained(preset.student, subfolder="scheduler")
            pipeline = DiffusionPipeline.from_pretrained(preset.path, **parts)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"the weights of {name!r} ({preset.path}) could not be loaded: download them first "
                f"(`hf download {preset.path}`) or name a local folder; the embedded denoiser 'shapes' needs none. "
                f"Cause: {str(error).splitlines()[0]}"
            ) from error
    if preset.scheduler == "dpm":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    options.setdefault("num_inference_steps", preset.num_inference_steps)
    options.setdefault("guidance_scale", preset.guidance_scale)
    patch_size = preset.patch_size or max(1, pipeline.unet.config.sample_size // 4)
    return DiffusionPipelineDenoiser(pipeline, name=name, patch_size=patch_size, **options)


@contextlib.contextmanager
def _quiet():
    """Keeps the loading bars of diffusers and transformers out of other progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in (diffusers_logging, transformers_logging):
            logging.enable_progress_bar()
