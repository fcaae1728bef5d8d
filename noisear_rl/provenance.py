"""Where numbers come from: commit, versions and hardware, and the command that a process was started with."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from noisear_rl.distributed import num_processes

SOURCE = Path(__file__).parent
PACKAGES = {"noisear_rl": "noisear-rl", "torch": "torch", "diffusers": "diffusers", "transformers": "transformers"}


def provenance() -> dict[str, str | int | bool]:
    """Returns the commit of this library, versions of packages, and the hardware of this process and its fellows.

    ``dirty`` says whether tracked files differ from the commit; an installed library has the commit ``unknown``.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        **_checkout(),
        **{name: _version(package) for name, package in PACKAGES.items()},
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": num_processes(),
    }


def command_line() -> str:
    """Returns the command line of this process, without the folder of the program."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _checkout() -> dict[str, str | bool]:
    try:
        _git("ls-files", "--error-unmatch", ".")  # fails for a library that is installed inside another checkout
        return {"commit": _git("rev-parse", "--short=10", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown"}


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(SOURCE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
