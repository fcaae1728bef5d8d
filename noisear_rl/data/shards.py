"""Datasets on disk as numbered Parquet files with a manifest, so that an interrupted command can resume."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    Features,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from pyarrow.parquet import read_metadata

from noisear_rl.files import atomic


def shard_file(folder: Path, index: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{index:05d}.parquet"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Disables the progress bars of ``datasets``, one per file, in favour of the command's own."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def write_shard(folder: Path, index: int, rows: Mapping[str, list[Any]], features: Features) -> None:
    """Writes a shard atomically."""
    with _quiet(), atomic(shard_file(folder, index)) as temporary:
        Dataset.from_dict(dict(rows), features=features).to_parquet(temporary)


def load_shards(folder: str | Path, what: str, command: str) -> Dataset:
    """Loads all shards of a folder as one dataset in memory.

    Args:
        folder: Folder of the shards.
        what: What they contain, for the error message.
        command: The command that writes them, for the error message.

    Raises:
        FileNotFoundError: If there are no shards or no manifest.
    """
    files = sorted(str(file) for file in Path(folder).glob("shard-*.parquet"))
    if not files or not (Path(folder) / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} holds no {what}: make some with `{command}`")
    filled = [file for file in files if read_metadata(file).num_rows]
    with _quiet():
        parts = [Dataset.from_parquet(file, keep_in_memory=True) for file in filled]
    return concatenate_datasets(parts) if parts else Dataset.from_dict({})
