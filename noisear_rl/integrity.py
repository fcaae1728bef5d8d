"""Checksums of written files, which loading compares with, and locks that keep two processes out of one folder.

A folder whose files are written together (a checkpoint) holds ``checksums.json``; one that grows (pairs, rollouts, an
evaluation) holds ``checksums/PART.json``, written just before the file that makes a part complete appears. Each maps
the names of files to size in bytes and SHA-256. Folders without checksums, of earlier versions, are read as they are.
``NOISEAR_VERIFY=0`` skips the comparison, which reads every file once.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from noisear_rl.files import write_atomically

CHECKSUMS, VARIABLE = "checksums.json", "NOISEAR_VERIFY"
LOCK = ".lock"


class DamagedError(ValueError):
    """A file is not what was written."""


class InUseError(OSError):
    """Another process writes to the folder."""


def digest(file: Path) -> list[Any]:
    """Size in bytes and SHA-256."""
    with file.open("rb") as stream:
        return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def write_checksums(folder: Path, files: Mapping[Path, Path], part: str = "") -> None:
    """Records files below ``folder``.

    Args:
        folder: The folder that the checksums belong to.
        files: Where each file is now: at its place, or at a temporary one from which it is about to be renamed.
        part: Name of the part that they complete; empty for a folder that is written at once.
    """
    record = {file.relative_to(folder).as_posix(): digest(place) for file, place in files.items()}
    write_atomically(_checksums_of(folder, part), json.dumps(record, indent=1) + "\n")


def _checksums_of(folder: Path, part: str) -> Path:
    return folder / "checksums" / f"{part}.json" if part else folder / CHECKSUMS


def verify(
    folder: Path,
    names: Iterable[str] | None = None,
    *,
    part: str = "",
    advice: str = "restore it from a copy, or remove it and make it again",
) -> None:
    """Compares files with the checksums of their folder, sizes first.

    Args:
        folder: The folder that the checksums belong to.
        names: Files to compare, relative to it; ``None`` for all that the part records.
        part: As in :func:`write_checksums`.
        advice: What to do about a damaged file, for the message.

    Raises:
        DamagedError: If a file is missing or differs; names it.
    """
    recorded = read_checksums(folder, part, advice)
    for name in recorded if names is None else [name for name in names if name in recorded]:
        check(folder / name, recorded[name], advice)


def skipped() -> bool:
    """Whether ``NOISEAR_VERIFY=0`` asks for no comparison."""
    return os.environ.get(VARIABLE) == "0"


def read_checksums(folder: Path, part: str, advice: str) -> dict[str, list[Any]]:
    """The checksums of a part; empty if it has none, or ``NOISEAR_VERIFY`` is 0.

    Raises:
        DamagedError: If the file of the checksums is damaged.
    """
    path = _checksums_of(folder, part)
    if skipped() or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        whole = all(Path(name).name and pair[0] >= 0 and len(pair[1]) == 64 for name, pair in found.items())
    except (ValueError, AttributeError, TypeError, LookupError) as error:
        raise DamagedError(f"{path}: damaged ({error}): {advice}") from error
    if not whole or not found:
        raise DamagedError(f"{path}: damaged: {advice}")
    return found


def verify_parts(folder: Path, prefix: str, advice: str) -> None:
    """Compares all files of the parts whose names begin with ``prefix``, such as ``noise-``.

    Raises:
        DamagedError: If a file is missing or differs; names it.
    """
    for path in sorted((folder / "checksums").glob(f"{prefix}*.json")):
        verify(folder, part=path.stem, advice=advice)


def check(file: Path, expected: list[Any], advice: str) -> None:
    """Compares one file with its size and SHA-256.

    Raises:
        DamagedError: If it is missing or differs.
    """
    if not file.is_file():
        raise DamagedError(f"{file}: missing: {advice}")
    if (size := file.stat().st_size) != expected[0]:
        raise DamagedError(f"{file}: damaged: {size} bytes instead of {expected[0]}: {advice}")
    if digest(file)[1] != expected[1]:
        raise DamagedError(f"{file}: damaged: its SHA-256 is not that of what was written: {advice}")


def read_checked(folder: Path, name: str, read: Callable[[Any], Any], *, part: str, advice: str) -> Any:
    """Reads a file from the bytes that were compared with its checksum.

    Args:
        folder: The folder that the checksums belong to.
        name: The file, relative to it.
        read: Takes an open binary file.
        part: As in :func:`write_checksums`.
        advice: What to do about a damaged file, for the message.

    Raises:
        DamagedError: If the file is missing, differs, or cannot be read.
    """
    file, expected = folder / name, read_checksums(folder, part, advice).get(name)
    if expected is not None and file.is_file() and file.stat().st_size != expected[0]:
        check(file, expected, advice)  # before its content is in memory
    content = file.read_bytes()
    if expected is not None and hashlib.sha256(content).hexdigest() != expected[1]:
        raise DamagedError(f"{file}: damaged: its SHA-256 is not that of what was written: {advice}")
    try:
        return read(io.BytesIO(content))
    except Exception as error:  # each format raises its own
        raise DamagedError(f"{file}: damaged ({' '.join(str(error).split()):.200}): {advice}") from error


def lock_folder(folder: Path) -> FileLock:
    """Keeps other processes from writing to a folder.

    The lock ends when it is released, nobody refers to it any more, or this process ends, however it does. Within a
    process it is shared. Temporary files that killed processes left behind are removed.

    Raises:
        InUseError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True, thread_local=False)
    alone = not lock.is_locked
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(
            f"{folder} is in use: another process writes to it. Wait for it or stop it, or choose another --output-dir"
        ) from error
    if alone:
        for file in folder.rglob(".*.tmp"):
            file.unlink(missing_ok=True)
    return lock
