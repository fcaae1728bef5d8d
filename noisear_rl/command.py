"""How commands end: a user's error is one message and exit code 2, a programming error keeps its traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from gymnasium.error import Error as GymnasiumError

from noisear_rl import trust

USER_ERRORS = (OSError, ValueError, GymnasiumError)  # wrong options, wrong files, full disks
TRACEBACK, VARIABLE = "--traceback", "NOISEAR_TRACEBACK"
WRONG, INTERRUPTED = 2, 130  # exit codes
_PROGRAM: ContextVar[str | None] = ContextVar("program", default=None)


class Stop(SystemExit):
    """Ends the process with a message, which was printed, and an exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def run_command(name: str, main: Callable[[list[str]], Any], arguments: Sequence[str]) -> None:
    """Runs a command and turns errors of its user into a message on standard error.

    ``--traceback`` among the arguments, or a non-empty variable ``NOISEAR_TRACEBACK``, shows the traceback of every
    error instead. ``--trust-code`` lets configurations and manifests name code (:mod:`noisear_rl.trust`).

    Args:
        name: Name of the command, for the message.
        main: The command.
        arguments: Its arguments.

    Raises:
        Stop: On an error that the user can mend (exit code 2) or on Ctrl-C (exit code 130).
    """
    shown = bool(os.environ.get(VARIABLE)) or TRACEBACK in arguments
    outer = _PROGRAM.set(name)
    try:
        with trust.trusting(trust.OPTION in arguments):
            main([argument for argument in arguments if argument not in (TRACEBACK, trust.OPTION)])
    except KeyboardInterrupt as error:
        if shown:
            raise
        stop(f"{name}: interrupted", INTERRUPTED, error)
    except Exception as error:
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
        if shown or not (out_of_memory or isinstance(error, USER_ERRORS)):
            raise
        advice = "out of memory: use smaller batches, or a preset low_memory.yaml. " if out_of_memory else ""
        stop(f"{name}: {advice}{describe(error)}", WRONG, error)
    finally:
        _PROGRAM.reset(outer)


def program() -> str | None:
    """What its user typed to start the command that runs, such as ``noisear ppo``; ``None`` outside of one."""
    return _PROGRAM.get()


def run_script(main: Callable[[list[str]], Any]) -> None:
    """:func:`run_command` for a script that was started by its path or with ``python -m``."""
    run_command(Path(sys.argv[0]).name, main, sys.argv[1:])


def describe(error: BaseException) -> str:
    """An error's message: the file first if there is one, control characters escaped."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.filename2, error.strerror) if part is not None)
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def stop(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    """Prints a message on standard error and raises :class:`Stop`."""
    print(message, file=sys.stderr, flush=True)
    raise Stop(message, code) from error
