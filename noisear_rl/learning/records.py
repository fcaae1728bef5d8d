"""The records of a run, ``metrics.jsonl``: one line of JSON per record, each update once.

A checkpoint keeps the checksum of the lines before it (``records.json``), which reading compares with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from noisear_rl import checkpoints
from noisear_rl.checkpoints import list_checkpoints, step_of
from noisear_rl.files import write_atomically
from noisear_rl.integrity import DamagedError, skipped

RECORDS = "metrics.jsonl"
# What "best" means for a checkpoint: the first of these that a run logs, and its sign.
SCORES = (
    ("eval/rewards/accuracies", 1),
    ("losses/nll_held_out", -1),
    ("losses/mse_held_out", -1),
    ("charts/episodic_return", 1),
)
AVERAGED = 10  # records before a checkpoint that its score is the mean of
ADVICE = "restore it from a copy, or move it away to go on without the records so far"


def append_record(folder: Path, record: dict[str, Any]) -> None:
    """Adds a line, in one write."""
    path, line = folder / RECORDS, f"{json.dumps(record)}\n".encode()
    with path.open("ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records that a run logged; a last line that is not complete (yet) is left out.

    Raises:
        FileNotFoundError: If the run logged nothing.
        DamagedError: If the file is not what was written.
    """
    return [record for record, _ in _parsed(folder)]


def forget_after(folder: Path, step: int) -> None:
    """Drops records of updates that a killed run logged but did not save, and a line that it did not complete.

    Raises:
        DamagedError: If a line before them is damaged.
    """
    path = folder / RECORDS
    if path.exists():
        kept = [line for record, line in _parsed(folder, step) if record["step"] <= step]
        text = "".join(f"{line}\n" for line in kept)
        if text.encode() != path.read_bytes():
            write_atomically(path, text)


def scores_of(folder: Path) -> dict[int, float]:
    """How good the checkpoints of a run are, by step; higher is better, and empty if nothing says so."""
    if not (folder / RECORDS).exists():
        return {}
    records = read_records(folder)
    for key, sign in SCORES:
        found = [(record["step"], sign * record[key]) for record in records if key in record]
        if found:
            scores = {}
            for step in map(step_of, list_checkpoints(folder)):
                before = [value for at, value in found if at <= step and np.isfinite(value)][-AVERAGED:]
                if before:
                    scores[step] = float(np.mean(before))
            return scores
    return {}


def _parsed(folder: Path, step: int | None = None) -> list[tuple[dict[str, Any], str]]:
    """Records and their lines, once the part before a checkpoint (the newest, or ``step``'s) has its checksum."""
    path = folder / RECORDS
    content = path.read_bytes()
    known = [found for found in list_checkpoints(folder) if step is None or step_of(found) <= step]
    expected = known[-1] / checkpoints.RECORDS if known else None
    if expected is not None and expected.is_file() and not skipped():
        try:
            size, digest = json.loads(expected.read_bytes())
            whole = len(content) >= size and hashlib.sha256(content[:size]).hexdigest() == digest
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{expected}: damaged: remove it, or the checkpoint") from error
        if not whole:
            raise DamagedError(f"{path}: damaged: the records before {known[-1].name} are not those written: {ADVICE}")
    lines = content.split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            record["step"] + 0  # a number
        except (ValueError, TypeError, LookupError) as error:
            raise DamagedError(f"{path}, line {number}: damaged: {ADVICE}") from error
        found.append((record, line.decode()))
    return found
