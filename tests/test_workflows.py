"""What runs on the hosting service: workflows, templates and the citation say nothing that is not here."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from noisear_rl import cli

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in FILES if file.parent.name == "workflows"}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"].values()]
STEPS = [step for _, job in JOBS for step in job.get("steps", [])]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_workflows_are_those_that_we_know():
    assert set(WORKFLOWS) == {"package", "release", "tests"}
    assert WORKFLOWS["release"][True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    for name in ("package", "tests"):
        assert WORKFLOWS[name][True]["push"] == {"branches": ["main"]} and "pull_request" in WORKFLOWS[name][True]


def test_commands_exist():
    commands = "\n".join(step["run"] for step in STEPS if "run" in step)
    targets = re.findall(r"^make (\S+)", commands, flags=re.M)
    assert {"lint", "test", "test-lowest", "test-originals", "test-newcomer"} == set(targets)
    assert all(re.search(rf"^{target}:", MAKEFILE, flags=re.M) for target in targets)
    for assigned in re.findall(r"\b([A-Z_]+)=", commands):
        assert f"$({assigned})" in MAKEFILE, assigned
    called = re.findall(r"\bnoisear ([\w-]+)", commands)
    assert called and set(called) <= {*cli.COMMANDS, "configs", "--version"}


def test_actions_are_pinned_and_permissions_minimal():
    used = [step["uses"] for step in STEPS if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in used)
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    more = [(name, job["permissions"]) for name, job in JOBS if "permissions" in job]
    assert more == [("release", {"id-token": "write"})]  # trusted publishing
    assert all("timeout-minutes" in job or "uses" in job for _, job in JOBS)
    assert not any("secrets." in file.read_text() for file in FILES)


def test_every_supported_python_is_tested():
    supported = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert WORKFLOWS["tests"]["jobs"]["test"]["strategy"]["matrix"]["python"] == supported
    assert PROJECT["requires-python"] == f">={supported[0]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_parse_and_name_files_that_exist(file):
    text = file.read_text()
    assert isinstance(yaml.safe_load(text), dict) and "://" not in text
    for path in re.findall(r"\./\.github/[\w/.-]+|constraints[\w-]*\.txt|tests/\w+\.py", text):
        assert (ROOT / path).exists(), path


def test_issue_forms_have_what_a_form_needs():
    forms = [yaml.safe_load(file.read_text()) for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")]
    assert len(forms) == 2
    for form in forms:
        assert form["name"] and form["description"] and form["body"]
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
    targets = re.findall(r"`make ([\w-]+)`", (ROOT / ".github/pull_request_template.md").read_text())
    assert targets and all(f"\n{target}:" in MAKEFILE for target in targets)


def test_the_citation_names_us_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Liu", "Zhang", "Tan", "Shum"]
