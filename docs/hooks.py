"""Adds pages to the site that live beside what they describe: READMEs and measured results.

Their links to files of the site are rewritten; links to other files become text, since a site has no sources.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = {
    "development/changelog.md": "CHANGELOG.md",
    "development/contributing.md": "CONTRIBUTING.md",
    "guides/denoisers.md": "noisear_rl/denoisers/README.md",
    "guides/presets.md": "configs/README.md",
    "guides/rewards.md": "noisear_rl/rewards/README.md",
    "results/scripts.md": "benchmarks/README.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def added() -> dict[str, Path]:
    """Address in the site → file, of all pages and images that are added."""
    results = ROOT / "benchmarks/results"
    found = (path for path in sorted(results.rglob("*")) if path.suffix in (".md", ".png"))
    pages = {address: ROOT / path for address, path in PAGES.items()}
    return pages | {f"results/{path.relative_to(results).as_posix()}": path for path in found}


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds them."""
    for address, path in added().items():
        listed = InclusionLevel.INCLUDED if address in PAGES and "scripts" not in address else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, address, abs_src_path=str(path), inclusion=listed))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links of an added page those of the site, and gives it a heading."""
    if page.file.src_uri not in (pages := added()):
        return markdown
    source, addresses = pages[page.file.src_uri], {path: address for address, path in pages.items()}
    addresses |= {path: path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups(default="")
        if "://" in target:
            return match[0]
        address = addresses.get((source.parent / target).resolve())
        if address is None:
            return text
        return f"{mark}[{text}]({os.path.relpath(address, Path(page.file.src_uri).parent)}{anchor})"

    markdown = LINK.sub(rewritten, markdown)
    title = Path(page.file.src_uri).stem.replace("_", " ").capitalize()
    return markdown if markdown.startswith("#") else f"# {title}\n\n{markdown}"
