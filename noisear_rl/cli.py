"""The ``noisear`` command: one sub-command per script of the library."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import noisear_rl
from noisear_rl.command import WRONG, run_command, stop

COMMANDS = {
    "demo": ("noisear_rl.demo", "train a noise prior on the embedded denoiser and compare it with Gaussian noise"),
    "sample": ("noisear_rl.sample", "draw images from Gaussian noise and from a policy's noise, side by side"),
    "app": ("noisear_rl.app", "show Gaussian and policy images of any prompt on a page of this machine"),
    "pairs": ("noisear_rl.data.pairs", "build pretraining pairs: weak-to-strong, or signal leaks of good images"),
    "shared-noise": ("noisear_rl.data.shared_noise", "build pretraining pairs from noises tried on many prompts"),
    "nll": ("noisear_rl.algos.nll", "pretrain a policy on pairs"),
    "reinforce": ("noisear_rl.algos.reinforce", "improve a policy with REINFORCE"),
    "ppo": ("noisear_rl.algos.ppo", "improve a policy with PPO"),
    "trajectory-balance": (
        "noisear_rl.algos.trajectory_balance",
        "train a policy towards a prior tilted by rewards, also on earlier rollouts",
    ),
    "train-prior": ("noisear_rl.algos.prior", "train a noise prior: try shared noises, choose, pretrain, PPO"),
    "collect": ("noisear_rl.algos.collect", "collect rollouts to disk"),
    "dpo": ("noisear_rl.algos.dpo", "improve a policy on collected rollouts, with trl's preference losses"),
    "reward-gradient": (
        "noisear_rl.algos.reward_gradient",
        "improve a policy with reward gradients through the denoiser",
    ),
    "reward-statistics": (
        "noisear_rl.evaluation.reward_statistics",
        "measure the mean and standard deviation of scorers on Gaussian noise",
    ),
    "critic": ("noisear_rl.algos.critic", "train a critic of noises on rollouts, which chooses without an image"),
    "serve-reward": ("noisear_rl.rewards.server", "serve a reward to other environments and machines over HTTP"),
    "npnet": ("noisear_rl.algos.npnet", "train NPNet (golden noise) on pairs, as a baseline"),
    "evaluate": ("noisear_rl.algos.evaluate", "compare policies and searches with Gaussian noise"),
    "table": (
        "noisear_rl.evaluation.paper_tables",
        "print tables of evaluations, also in the paper's layouts next to its numbers",
    ),
    "report": ("noisear_rl.report.page", "write one self-contained page on evaluations and training runs"),
    "push": (
        "noisear_rl.report.hub",
        "write a policy, rollouts or pairs with a filled-in card, for the Hugging Face Hub",
    ),
    "config": ("noisear_rl.presets", "list the presets for --config (also `noisear configs`), or `config show NAME`"),
    "completion": (
        "noisear_rl.completion",
        "print a script for bash and zsh that completes commands and options",
    ),
    "doctor": (
        "noisear_rl.doctor",
        "say what is installed here, which devices and weights there are, and what to do next",
    ),
    "train-shapes": ("noisear_rl.denoisers.shapes.train", "train the embedded denoiser and its judges from scratch"),
}

# Commands whose work several processes share.
SHARED = {"pairs", "shared-noise", "nll", "reinforce", "ppo", "train-prior", "collect", "dpo", "reward-gradient"}
SHARED |= {"npnet", "critic", "evaluate", "trajectory-balance"}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: ``noisear COMMAND --help`` lists the options of a command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:19}{text}" for name, (_, text) in COMMANDS.items())
    usage = (
        f"usage: noisear COMMAND [options]\n\n{listing}\n\n`noisear COMMAND --help` lists the options of a command.\n"
        "`noisear --version` prints the version.\n"
        "`--traceback` shows where an error was raised; `--trust-code` runs code that configurations or manifests name."
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    if arguments[0] == "--version":
        print(f"noisear-rl {noisear_rl.__version__}")
        return
    arguments = ["config", "list", *arguments[1:]] if arguments[0] == "configs" else arguments
    if arguments[0] not in COMMANDS:
        from noisear_rl.wording import nearest  # here, as it loads what only commands need

        near = nearest(arguments[0], COMMANDS)
        stop(f"noisear: unknown command {arguments[0]!r}{near}\n\n{usage}", WRONG)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and arguments[0] not in SHARED:
        stop(f"noisear {arguments[0]} runs in one process: start it without a launcher", WRONG)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # silences hints about optional packages
    run_command(
        f"noisear {arguments[0]}",
        lambda options: importlib.import_module(COMMANDS[arguments[0]][0]).main(options),
        arguments[1:],
    )


if __name__ == "__main__":
    main()
