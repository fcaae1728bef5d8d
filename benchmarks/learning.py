"""How well do the algorithms learn? Runs the learning benchmarks and joins their tables on one page.

    python benchmarks/learning.py           # train what is missing, evaluate, write the page
    python benchmarks/learning.py --join    # write the page from existing tables only

Joins the tables of ``few_captions.py`` (trained captions, fresh noise) and ``held_out.py`` (validation captions).
Writes ``benchmarks/results/learning.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from noisear_rl.files import write_atomically

HERE = Path(__file__).parent
PARTS = {"few_captions": "Few trained captions, fresh noise", "held_out": "Validation captions"}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--join", action="store_true", help="join existing tables without training")
    if not parser.parse_args().join:
        for name in PARTS:
            subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    page = ["`python benchmarks/learning.py`; each part names its command and commit."]
    for name, title in PARTS.items():
        page += [f"# {title}", (HERE / "results" / f"{name}.md").read_text().strip()]
    write_atomically(HERE / "results" / "learning.md", "\n\n".join(page) + "\n")


if __name__ == "__main__":
    main()
