"""Every option of every configuration, with values of other types and ranges: refused in one line that names it."""

import dataclasses
import random
import types
import typing
from pathlib import Path

import pytest
import yaml

from noisear_rl.config import ConfigError, load_yaml
from noisear_rl.rewards import RewardConfig
from tests.test_config import CONFIGS

NAN, INFINITE = float("nan"), float("inf")
# By type of an option: values that none of its kind takes.
WRONG = {
    int: ["ten", 1.5, [3], {"a": 1}, True, -1, NAN, 10**30, "", "0x10", -(10**12), "1"],
    float: ["wide", [0.5], {"a": 1}, True, NAN, INFINITE, -INFINITE, "", "1,5", "1e-4e"],
    bool: ["maybe", [True], {"a": 1}, 2, 0.5, ""],
    str: [5, 1.5, {"a": 1}, True],
    Path: [5, [1], {"a": 1}, True],
    tuple: [5, 1.5, {"a": 1}, True],
    dict: [5, "text", [1], True, {1: "a"}, {"a": [1]}],
}
NOTHING = {"options", "measured"}  # hold anything
# Of a reward: what a mapping must not hold.
WRONG_REWARDS: dict[str, list[typing.Any]] = {
    "weights": [{"brightness": value} for value in ("much", None, NAN, INFINITE, [1.0], True)] + [{1: 1.0}, {}],
    "statistics": [{"brightness": value} for value in (3, "a", [NAN], ["a"], None, {"a": 1.0})] + [{1: [0.0, 1.0]}],
    "options": [{"brightness": value} for value in (3, "a", [1], None)] + [{1: {"a": 2}}],
}


def kind_of(hint):
    """The plain type of an option that is not nested, and whether it may be unset."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    optional = is_union and type(None) in typing.get_args(hint)
    if is_union:
        hint = next((part for part in parts if typing.get_origin(part) is tuple), parts[0])
    origin = typing.get_origin(hint) or hint
    return ("choice" if origin is typing.Literal else origin), optional


def cases():
    """A configuration, an option, and a wrong value, many times."""
    found: list[tuple[type, str, typing.Any]]
    found = [(RewardConfig, name, value) for name, values in WRONG_REWARDS.items() for value in values]
    for cls in (*CONFIGS, RewardConfig):
        for name, hint in typing.get_type_hints(cls).items():
            kind, optional = kind_of(hint)
            if dataclasses.is_dataclass(kind):
                values = [3, "text", [1], True]
            elif kind == "choice":
                values = ["choose-me", 5, [1], {"a": 1}, "", True]
            else:
                values = [value for value in WRONG[kind] if cls is not RewardConfig or value != {"a": [1]}]
            if name not in NOTHING:
                found += [(cls, name, value) for value in (values if optional else [*values, None])]
    return found


def check(cases, folder):
    """Reads a file with each wrong value; returns how many were refused."""
    path = folder / "preset.yaml"
    for cls, name, value in cases:
        base = {"weights": {"brightness": 1.0}} if cls is RewardConfig else {}
        path.write_text(yaml.safe_dump(base | {name: value}))
        with pytest.raises((ConfigError, OSError)) as caught:
            load_yaml(cls, path)
            pytest.fail(f"{cls.__name__}: {name}: {value!r} was accepted")
        message = str(caught.value)
        assert str(path) in message and name in message and "\n" not in message, (cls, name, value, message)
    return len(cases)


def test_some_wrong_values(tmp_path):
    check(random.Random(0).sample(cases(), 120), tmp_path)


def test_rewards(tmp_path):
    assert check([case for case in cases() if case[0] is RewardConfig], tmp_path) >= 30


@pytest.mark.faults
def test_all_wrong_values(tmp_path):
    count = check(cases(), tmp_path)
    print(f"\nwrong values: {count}, each refused in one line that names file and option")
    assert count >= 900
