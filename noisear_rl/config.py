"""Dataclasses as configuration: checked when they are made, read from YAML and the command line, written back.

A configuration calls :func:`check_config` in its ``__post_init__``, so that the same rules hold for files, the command
line and Python. The types below say which values an option takes; pydantic checks them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import numbers
import sys
import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import tyro
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, BeforeValidator, Strict

from noisear_rl.command import program
from noisear_rl.trust import values_from
from noisear_rl.wording import nearest, problems_of, shown

Config = TypeVar("Config")
PRESETS = Path(__file__).parent / "configs"  # one folder per denoiser, and those of rewards and launchers
# What an option is called where a command does not have it; the first of these that the command has is meant.
COUNTERPARTS = {
    "env_id": ("denoiser",),
    "policy": ("init_from", "methods"),
    "init_from": ("policy", "methods"),
    "samples": ("samples_per_prompt",),
    "samples_per_prompt": ("samples",),
    "prompts": ("captions",),
    "captions": ("prompts",),
}
LARGEST = 10**9  # of a count: more is a slip of the pen, and would overflow or exhaust the memory


def _whole(value: Any) -> Any:
    """NumPy's integers as Python's; a truth value is no number."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


def _real(value: Any) -> Any:
    """Any real number as a float, also one that YAML reads as a string, such as 1e-4; a truth value is no number."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


_Int = Annotated[int, Strict(), BeforeValidator(_whole)]
_Float = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_real)]
PositiveInt = Annotated[_Int, Ge(1), Le(LARGEST)]
NonNegativeInt = Annotated[_Int, Ge(0), Le(LARGEST)]
Seed = Annotated[_Int, Ge(0), Lt(2**62)]
Float = _Float
PositiveFloat = Annotated[_Float, Gt(0)]
NonNegativeFloat = Annotated[_Float, Ge(0)]
Guidance = Annotated[_Float, Ge(1), Le(1000)]
"""Of a denoiser; 1 is none."""
Fraction = Annotated[_Float, Ge(0), Le(1)]
"""From 0 to 1."""
Decay = Annotated[_Float, Ge(0), Lt(1)]
"""From 0 to below 1."""
Share = Annotated[_Float, Gt(0), Lt(1)]
"""Between 0 and 1, neither of them."""
PositiveFraction = Annotated[_Float, Gt(0), Le(1)]
"""Above 0, up to 1."""


class ConfigError(ValueError):
    """A value that an option does not take.

    Args:
        where: The file, or the class of a dataclass built in Python.
        problem: What is wrong: option, value, what is expected.
    """

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


def parse_config(cls: type[Config], argv: Sequence[str] | None, description: str | None) -> Config:
    """Reads a dataclass from YAML (``--config FILE_OR_PRESET``) and the command line, which overrides it.

    Args:
        cls: The dataclass; the docstrings below its fields become ``--help``.
        argv: Arguments; ``None`` for the command line's own.
        description: Text above the options.

    Raises:
        ConfigError: If the file holds an unknown key or a wrong value, or an option is called otherwise here.
        OSError: If the file cannot be read, or there is no such preset.
        SystemExit: On an unknown option (names the nearest one) or a wrong value on the command line.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    preset = cls() if known.config is None else load_yaml(cls, find_preset(known.config))
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and (meant := counterpart(cls, option[2:].replace("-", "_"))):
            raise ConfigError("command line", f"unknown option {option}; did you mean --{meant.replace('_', '-')}?")
    text = (
        f"{description or ''}\n\n--config FILE.yaml, or a name that `noisear configs` lists, reads presets; options "
        "given here override them."
    )
    entries = [dict(mapping) for mapping in _mappings(preset)]
    for mapping in _mappings(preset):  # of one that holds keys, tyro takes these alone, each as an option of its own
        mapping.clear()
    given = tyro.cli(cls, prog=program(), args=rest, default=preset, description=text)
    for mapping, own in zip(_mappings(given), entries, strict=True):
        mapping.update(own | mapping)
    return given


