"""Published tables are what their data render to, and README figures are in them."""

import json
import re
from pathlib import Path

from benchmarks import text_features

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def test_text_features():
    table = (RESULTS / "text_features.md").read_text()
    assert text_features.table(json.loads((RESULTS / "text_features.json").read_text())) == table
    sentence = re.search(r"then gets ([\d.]+) and ([\d.]+) % right instead of ([\d.]+) and ([\d.]+) %", readme())
    assert sentence is not None
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in table.splitlines() if line.startswith("| ")}
    cells = [cell.split("(")[0].strip() for name in ("whitened, text x 4", "normalized") for cell in rows[name]]
    assert list(sentence.groups()) == cells


def readme() -> str:
    """The README with line breaks as spaces."""
    return " ".join((ROOT / "README.md").read_text().split())
