"""Starts commands in several processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CPU = ROOT / "noisear_rl/configs/accelerate/cpu.yaml"


def launch(
    count: int, *arguments: str | Path, check: bool = True, by_accelerate: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a script or a module, each of whose processes must say that they are ``count``.

    Args:
        count: Number of processes.
        *arguments: What to run.
        check: Whether it must succeed.
        by_accelerate: Whether to start it by ``accelerate launch`` and the file that comes with the library.
    """
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(count)]
    accelerate = ["accelerate.commands.launch", "--config_file", CPU, "--num_processes", str(count)]
    command = [sys.executable, "-m", *(accelerate if by_accelerate else torchrun), *arguments]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    assert count == 1 or all(f"process {rank} of {count} on cpu" in done.stderr for rank in range(count)), done.stderr
    return done
