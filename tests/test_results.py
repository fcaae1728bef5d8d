"""Published tables are what their data render to, and figures of the README and of ``docs/`` are in them."""

import importlib
import re
from pathlib import Path

import pytest

from noisear_rl.evaluation.results import COMPRESSED, LIMIT, read_record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
DATA = sorted(RESULTS.glob("*.json*"))


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.name)
def test_pages_are_rendered_from_their_data(path):
    """What ``python benchmarks/X.py --render`` writes is what is published."""
    name = path.name.removesuffix(".gz").removesuffix(".json")
    script = importlib.import_module(f"benchmarks.{name}")
    assert script.table(read_record(RESULTS / f"{name}.json")) == (RESULTS / f"{name}.md").read_text()
    assert path.stat().st_size <= (LIMIT if path.suffix == ".gz" else COMPRESSED)


def test_figures_of_text_features():
    table = (RESULTS / "text_features.md").read_text()
    sentence = re.search(r"then gets ([\d.]+) and ([\d.]+) % right instead of ([\d.]+) and ([\d.]+) %", measured())
    assert sentence is not None
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table.splitlines() if line.startswith("| ")}
    cells = [cell.split("(")[0].strip() for name in ("whitened, text x 4", "normalized") for cell in rows[name]]
    assert list(sentence.groups()) == cells


def measured(page: str = "results/index.md") -> str:
    """A page with line breaks as spaces."""
    return " ".join((ROOT / "docs" / page).read_text().split())


def test_readme_headline_table():
    """Its rows by their names in the results."""
    names = {
        "Gaussian": "Gaussian",
        "pretrained on layouts that rewards chose": "NLL on shared layouts",
        "then PPO": "PPO with ten times the images",
        "then PPO, temperature 0.8": "PPO with ten times the images, temperature 0.8",
        "both with a sixth of the images, temperature 0.8": "PPO, small preset, temperature 0.8",
        "then reward gradients": "reward gradient from there",
        "best of 4 Gaussian": "best of 4",
        "best of 8 Gaussian": "best of 8",
    }
    found = re.findall(r"^\| (.+?) \| (\d) \| ([^|]+) \| ?(\d*) ?\|$", (ROOT / "README.md").read_text(), re.M)
    assert [title for title, *_ in found] == list(names)
    table = (RESULTS / "shapes.md").read_text().split("By category")[0]
    for title, evaluations, right, kl in found:
        row = next(line for line in table.splitlines() if line.startswith(f"| {names[title]} |")).split(" | ")
        assert (row[2], row[3].split(";")[0], row[8].strip()) == (evaluations, right, kl), title


def test_table_of_the_prior():
    pattern = r"^\| (.+?) \| ([\d,]+) \| (\d) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ?(\d*) \|$"
    found = re.findall(pattern, (ROOT / "docs/algorithms/prior.md").read_text(), re.M)
    table, by_category = (RESULTS / "shapes.md").read_text().split("By category")
    assert len(found) == sum(line.startswith("| ") for line in table.splitlines()) - 1  # a head
    for title, *cells, position, layout, kl in found:
        name = title.strip("*").removesuffix(" noise")
        row, means = (
            next(line for line in part.splitlines() if line.startswith(f"| {name} |")).split(" | ")
            for part in (table, by_category)
        )
        assert (row[1:4], row[7], row[8], means[5]) == (cells, layout, kl, position), title


def test_figures_of_speed():
    pattern = r"drawn ([\d.]+) \(batch 1\) to ([\d.]+) \(batch 32\) .*? float32, ([\d.]+) to ([\d.]+) times in bfloat16"
    drawn = re.search(pattern + r".*? at (\d+) % of the rate .*? is ([\d.]+) times as fast", measured())
    assert drawn is not None
    rows = [line.split(" | ") for line in (RESULTS / "bench.md").read_text().splitlines() if line.startswith("| ")]
    titles = [f"sampling in {dtype}, batch {batch}," for dtype in ("float32", "bfloat16") for batch in (1, 32)]
    titles += ["an NLL step in float32", "PPO outside the environments, per image, beside Stable"]
    cells = [next(row[1] for row in rows if title in row[0]) for title in titles]
    assert list(drawn.groups()) == [re.split("[× ]", cell)[0] for cell in cells]


def test_figures_of_the_teacher():
    sentence = re.search(r"the same policies are right in (.+?) % instead of (.+?) %", measured("algorithms/prior.md"))
    assert sentence is not None
    rows = [line.split(" | ") for line in (RESULTS / "teacher.md").read_text().splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[2] for row in rows}
    assert list(sentence.groups()) == [found["PPO from there"], found["Gaussian"]]


def test_figures_of_cross_talk():
    sentence = re.search(r"by (\d+) % of its own way .*?, by (\d+) % with .*?, and by (\d+) % once", measured())
    assert sentence is not None
    rows = [line.split(" | ") for line in (RESULTS / "cross_talk.md").read_text().splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): row[2].split(" (")[0] for row in rows}
    names = ("denoiser, normalized", "denoiser, whitened, text x 4", "shapes/nll")
    assert [int(share) / 100 for share in sentence.groups()] == [float(found[name]) for name in names]
