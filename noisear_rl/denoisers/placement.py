"""Devices and dtypes by name, and where a pipeline's parts are: on a device, on several, or on the CPU until used."""

from __future__ import annotations

import gc
import os
from typing import Any, Literal

import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential"]
DeviceMap = Literal["none", "balanced"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """Resolves ``auto`` to the accelerator of this process if there is one, otherwise to the CPU.

    As in Accelerate, processes that were launched together take an accelerator each (``LOCAL_RANK``), and all stay on
    the CPU if ``ACCELERATE_USE_CPU`` says so.

    Raises:
        ValueError: If the device is unknown, or this machine has none of its kind.
    """
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if str(device) == "auto":
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on"):
            return torch.device("cpu")
        rank = os.environ.get("LOCAL_RANK")
        return found if rank is None or found.type == "cpu" else torch.device(found.type, int(rank))
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r}; expected 'auto', 'cpu' or one such as 'cuda:0'") from error
    if named.type not in ("cpu", found.type):
        raise ValueError(f"device {device!r} is not available here; expected 'auto' or {found.type!r}")
    return named


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Resolves ``auto`` to half precision on devices that are fast at it, otherwise to float32.

    Raises:
        ValueError: If the dtype is unknown.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; expected 'auto' or one of {sorted(DTYPES)}")
        return DTYPES[dtype]
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def place(pipeline: Any, device: torch.device, offload: Offload = "none") -> torch.device:
    """Moves a pipeline to a device; returns the one that takes its inputs.

    Args:
        pipeline: A diffusers pipeline. One with a device map stays where it is.
        device: Where it computes.
        offload: ``model`` keeps all components but the running one on the CPU, ``sequential`` all layers but the
            running one: the least memory, and the slowest.
    """
    if len(set((getattr(pipeline, "hf_device_map", None) or {}).values())) > 1:
        return pipeline._execution_device
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return device


def drop_text_encoders(pipeline: Any) -> None:
    """Frees the memory of a pipeline's text encoders. Tokenizers stay."""
    for name in [name for name in pipeline.components if name.startswith("text_encoder")]:
        setattr(pipeline, name, None)
    pipeline.maybe_free_model_hooks()  # of offloaded components, which know their predecessors
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
