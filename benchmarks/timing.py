"""How speed and memory are measured: after a warm-up, repetitions of all candidates in turn, in CPU seconds.

CPU time leaves out what other programs take, and ratios within one run leave out the machine's mood.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

Seconds = dict[str, list[float]]
CPU, GIB = torch.device("cpu"), 2**30


def clock(device: torch.device = CPU) -> float:
    """Seconds: of the CPU, which leave out what other programs take, or on an accelerator of its finished work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def interleaved(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    what: str = "",
    warm_up: bool = True,
    device: torch.device = CPU,
) -> Seconds:
    """Runs every call in turn, ``repeats`` times after a warm-up, and returns the seconds of each."""
    seconds: Seconds = {name: [] for name in calls}
    for turn in tqdm(range(repeats + warm_up), desc=what):
        for name, call in calls.items():
            began = clock(device)
            call()
            if turn >= warm_up:
                seconds[name].append(clock(device) - began)
    return seconds


def ratios(seconds: Seconds, numerator: str, denominator: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two calls, turn by turn."""
    found = np.array(seconds[numerator]) / np.array(seconds[denominator])
    return float(np.median(found)), float(found.min()), float(found.max())


def command_seconds(arguments: Sequence[str]) -> float:
    """CPU seconds of a Python process.

    Raises:
        RuntimeError: If it fails.
    """
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{list(arguments)} ended with code {child.returncode}")
    return usage.ru_utime + usage.ru_stime


class Meter:
    """Measures stages: seconds, and the largest memory that the process (or the accelerator) held meanwhile.

    Attributes:
        rows: One record per stage.
    """

    def __init__(self, device: torch.device):
        self.device, self.rows = device, list[dict[str, Any]]()

    def clock(self) -> float:
        """Seconds, as :func:`clock` counts them."""
        return clock(self.device)

    def matmul_rate(self, dtype: torch.dtype, size: int = 4096) -> float:
        """FLOPs per second of a large matrix product: the median of five."""
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(6):
            began = self.clock()
            left = (left @ right).clamp(-1, 1)
            seconds.append(self.clock() - began)
        return 2 * size**3 / float(np.median(seconds[1:]))

    def memory(self, field: str) -> int:
        """Bytes that this process holds (``VmRSS``) or held at most (``VmHWM``)."""
        if self.device.type == "cuda":
            at_most = torch.cuda.max_memory_allocated(self.device)
            return at_most if field == "VmHWM" else torch.cuda.memory_allocated(self.device)
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 2**10

    @contextlib.contextmanager
    def __call__(self, name: str, seconds: float | None = None, memory: float | None = None) -> Iterator[None]:
        """Measures what runs inside.

        Args:
            name: Name of the stage.
            seconds: Predicted time.
            memory: Predicted bytes beyond those held before.
        """
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        before, began = self.memory("VmRSS"), self.clock()
        yield
        took, peak = self.clock() - began, self.memory("VmHWM")
        held = None if memory is None else (before + memory) / GIB
        self.rows.append({"stage": name, "seconds": took, "seconds predicted": seconds, "GiB": peak / GIB})
        self.rows[-1]["GiB predicted"] = held
        print(f"{name}: {took:.1f} s, {peak / GIB:.2f} GiB", flush=True)
