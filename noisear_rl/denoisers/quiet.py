"""Silences what diffusers and transformers print about themselves while a pipeline is loaded, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

HINTS = "transformers.utils.import_utils"  # the logger that reports missing optional packages


@contextlib.contextmanager
def quietly(progress_bars: bool = False) -> Iterator[None]:
    """Hides hints that torchvision is missing or that ``torch_dtype`` is deprecated, and loading bars.

    All other messages, the user's verbosity and the user's progress-bar settings stay as they are.

    Args:
        progress_bars: Whether to show progress bars, for downloads.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = () if progress_bars else (diffusers_logging, transformers_logging)
    enabled = [library for library in libraries if library.is_progress_bar_enabled()]
    hints = logging.getLogger(HINTS)
    keep = lambda record: "requires torchvision" not in record.getMessage()
    for library in enabled:
        library.disable_progress_bar()
    hints.addFilter(keep)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
            yield
    finally:
        hints.removeFilter(keep)
        for library in enabled:
            library.enable_progress_bar()
