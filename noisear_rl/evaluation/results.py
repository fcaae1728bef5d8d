"""Reads the folder of an evaluation, and keeps the scores behind a published table as one small file.

Shapes: ``P`` prompts, ``S`` samples per prompt, ``T`` training seeds.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from noisear_rl.files import atomic, write_atomically
from noisear_rl.integrity import verify

VERSION = 1
LONGEST_NAME = 200  # of a method's folder
COMPRESSED, LIMIT = 1_000_000, 2_000_000  # bytes of data: from where they are compressed, and at most
DRAWN = ("radial_spectrum", "noise_map")  # for figures only, not part of the data behind a table


@dataclass
class MethodResult:
    """Results of one method with one training seed.

    Attributes:
        group: Name shared by the training seeds of one method; tables have one row per group.
        slug: Name of its folder under ``images``.
        scores: ``(P, S)`` by scorer.
        nfe: Network evaluations per image, including those of a search.
        kl_to_gaussian: Mean KL of its noise to N(0, I) in nats; ``None`` for a method without a density.
        noise_mean: Mean over all noise elements.
        noise_std: Standard deviation over all noise elements.
        radial_spectrum: Power by radial frequency, low to high; 1 everywhere for N(0, I).
        noise_map: ``(h, w)``, the mean of the noise over images and channels.
        diversity: ``(P,)`` mean pairwise distance of a prompt's images, by the features that measure it.
        trained: Whether the method was trained.
    """

    group: str
    slug: str
    scores: dict[str, np.ndarray]
    nfe: float
    kl_to_gaussian: float | None
    noise_mean: float
    noise_std: float
    radial_spectrum: np.ndarray
    noise_map: np.ndarray
    diversity: dict[str, np.ndarray] = field(default_factory=dict)
    trained: bool = True


@dataclass
class Results:
    """Results of an evaluation: every method on the same prompts with the same seeds.

    Attributes:
        folder: Folder of the evaluation.
        prompts: ``P`` prompts.
        categories: ``P`` names; all the same if the prompt set has no categories.
        samples: ``S`` samples per prompt.
        judge: The held-out scorer that decides the comparison.
        methods: Results by method name, the baseline first.
        denoiser: Name of the frozen diffusion model.
        prompt_set: Name or file of the prompts.
        config: Options of the evaluation.
        provenance: Commit, library versions and hardware.
        timing: Seconds per image for sampling and denoising by method, without scoring; empty if not recorded.
        facts: Plain values that a published table also shows, such as the number of training images.
    """

    folder: Path
    prompts: list[str]
    categories: list[str]
    samples: int
    judge: str
    methods: dict[str, MethodResult]
    denoiser: str
    prompt_set: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    timing: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """Name of the first method, which the others are compared with."""
        return next(iter(self.methods))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the methods by group, in order."""
        groups: dict[str, list[str]] = {}
        for name, method in self.methods.items():
            groups.setdefault(method.group, []).append(name)
        return groups

    def by_seed(self, group: str, scorer: str) -> np.ndarray:
        """Returns the scores ``(T, P, S)`` of a group by training seed, as intervals need them."""
        return np.stack([self.methods[name].scores[scorer] for name in self.groups[group]])

    def pooled(self, group: str, scorer: str) -> np.ndarray:
        """Returns the scores ``(P, S)`` of a group, averaged over its training seeds."""
        return self.by_seed(group, scorer).mean(0)

    def image_path(self, method: str, prompt: int, sample: int) -> Path:
        """Returns the PNG file of one image."""
        return image_file(self.folder, self.methods[method].slug, prompt, sample)

    def seconds_per_image(self) -> dict[str, float]:
        """Returns the time for sampling and denoising by method, without scoring; empty if it was not recorded."""
        return self.timing


def image_file(folder: Path, slug: str, prompt: int, sample: int) -> Path:
    """Returns the file in which an evaluation keeps the image of one prompt and sample."""
    return folder / "images" / slug / f"{prompt:05d}-{sample:02d}.png"


