"""Prompt sets of text-to-image evaluation: from a local file in its published layout, or by name.

=============  ==============================  ==================================  =======  ============
name           published file                  layout                              prompts  licence
=============  ==============================  ==================================  =======  ============
drawbench      DrawBench Prompts - Sheet1.csv  csv: Prompts, Category                  200  not stated
pick-a-pic     test_unique split               parquet: caption                        500  not stated
geneval        evaluation_metadata.jsonl,      jsonl: tag, include, prompt;            553  MIT
               generation_prompts.txt          one prompt per line
parti-prompts  PartiPrompts.tsv                tsv: Prompt, Category, two more       1,632  Apache-2.0
hpd            anime.json, concept-art.json,   a JSON list of strings; the file's    3,200  Apache-2.0
               paintings.json, photo.json      name is the category
=============  ==============================  ==================================  =======  ============

Sources: DrawBench comes from Imagen (Saharia et al. 2022, arXiv 2205.11487), here from the Hub dataset
sayakpaul/drawbench. Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569) is no longer on the Hub under its authors'
name; the test prompts come from Jialuo21/pickapic-test (jsonl). Users wrote them, and some are not safe for work.
GenEval (Ghosh et al. 2023, arXiv 2310.11513) is the GitHub repository djghosh13/geneval. PartiPrompts (Yu et al. 2022,
arXiv 2206.10789) are in the GitHub repository google-research/parti and in the Hub dataset nateraw/parti-prompts. HPD
v2 (Wu et al. 2023, arXiv 2306.09341) is the Hub dataset ymhao/HPDv2, folder ``benchmark``. Revisions are pinned.

Your own file can be a txt with one prompt per line, or a csv, tsv, jsonl, json or parquet file with one of the
:data:`PROMPT_COLUMNS` and optionally one of the :data:`CATEGORY_COLUMNS`, in upper or lower case. Text is UTF-8, with
or without a byte order mark. A csv may quote line breaks, and must quote a text with commas: a row with too many
columns, or with a space behind an unquoted comma where the header has none, is malformed. A tsv has no quoting, because
quotation marks in PartiPrompts belong to the prompts.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisear_rl.files import write_atomically

PROMPT_COLUMNS: tuple[str, ...] = ("prompt", "prompts", "caption", "text")
CATEGORY_COLUMNS: tuple[str, ...] = ("category", "tag")
HPD_FILES: tuple[str, ...] = ("anime.json", "concept-art.json", "paintings.json", "photo.json")
SUFFIXES: tuple[str, ...] = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")
SHOWN_BAD_ROWS = 5

# Name: a Hub dataset (owner/name) or a URL, the revision, and its files.
PUBLISHED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "drawbench": (
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
        ("DrawBench Prompts - Sheet1.csv",),
    ),
    "pick-a-pic": ("Jialuo21/pickapic-test", "c45a875adf0fe5f2896e46bbef2124f4953dcaa6", ("test.jsonl",)),
    "geneval": (
        "https://raw.githubusercontent.com/djghosh13/geneval",
        "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
        ("prompts/evaluation_metadata.jsonl",),
    ),
    "parti-prompts": ("nateraw/parti-prompts", "944b156abfdad7627c3221b5ec4f6a6fb060a197", ("PartiPrompts.tsv",)),
    "hpd": ("ymhao/HPDv2", "fd163b223b6faf112eccafeabe2e31a0e950f177", tuple(f"benchmark/{f}" for f in HPD_FILES)),
}


@dataclass(frozen=True)
class PromptSet:
    """``P`` prompts to evaluate on.

    Attributes:
        name: Name of the set in tables.
        prompts: ``P`` prompts, without surrounding white space.
        categories: ``P`` names; ``"all"`` if the file has none.
        skipped: What is wrong with each skipped row, with file and line.
    """

    name: str
    prompts: list[str]
    categories: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompt_set(
    source: str | Path, *, name: str | None = None, skip_bad_rows: bool = False, limit: int | None = None
) -> PromptSet:
    """Reads a prompt set.

    Prompts keep the order of the file; a repeated prompt counts once, with its first category.

    Args:
        source: One of :data:`PUBLISHED`, which is downloaded once; a file (see the module docstring); or a folder with
            the four files of HPD v2. A name takes precedence over a file of that name: write ``./geneval`` for the
            file.
        name: Name of the set; by default the published name, or the file name without suffix.
        skip_bad_rows: Skip malformed rows with a warning; by default they are an error.
        limit: Maximum number of prompts, from the first; all by default. Many sets are sorted by category.

    Raises:
        ValueError: If rows are malformed, the file is in none of the layouts, or there is no prompt. A broken ``json``
            file is always an error, because its rows cannot be separated.
        FileNotFoundError: If there is no such file, or a named set is not on disk and cannot be downloaded.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    named = isinstance(source, str) and source in PUBLISHED
    paths = _download(str(source)) if named else _find(source)
    found: dict[str, str] = {}
    bad: list[str] = []
    rows = [(path, place, record) for path in paths for place, record in _rows(path)]
    for path, place, record in rows:
        try:
            prompt, category = _parse(record)
            found.setdefault(prompt, category or (path.stem if path.name in HPD_FILES else "all"))
        except ValueError as error:
            bad.append(f"{path.name}, {place}: {error}")
    if bad and not skip_bad_rows:
        listed = "\n  ".join(
            bad[:SHOWN_BAD_ROWS] + [f"and {len(bad) - SHOWN_BAD_ROWS} more"] * (len(bad) > SHOWN_BAD_ROWS)
        )
        raise ValueError(
            f"{source}: {len(bad)} of {len(rows)} rows are malformed:\n  {listed}\n"
            "Fix the file, or skip these rows: --skip-bad-rows"
        )
    if bad:
        message = f"{source}: {len(bad)} of {len(rows)} rows are malformed and skipped; the first: {bad[0]}"
        warnings.warn(message, stacklevel=2)
    if not found:
        raise ValueError(f"{source} contains no prompts")
    prompts = list(found)[:limit]
    name = name or (str(source) if named else Path(source).stem)
    return PromptSet(name, prompts, [found[prompt] for prompt in prompts], bad)


