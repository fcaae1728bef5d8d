"""Where numbers come from: commit, library version and hardware."""

from __future__ import annotations

import platform
import subprocess

import torch


def provenance() -> dict[str, str | int]:
    """Returns the commit, torch version, device and CPU threads of this process."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": commit, "torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
