"""Datasets on disk as numbered Parquet files with a manifest, so that an interrupted command can resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow.parquet import read_table, write_table

from noisear_rl.files import atomic
from noisear_rl.integrity import read_checked, write_checksums

if TYPE_CHECKING:
    from datasets import Dataset, Features  # elsewhere imported where it is used: it takes half a second

Columns = dict[str, str]
"""Types of a dataset's columns by name: ``string``, ``int64``, ``float32``, ``list<float16>``, ``image`` …"""


def features_of(columns: Columns) -> Features:
    """Columns as ``datasets`` writes them."""
    from datasets import Features, Image, List, Value

    def feature(kind: str) -> Any:
        if kind.startswith("list<"):
            return List(Value(kind.removeprefix("list<").removesuffix(">")))
        return Image() if kind == "image" else Value(kind)

    return Features({name: feature(kind) for name, kind in columns.items()})


def shard_file(folder: Path, index: int) -> Path:
    """Path of a shard."""
    return folder / f"shard-{index:05d}.parquet"


def write_shard(folder: Path, index: int, rows: Mapping[str, list[Any]], columns: Columns) -> None:
    """Writes a shard atomically, and its checksum before it."""
    from datasets import Dataset

    file = shard_file(folder, index)
    with atomic(file) as temporary:
        write_table(Dataset.from_dict(dict(rows), features=features_of(columns)).data.table, temporary)
        write_checksums(folder, {file: temporary}, file.stem)


def load_shards(folder: str | Path, what: str, command: str) -> Dataset:
    """Loads all shards of a folder as one dataset in memory.

    Args:
        folder: Folder of the shards.
        what: What they contain, for the error message.
        command: The command that writes them, for the error message.

    Raises:
        FileNotFoundError: If there are no shards or no manifest.
        ValueError: If a shard is damaged; names it.
    """
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    files = sorted(Path(folder).glob("shard-*.parquet"))
    if not files or not (Path(folder) / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} holds no {what}: make some with `{command}`")
    advice = f"remove it and run the same `{command}` again, which makes it anew"
    tables = [read_checked(Path(folder), file.name, read_table, part=file.stem, advice=advice) for file in files]
    parts = [Dataset(InMemoryTable(table)) for table in tables if table.num_rows]
    try:
        return concatenate_datasets(parts) if parts else Dataset.from_dict({})
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder}: its shards do not have the same columns: {error}") from error
