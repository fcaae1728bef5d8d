"""Files written whole or not at all, and manifests that say what a folder was written with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, complete or not at all; see :func:`atomic`."""
    with atomic(path, shared=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary path that replaces ``path`` at the end: a killed process leaves the old file or the new.

    The temporary file is next to ``path`` and is removed on failure; after a kill, the next try overwrites it. Folders
    are created.

    Args:
        path: The file to write.
        shared: Whether several processes may write this file at a time. Each has its own temporary file then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(content: Path | Sequence[str]) -> str:
    """Fingerprint of a file, or of lines of text."""
    data = content.read_bytes() if isinstance(content, Path) else "\n".join(content).encode()
    return hashlib.sha256(data).hexdigest()


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a folder's manifest, or compares with the one that is there.

    Raises:
        ValueError: If the folder was written with other settings; names the first that differs.
    """
    path = folder / "manifest.json"
    if not path.exists():
        write_atomically(path, json.dumps(manifest, indent=1))
        return
    known = read_manifest(folder)
    for key in {**known, **manifest}:
        if known.get(key) != manifest.get(key):
            raise ValueError(
                f"{folder} was written with other settings ({key}: {known.get(key)!r}, not {manifest.get(key)!r}): "
                "choose another output_dir"
            )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a folder was written with."""
    return json.loads((Path(folder) / "manifest.json").read_text())
