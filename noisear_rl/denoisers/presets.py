"""Denoisers by name: settings of published pipelines, where their weights come from, and how they are loaded."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from huggingface_hub import HfApi, constants

from noisear_rl.config import UnknownOptionError
from noisear_rl.denoisers import check_denoiser
from noisear_rl.denoisers.diffusion_pipeline import DiffusionPipelineDenoiser
from noisear_rl.denoisers.pipelines import INTERFACES
from noisear_rl.denoisers.placement import DeviceMap, Offload, resolve_device, resolve_dtype
from noisear_rl.denoisers.quiet import quietly
from noisear_rl.denoisers.shapes import ASSETS

Scheduler = Literal["dpm", "own"]
REACHABLE_WITHIN = 3.0  # seconds to wait for an answer from the Hub


@dataclass(frozen=True)
class Preset:
    """Settings of a published pipeline (NoiseAR, appendix E; the others follow their model cards).

    Attributes:
        path: Folder or Hub id.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance scale.
        revision: Commit on the Hub; ``None`` for the newest, whose commit goes into records.
        scheduler: ``dpm`` replaces the scheduler by DPMSolverMultistep, ``own`` keeps the pipeline's.
        variant: Which weight files to fetch for half precision; ``None`` for those without a variant.
        pipeline: Pipeline class; folders with a pipeline of this class use the same settings.
        student: Folder with another UNet and scheduler for the same pipeline; ``None`` for the pipeline's own.
    """

    path: str
    num_inference_steps: int
    guidance_scale: float
    revision: str | None = None
    scheduler: Scheduler = "dpm"
    variant: str | None = None
    pipeline: str | None = None
    student: str | None = None


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
}
SMALLEST, LARGEST = {"guidance_scale": 0}, 100_000  # of options that are numbers; others are at least 1
_OWN = {"path": str, "revision": str, "scheduler": str, "device_map": str}


def load_pipeline_denoiser(name: str, **options: Any) -> DiffusionPipelineDenoiser:
    """Builds the denoiser of a preset or of a pipeline folder; see :func:`noisear_rl.denoisers.load_denoiser`."""
    preset = _preset_of(name)
    options = _converted(options)
    path = options.pop("path", preset.path)
    revision = options.pop("revision", preset.revision if path == preset.path else None)
    scheduler = options.pop("scheduler", preset.scheduler)
    if scheduler not in get_args(Scheduler):
        raise ValueError(f"scheduler must be 'dpm' or 'own', not {scheduler!r}")
    device = resolve_device(options.get("device", "auto"))
    dtype = resolve_dtype(options.get("dtype", "auto"), device)
    device_map, offload = options.pop("device_map", "none"), options.get("offload", "none")
    for option, value, allowed in (("device_map", device_map, DeviceMap), ("offload", offload, Offload)):
        if value not in get_args(allowed):
            raise ValueError(f"{option} must be one of {get_args(allowed)}, not {value!r}")
    if device.type == "cpu" and (offload, device_map) != ("none", "none"):
        raise ValueError("offload and device_map spare the memory of accelerators, but the device is the CPU")
    if "none" not in (offload, device_map):
        raise ValueError(f"set offload={offload} or device_map={device_map}, not both")
    folder = _local_folder(name, path, revision, preset.variant if path == preset.path else None)
    parts: dict[str, Any] = {} if device.type == "cpu" else {"torch_dtype": dtype}
    if device_map != "none":
        parts["device_map"] = device_map
    if _wants_fp16_files(folder, parts.get("torch_dtype")):
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
    if scheduler == "dpm":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale} | options
    return DiffusionPipelineDenoiser(pipeline, name=name, revision=_revision_of(folder), **options)


def _preset_of(name: str) -> Preset:
    if name in PRESETS:
        return PRESETS[name]
    check_denoiser(name)
    cls = _index(Path(name)).get("_class_name")
    like = next((preset for preset in PRESETS.values() if preset.pipeline and preset.pipeline == cls), None)
    if like is None and cls in INTERFACES:
        return Preset(name, 50, 7.5)
    if like is None:
        raise ValueError(f"{name} contains a {cls}; expected one of {sorted(INTERFACES)}")
    return Preset(name, like.num_inference_steps, like.guidance_scale, scheduler=like.scheduler)


def _index(folder: Path) -> dict[str, Any]:
    """The contents of a pipeline folder's ``model_index.json``."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} contains no diffusers pipeline: it has no model_index.json")
    return json.loads((folder / "model_index.json").read_text())


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


def _local_folder(name: str, path: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a pipeline: the given one, from the Hub's cache, or downloaded if the Hub can be reached.

    Raises:
        FileNotFoundError: If there is none; the message says which command downloads it and where to put it.
    """
    if Path(path).is_dir():
        _index(Path(path))
        return Path(path)
    if path.count("/") != 1 or Path(path).is_absolute() or Path(path).parent.is_dir():  # not a Hub id
        raise FileNotFoundError(f"{path}: no such pipeline folder")
    if (found := _cached(path, revision, variant)) is not None:
        return found
    download = {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        HfApi().model_info(path, revision=revision, timeout=REACHABLE_WITHIN)
        with quietly(progress_bars=True):
            return Path(DiffusionPipeline.download(path, **download))
    except Exception as error:  # from many libraries: unreachable, gated, renamed, no disk space
        at = f" --revision {revision}" if revision else ""
        weights = f"*/*.{variant}.safetensors" if variant else "*/*.safetensors"
        raise FileNotFoundError(
            f"the weights of {name!r} ({path}) are not on this machine and could not be fetched. With access to the "
            f"Hub, run `hf download {path}{at} --include '*.json' '*.txt' '*.model' '{weights}'`, which fills "
            f"{constants.HF_HUB_CACHE}; or copy the pipeline to any folder and pass path=FOLDER. The "
            "embedded denoisers 'shapes' and 'shapes-turbo' need no download. "
            f"Cause: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


def _cached(path: str, revision: str | None, variant: str | None) -> Path | None:
    with quietly(), contextlib.suppress(OSError, ValueError):
        options = {"revision": revision, "variant": variant, "use_safetensors": True}
        return Path(DiffusionPipeline.download(path, local_files_only=True, **options))
    return None


def cached_folder(name: str) -> Path | None:
    """The folder of a preset's weights in the Hub's cache, if they are on this machine."""
    preset = PRESETS[name]
    return _cached(preset.path, preset.revision, preset.variant)


def _wants_fp16_files(folder: Path, dtype: torch.dtype | None) -> bool:
    """Whether to load the fp16 files: in half precision if there are any, or if there are no others."""
    files = [file.name for file in folder.glob("*/*.safetensors")]
    half = [name for name in files if ".fp16." in name]
    return bool(half) and (dtype in (torch.float16, torch.bfloat16) or len(half) == len(files))


def _revision_of(folder: Path) -> str:
    """The Hub's commit, or a digest of the folder's files (for large ones: size, beginning and end)."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".model", ".safetensors")
    ):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            if size > 2**20:
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
    return digest.hexdigest()[:16]
