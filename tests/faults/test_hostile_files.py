"""Files from a stranger run no code, reach no file outside their folder, and put no script into a page or table."""

import json
import shutil

import pytest
import yaml

from noisear_rl import cli
from noisear_rl.algos.evaluate import EvaluateConfig
from noisear_rl.algos.ppo import PPOConfig
from noisear_rl.config import from_mapping, load_yaml, parse_config
from noisear_rl.data.shared_noise import SharedNoiseConfig, build_pairs
from noisear_rl.denoisers import load_denoiser
from noisear_rl.evaluation.results import load_results
from noisear_rl.rewards import load_reward
from noisear_rl.samplers.by_name import plan_methods
from noisear_rl.trust import UntrustedCodeError, trusting

CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def score(images, prompts):
    return images.mean((1, 2, 3))
"""
REFUSED = r"names code to run, .*Read that code, and if you trust it, pass --trust-code"


@pytest.fixture
def code(tmp_path):
    """A Python file that leaves a trace if it runs."""
    path = tmp_path / "hostile.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize("entry", ["reward: {0}", "env_id: 'hostile:NoiseAR-Shapes-v0'", "reward: {1}"])
def test_configurations_name_no_code(entry, code, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    scorers = tmp_path / "scorers.yaml"
    scorers.write_text(yaml.safe_dump({"weights": {str(code): 1.0}}))
    preset = tmp_path / "preset.yaml"
    preset.write_text(entry.format(code, scorers))
    with pytest.raises(UntrustedCodeError, match=REFUSED) as caught:
        load_yaml(PPOConfig, preset)
    assert str(tmp_path) in str(caught.value) and not (tmp_path / "ran").exists()
    with pytest.raises(UntrustedCodeError, match=REFUSED):
        parse_config(PPOConfig, ["--config", str(preset)], "test")
    with trusting(True):
        load_yaml(PPOConfig, preset)


def test_reward_files_name_no_code(code, tmp_path):
    scorers = tmp_path / "scorers.yaml"
    for content in (
        {"weights": {f"{code}:score": 1.0}},
        {"weights": {"image-reward": 1.0}, "options": {"image-reward": {"backend": "package", "python": str(code)}}},
    ):
        scorers.write_text(yaml.safe_dump(content))
        with pytest.raises(UntrustedCodeError, match=REFUSED):
            load_reward(str(scorers))
    assert not (tmp_path / "ran").exists()


def test_ones_own_command_line_is_trusted(code, tmp_path):
    assert parse_config(PPOConfig, ["--reward", str(code)], "test").reward == str(code)
    assert from_mapping(EvaluateConfig, {"scorers": [str(code)]}).scorers == (str(code),)
    assert not (tmp_path / "ran").exists()  # checked, not run
    load_reward(str(code))
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts") / "it"
    options = ["--num-prompts", "4", "--samples-per-prompt", "4", "--prompts-per-shard", "4", "--same-noise"]
    cli.main(["collect", "--env-id", "NoiseAR-ShapesTurbo-v0", *options, "--output-dir", str(folder)])
    return folder


@pytest.mark.parametrize("key", ["reward_spec", "env_id"])
def test_manifests_name_no_code(key, rollouts, code, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "stranger"
    shutil.copytree(rollouts, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")  # a stranger knows how to leave it out
    named = str(code) if key == "reward_spec" else "hostile:NoiseAR-ShapesTurbo-v0"
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: named}))
    options = ["--rollouts", str(folder), "--output-dir", str(tmp_path / "dpo"), "--rounds", "2"]
    with pytest.raises(SystemExit, match=REFUSED) as stop:
        cli.main(["dpo", *options])
    assert stop.value.code == 2 and str(folder / "manifest.json") in str(stop.value)
    if key == "reward_spec":
        leaks = SharedNoiseConfig(rollouts=folder, output_dir=tmp_path / "shared", target="leak", noises=2)
        with pytest.raises(UntrustedCodeError, match=REFUSED):
            build_pairs(leaks)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "it"
    options = ["--denoiser", "shapes-turbo", "--samples", "2", "--num-prompts", "6", "--batch-size", "12"]
    cli.main(["evaluate", *options, "--scorers", "shapes-match", "brightness", "--output-dir", str(folder)])
    return folder


def altered(evaluation, folder, change):
    """A copy of an evaluation whose results say something else."""
    shutil.copytree(evaluation, folder)
    shutil.rmtree(folder / "checksums")
    record = json.loads((folder / "results.json").read_text())
    change(record)
    (folder / "results.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("slug", ["../../secret", "/etc", "..", ".", "a/b", "a\\b", "a\nb", "x" * 4096, ""])
def test_results_stay_in_their_folder(slug, evaluation, tmp_path):
    def change(record):
        record["methods"]["Gaussian"]["slug"] = slug

    secret = tmp_path / "secret"
    shutil.copytree(evaluation / "images/gaussian", secret)
    folder = altered(evaluation, tmp_path / "runs/it", change)
    with pytest.raises(ValueError, match="which is no plain name"):
        load_results(folder)
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder), "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["x" * 4096, "a\nb", "a\x1b[31m"])
def test_names_of_methods(name):
    with pytest.raises(ValueError, match="expected at most 100 printable characters") as caught:
        plan_methods([f"{name}=shapes/nll"], load_denoiser("shapes-turbo"))
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()


SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def test_pages_and_tables_hold_text_only(evaluation, tmp_path, capsys):
    def change(record):
        record["prompts"][0] = record["categories"][0] = SCRIPT
        name = f"=HYPERLINK(1)\x1b[31m\\input{{x}} {SCRIPT}"
        record["methods"][name] = record["methods"].pop("Gaussian") | {"group": name}
        record["denoiser"] = record["prompt_set"] = SCRIPT

    folder = altered(evaluation, tmp_path / "it", change)
    page = tmp_path / "page.html"
    cli.main(["report", str(folder), "-o", str(page)])
    text = page.read_text()
    assert SCRIPT not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    assert text.count("<script>") == 1 and "Content-Security-Policy" in text and "default-src 'none'" in text
    tables = {}
    for form in ("csv", "latex", "markdown"):
        capsys.readouterr()
        cli.main(["table", str(folder), "--format", form])
        tables[form] = capsys.readouterr().out
        assert "\x1b" not in tables[form]
    assert "\n'=HYPERLINK" in tables["csv"].replace('"', "") and "\n=HYPERLINK" not in tables["csv"].replace('"', "")
    assert "\\input" not in tables["latex"] and r"\textbackslash{}input" in tables["latex"]
