"""LoRAs of published pipelines, such as those that distil a model to few steps, merged into its weights.

A layer with weight ``W`` becomes ``W + scale · alpha / r · B A`` (Hu et al. 2021, arXiv 2106.09685). Diffusers' own
loader keeps ``A`` and ``B`` apart, which needs the package ``peft``; a frozen denoiser does not. Diffusers' readers of
the formats in use (its own, PEFT's, Kohya's) are called here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from noisear_rl.denoisers.quiet import quietly

ADAPTER = "lora_adapter_metadata"  # of files that diffusers wrote with PEFT


def merge_lora(pipeline: DiffusionPipeline, network: str, file: Path, scale: float) -> None:
    """Adds a LoRA to the weights of a pipeline's denoising network.

    Args:
        pipeline: Of a class for which diffusers reads LoRAs.
        network: Which part of it denoises: ``unet`` or ``transformer``.
        file: A safetensors file.
        scale: Factor on the change; 1 for the LoRA as it was trained.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file with a LoRA of this network, or it also changes other parts.
    """
    if not file.is_file():
        raise FileNotFoundError(f"lora: {file}: no such file")
    state, alphas, metadata = _read(pipeline, file)
    if strange := sorted(name for name in state if not name.startswith(f"{network}.")):
        raise ValueError(
            f"lora: {file} changes {strange[0]!r:.80} ({len(strange)} of {len(state)} tensors); only LoRAs of the "
            f"{network} are supported"
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        layer, _, part = name.removeprefix(f"{network}.").rpartition(".lora_")
        pairs.setdefault(layer, {})[part.removesuffix(".weight")] = value
    weights = dict(getattr(pipeline, network).named_parameters())
    for layer, parts in pairs.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or not {"A", "B"} <= parts.keys() <= {"A", "B", "B.bias"}:
            raise ValueError(f"lora: {file} holds {sorted(parts)} of {layer!r:.80}; expected A and B of a layer")
        _check_shapes(file, layer, weight, parts["A"], parts["B"])
    for layer, parts in pairs.items():
        rank = parts["A"].shape[0]
        factor = scale * _alpha(metadata, alphas, f"{network}.{layer}", network, rank) / rank
        change = parts["B"].float().flatten(1) @ parts["A"].float().flatten(1)
        _add(weights[f"{layer}.weight"], factor * change)
        if "B.bias" in parts:
            _add(weights[f"{layer}.bias"], scale * parts["B.bias"].float())


def _read(
    pipeline: DiffusionPipeline, file: Path
) -> tuple[dict[str, torch.Tensor], Mapping[str, Any], Mapping[str, Any]]:
    """A LoRA's tensors with PEFT's names, alphas by layer, and what the file says of the adapter."""
    read = getattr(type(pipeline), "lora_state_dict", None)
    if read is None:
        raise ValueError(f"lora: diffusers reads no LoRAs of a {type(pipeline).__name__}")
    try:
        with safe_open(file, "pt") as opened:
            names, metadata = set(opened.keys()), json.loads((opened.metadata() or {}).get(ADAPTER, "{}"))
        if any("dora_scale" in name or "lora_magnitude_vector" in name for name in names):
            raise ValueError("it is a DoRA, whose magnitudes are not supported")
        options: dict[str, Any] = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
        if "unet" in pipeline.components:
            options["unet_config"] = pipeline.unet.config
        if "return_alphas" in inspect.signature(read).parameters or "return_alphas" in inspect.getsource(read):
            options["return_alphas"] = True
        with quietly():
            found = read(str(file.parent), **options)
        state, alphas = found if isinstance(found, tuple) else (found, None)
        state, alphas = (convert_unet_state_dict_to_peft(part or {}) for part in (state, alphas))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"lora: {file} holds no LoRA of this pipeline: {str(error).splitlines()[0]}") from error
    if not state or not all(".lora_A." in name or ".lora_B." in name for name in state):
        raise ValueError(f"lora: {file} holds no LoRA of this pipeline, but {sorted(state or names)[:2]!r:.200}")
    by_layer = {re.sub(r"(\.lora_[AB]\.weight)?\.alpha$", "", name): alpha for name, alpha in alphas.items()}
    return state, by_layer, metadata


def _alpha(metadata: Mapping[str, Any], alphas: Mapping[str, Any], layer: str, network: str, rank: int) -> float:
    """A layer's alpha, from its own tensor or from what the file says of the adapter; the rank if neither does."""
    if layer in alphas:
        return float(alphas[layer])
    own = {key.removeprefix(f"{network}."): value for key, value in metadata.items() if key.startswith(f"{network}.")}
    name = layer.removeprefix(f"{network}.")
    alpha = float(own.get("alpha_pattern", {}).get(name, own.get("lora_alpha", rank)))
    return alpha * rank**0.5 if own.get("use_rslora") else alpha


def _check_shapes(file: Path, layer: str, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    fits = weight.dim() == a.dim() == b.dim() and a.shape[0] == b.shape[1] and b.shape[0] == weight.shape[0]
    if not fits or a.shape[1:] != weight.shape[1:] or b[0, 0].numel() != 1:
        raise ValueError(
            f"lora: {file} does not fit {layer!r:.80} {tuple(weight.shape)}: A is {tuple(a.shape)}, B {tuple(b.shape)}"
        )


@torch.no_grad()
def _add(parameter: torch.Tensor, change: torch.Tensor) -> None:
    """Adds in float32, so that half precision rounds once."""
    parameter.copy_(parameter.float() + change.reshape(parameter.shape).to(parameter.device))
