"""Code that a file names: a configuration or a manifest from somebody else runs none unless it is trusted.

What a user writes on the command line or in Python is trusted. A file that was read may come from a stranger, so a
reward ``FILE.py``, an interpreter, or an environment ``module:id`` in it is shown and refused, unless ``--trust-code``
(:mod:`noisear_rl.command`) or ``NOISEAR_TRUST_CODE=1`` allows it. So is the address of a server on another machine,
which would be sent images and prompts.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

OPTION, VARIABLE = "--trust-code", "NOISEAR_TRUST_CODE"
PACKAGE = Path(__file__).parent
_source: ContextVar[str | None] = ContextVar("source", default=None)
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


class UntrustedCodeError(PermissionError):
    """A file names code to run."""


@contextlib.contextmanager
def values_from(file: str | Path) -> Iterator[None]:
    """Marks all values checked inside as read from a file; files of this package are trusted."""
    inside = PACKAGE in Path(file).resolve().parents
    token = _source.set(_source.get() if inside else str(file))
    try:
        yield
    finally:
        _source.reset(token)


@contextlib.contextmanager
def trusting(trusted: bool) -> Iterator[None]:
    """Lets files name code inside, if ``trusted``."""
    token = _trusted.set(trusted or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def check_code(code: str) -> None:
    """Refuses code that a file names.

    Raises:
        UntrustedCodeError: If the value under check comes from a file and files are not trusted; names both.
    """
    if _untrusted():
        raise UntrustedCodeError(
            f"{_source.get()} names code to run, {code!r:.200}, and was not given on the command line. Read that code, "
            f"and if you trust it, pass {OPTION}"
        )


def import_module_of(code: str) -> ModuleType:
    """Imports the module of ``module:name``, also one of the current folder, as ``python -m`` does.

    Raises:
        ImportError: If it cannot be imported.
        UntrustedCodeError: Like :func:`check_code`.
    """
    check_code(code)
    sys.path.insert(0, folder := os.getcwd())
    try:
        return importlib.import_module(code.partition(":")[0])
    finally:
        sys.path.remove(folder)


def check_address(url: str, host: str) -> None:
    """Refuses a server on another machine that a file names.

    Raises:
        UntrustedCodeError: Like :func:`check_code`.
    """
    if _untrusted() and not is_loopback(host):
        raise UntrustedCodeError(
            f"{_source.get()} names a server that images and prompts would be sent to, {url!r:.200}, and was not given "
            f"on the command line. If you trust it, pass {OPTION}"
        )


def check_secret(variable: str) -> None:
    """Refuses a secret, by the name of its environment variable, that a file wants to be sent.

    Raises:
        UntrustedCodeError: Like :func:`check_code`.
    """
    if _untrusted():
        raise UntrustedCodeError(
            f"{_source.get()} wants the environment variable {variable!r:.80} to be sent to a server, and was not "
            f"given on the command line. If you trust it, pass {OPTION}"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _untrusted() -> bool:
    """Whether the value under check comes from a file, and files are not trusted."""
    if _source.get() is None or _trusted.get():
        return False
    return os.environ.get(VARIABLE, "0") in ("", "0")
