"""SIGTERM and SIGINT (Ctrl-C) end a training after the update that is under way, with a checkpoint.

The first signal lets the update finish, for ``NOISEAR_GRACE`` seconds at most (120 unless set); the run is saved and
the process ends with exit code 0. Signals before the first update is done, after that time, and second ones end it at
once: the last checkpoint is whole then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import weakref
from types import FrameType
from typing import Any

from noisear_rl.command import stop

GRACE, VARIABLE = 120.0, "NOISEAR_GRACE"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Handles the signals of one run from :meth:`install` to :meth:`remove`, or until nobody refers to it any more.

    Args:
        advice: What the user can do next, for the messages.

    Attributes:
        asked: The signal that asked the run to stop, or ``None``.
        ready: Whether an update is done, so that there is something to save.
    """

    def __init__(self, advice: str):
        self.advice = advice
        self.asked: int | None = None
        self.ready = False
        self._former: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over the signals; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        former: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        reference = weakref.ref(self)

        def handle(number: int, frame: FrameType | None) -> None:
            owner = reference()
            if owner is not None:
                owner._handle(number)
            else:  # a run that nobody closed, after an error
                signal.signal(number, former[number] or signal.SIG_DFL)
                os.kill(os.getpid(), number)

        for number in SIGNALS:
            signal.signal(number, handle)
        self._former = former

    def remove(self) -> None:
        """Gives the signals back and stops the clock."""
        if self._former and self.asked is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._former = {}

    def _handle(self, number: int) -> None:
        if self.asked is not None:
            self.remove()
            stop(f"stopped at once; the checkpoints so far are whole. {self.advice}", 128 + number)
        self.asked = number
        if not self.ready:
            self.remove()
            stop(f"stopped before an update was done. {self.advice}", 0)
        seconds = float(os.environ.get(VARIABLE) or GRACE)
        signal.signal(signal.SIGALRM, self._too_late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this update, in {seconds:g} s at most", file=sys.stderr, flush=True)

    def _too_late(self, number: int, frame: FrameType | None) -> None:
        self.remove()
        stop(f"the update took too long ({VARIABLE}); the checkpoints so far are whole. {self.advice}", 0)
