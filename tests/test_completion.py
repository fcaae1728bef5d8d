"""The completion script in a shell, as somebody who presses Tab uses it."""

import contextlib
import dataclasses
import io
import shutil
import subprocess

import pytest

from noisear_rl import cli
from noisear_rl.algos.reinforce import ReinforceConfig
from noisear_rl.config import preset_names

WORDS = 'COMP_WORDS=(noisear {words}); COMP_CWORD={last}; _noisear; echo "${{COMPREPLY[@]}}"'


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["completion"])
    file = tmp_path_factory.mktemp("completion") / "noisear"
    file.write_text(out.getvalue())
    return file


def complete(file, *words):
    """What bash offers for the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"source '{file}'; {WORDS.format(words=quoted, last=len(words))}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_what_bash_offers(completion):
    assert set(complete(completion, "")) == {*cli.COMMANDS, "configs", "--version", "--help"}
    assert complete(completion, "rein") == ["reinforce"]
    for words, offered in [
        (("ppo", "--target-k"), ["--target-kl"]),
        (("ppo", "--policy.text-s"), ["--policy.text-scale"]),
        (("nll", "--target-k"), []),
        (("train-prior", "--ppo.target-k"), ["--ppo.target-kl"]),
        (("ppo", "--env-id", "NoiseAR-ShapesT"), ["NoiseAR-ShapesTurbo-v0"]),
        (("evaluate", "--denoiser", "shapes-"), ["shapes-turbo"]),
        (("ppo", "--config", "shapes/pp"), ["shapes/ppo", "shapes/ppo_transfer"]),
        (("ppo", "--updates", "3", "--conf"), ["--config"]),
        (("ppo", "--optimizer", ""), ["natural", "adam", "adaptive_adam"]),
        (("ppo", "--reward", "./mi"), []),  # bash then completes files
        (("collect", "--policy", "shapes/n"), ["shapes/nll"]),
        (("config", ""), ["list", "show", "--help", "--traceback", "--trust-code"]),
        (("config", "show", "sdxl/ppo"), ["sdxl/ppo"]),
    ]:
        assert complete(completion, *words) == offered, words
    assert set(complete(completion, "ppo", "--config", "")) == set(preset_names())


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_options_are_those_of_the_dataclass(completion):
    fields = {field.name for field in dataclasses.fields(ReinforceConfig)} - {"policy"}
    offered = [word for word in complete(completion, "reinforce", "--") if "." not in word]
    plain = {word.removeprefix("--").replace("-", "_") for word in offered if not word.startswith("--no-")}
    assert plain == fields | {"config", "help", "traceback", "trust_code"}


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_registers_it_for_the_program(completion):
    done = subprocess.run(["bash", "-c", f"source '{completion}'; complete -p noisear"], capture_output=True, text=True)
    assert done.stdout == "complete -o default -F _noisear noisear\n"


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_registers_it_and_offers_the_same(completion):
    """Outside of a completion, zsh's ``compgen`` does not filter words by what was typed."""
    words = WORDS.format(words="ppo --target-k", last=2)
    code = f"source '{completion}'; echo $_comps[noisear]; emulate sh; {words}"
    done = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True)
    registered, offered = done.stdout.splitlines()
    assert registered == "_bash_complete -o default -F _noisear" and "--target-kl" in offered.split()
