"""How errors say what is wrong with an option: the value, what is expected, and what was perhaps meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import pydantic


def problems_of(cls: type, error: pydantic.ValidationError) -> str:
    """All that is wrong with a dataclass, in one line."""
    hints = typing.get_type_hints(cls)
    by_field: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_field.setdefault(str(problem["loc"][0]), []).append(problem)
    lines = []
    for name, problems in by_field.items():
        choices, value = _choices(hints[name]), problems[-1]["input"]
        own = [p["msg"].removeprefix("Value error, ") for p in problems if p["type"] == "value_error"]
        if own:
            lines.append(f"{name}: {own[0]}")
        elif choices:
            hint = nearest(str(value), map(str, choices))
            lines.append(f"{name} must be one of {choices}, not {shown(value)}{hint}")
        else:
            wanted = list(dict.fromkeys(_expected(p["msg"]) for p in problems))
            lines.append(f"{name} must be {' or '.join(wanted)}{_unset(hints[name])}, not {shown(value)}")
    return "; ".join(lines)


_WORDS = (
    ("Input should be ", ""),
    ("Input is not a valid path for <class 'pathlib.Path'>", "a path"),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("greater than 0", "positive"),
    ("greater than", "above"),
    ("less than", "below"),
    ("a valid ", "a "),
    ("a integer", "an integer"),
    ("a tuple", "a list"),
    ("a string", "text"),
)


def _expected(message: str) -> str:
    """What pydantic expects, in this library's words."""
    for old, new in _WORDS:
        message = message.replace(old, new)
    return message


def _unset(hint: Any) -> str:
    return " (or unset)" if type(None) in typing.get_args(hint) else ""


def shown(value: Any) -> str:
    """A value in a message, in one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` for a misspelt name, or nothing if no known one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _choices(hint: Any) -> tuple:
    """The values that a type allows, if it is a ``Literal``, an optional one or a tuple of one; else nothing."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (tuple, typing.Union, types.UnionType) else ()
    found = tuple(choice for part in parts for choice in _choices(part))
    return (*found, None) if found and type(None) in parts else found
