import platform
import subprocess
import sys
from importlib.metadata import version

import torch

from noisear_rl import provenance as module
from noisear_rl.provenance import command_line, provenance


def test_provenance_names_commit_versions_and_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SOURCE", tmp_path / "library")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "library").mkdir()
    rest = {
        "noisear_rl": version("noisear-rl"),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": 1,
    }
    assert provenance() == {"commit": "unknown"} | rest
    git = ["git", "-C", str(tmp_path), "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    git += ["-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "other.txt").write_text("1")
    subprocess.run([*git, "add", "other.txt"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "first"], check=True)
    assert provenance() == {"commit": "unknown"} | rest  # somebody else's checkout: the library is not part of it
    (tmp_path / "library/file.py").write_text("1")
    subprocess.run([*git, "add", "library"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "second"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    found = provenance()
    commit = found.pop("commit")
    assert isinstance(commit, str) and len(commit) >= 7 and head.startswith(commit)
    assert found == {"dirty": False} | rest
    (tmp_path / "library/file.py").write_text("2")
    assert provenance()["dirty"] is True


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/noisear", "ppo", "--prompts", "a red circle"])
    assert command_line() == "noisear ppo --prompts 'a red circle'"
