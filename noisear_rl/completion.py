"""Prints a script that completes commands, options, their choices and presets in bash and zsh.

    noisear completion > ~/.noisear-completion && echo 'source ~/.noisear-completion' >> ~/.bashrc    # or ~/.zshrc

Takes a few seconds, as it reads the help of every command. Print it again after an upgrade.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from noisear_rl import ENVIRONMENTS
from noisear_rl.command import TRACEBACK, run_script
from noisear_rl.config import check_config, parse_config, preset_names
from noisear_rl.policy.loading import shipped_policies
from noisear_rl.trust import OPTION as TRUST_CODE

# A word that does not begin with "-" after an option is a value: one of its choices if it has some, otherwise a file.
SCRIPT = """# Completion of noisear for bash and zsh.
if [ -n "$ZSH_VERSION" ]; then autoload -U +X compinit bashcompinit && compinit -u && bashcompinit; fi
_noisear() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands} configs --version --help"
    else
        case "${{COMP_WORDS[1]}} $before $current" in
{values}
            *" -"*" "[!-]*|*" -"*" ") ;;
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _noisear noisear
"""


@dataclass
class CompletionConfig:
    """The command takes no options."""

    def __post_init__(self) -> None:
        check_config(self)


@dataclass
class Words:
    """What a command takes.

    Attributes:
        options: Options and sub-commands.
        choices: By option that has choices.
    """

    options: list[str] = field(default_factory=list)
    choices: dict[str, list[str]] = field(default_factory=dict)


def words_of(module: str) -> Words:
    """Reads the help of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(module).main(["--help"])
    found = Words()
    text = out.getvalue()
    found.options = re.findall(r"^ {4}• ([\w-]+)", text, flags=re.M) or ["--config"]
    for form in re.findall(r"^ {2}(-[\w-].*?)(?: {2}|$)", text, flags=re.M):  # without its description
        found.options += re.findall(r"--[a-z][\w.-]*", form)
        for option, choices in re.findall(r"(--[a-z][\w.-]*) \{([\w,.-]+)\}(?!\|)", form):
            found.choices[option] = choices.split(",")
    return found


def script(commands: Mapping[str, str]) -> str:
    """The script.

    Args:
        commands: Module by command.
    """
    found = {name: words_of(module) for name, module in commands.items()}
    values = {'*" --config "*|"config show "*': preset_names()}
    values |= {
        '*"--env-id "*|*".env-id "*': [*ENVIRONMENTS],
        '*" --denoiser "*|*".denoiser "*': [*ENVIRONMENTS.values()],
    }
    values['*" --policy "*|*"--init-from "*|*".init-from "*'] = shipped_policies()
    for name, words in found.items():
        values |= {f'"{name} {option} "*': choices for option, choices in words.choices.items()}
    options = {f'"{name} "*': [*words.options, TRACEBACK, TRUST_CODE] for name, words in found.items()}
    cases = [
        "\n".join(f'{" " * 12}{pattern}) words="{" ".join(words)}" ;;' for pattern, words in table.items())
        for table in (values, options)
    ]
    return SCRIPT.format(commands=" ".join(commands), values=cases[0], options=cases[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parse_config(CompletionConfig, argv, __doc__)
    from noisear_rl.cli import COMMANDS  # which names this module

    print(script({name: module for name, (module, _) in COMMANDS.items()}), end="")


if __name__ == "__main__":
    run_script(main)
