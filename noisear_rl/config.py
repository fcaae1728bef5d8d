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
    """Builds a dataclass (nested ones too) from a mapping.

    Raises:
        ValueError: If a key is unknown (names the nearest one), or a value is not among a closed set of choices.
    """
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
    config = cls(**values)
    check_choices(config, where)
    return config


def check_choices(config: Any, where: str = "config") -> None:
    """Checks the options of a dataclass (nested ones too) whose type is a ``Literal``.

    Raises:
        ValueError: If a value is not among the choices; names them and the nearest one.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_choices(value, f"{where}: {field.name}")
        choices = _choices(hints[field.name])
        for item in value if isinstance(value, tuple) else (value,):
            if choices and item not in choices:
                near = difflib.get_close_matches(str(item), [str(choice) for choice in choices], n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{where}: {field.name} must be one of {choices}, not {item!r}{hint}")


def _choices(hint: Any) -> tuple:
    """The values that a type allows, if it is a ``Literal``, an optional one or a tuple of one; else nothing."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint)
    found = tuple(choice for part in parts for choice in _choices(part))
    return (*found, None) if found and type(None) in parts else found


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that YAML and JSON hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
