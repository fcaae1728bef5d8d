"""Presets that come with the library: ``noisear configs`` lists them, ``noisear config show NAME`` prints one.

The first lines of a command's preset are comments: how it is used, and what it is for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from noisear_rl.command import program, run_script
from noisear_rl.config import PRESETS, find_preset, preset_names

Name = Annotated[str, tyro.conf.Positional]


def use_of(name: str) -> tuple[str, str]:
    """How a preset is used, such as ``noisear ppo --config shapes/ppo``, and what it is for, in a line each."""
    use, purpose, *_ = (line.removeprefix("# ") for line in find_preset(name).read_text(encoding="utf-8").splitlines())
    return (use, purpose) if use.startswith("noisear ") else (name, use)  # of a reward or a launcher


def listing(folder: str = "") -> str:
    """The presets of a folder, such as ``shapes``, or all of them: per preset how it is used and what it is for.

    Raises:
        FileNotFoundError: If there is no such folder of presets.
    """
    names = [name for name in preset_names() if name.startswith(folder and f"{folder.rstrip('/')}/")]
    if not names:
        known = sorted({name.partition("/")[0] for name in preset_names()})
        raise FileNotFoundError(f"{folder:.80}: no such folder of presets; expected one of {known}")
    return "\n".join(f"{use}\n    {purpose}" for use, purpose in map(use_of, names))


def show(name: Name) -> None:
    """Print a preset.

    Args:
        name: Name of a preset, such as shapes/ppo, or a file.
    """
    sys.stdout.write(find_preset(name).read_text(encoding="utf-8"))


def list_(folder: Annotated[str, tyro.conf.Positional] = "") -> None:
    """List presets: how each is used, and what it is for.

    Args:
        folder: One folder of presets, such as shapes; all by default.
    """
    print(listing(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    description = f"Presets that come with the library, in {PRESETS}."
    tyro.extras.subcommand_cli_from_dict(
        {"list": list_, "show": show}, prog=program(), description=description, args=argv
    )


if __name__ == "__main__":
    run_script(main)
