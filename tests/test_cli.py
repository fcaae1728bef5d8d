"""The ``noisear`` command: its table of sub-commands, exit codes and messages."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from noisear_rl import cli

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_lists_every_command_in_one_line(arguments, capsys):
    cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: noisear COMMAND [options]"
    for name, (_, text) in cli.COMMANDS.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.endswith(f" {text}") and len(line) <= 120


def test_every_algorithm_is_a_command():
    modules = {module for module, _ in cli.COMMANDS.values()}
    assert len(modules) == len(cli.COMMANDS)
    scripts = [path for path in (ROOT / "algos").glob("*.py") if "\ndef main(" in path.read_text()]
    assert scripts and {f"noisear_rl.algos.{path.stem}" for path in scripts} <= modules
    assert all(callable(importlib.import_module(module).main) for module in modules)


def test_the_installed_script_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"noisear": f"{cli.main.__module__}:{cli.main.__name__}"}


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, FileExistsError])
def test_user_errors_end_with_a_message(error, monkeypatch):
    def main(arguments):
        assert arguments == ["--seed", "1"]
        raise error("this was wrong")

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--seed", "1"])
    assert stop.value.code == "noisear ppo: this was wrong"


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, PermissionError])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    def main(arguments):
        raise error("a bug")

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    with pytest.raises(error, match="a bug"):
        cli.main(["ppo"])


def test_the_users_verbosity_wins(monkeypatch):
    seen = []
    main = lambda arguments: seen.append(os.environ["TRANSFORMERS_VERBOSITY"])
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    cli.main(["sample"])
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    cli.main(["sample"])
    assert seen == ["info", "error"]


def test_exit_codes_in_a_shell(tmp_path):
    def noisear(*arguments):
        command = [sys.executable, "-m", "noisear_rl.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert noisear().returncode == 0
    unknown = noisear("fly")
    assert unknown.returncode == 1 and not unknown.stdout
    assert unknown.stderr.startswith("noisear: unknown command 'fly'\n\nusage: noisear COMMAND")
    missing = noisear("table", str(tmp_path / "none"))
    assert missing.returncode == 1 and "Traceback" not in missing.stderr
    assert missing.stderr.startswith("noisear table: ") and "none" in missing.stderr
    option = noisear("table", "--formta", "csv")
    assert option.returncode == 2 and "--format" in option.stderr and "Traceback" not in option.stderr
