"""Forward passes over as many images as fit into memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def in_micro_batches(denoiser: Any, count: int, run: Callable[[slice], Any]) -> list[Any]:
    """Results of ``run`` on successive slices of the denoiser's ``micro_batch_size``, halved when memory runs out."""
    results: list[Any] = []
    start = 0
    while start < count:
        size = min(denoiser.micro_batch_size, count - start)
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
        denoiser.micro_batch_size = size // 2
        warnings.warn(f"out of memory with {size} images per forward pass; continuing with {size // 2}", stacklevel=3)
        gc.collect()
        if denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
    return results