def load_results(folder: str | Path) -> Results:
    """Reads the folder of an evaluation.

    Raises:
        FileNotFoundError: If the folder holds no results.
        ValueError: If ``results.json`` is damaged or has another version.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json: run `noisear evaluate --output-dir {folder}` first")
    timing = path.with_name("timing.json")
    verify(path.parent, part="results", advice="run the same `noisear evaluate` command again, which writes it anew")
    try:
        record = json.loads(path.read_text()) | {"timing": json.loads(timing.read_text()) if timing.is_file() else {}}
        return from_record(record, path.parent)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not the result of an evaluation: {error!r}") from error


def from_record(record: Mapping[str, Any], folder: Path) -> Results:
    """Returns the results that ``results.json`` or :func:`to_record` describes.

    Args:
        record: The contents of the file.
        folder: Folder of the evaluation.

    Raises:
        KeyError: If a part is missing.
        TypeError: If a part is unknown.
        ValueError: If the record has another version.
    """
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']}, expected {VERSION}: run the evaluation again")
    arrays = lambda parts: {name: np.array(values, dtype=float) for name, values in parts.items()}
    methods = {
        name: MethodResult(
            **part
            | {"scores": arrays(part["scores"]), "diversity": arrays(part.get("diversity", {}))}
            | {key: np.array(part.get(key, []), dtype=float) for key in DRAWN}
        )
        for name, part in record["methods"].items()
    }
    for name, method in methods.items():
        slug = method.slug
        if len(slug) > LONGEST_NAME or not slug.isprintable() or set(slug) & {"/", "\\"} or not slug.strip(". "):
            raise ValueError(f"method {name!r:.100} has the folder {method.slug!r:.100}, which is no plain name")
    rest = {key: value for key, value in record.items() if key not in ("version", "methods")}
    return Results(folder, methods=methods, **rest)


def to_record(results: Results) -> dict[str, Any]:
    """Returns all that a table needs as plain values for JSON: every score, without noise maps and spectra."""
    record = {part.name: getattr(results, part.name) for part in dataclasses.fields(results) if part.name != "folder"}
    methods = {}
    for name, method in results.methods.items():
        own = {part.name: getattr(method, part.name) for part in dataclasses.fields(method) if part.name not in DRAWN}
        own["scores"] = {scorer: _plain(values) for scorer, values in method.scores.items()}
        own["diversity"] = {feature: _plain(values) for feature, values in method.diversity.items()}
        methods[name] = own
    return {"version": VERSION} | record | {"methods": methods}


def _plain(values: np.ndarray) -> list[Any]:
    """Returns nested lists with six decimals, and whole numbers without a decimal point."""
    if values.ndim > 1:
        return [_plain(part) for part in values]
    return [int(value) if value.is_integer() else value for value in np.round(values.astype(float), 6).tolist()]


def save_data(results: Results, path: str | Path) -> Path:
    """Writes the scores behind a table; see :func:`to_record` and :func:`write_record`, also for errors."""
    return write_record(path, to_record(results))


def load_data(path: str | Path) -> Results:
    """Reads what :func:`save_data` wrote, compressed or not; images, noise maps and spectra are not part of it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has another version.
    """
    try:
        return from_record(read_record(path), Path(path).parent)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or does not hold scores: {error!r}") from error


def write_record(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Writes plain values as compact JSON, as ``PATH.gz`` above 1 MB; the same record gives the same bytes.

    Args:
        path: A file that ends in ``.json``.
        record: Plain values; numbers must be finite.

    Returns:
        The file written.

    Raises:
        ValueError: If the file would exceed 2 MB, or a number is NaN or infinite.
    """
    plain, packed = Path(path), Path(f"{path}.gz")
    content = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    file, other = (plain, packed) if len(content) <= COMPRESSED else (packed, plain)
    content = content if file is plain else gzip.compress(content, mtime=0)
    if len(content) > LIMIT:
        size = f"{len(content) / 1e6:.1f} MB, more than {LIMIT / 1e6:g}"
        raise ValueError(f"{file}: {size}: keep fewer scorers, samples or methods in one file")
    with atomic(file) as temporary:
        temporary.write_bytes(content)
    other.unlink(missing_ok=True)
    return file


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads what :func:`write_record` wrote to ``path``, compressed or not.

    Raises:
        FileNotFoundError: If neither file exists.
        ValueError: If the file is damaged, or both files exist.
    """
    plain, packed = Path(path), Path(f"{path}.gz")
    if not packed.is_file():
        return json.loads(plain.read_bytes())
    if plain.is_file():
        raise ValueError(f"both {plain} and {packed} exist: remove the older one")
    try:
        return json.loads(gzip.decompress(packed.read_bytes()))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{packed} is damaged: {error}") from error


def write_page(
    path: str | Path, table: Callable[[dict[str, Any]], str], record: Mapping[str, Any] | None = None
) -> str:
    """Writes a Markdown page together with the data that it is rendered from.

    Args:
        path: A file that ends in ``.md``; the data are next to it, in ``.json`` or ``.json.gz``.
        table: Renders the page from the data as they are read from disk.
        record: New data; ``None`` to render the page again from the data on disk.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If there are neither new data nor data on disk.
        ValueError: If the data are too large or damaged; see :func:`write_record`.
    """
    page = Path(path)
    data = page.with_suffix(".json")
    if record is not None:
        write_record(data, record)
    text = table(read_record(data))
    write_atomically(page, text)
    return text
