"""How ``bench.py`` measures: CPU seconds of one thread, after a warm-up, repetitions of all candidates in turn.

CPU time leaves out what other programs take, and ratios within one run leave out the machine's mood.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

Seconds = dict[str, list[float]]


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, what: str = "", warm_up: bool = True) -> Seconds:
    """Runs every call in turn, ``repeats`` times after a warm-up, and returns the CPU seconds of each."""
    seconds: Seconds = {name: [] for name in calls}
    for turn in tqdm(range(repeats + warm_up), desc=what):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn >= warm_up:
                seconds[name].append(time.process_time() - began)
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
