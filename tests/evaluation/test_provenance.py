import platform
import subprocess

import torch

from noisear_rl.evaluation.provenance import provenance


def test_provenance_names_commit_version_and_hardware(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = provenance()
    assert found == {
        "commit": "unknown",
        "torch": torch.__version__,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--no-verify", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    commit = provenance()["commit"]
    assert isinstance(commit, str) and len(commit) >= 7 and head.startswith(commit)
