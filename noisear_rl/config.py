"""Dataclasses as configuration: read from YAML and the command line, written back as plain values."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

Config = TypeVar("Config")


def parse_config(cls: type[Config], argv: Sequence[str] | None, description: str | None) -> Config:
    """Reads a dataclass from YAML (``--config FILE``) and the command line, which overrides it.

    Args:
        cls: The dataclass; the docstrings below its fields become ``--help``.
        argv: Arguments; ``None`` for the command line's own.
        description: Text above the options.

    Raises:
        SystemExit: On an unknown or malformed option; the message names the nearest known one.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    default = cls()
    if known.config is not None:
        try:
            default = load_yaml(cls, known.config)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise SystemExit(f"error: {error}") from error
    text = f"{description or ''}\n\n--config FILE.yaml reads presets; options given here override them."
    return tyro.cli(cls, args=rest, default=default, description=text)


def load_yaml(cls: type[Config], path: Path) -> Config:
    """Reads a dataclass from a YAML file.

    Raises:
        ValueError: If a key is unknown (names the nearest one) or the file is no mapping.
        OSError: If the file cannot be read.
    """
    values = yaml.safe_load(Path(path).read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of option names to values")
    return from_mapping(cls, values, str(path))


def from_mapping(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Builds a dataclass (nested ones too) from a mapping; unknown keys raise ``ValueError``."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            values = values | {key: from_mapping(typing.cast(type, hints[key]), value, f"{where}: {key}")}
        elif isinstance(value, list):
            values = values | {key: tuple(value)}
        elif hints[key] is float and isinstance(value, str):
            values = values | {key: float(value)}  # YAML reads 1e-4 as a string
        elif value is not None and Path in (hints[key], *typing.get_args(hints[key])):
            values = values | {key: Path(value)}
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that YAML and JSON hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
