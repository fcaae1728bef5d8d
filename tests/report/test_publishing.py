"""A run folder becomes a policy that comes with the library, with a card that says how it was trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from noisear_rl import cli
from noisear_rl.checkpoints import find_checkpoint
from noisear_rl.files import sha256
from noisear_rl.policy import load_policy, loading, policy_sha256
from noisear_rl.report import publishing
from noisear_rl.report.publishing import PublishConfig, main, publish

FEW = ["--updates", "1", "--prompts-per-update", "2", "--samples-per-prompt", "4"]
PROMPTS = ["--prompts", "a photo of a red circle", "a photo of two squares"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two stages of a training: ``ppo`` started from ``first``."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--env-id", "NoiseAR-ShapesTurbo-v0", *FEW, *PROMPTS]
    cli.main(["reinforce", "--output-dir", str(folder / "first"), *options])
    cli.main(["ppo", "--init-from", str(folder / "first"), "--output-dir", str(folder / "second"), *options])
    return folder


@pytest.fixture
def config(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", tmp_path / "shipped")
    return PublishConfig(run=runs / "second", name="ppo", description="PPO on two captions.")


def weights(run: Path) -> Path:
    return Path(find_checkpoint(run, "policy")) / "model.safetensors"


def test_the_published_policy_is_the_runs(config, tmp_path, capsys):
    main(["--run", str(config.run), "--name", "ppo", "--description", config.description])
    folder = tmp_path / "shipped/ppo"
    assert capsys.readouterr().out.endswith(f"published: {folder}\n")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sha256(folder / "model.safetensors") == sha256(weights(config.run))
    assert policy_sha256(load_policy("shapes/ppo")) == policy_sha256(load_policy(config.run))
    assert publish(config) == folder and [file.name for file in folder.parent.iterdir()] == ["ppo"]  # replaced


def test_the_card_says_how_it_was_trained(config, runs):
    card = (publish(config) / "README.md").read_text()
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert body.startswith("# Policy `shapes/ppo`\n\nPPO on two captions.\n") and "`shapes-turbo`" in body
    assert "| updates | 1 |" in body and "| images denoised in the last stage | 8 |" in body
    assert sha256(weights(config.run)) in body and "float32" in body and "commit" in body
    last, first = (yaml.safe_load(part.split("```")[0]) for part in body.split("```yaml\n")[1:])
    assert last["init_from"] == "first" and last["prompts"] == ["a photo of a red circle", "a photo of two squares"]
    assert last["clip_range"] and "clip_range" not in first  # PPO's options, and REINFORCE's
    assert str(runs) not in card and "output_dir" not in card


def test_an_evaluation_of_the_same_weights_becomes_part_of_the_card(config, runs, tmp_path):
    options = ["--denoiser", "shapes-turbo", "--prompts", *PROMPTS[1:2], "--samples", "2"]
    cli.main(["evaluate", "--methods", f"mine={config.run}", *options, "--output-dir", str(tmp_path / "evaluation")])
    card = (publish(replace(config, evaluation=tmp_path / "evaluation")) / "README.md").read_text()
    assert "## Evaluation\nThis policy is mine. commit " in card
    assert (tmp_path / "evaluation/table.md").read_text().strip() in card
    with pytest.raises(ValueError, match="is not an evaluation of this checkpoint"):
        publish(replace(config, run=runs / "first", evaluation=tmp_path / "evaluation"))
    assert (tmp_path / "shipped/ppo/README.md").read_text() == card  # a failure leaves what was there
    assert [file.name for file in (tmp_path / "shipped").iterdir()] == ["ppo"]


def test_large_policies_are_stored_in_half_precision_if_they_survive_it(config, monkeypatch):
    size = weights(config.run).stat().st_size
    monkeypatch.setattr(publishing, "LIMIT", size - 1)
    folder = publish(config)
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert (folder / "model.safetensors").stat().st_size < 0.6 * size
    assert "float16" in (folder / "README.md").read_text()
    loaded, original = load_policy("shapes/ppo").state_dict(), load_policy(config.run).state_dict()
    for name, value in original.items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(publishing, "TOLERANCE", 1e-6)
    with pytest.raises(ValueError, match="does not survive float16"):
        publish(config)
    monkeypatch.setattr(publishing, "LIMIT", size // 3)
    with pytest.raises(ValueError, match="MB in float16, more than the"):
        publish(config)


def test_bad_options(config, tmp_path):
    for wrong in ("", "PPO", "a/b", "..", "-a"):
        with pytest.raises(ValueError, match="expected a name like 'ppo'"):
            publish(replace(config, name=wrong))
    with pytest.raises(ValueError, match="and a description"):
        publish(replace(config, description=" "))
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        publish(replace(config, run=tmp_path))
    assert not (tmp_path / "shipped").exists()
