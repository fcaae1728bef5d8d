"""Policies, rollouts and pairs in the Hub's layout: their cards, and the way there and back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from noisear_rl import cli
from noisear_rl.data.pairs import load_pairs
from noisear_rl.data.rollouts import load_rollouts
from noisear_rl.policy import load_policy, policy_sha256
from noisear_rl.report.hub import PushConfig, push

PROMPTS = ("a photo of a red circle", "a photo of two squares")
FEW = ["--prompts", *PROMPTS, "--samples-per-prompt", "4", "--env-id", "NoiseAR-ShapesTurbo-v0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A training, its evaluation, rollouts with images, and pairs."""
    folder = tmp_path_factory.mktemp("runs")
    training = ["--updates", "1", "--prompts-per-update", "2", *FEW]
    cli.main(["reinforce", "--output-dir", str(folder / "first"), *training])
    rollouts = ["--num-prompts", "2", "--prompts-per-shard", "1", "--save-images", *FEW]
    cli.main(["collect", "--output-dir", str(folder / "rollouts"), *rollouts])
    pairs = ["--pairs", "6", "--shard-size", "4", "--prompts", *PROMPTS]
    cli.main(["pairs", "--output-dir", str(folder / "pairs"), *pairs])
    (folder / "prompts.txt").write_text("a photo of two squares\na photo of three circles")  # of one category
    evaluation = ["--denoiser", "shapes-turbo", "--prompts", str(folder / "prompts.txt"), "--samples", "2"]
    cli.main(
        ["evaluate", "--methods", f"mine={folder / 'first'}", *evaluation, "--output-dir", str(folder / "evaluation")]
    )
    return folder


def front_of(folder: Path) -> tuple[dict, str]:
    front, text = (folder / "README.md").read_text().split("---\n", 2)[1:]
    return yaml.safe_load(front), text


def test_the_card_of_a_policy_is_filled_in(runs, tmp_path, capsys):
    """Data, command, metrics with intervals, commit, licence."""
    out, evaluation = tmp_path / "out", runs / "evaluation"
    cli.main(["push", str(runs / "first"), "--evaluation", str(evaluation), "--output-dir", str(out)])
    assert "nothing was uploaded: --to OWNER/NAME does that" in capsys.readouterr().out
    front, text = front_of(out)
    assert front["license"] == "apache-2.0" and front["library_name"] == "noisear-rl"
    assert f"- prompts: `{json.dumps(PROMPTS)}`" in text
    start = json.loads((runs / "first/provenance.json").read_text())[0]
    assert "- from update 0: `" in text and f"`, commit {start['commit']}, dirty {start['dirty']}" in text
    table = (evaluation / "table.md").read_text().strip()
    assert table in text and re.search(r"\[\d+\.\d, \d+\.\d\]", table)
    assert "target_kl: " in text and str(runs) not in text
    assert "More Information Needed" not in text and "{{" not in text
    with pytest.raises(ValueError, match="is not an evaluation of this checkpoint"):
        other = load_policy(runs / "first")
        with torch.no_grad():
            next(other.parameters()).add_(1)
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other/config.yaml").write_text((runs / "first/config.yaml").read_text())
        push(PushConfig(tmp_path / "other", evaluation=evaluation, output_dir=tmp_path / "none"))


def test_a_policy_there_and_back(runs, tmp_path, hub):
    push(PushConfig(runs / "first", to="me/first", output_dir=tmp_path / "out"))
    assert hub["created"] == [("me/first", "model", False)]
    copy = hub["folder"] / "models--me--first"
    assert sorted(file.name for file in copy.rglob("*.*") if file.is_file()) == sorted(
        file.name for file in (tmp_path / "out").iterdir()
    )
    assert policy_sha256(load_policy("me/first")) == policy_sha256(load_policy(runs / "first"))  # from the Hub's cache
    assert 'load_policy("me/first")' in (tmp_path / "out/README.md").read_text()


def test_rollouts_there_and_back(runs, tmp_path, hub):
    import datasets

    push(PushConfig(runs / "rollouts", to="me/rollouts", private=True, output_dir=tmp_path / "out"))
    assert hub["created"] == [("me/rollouts", "dataset", True)]
    front, text = front_of(tmp_path / "out")
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "shard-*.parquet"}]
    assert "| rows | 8 |" in text and "| prompts | 2 |" in text and "| policy | gaussian |" in text
    assert "| `noise` | list of float16 | the initial noise, flattened |" in text and "| `image` | " in text
    original, copy = load_rollouts(runs / "rollouts"), hub["snapshot"]("me/rollouts")
    rows = datasets.load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == original.dataset.column_names and rows["prompt"][:] == original.prompts
    assert np.allclose(rows["reward"][:], original.rewards)
    assert np.array_equal(np.asarray(rows[5]["image"]), np.asarray(original.dataset[5]["image"]))
    again = load_rollouts(copy)
    assert torch.equal(again.patches(), original.patches()) and again.manifest == original.manifest


def test_pairs_there_and_back(runs, tmp_path, hub):
    import datasets

    push(PushConfig(runs / "pairs", to="me/pairs", output_dir=tmp_path / "out"))
    copy, original = hub["snapshot"]("me/pairs"), load_pairs(runs / "pairs")
    rows = datasets.load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["target"][:] == original["target"][:] == load_pairs(copy)["target"][:]
    front, text = front_of(tmp_path / "out")
    assert "noisear nll --pairs FOLDER" in text and "strong_guidance" in text and front["license"] == "apache-2.0"


def test_wrong_folders(runs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        push(PushConfig(runs / "pairs", output_dir=tmp_path / "full"))
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        push(PushConfig(tmp_path / "full"))
    with pytest.raises(ValueError, match="only policies are evaluated"):
        push(PushConfig(runs / "pairs", evaluation=runs / "evaluation", output_dir=tmp_path / "out"))
    push(PushConfig(runs / "pairs", output_dir=tmp_path / "out"))
    push(PushConfig(runs / "rollouts", output_dir=tmp_path / "out"))  # replaces what push wrote
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: what is uploaded lies in its cache's layout, ``models--OWNER--NAME/snapshots/COMMIT``."""
    from huggingface_hub import HfApi, constants

    folder, commit, created = tmp_path / "hub", "0" * 40, []
    place = lambda repo, kind: folder / f"{kind}s--{repo.replace('/', '--')}"

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        created.append((repo_id, repo_type, private))
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
        for file in filter(Path.is_file, Path(folder_path).rglob("*")):
            target = place(repo_id, repo_type) / "snapshots" / commit / file.relative_to(folder_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        (place(repo_id, repo_type) / "refs").mkdir()
        (place(repo_id, repo_type) / "refs/main").write_text(commit)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = lambda repo: place(repo, "dataset") / "snapshots" / commit
    return {"folder": folder, "created": created, "snapshot": snapshot}
