"""The pages of ``docs/``: the site builds offline, its links lead somewhere, its code and commands run, and what it
says of files, metrics and results is what they hold."""

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest

from tests import training_runs
from tests.conftest import random_policy, requested
from tests.documents import (
    PAGES,
    ROOT,
    arguments_of,
    blocks,
    commands,
    link_sources,
    parse,
    run_small,
    write_files,
)

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks/results"
NAME = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
SESSION = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("index", "algorithms/index", "algorithms/prior"))]
SESSION += [DOCS / "evaluation.md", *sorted((DOCS / "extend").glob("*.md"))]  # with what they need of each other
OTHERS = [page for page in PAGES if page not in SESSION]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder in a checkout, which is the current one and where Python looks for modules."""
    link_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)) and before.get(name) is not module:
            del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})


def forget(names) -> None:
    """Lets modules be imported from another file."""
    for name in names:
        sys.modules.pop(name, None)


# The site.


class Page(HTMLParser):
    """Links, sources and anchors of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        self.links: set[str] = set()
        self.loaded: set[str] = set()  # by the browser, on opening the page
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.anchors |= {known[key] for key in ("id", "name") if known.get(key)}
        if tag == "a" and known.get("href"):
            self.links.add(known["href"])
        if tag in ("img", "script", "iframe") and known.get("src"):
            self.loaded.add(known["src"])
        if tag == "link" and known.get("href"):
            self.loaded.add(known["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """The built pages, by file."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {file: Page(file) for file in out.rglob("*.html") if file.name != "404.html"}


def test_links_and_images_resolve(site):
    assert len(site) > 40
    broken = []
    for file, page in site.items():
        for link in page.links | page.loaded:
            address, anchor = urldefrag(link)
            if "://" in address or address.startswith(("mailto:", "data:")):
                continue
            target = (file.parent / unquote(address)).resolve() if address else file
            if not target.is_file() or (anchor and target in site and unquote(anchor) not in site[target].anchors):
                broken.append(f"{file.name}: {link}")
    assert not broken


def test_pages_open_without_errors(site, browser):
    """In Chromium, from an address as readers have it: nothing goes wrong, nothing is asked of another host."""
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(min(site, key=lambda file: len(file.parts)).parent)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser.get_log("browser"), browser.get_log("performance")
        for page in ("", "concepts.html", "algorithms/ppo.html", "results/shapes.html", "api/policy.html"):
            browser.get(address + page)
            assert browser.find_element("tag name", "h1").text, page
        wrong = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        asked = requested(browser)
        server.shutdown()
    assert not wrong, wrong
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked), asked


def test_nothing_is_fetched(site):
    """No font, script or style of another host, and no diagram, which the theme would fetch a library for."""
    for file, page in site.items():
        assert not [address for address in page.loaded if "://" in address], file
        assert 'class="mermaid"' not in file.read_text(), file


def test_docstrings_are_on_the_site(site):
    (policy,) = (page for file, page in site.items() if file.parts[-2:] == ("api", "policy.html"))
    (environments,) = (page for file, page in site.items() if file.parts[-2:] == ("api", "environments.html"))
    assert "noisear_rl.policy.model.NoiseARPolicy.sample" in policy.anchors
    assert "noisear_rl.envs.noise_env.NoiseEnv" in environments.anchors
    assert ":class:" not in policy.file.read_text() and ":meth:" not in policy.file.read_text()


# Code and commands.


@pytest.mark.parametrize("page", PAGES, ids=NAME.get)
def test_commands_parse(page, folder, monkeypatch):
    modules = write_files(page, folder)
    forget(modules)
    for line in commands(page):
        assert parse(arguments_of(line), monkeypatch), line


@pytest.mark.parametrize("page", [page for page in PAGES if "python" in page.read_text()], ids=NAME.get)
def test_python_runs(page, folder):
    """All blocks of a page, one after the other, as a reader would."""
    forget(write_files(page, folder))
    random_policy().save_pretrained(folder / "runs/mine")
    scope: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python" and not block.title:
            exec(compile(block.text, NAME[page], "exec"), scope)


def write_all(pages, folder) -> None:
    for page in pages:
        forget(write_files(page, folder))


def test_commands_run_in_a_small_size(folder, monkeypatch):
    """Those of a session, in one folder."""
    write_all(SESSION, folder)
    ran = run_small(commands(*SESSION), monkeypatch)
    assert {"pairs", "nll", "ppo", "dpo", "trajectory-balance", "train-prior", "evaluate", "table", "report"} <= ran


@pytest.mark.slow
def test_all_commands_run_in_a_small_size(folder, monkeypatch):
    write_all(PAGES, folder)
    run_small(commands(*PAGES), monkeypatch, replace=True)


# What pages say.


def quoted():
    return [(page, block) for page in PAGES for block in blocks(page) if block.quotes]


@pytest.mark.parametrize(("page", "block"), quoted(), ids=lambda x: NAME.get(x) if isinstance(x, Path) else x.title)
def test_quoted_lines_are_in_their_files(page, block):
    """Parts are separated by a line of three dots."""
    source = (ROOT / block.title).read_text()
    for part in re.split(r"^\.\.\.\n", block.text, flags=re.M):
        assert f"\n{part}" in f"\n{source}", f"{block.title} does not hold\n{part}"


def test_files_that_readers_write_are_those_of_the_examples():
    own = {block.title: block.text for page in PAGES for block in blocks(page) if block.title and not block.quotes}
    shared = [name for name in own if (ROOT / "examples" / name).exists()]
    assert "own_denoiser.py" in shared
    assert all(own[name] == (ROOT / "examples" / name).read_text() for name in shared)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pairs and rollouts to start from."""
    folder = tmp_path_factory.mktemp("data")
    training_runs.prepare(folder)
    return folder


# A run that logs whatever its algorithm can log; Adam, since natural steps have no learning rate.
EVERYTHING = {
    "nll": ("nll-layouts", {}),
    "reinforce": ("reinforce", {"optimizer": "adam", "learning_rate": 1e-2, "save_every": 1}),
    "ppo": ("ppo-gae", {"save_every": 1, "learning_rate": 1e-2}),
    "dpo": ("dpo", {}),
    "trajectory_balance": ("trajectory-balance", {"optimizer": "adam", "learning_rate": 1e-2, "save_every": 1}),
    "reward_gradient": ("reward-gradient", {}),
    "critic": ("critic", {}),
}


@pytest.mark.parametrize("algorithm", EVERYTHING)
def test_metric_tables_explain_what_is_logged(algorithm, data, tmp_path):
    text = (DOCS / f"algorithms/{algorithm}.md").read_text()
    (table,) = re.findall(r"^\| metric \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", text, flags=re.M)
    explained = re.findall(r"^\| `([^`]+)` \| .{5,} \|$", table, flags=re.M)
    assert len(explained) == len(table.splitlines()) == len(set(explained))
    name, options = EVERYTHING[algorithm]
    training_runs.trainings(data, 4)[name](tmp_path / "run", **options)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {key for record in records for key in record} - {"step"}
    assert {"reward/<scorer>" if key.startswith("reward/") else key for key in logged} == set(explained)


LINKED = re.compile(r"\((?:\.\./)*results/((?:former/)?\w+\.md)(?:#[\w-]*)?\)")
FIGURE = re.compile(r"(?<![\w.§])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+)(?![\w.]|\.\d)")  # 7,680 or 0.485


def passages():
    """Rows of tables and paragraphs that link to measured results."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```$|`[^`]*`", "", page.read_text(), flags=re.S | re.M)
        text = re.sub(r"arXiv [\d.]+|https?://\S+", "", text)
        for passage in re.split(r"\n\s*\n|\n(?=\||- |\d+\. )", text):
            if files := LINKED.findall(passage):
                yield page, passage, [RESULTS / file for file in files]


def test_figures_are_those_of_the_results_they_link_to():
    checked = 0
    for page, passage, files in passages():
        held = " ".join((file if file.exists() else ROOT / "benchmarks/README.md").read_text() for file in files)
        for figure in FIGURE.findall(LINKED.sub("", passage)):
            assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", held), (
                f"{NAME[page]}: {figure}: {passage}"
            )
            checked += 1
    assert checked > 60


def test_presets_that_pages_name_exist():
    texts = "\n".join(page.read_text() for page in PAGES)
    names = set(re.findall(r"--config ([a-z0-9_]+/[a-z0-9_]+)(?![\w./])", texts))
    assert len(names) > 20 and all((ROOT / f"configs/{name}.yaml").exists() for name in names)
