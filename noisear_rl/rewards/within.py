"""A limit on the time that a call may take."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """The result of a call that may take so long.

    With a limit it runs in a thread, which goes on by itself when the time is over, until the process ends.

    Raises:
        TimeoutError: If it takes longer.
    """
    if seconds is None:
        return call()
    context, gradients, result = contextvars.copy_context(), torch.is_grad_enabled(), Future[Any]()

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                result.set_result(context.run(call))
        except BaseException as error:  # raised again below
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError as error:
        if result.done():
            raise
        raise TimeoutError(f"no result after {seconds:g} seconds (its timeout)") from error