def _nested(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are configurations."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: v for name, v in values.items() if dataclasses.is_dataclass(v) and not isinstance(v, type)}


def _mappings(config: Any) -> list[dict[str, Any]]:
    """What maps names to values in a configuration, such as ``denoiser_options``, and in nested ones."""
    hints = typing.get_type_hints(type(config))
    own = [getattr(config, name) for name, hint in hints.items() if typing.get_origin(hint) is dict]
    return own + [mapping for inner in _nested(config).values() for mapping in _mappings(inner)]


def preset_names() -> list[str]:
    """Names of the presets that come with the library, such as ``shapes/ppo``."""
    return sorted(file.relative_to(PRESETS).with_suffix("").as_posix() for file in PRESETS.rglob("*.yaml"))


def find_preset(name: str) -> Path:
    """The file of a preset, from any folder.

    Args:
        name: A file, which takes precedence, or ``shapes/ppo``; ``configs/shapes/ppo.yaml`` is the same.

    Raises:
        FileNotFoundError: If it is neither; names the nearest preset.
    """
    if Path(name).is_file():
        return Path(name)
    known, preset = preset_names(), name.removesuffix(".yaml").removeprefix("noisear_rl/").removeprefix("configs/")
    if preset not in known:
        near = nearest(preset, known)
        raise FileNotFoundError(
            f"{name:.300}: no such file, and no preset of this name (`noisear configs` lists them){near}"
        )
    return PRESETS / f"{preset}.yaml"


def counterpart(cls: Any, name: str) -> str | None:
    """What a configuration calls an option that other commands call ``name``; ``None`` if it takes ``name`` itself."""
    plain = {key for key, hint in typing.get_type_hints(cls).items() if not dataclasses.is_dataclass(hint)}
    return None if name in plain else next((other for other in COUNTERPARTS.get(name, ()) if other in plain), None)


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which would keep the last of several equal keys, refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is repeated", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(cls: type[Config], path: Path) -> Config:
    """Reads a dataclass from a YAML file.

    Raises:
        ConfigError: If a key is unknown (names the nearest one) or repeated, a value is wrong, or the file is not YAML,
            not UTF-8 or no mapping.
        OSError: If the file cannot be read.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(str(path), f"{line}{error.problem or error.context}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # bytes that are not UTF-8, numbers, depth
        raise ConfigError(str(path), f"not a YAML file: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(str(path), f"expected a mapping of option names to values, not {shown(values)}")
    with values_from(path):
        return from_mapping(cls, values or {}, str(path))


def from_mapping(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Builds a dataclass (nested ones too) from a mapping.

    Args:
        cls: The dataclass.
        values: By name of the field.
        where: Where they come from, for the message.

    Raises:
        ConfigError: If a key is unknown (names the nearest one) or missing, or a value is wrong.
    """
    hints = typing.get_type_hints(cls)
    given = dict(values)
    for key, value in values.items():
        meant = counterpart(cls, str(key))
        if meant and (key not in hints or isinstance(value, str)):  # a mapping may be of a nested dataclass
            raise ConfigError(where, f"unknown key {shown(key)}; did you mean {meant!r}?")
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)[0]
            raise ConfigError(where, f"unknown key {shown(key)}; did you mean {near!r}?")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            given[key] = from_mapping(typing.cast(type, hints[key]), value, f"{where}: {key}")
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in given and dataclasses.MISSING is field.default is field.default_factory:
            raise ConfigError(where, f"{field.name!r} is missing")
    try:
        config = cls(**given)
        check_config(config, where)  # also those that do not check themselves
    except ConfigError as error:
        raise ConfigError(where, error.problem) from error
    except ValueError as error:  # options that do not go together
        raise ConfigError(where, str(error)) from error
    return config


def check_config(config: Any, where: str | None = None) -> None:
    """Checks every field of a dataclass by its type, and converts lists, paths and numbers to it.

    Raises:
        ConfigError: If a value is wrong; names the field, the value, what is expected, and the nearest choice.
        OSError: If an option names a file that is not there.
    """
    where = where or type(config).__name__
    for name, inner in _nested(config).items():
        check_config(inner, f"{where}: {name}")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    try:
        checked = _model(typing.cast(Any, type(config))).model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(where, problems_of(type(config), error)) from error
    for name in values:
        setattr(config, name, getattr(checked, name))


def _instance_of(cls: Any) -> Any:
    return Annotated[cls, pydantic.InstanceOf()]


@functools.cache
def _model(cls: type) -> type[pydantic.BaseModel]:
    """What pydantic checks a dataclass by; nested ones are only asked to be of their class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    plain = typing.get_type_hints(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        nested = dataclasses.is_dataclass(plain[field.name])
        fields[field.name] = (_instance_of(plain[field.name]) if nested else hints[field.name], ...)
    options = pydantic.ConfigDict(protected_namespaces=(), arbitrary_types_allowed=True)
    return pydantic.create_model(cls.__name__, __config__=options, **fields)


class UnknownOptionError(TypeError, ValueError):
    """An option that nothing takes; also a ``TypeError``, which libraries that probe options expect."""


def to_mapping(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that YAML and JSON hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))
