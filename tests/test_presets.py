"""Presets by name, from any folder, and the commands that list and show them."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from noisear_rl import cli, config
from noisear_rl.config import find_preset, preset_names
from noisear_rl.presets import listing, use_of
from tests.documents import parse

ROOT = Path(__file__).parents[1]
COMMANDS = [name for name in preset_names() if not name.startswith(("accelerate/", "rewards/"))]


def test_every_file_has_a_name():
    files = {file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*.yaml")}
    assert {f"{name}.yaml" for name in preset_names()} == files and "shapes/ppo" in COMMANDS


@pytest.mark.parametrize(
    "name", ["shapes/ppo", "shapes/ppo.yaml", "configs/shapes/ppo.yaml", "noisear_rl/configs/shapes/ppo.yaml"]
)
def test_names_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_preset(name).read_text() == (ROOT / "configs/shapes/ppo.yaml").read_text()
    parsed = parse(["ppo", "--config", name, "--updates", "7"], monkeypatch)
    assert (parsed.env_id, parsed.prompts_per_update, parsed.updates) == ("NoiseAR-ShapesTurbo-v0", 16, 7)


def test_a_file_of_ones_own_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/ppo").write_text("updates: 3\n")
    assert parse(["ppo", "--config", "shapes/ppo"], monkeypatch).updates == 3


@pytest.mark.parametrize("name", ["shapes/pp", "../pyproject", "shapes/../shapes/ppo", "shapes"])
def test_unknown_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--config", name])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(
        f"noisear ppo: {name}: no such file, and no preset of this name (`noisear configs` lists them)"
    )
    assert name != "shapes/pp" or error.endswith("did you mean 'shapes/ppo'?\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_lines_say_how_a_preset_is_used(name, monkeypatch):
    use, purpose = use_of(name)
    program, *arguments = shlex.split(use)
    assert program == "noisear" and arguments[1:] == ["--config", name] and purpose
    assert parse(arguments, monkeypatch)  # this command reads it


def test_listing(capsys):
    cli.main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert {line for line in lines if not line.startswith("    ")} == {use_of(name)[0] for name in preset_names()}
    assert len(lines) == 2 * len(preset_names()) and all(len(line) < 140 for line in lines)
    cli.main(["configs", "sdxl"])
    assert capsys.readouterr().out == listing("sdxl") + "\n" and "noisear ppo --config sdxl/ppo\n" in listing("sdxl")
    with pytest.raises(SystemExit):
        cli.main(["configs", "sdlx"])
    assert re.search(r"no such folder of presets; expected one of .*'sdxl'", capsys.readouterr().err)


def test_show(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["config", "show", "sdxl/ppo"])
    shown = capsys.readouterr().out
    assert shown == (ROOT / "configs/sdxl/ppo.yaml").read_text()
    Path("mine.yaml").write_text(shown.replace("samples_per_prompt: ", "samples_per_prompt: 1"))
    edited = config.load_yaml(importlib.import_module("noisear_rl.algos.ppo").PPOConfig, Path("mine.yaml"))
    assert edited.env_id == "NoiseAR-SDXL-v0" and edited.samples_per_prompt > 100
