"""Signs of life between processes: one that dies ends the others within a minute.

``torchrun`` ends the processes of its own machine at once. Those of other machines would go on until they next exchange
numbers, which may take long, and wait forever for a machine that lost its power. So each process writes a number to the
store that they met in, every few seconds, and ends when another's number stands still.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

BEAT, SILENCE, ANSWER = 2.0, 40.0, 10.0  # seconds: between signs, without any until death, for the store to answer
GONE = "gone"  # the last sign of a process that ends without an error


def start(rank: int, count: int) -> None:
    """Starts to give and to expect signs of life, in a thread.

    Args:
        rank: Number of this process.
        count: Number of all processes.
    """
    address, port, leaving = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), threading.Event()
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"noisear/{attempt}/{other}" for other in range(count)]
    thread = threading.Thread(target=_watch, args=(store, keys, rank, leaving), daemon=True)

    def leave() -> None:
        leaving.set()
        thread.join()
        if not hasattr(sys, "last_value"):  # no error has ended this process
            with contextlib.suppress(RuntimeError):
                store.set(keys[rank], GONE)

    atexit.register(leave)
    thread.start()


def _watch(store: TCPStore, keys: list[str], rank: int, leaving: threading.Event) -> None:
    signs, heard, beat = [""] * len(keys), [time.monotonic()] * len(keys), 0
    while not leaving.wait(BEAT):
        beat += 1
        with contextlib.suppress(RuntimeError):  # if the store went with its machine, nobody is heard of
            store.set(keys[rank], str(beat))
            for other, key in enumerate(keys):
                sign = store.get(key).decode() if store.check([key]) else ""
                if sign != signs[other] or sign == GONE:
                    signs[other], heard[other] = sign, time.monotonic()
        dead = [other for other in range(len(keys)) if time.monotonic() - heard[other] > SILENCE]
        if dead:
            print(f"process {rank} ends: no sign of life of {dead} for {SILENCE:g} s", file=sys.stderr, flush=True)
            os._exit(1)
