"""The ``noisear`` command: its table of sub-commands, exit codes and messages."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest

import noisear_rl
from noisear_rl import cli
from noisear_rl.envs import check_env_id
from noisear_rl.prompts import resolve_prompts
from tests.test_readme import parse

ROOT = Path(__file__).parents[1]
DEFINE = "def score(images, prompts):\n    "


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


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"noisear-rl {noisear_rl.__version__}\n"


def test_help_names_the_command_and_loads_no_heavy_library():
    """One process per command would take minutes; what no command loads here, each does not load alone."""
    code = """
import contextlib, io, sys
from noisear_rl import cli
for command in cli.COMMANDS:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    if command != "train-shapes":  # a research script, which trains diffusers' own models
        assert not {"datasets", "diffusers.utils", "transformers.modeling_utils"} & set(sys.modules), command
    assert f"usage: noisear {command} " in out.getvalue(), (command, out.getvalue()[:200])
    assert "algos/" not in out.getvalue(), command  # where only the wheel is, there is no such folder
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mistyped_environments_are_named(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--env-id", "NoiseAR-ShapesTurb-v0"])
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "unknown environment 'NoiseAR-ShapesTurb-v0'" in error and "did you mean 'NoiseAR-ShapesTurbo-v0'?" in error


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("ppo --policy runs/nll", "unknown option --policy; did you mean --init-from?"),
        ("collect --init-from=runs/nll", "unknown option --init-from; did you mean --policy?"),
        ("evaluate --policy runs/nll", "unknown option --policy; did you mean --methods?"),
        ("evaluate --env_id NoiseAR-SDXL-v0", "unknown option --env_id; did you mean --denoiser?"),
        ("evaluate --samples-per-prompt 4", "unknown option --samples-per-prompt; did you mean --samples?"),
        ("demo --prompts a", "unknown option --prompts; did you mean --captions?"),
    ],
)
def test_options_of_other_commands_are_answered_with_their_name_here(line, meant, capsys):
    command, *options = line.split()
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *options])
    assert stop.value.code == 2 and capsys.readouterr().err == f"noisear {command}: command line: {meant}\n"


@pytest.mark.parametrize("command", ["ppo", "reinforce", "trajectory-balance", "collect"])
def test_every_command_takes_a_denoiser(command, monkeypatch):
    """Those with an environment, too: ``--denoiser`` is the option that all have."""
    assert parse([command, "--denoiser", "shapes-turbo"], monkeypatch).denoiser == "shapes-turbo"


def test_one_caption_is_one_prompt(monkeypatch):
    config = parse(["ppo", "--prompts", "a photo of two red squares"], monkeypatch)
    assert resolve_prompts(config.prompts, "shapes").prompts == ["a photo of two red squares"]
    config = parse(["ppo", "--prompts", "a photo of two red squares", "a photo of a circle"], monkeypatch)
    assert resolve_prompts(config.prompts, "shapes").prompts == ["a photo of two red squares", "a photo of a circle"]


def test_environments_of_the_current_folder(tmp_path, monkeypatch):
    """``module:id`` names a file of one's own beside which the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    Path("mine_env.py").write_text(
        "import gymnasium\nfrom noisear_rl.envs import NoiseEnv, NoiseVectorEnv\n"
        "gymnasium.register('Mine-v0', NoiseEnv, vector_entry_point=NoiseVectorEnv)\n"
    )
    before = list(sys.path)
    assert check_env_id("mine_env:Mine-v0") == "mine_env:Mine-v0" and sys.path == before
    del gymnasium.registry["Mine-v0"]


def test_wandb_that_is_not_installed_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--wandb", "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "noisear ppo: --wandb: the package wandb is not installed: `pip install wandb`" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["torch", "diffusers", "noisear_rl.denoisers.presets", "tqdm.auto"])
def test_ctrl_c_while_a_command_starts_ends_in_one_line(at, tmp_path):
    """The signal comes when a module is imported."""
    code = f"""
import os, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == {at!r}:
        os.kill(os.getpid(), signal.SIGINT)
