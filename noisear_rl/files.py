"""Files written whole or not at all, and manifests that say what a folder was written with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, complete or not at all; see :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces ``path`` at the end: a killed process leaves the old file or the new.

    The temporary file is next to ``path``, has a name of its own, so that several processes may write the same file,
    and is removed on failure; what a killed process leaves, :func:`noisear_rl.integrity.lock_folder` removes. Folders
    are created.

    Args:
        path: The file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(content: Path | Sequence[str]) -> str:
    """Fingerprint of a file, or of lines of text."""
    data = content.read_bytes() if isinstance(content, Path) else "\n".join(content).encode()
    return hashlib.sha256(data).hexdigest()


SEAL = "sha256"  # key of a manifest's own checksum, and of every entry of provenance.json
LATER = ("dtype", "reward_sha256")  # keys that earlier versions did not write


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a folder's manifest, with a checksum of its own, or compares with the one that is there.

    Raises:
        ValueError: If the folder was written with other settings (names the first that differs), its manifest is
            damaged, or it holds shards without a manifest.
    """
    path = folder / "manifest.json"
    if not path.exists():
        if found := next(folder.glob("shard-*.parquet"), None):
            raise ValueError(f"{found} has no manifest, so nobody knows its settings: choose another output_dir")
        write_atomically(path, json.dumps({**manifest, SEAL: _seal(manifest)}, indent=1))
        return
    known, asked = read_manifest(folder), json.loads(json.dumps(manifest))
    for key in {**known, **asked}:
        if key in LATER and key not in known:
            continue
        if known.get(key) != asked.get(key):
            raise ValueError(
                f"{folder} was written with other settings ({key}: {known.get(key)!r}, not {asked.get(key)!r}): "
                "choose another output_dir"
            )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a folder was written with.

    Raises:
        FileNotFoundError: If there is no manifest.
        ValueError: If it is damaged.
    """
    path = Path(folder) / "manifest.json"
    try:
        manifest = _without_seal(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy, or make the folder again") from error
    if manifest is None:
        raise ValueError(f"{path} is damaged or was edited: restore it from a copy, or make the folder again")
    return manifest


def write_entries(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Writes a list of mappings as JSON, each with a checksum of its own."""
    write_atomically(path, json.dumps([{**entry, SEAL: _seal(entry)} for entry in entries], indent=1) + "\n")


def read_entries(path: Path) -> list[dict[str, Any]]:
    """What :func:`write_entries` wrote, without the checksums; empty if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        found = [_without_seal(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy, or remove it") from error
    whole = [entry for entry in found if entry is not None]
    if len(whole) < len(found):
        raise ValueError(f"{path} is damaged or was edited: restore it from a copy, or remove it")
    return whole


def _without_seal(written: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was written with a checksum, or by earlier versions without one; ``None`` if it is damaged."""
    last, rest = next(reversed(list(written.items())), ("", None)), dict(list(written.items())[:-1])
    if SEAL in written:
        return rest if last == (SEAL, _seal(rest)) else None
    return None if rest and last[1] == _seal(rest) else dict(written)  # the name of the checksum is damaged


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
