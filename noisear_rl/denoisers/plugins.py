"""Denoisers from outside: ``module:Class``, or the name of an entry point of an installed package."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from noisear_rl.denoisers.capabilities import Denoiser, require
from noisear_rl.trust import import_module_of

GROUP = "noisear_rl.denoisers"


def plugin_names() -> list[str]:
    """Names of the entry points of group :data:`GROUP`."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_plugin(name: str) -> Callable[..., Any] | None:
    """What makes the denoiser of this name, or ``None`` if the name is neither ``module:Class`` nor an entry point.

    Raises:
        ValueError: If it cannot be imported.
        UntrustedCodeError: If a file that is not trusted names ``module:Class``.
    """
    module, _, attribute = name.partition(":")
    try:
        if name in plugin_names():
            return entry_points(group=GROUP)[name].load()
        if not attribute or Path(name).is_dir() or not all(part.isidentifier() for part in module.split(".")):
            return None
        return getattr(import_module_of(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"denoiser {name!r:.80} cannot be imported: {error}. Is its file here or in PYTHONPATH, or its package "
            "installed?"
        ) from error


def load_plugin(name: str, make: Callable[..., Any], options: dict[str, Any]) -> Denoiser:
    """Makes a denoiser, whose ``name`` becomes the one that loads it again.

    Raises:
        ValueError: If it does not take the options, or lacks what every denoiser has.
    """
    try:
        denoiser = make(**options)
    except TypeError as error:
        raise ValueError(f"denoiser {name!r:.80} with options {sorted(options)}: {error}") from error
    denoiser.name = name
    return require(denoiser, Denoiser, "the library")