from noisear_rl import cli
sys.addaudithook(interrupt)
cli.main(["pairs", "--output-dir", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "noisear pairs: interrupted\n")


def test_the_installed_script_is_this_function():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"noisear": f"{cli.main.__module__}:{cli.main.__name__}"}


def raising(monkeypatch, error):
    """Makes every command raise an error."""

    def main(arguments):
        assert arguments == ["--seed", "1"]
        raise error

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(main=main))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("this was wrong"), "this was wrong"),
        (FileNotFoundError("no such folder"), "no such folder"),
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (gymnasium.error.NameNotFound("no such environment"), "no such environment"),
        (MemoryError("17 GiB"), "out of memory: use smaller batches, or a preset low_memory.yaml. 17 GiB"),
        (ValueError("a\x1b[31mred\ttext"), r"a\x1b[31mred\ttext"),
    ],
)
def test_user_errors_end_with_a_message(error, message, monkeypatch, capsys):
    raising(monkeypatch, error)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--seed", "1"])
    assert stop.value.code == 2 and capsys.readouterr().err == f"noisear ppo: {message}\n"


def test_interruptions_end_without_a_traceback(monkeypatch, capsys):
    raising(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--seed", "1"])
    assert stop.value.code == 130 and capsys.readouterr().err == "noisear ppo: interrupted\n"


@pytest.mark.parametrize("error", [TypeError, KeyError, RuntimeError, AttributeError])
def test_other_errors_keep_their_traceback(error, monkeypatch):
    raising(monkeypatch, error("a bug"))
    with pytest.raises(error, match="a bug"):
        cli.main(["ppo", "--seed", "1"])


def test_tracebacks_on_request(monkeypatch):
    raising(monkeypatch, ValueError("this was wrong"))
    with pytest.raises(ValueError, match="this was wrong"):
        cli.main(["ppo", "--seed", "1", "--traceback"])
    monkeypatch.setenv("NOISEAR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="this was wrong"):
        cli.main(["ppo", "--seed", "1"])


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
    assert unknown.returncode == 2 and not unknown.stdout
    assert unknown.stderr.startswith("noisear: unknown command 'fly'\n\nusage: noisear COMMAND")
    missing = noisear("table", str(tmp_path / "none"))
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    assert missing.stderr.startswith("noisear table: ") and "none" in missing.stderr
    option = noisear("table", "--formta", "csv")
    assert option.returncode == 2 and "--format" in option.stderr and "Traceback" not in option.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit()\n", "reward.py: cannot be loaded: it exits (code None)"),
        ("def score(images, prompts)\n    return 1\n", "reward.py, line 1: syntax error: expected ':'"),
        ("x = 1\n", "reward.py has no function 'score': define score(images, prompts)"),
        ("import nothing_of_this_name\n", "reward.py, line 1: cannot be loaded: ModuleNotFoundError: No module named"),
        (DEFINE + "return 1 / 0\n", "reward.py, line 2: scorer 'reward' failed: ZeroDivisionError"),
        (DEFINE + "exit(0)\n", "reward.py: scorer 'reward' failed: it exits (code 0)"),
        (DEFINE + "return None\n", "reward.py: scorer 'reward' returned None, expected (2,) numbers"),
        (DEFINE + "return ['good'] * 2\n", "reward.py: scorer 'reward' returned ['good', 'good']"),
    ],
)  # fmt: skip
def test_reward_files_that_fail(text, message, tmp_path, capsys):
    (tmp_path / "reward.py").write_text(text)
    options = ["--num-prompts", "1", "--samples-per-prompt", "2", "--output-dir", str(tmp_path / "out")]
    options += ["--env-id", "NoiseAR-ShapesTurbo-v0", "--reward", str(tmp_path / "reward.py")]
    options += ["--prompts-per-shard", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["collect", *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"noisear collect: {tmp_path}/{message}" in error and "Traceback" not in error


def test_scripts_end_as_commands_do(tmp_path):
    script = [sys.executable, "algos/nll.py", "--pairs", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("nll.py: ") and "holds no pairs" in done.stderr
    again = subprocess.run([*script, "--traceback"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "Traceback" in again.stderr
