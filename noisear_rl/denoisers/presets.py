"""Denoisers by name: settings of published pipelines, and how they are loaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)

from noisear_rl.config import UnknownOptionError
from noisear_rl.denoisers import check_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.lora import merge_lora
from noisear_rl.denoisers.pipelines import INTERFACES, interface_of
from noisear_rl.denoisers.placement import DeviceMap, Dtype, Offload, resolve_device, resolve_dtype
from noisear_rl.denoisers.quiet import quietly
from noisear_rl.denoisers.shapes import ASSETS
from noisear_rl.denoisers.weights import (
    cached,
    file_digest,
    hub_file,
    load_weights,
    local_folder,
    lora_file,
    read_index,
    revision_of,
    wants_fp16_files,
)

Scheduler = Literal["dpm", "euler", "own"]


@dataclass(frozen=True)
class Preset:
    """Settings of a published pipeline (NoiseAR, appendix E; the others follow their model cards).

    Attributes:
        path: Folder or Hub id.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale.
        revision: Commit on the Hub; ``None`` for the newest, whose commit goes into records.
        scheduler: ``dpm`` replaces the scheduler by DPMSolverMultistep, ``euler`` by Euler's with trailing
            timesteps, for students of few steps; ``own`` keeps the pipeline's.
        variant: Which weight files to fetch for half precision; ``None`` for those without a variant.
        pipeline: Pipeline class; folders with a pipeline of this class use the same settings.
        student: Folder with another UNet and scheduler for the same pipeline; ``None`` for the pipeline's own.
        unet: Hub id and file of other weights for the pipeline's UNet.
        half: Precision on accelerators.
        options: Other options of the denoiser.
    """

    path: str
    num_inference_steps: int
    guidance_scale: float
    revision: str | None = None
    scheduler: Scheduler = "dpm"
    variant: str | None = None
    pipeline: str | None = None
    student: str | None = None
    unet: tuple[str, str] | None = None
    half: Dtype = "float16"
    options: Mapping[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "shapes": Preset(str(ASSETS / "pipeline"), 4, 4.0, scheduler="own"),
    "shapes-turbo": Preset(str(ASSETS / "pipeline"), 1, 1.0, scheduler="own", student=str(ASSETS / "turbo")),
    "sdxl": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        50,
        5.5,
        "462165984030d82259a11f4367a4eed129e94a7b",
        variant="fp16",
        pipeline="StableDiffusionXLPipeline",
    ),
    "dreamshaper": Preset("Lykon/dreamshaper-xl-v2-turbo", 50, 3.5, variant="fp16"),
    "hunyuan-dit": Preset("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", 50, 5.5, pipeline="HunyuanDiTPipeline"),
    "pixart-sigma": Preset(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        20,
        4.5,
        "e102b3591cc82e97071b8b4cb90d834d0c487207",
        pipeline="PixArtSigmaPipeline",
    ),
    "sd3": Preset(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        28,
        7.0,
        "ea42f8cef0f178587cf766dc8129abd379c90671",
        scheduler="own",
        pipeline="StableDiffusion3Pipeline",
    ),
    "sd3.5-medium": Preset("stabilityai/stable-diffusion-3.5-medium", 40, 4.5, scheduler="own", half="bfloat16"),
    "sd3.5-large-turbo": Preset(
        "stabilityai/stable-diffusion-3.5-large-turbo", 4, 1.0, scheduler="own", half="bfloat16"
    ),
    "sdxl-turbo": Preset("stabilityai/sdxl-turbo", 1, 1.0, scheduler="own", variant="fp16"),
    "sdxl-lightning": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        4,
        1.0,
        "462165984030d82259a11f4367a4eed129e94a7b",
        scheduler="euler",
        variant="fp16",
        unet=("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors"),
    ),
    "sana-sprint": Preset(
        "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
        2,
        4.5,
        scheduler="own",
        pipeline="SanaSprintPipeline",
        half="bfloat16",
    ),
    "sana-sprint-0.6b": Preset(
        "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", 2, 4.5, scheduler="own", half="bfloat16"
    ),
    "flux-dev": Preset(
        "black-forest-labs/FLUX.1-dev", 50, 3.5, scheduler="own", pipeline="FluxPipeline", half="bfloat16"
    ),
    "flux-schnell": Preset(
        "black-forest-labs/FLUX.1-schnell",
        4,
        1.0,
        scheduler="own",
        half="bfloat16",
        options={"max_sequence_length": 256},
    ),
    "flux2-klein": Preset(
        "black-forest-labs/FLUX.2-klein-4B",
        4,
        1.0,
        scheduler="own",
        pipeline="Flux2KleinPipeline",
        half="bfloat16",
    ),
    "z-image-turbo": Preset(
        "Tongyi-MAI/Z-Image-Turbo", 9, 1.0, scheduler="own", pipeline="ZImagePipeline", half="bfloat16"
    ),
    "qwen-image": Preset("Qwen/Qwen-Image", 50, 4.0, scheduler="own", pipeline="QwenImagePipeline", half="bfloat16"),
    "wan": Preset(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 50, 5.0, scheduler="own", pipeline="WanPipeline", half="bfloat16"
    ),
}
SMALLEST = dict.fromkeys(("guidance_scale", "height", "width", "num_frames", "max_sequence_length", "lora_scale"), 0)
LARGEST = 100_000  # of options that are numbers; others are at least 1
_OWN = {
    "path": str,
    "revision": str,
    "scheduler": str,
    "unet": str,
    "device_map": str,
    "lora": str,
    "lora_scale": float,
}


def load_pipeline_denoiser(name: str, **options: Any) -> DiffusionPipelineDenoiser:
    """Builds the denoiser of a preset or of a pipeline folder; see :func:`noisear_rl.denoisers.load_denoiser`."""
    preset = _preset_of(name)
    options = _converted(options)
    path = options.pop("path", preset.path)
    revision = options.pop("revision", preset.revision if path == preset.path else None)
    scheduler = options.pop("scheduler", preset.scheduler)
    if scheduler not in get_args(Scheduler):
        raise ValueError(f"scheduler must be one of {get_args(Scheduler)}, not {scheduler!r}")
    device = resolve_device(options.get("device", "auto"))
    if device.type != "cpu" and options.get("dtype", "auto") == "auto":
        options["dtype"] = preset.half
    unet, lora, lora_scale = options.pop("unet", None), options.pop("lora", None), options.pop("lora_scale", 1.0)
    dtype = resolve_dtype(options.get("dtype", "auto"), device)
    device_map, offload = options.pop("device_map", "none"), options.get("offload", "none")
    for option, value, allowed in (("device_map", device_map, DeviceMap), ("offload", offload, Offload)):
        if value not in get_args(allowed):
            raise ValueError(f"{option} must be one of {get_args(allowed)}, not {value!r}")
    if device.type == "cpu" and (offload, device_map) != ("none", "none"):
        raise ValueError("offload and device_map spare the memory of accelerators, but the device is the CPU")
    if "none" not in (offload, device_map):
        raise ValueError(f"set offload={offload} or device_map={device_map}, not both")
    folder = local_folder(name, path, revision, preset.variant if path == preset.path else None)
    parts: dict[str, Any] = {} if device.type == "cpu" else {"torch_dtype": dtype}
    if device_map != "none":
        parts["device_map"] = device_map
    if wants_fp16_files(folder, parts.get("torch_dtype")):
        parts["variant"] = "fp16"
    with quietly():
        try:
            if preset.student is not None:
                parts["unet"] = UNet2DConditionModel.from_pretrained(preset.student, subfolder="unet")
                parts["scheduler"] = DDIMScheduler.from_pretrained(preset.student, subfolder="scheduler")
            pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"the weights of {name!r} in {folder} could not be loaded; are they complete, and safetensors? "
                f"Cause: {str(error).splitlines()[0]}"
            ) from error
    revision = revision_of(folder)
    if unet or (preset.unet and path == preset.path and not lora):
        file = Path(unet) if unet else hub_file("unet", *(preset.unet or ("", "")))
        load_weights(pipeline.unet, file)
        revision += f"-{file_digest(file)}"
    if lora:
        file = lora_file(lora)
        merge_lora(pipeline, interface_of(pipeline).network, file, lora_scale)
        revision += f"-{file_digest(file)}" + (f"-{lora_scale:g}" if lora_scale != 1 else "")
    if scheduler == "dpm":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    elif scheduler == "euler":
        config = pipeline.scheduler.config
        pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    own = {"num_inference_steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
    return DiffusionPipelineDenoiser(pipeline, name=name, revision=revision, **own | dict(preset.options) | options)


def _preset_of(name: str) -> Preset:
    if name in PRESETS:
        return PRESETS[name]
    check_denoiser(name)
    cls = read_index(Path(name)).get("_class_name")
    like = next((preset for preset in PRESETS.values() if preset.pipeline and preset.pipeline == cls), None)
    if like is None and cls in INTERFACES:
        return Preset(name, 50, 7.5)
    if like is None:
        raise ValueError(f"{name} contains a {cls}; expected one of {sorted(INTERFACES)}")
    return Preset(name, like.num_inference_steps, like.guidance_scale, scheduler=like.scheduler, half=like.half)


def _converted(options: dict[str, Any]) -> dict[str, Any]:
    """Converts options given as strings to their own types.

    Raises:
        ValueError: If an option is unknown or does not convert.
    """
    parameters = inspect.signature(DiffusionPipelineDenoiser, eval_str=True).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    allowed = sorted((set(defaults) | set(_OWN)) - {"pipeline", "name"})
    converted = {}
    for key, value in options.items():
        if key not in allowed:
            raise UnknownOptionError(
                f"unknown denoiser option {key!r}; expected one of {allowed} (unexpected keyword argument {key!r})"
            )
        kind = int if key == "patch_size" else _OWN.get(key) or type(defaults[key])
        if isinstance(value, str) and kind is bool:
            if value.lower() not in ("true", "false"):
                raise ValueError(f"denoiser option {key} must be true or false, not {value!r}")
            value = value.lower() == "true"
        elif isinstance(value, str) and kind in (int, float):
            try:
                value = kind(value)
            except ValueError:
                raise ValueError(f"denoiser option {key} must be a number, not {value!r}") from None
        if kind in (int, float) and not (isinstance(value, kind | int) and SMALLEST.get(key, 1) <= value <= LARGEST):
            raise ValueError(
                f"denoiser option {key} must be a number from {SMALLEST.get(key, 1)} to {LARGEST:,}, not {value!r}"
            )
        converted[key] = value
    return converted


def cached_folder(name: str) -> Path | None:
    """The folder of a preset's weights in the Hub's cache, if they are on this machine."""
    preset = PRESETS[name]
    return cached(preset.path, preset.revision, preset.variant)
