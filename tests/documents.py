"""What tests read in the README and in ``docs/``: code blocks, and commands, which they run in a small size."""

import argparse
import importlib
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import noisear_rl
from noisear_rl import cli
from noisear_rl.denoisers import EMBEDDED

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.S | re.M)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?=(?:noisear|python)\s)")  # variables may be set before it
# Options that make a command fast; they follow a page's own and override them.
TINY = {
    "doctor": "",
    "sample": "--seeds 0",
    "pairs": "--pairs 16 --rounds 1 --batch-size 16 --num-inference-steps 2",
    "shared-noise": "--noises 2 --prompts 'a photo of a red circle' 'a photo of two squares'",
    "nll": "--epochs 1 --batch-size 8",
    "reinforce": "--updates 1 --prompts-per-update 1 --samples-per-prompt 4",
    "ppo": "--updates 1 --prompts-per-update 2 --samples-per-prompt 4",
    "trajectory-balance": "--updates 1 --prompts-per-update 2 --samples-per-prompt 4",
    "collect": "--num-prompts 8 --samples-per-prompt 4",
    "critic": "--epochs 1 --batch-size 8 --held-out-share 0.3",
    "train-prior": "--collect.num-prompts 8 --collect.samples-per-prompt 4 --shared-noise.noises 2 "
    "--shared-noise.min-reward -1 --shared-noise.prompts 'a photo of a red circle' 'a photo of two squares' "
    "--nll.epochs 1 --nll.held-out-share 0.5 --ppo.updates 1 --ppo.prompts-per-update 2",
    "dpo": "--epochs 1 --batch-size 4 --threshold 0.001",
    "reward-gradient": "--updates 1 --prompts-per-update 2",
    "reward-statistics": "--num-prompts 4",
    "npnet": "--epochs 1 --batch-size 8",
    "evaluate": "--num-prompts 4 --samples 2",
    "table": "",
    "report": "--max-images 4",
}
SLOW = {"demo", "train-shapes"}  # minutes at any size
READERS = ("sample", "evaluate", "table", "report")  # may be shown before the commands that write their input


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: As the fence says; empty for commands.
        title: A file: of the repository, whose lines the block quotes, or one that a reader writes; or empty.
        text: Its lines.
    """

    language: str
    title: str
    text: str

    @property
    def quotes(self) -> bool:
        """Whether it shows lines of the repository."""
        return bool(self.title) and (ROOT / self.title).exists()


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page."""
    text = page.read_text()
    found = [Block(*match) for match in FENCE.findall(text)]
    assert 2 * len(found) == len(re.findall(r"^```", text, flags=re.M)), f"{page}: a fence that tests cannot read"
    return found


def commands(*pages: Path) -> list[str]:
    """Lines ``noisear …`` and ``python …`` of pages, without variables before them, each once."""
    texts = [block.text for page in pages for block in blocks(page) if not block.language]
    lines = (line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines())
    return list(dict.fromkeys(line[found.end() :] for line in lines if (found := COMMAND.match(line))))


def write_files(page: Path, folder: Path) -> list[str]:
    """Writes the files that a reader of a page writes; returns the names of modules among them."""
    own = [block for block in blocks(page) if block.title and not block.quotes]
    for block in own:
        (folder / block.title).write_text(block.text)
    return [Path(block.title).stem for block in own if block.language == "python"]


def arguments_of(line: str) -> list[str]:
    """Arguments of ``noisear`` for a line ``noisear COMMAND …``, ``python FILE …`` or ``python -m MODULE …``."""
    program, *words = shlex.split(line, comments=True)
    if program == "python":
        module, *words = [word for word in words if word != "-m"]
        module = f"noisear_rl.{module.removesuffix('.py').replace('/', '.').removeprefix('noisear_rl.')}"
        names = [name for name, (known, _) in cli.COMMANDS.items() if known == module]
        assert names, f"{line}: no command runs {module}"
        words = names + words
    assert words[0] in cli.COMMANDS, f"{line}: unknown command"
    return words


class Parsed(Exception):
    """Carries the configuration of a command out of its ``main``."""


def parse(arguments, monkeypatch):
    """The configuration that a command makes of its arguments, without running it."""
    module = importlib.import_module(cli.COMMANDS[arguments[0]][0])
    owner, name = (
        (module, "parse_config") if hasattr(module, "parse_config") else (argparse.ArgumentParser, "parse_args")
    )
    original = getattr(owner, name)

    def stop(*values):
        raise Parsed(original(*values))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Parsed) as parsed:
            cli.main(arguments)
    return parsed.value.args[0]


def folders_read(arguments) -> set[str]:
    """The ``runs/…`` folders among the arguments, without the output."""
    kept = [word for flag, word in zip(["", *arguments], arguments, strict=False) if flag not in ("--output-dir", "-o")]
    return set(re.findall(r"\bruns/[\w.-]+", " ".join(kept)))


def link_sources(folder: Path) -> None:
    """Makes the repository's folders visible in another one, where commands may write."""
    for found in ROOT.iterdir():
        if found.is_dir() and not found.name.startswith(".") and found.name not in ("runs", "site"):
            (folder / found.name).symlink_to(found)


def run_small(lines, monkeypatch, replace: bool = False) -> set[str]:
    """Runs commands in a small size, all of them in this folder, so that each reads what others wrote.

    Args:
        lines: The commands.
        monkeypatch: The fixture.
        replace: Whether a command may replace the run of another, as pages that are not read together do.

    Returns:
        Names of the commands that ran: those of large denoisers do not, nor what reads their output.
    """
    order = lambda line: READERS.index(name) if (name := arguments_of(line)[0]) in READERS else -1
    ran: set[str] = set()
    left_out: set[str] = set()
    for line in sorted(lines, key=order):
        arguments = arguments_of(line)
        config = parse(arguments, monkeypatch)
        output = getattr(config, "output_dir", None) or getattr(config, "output", None)
        denoiser = getattr(config, "denoiser", None) or noisear_rl.ENVIRONMENTS.get(getattr(config, "env_id", ""))
        large = denoiser is not None and denoiser not in EMBEDDED and ":" not in denoiser
        if arguments[0] in SLOW or large or folders_read(arguments) & left_out:
            left_out.add(str(output))
            continue
        if replace and output is not None and Path(output).is_dir() and "--resume" not in arguments:
            shutil.rmtree(output)
        try:
            cli.main(arguments + shlex.split(TINY[arguments[0]]))
        except SystemExit as error:
            pytest.fail(f"{line}: {error}")
        assert output is None or Path(output).exists(), line
        ran.add(arguments[0])
    return ran