def _find(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        paths = [path / file for file in HPD_FILES]
        if missing := [file.name for file in paths if not file.is_file()]:
            raise FileNotFoundError(f"{path} is a folder, but not the one of HPD v2: it has no {', '.join(missing)}")
        return paths
    if not path.is_file():
        near = difflib.get_close_matches(str(source), PUBLISHED, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(f"{source} is neither a file nor one of the prompt sets {', '.join(PUBLISHED)}{hint}")
    return [path]


def _download(name: str) -> list[Path]:
    from huggingface_hub import cached_assets_path, constants, hf_hub_download

    source, revision, files = PUBLISHED[name]
    try:
        if "://" in source:
            folder = cached_assets_path(
                "noisear_rl", namespace=name, subfolder=revision, assets_dir=constants.HF_ASSETS_CACHE
            )
            return [_fetch(f"{source}/{revision}/{file}", folder / file) for file in files]
        return [Path(hf_hub_download(source, file, repo_type="dataset", revision=revision)) for file in files]
    except Exception as error:  # the Hub, the network and the disk each raise their own
        where = f"{source}/{revision}" if "://" in source else f"the Hub dataset {source}"
        raise FileNotFoundError(
            f"prompt set {name!r} is not on disk and cannot be downloaded ({error}). Get {', '.join(files)} from "
            f"{where} and pass the path of the {'file' if len(files) == 1 else 'folder'} instead of the name."
        ) from error


def _fetch(address: str, path: Path) -> Path:
    from huggingface_hub import constants

    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(address, timeout=30) as response:
            write_atomically(path, response.read().decode())
    return path


_Row = tuple[str, Any]  # its place in the file and its content, or a ValueError that says what is wrong with it


def _rows(path: Path) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: prompts are read from {', '.join(SUFFIXES)} files, not from {suffix or 'this one'}")
    if suffix == ".parquet":
        return _parquet_rows(path)
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    # A byte that is not UTF-8 becomes a lone surrogate, so that _parse can report its row.
    text = content.decode("utf-8-sig", "surrogateescape")
    if suffix in (".csv", ".tsv"):
        return _table_rows(text, path)
    if suffix == ".json":
        return _json_rows(text, path)
    return ((place, line if suffix == ".txt" else _json_or_error(line)) for place, line in _lines(text))


def _lines(text: str) -> Iterator[tuple[str, str]]:
    lines = enumerate(io.StringIO(text, newline=None), 1)  # unlike str.splitlines, only \n, \r and \r\n end a line
    return ((f"line {number}", line) for number, line in lines if line.strip())


def _json_or_error(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


def _table_rows(text: str, path: Path) -> Iterator[_Row]:
    tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    lines: list[str] = []  # of the row that was read last
    kept = (lines.append(line) or line for line in io.StringIO(text, newline=""))  # type: ignore[func-returns-value]
    reader = csv.reader(kept, strict=True, **(tabs if path.suffix.lower() == ".tsv" else {}))
    header: list[str] = []
    spaced = False  # whether the file sets a space behind its commas
    while True:
        place = f"line {reader.line_num + 1}"
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, ValueError(f"{error}; is a quotation mark missing or not doubled?")
            continue
        if not header:
            header, spaced = [cell.strip() for cell in cells], any(cell.startswith(" ") for cell in cells[1:])
            if header and _match(header, PROMPT_COLUMNS) is None:
                raise ValueError(f"{path}: {_no_prompt(header)}")
        elif cells and len(cells) != len(header):
            problem = f"{len(cells)} columns where the header has {len(header)}; is a text with the delimiter unquoted?"
            yield place, ValueError(problem)
        elif not spaced and any(cell.startswith(" ") and f",{cell}" in "".join(lines) for cell in cells[1:]):
            yield place, ValueError("a space follows a comma outside quotation marks; is a text with commas unquoted?")
        elif cells:
            yield place, dict(zip(header, cells, strict=True))


def _json_rows(text: str, path: Path) -> Iterator[_Row]:
    items = _json_or_error(text) if text.strip() else []
    if not isinstance(items, list):
        what = items if isinstance(items, ValueError) else f"a {type(items).__name__}"
        raise ValueError(f"{path}: expected a JSON list of prompts, but it is {what}")
    # Items are decoded again one by one, since the line of an item follows from its position in the text.
    decode, gap, end = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), text.find("[") + 1
    line, counted = 1, 0
    for number, item in enumerate(items, 1):
        start = gap.match(text, end).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        yield f"line {line}, item {number}", item
        end = decode(text, start)[1]


def _parquet_rows(path: Path) -> Iterator[_Row]:
    import pyarrow
    from datasets import ClassLabel, Features
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            prompt, category = _match(names, PROMPT_COLUMNS), _match(names, CATEGORY_COLUMNS)
            table = file.read(columns=[name for name in (prompt, category) if name])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or not parquet: {error}") from error
    if prompt is None:
        raise ValueError(f"{path}: {_no_prompt(names)}")
    labels = Features.from_arrow_schema(table.schema).get(category)
    for number in range(table.num_rows):
        record = {name: _cell(table[name][number]) for name in table.column_names}
        if isinstance(labels, ClassLabel) and record[category] is not None:
            record[category] = dict(enumerate(labels.names)).get(record[category])
        yield f"row {number + 1}", record


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")


def _match(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _no_prompt(names: Sequence[str]) -> str:
    return f"no prompt: expected one of {', '.join(PROMPT_COLUMNS)}, found {', '.join(map(repr, names)) or 'nothing'}"


def _parse(record: Any) -> tuple[str, str]:
    """Prompt and category of a row ("" without a category); raises ``ValueError`` that says what is wrong."""
    if isinstance(record, ValueError):
        raise record
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a prompt or an object with one, got {record!r:.60}")
    names = list(record)
    if (column := _match(names, PROMPT_COLUMNS)) is None:
        raise ValueError(_no_prompt(names))
    prompt, category = record[column], record.get(_match(names, CATEGORY_COLUMNS) or "")
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty")
    if not isinstance(prompt, str):
        raise ValueError(f"the prompt is {prompt!r:.60}, not text")
    if not isinstance(category, str | int | None):
        raise ValueError(f"the category is {category!r:.60}, not text")
    category = "" if category is None else str(category)
    for text in (prompt, category):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"not UTF-8: {text!r:.60}")
    if "include" in record:
        _check_geneval(record)
    return prompt.strip(), category.strip()


def _check_geneval(record: Mapping[str, Any]) -> None:
    """Checks GenEval's lists of objects that must and must not be in an image."""
    for key in ("include", "exclude"):
        objects = record.get(key, [])
        if not isinstance(objects, list) or (key == "include" and not objects):
            raise ValueError(f"{key} is {objects!r:.60}, not a list of objects")
        for entry in objects:
            match entry:
                case {"class": str(), "count": int(count)} if count > 0 and isinstance(entry.get("color", ""), str):
                    position = entry.get("position", ["", 0])
                case _:
                    raise ValueError(f"{key} holds {entry!r:.60}; expected class, count and optionally color, position")
            match position:
                case [str(), int(other)] if 0 <= other < len(objects):
                    continue
            raise ValueError(f"{key} has the position {position!r:.60}; expected a relation and an object's index")
