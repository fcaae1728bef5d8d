"""The ``noisear`` command: one sub-command for every script of the library."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": ("noisear_rl.demo", "train a noise prior on the embedded denoiser and compare it with Gaussian noise"),
    "sample": ("noisear_rl.sample", "draw pictures from Gaussian noise and from a policy's noise side by side"),
    "pairs": ("noisear_rl.data.pairs", "build pairs to pretrain on: weak-to-strong, or leaks of good pictures"),
    "shared-noise": ("noisear_rl.data.shared_noise", "build pairs from noises that many prompts were tried on"),
    "nll": ("noisear_rl.algos.nll", "pretrain a policy on pairs"),
    "reinforce": ("noisear_rl.algos.reinforce", "improve a policy with REINFORCE"),
    "ppo": ("noisear_rl.algos.ppo", "improve a policy with PPO"),
    "collect": ("noisear_rl.algos.collect", "collect rollouts on disk"),
    "dpo": ("noisear_rl.algos.dpo", "improve a policy on collected rollouts, with trl's preference losses"),
    "reward-gradient": ("noisear_rl.algos.reward_gradient", "improve a policy by gradients through the denoiser"),
    "reward-statistics": (
        "noisear_rl.evaluation.reward_statistics",
        "measure scorers on Gaussian noise, to standardise them by",
    ),
    "npnet": ("noisear_rl.algos.npnet", "train NPNet (golden noise) on pairs, to compare with"),
    "evaluate": ("noisear_rl.algos.evaluate", "compare policies and searches with Gaussian noise"),
    "table": (
        "noisear_rl.evaluation.paper_tables",
        "print tables of evaluations, also in the paper's layouts beside its numbers",
    ),
    "report": ("noisear_rl.report.page", "write one self-contained page about an evaluation and trainings"),
    "train-shapes": ("noisear_rl.denoisers.shapes.train", "train the embedded denoiser and its judges anew"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: ``noisear COMMAND --help`` tells each command's options."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:19}{text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: noisear COMMAND [options]\n\n{listing}\n\n`noisear COMMAND --help` tells a command's options."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    if arguments[0] not in COMMANDS:
        raise SystemExit(f"noisear: unknown command {arguments[0]!r}\n\n{usage}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # hints about optional packages we do without
    try:
        importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
    except (FileExistsError, FileNotFoundError, ValueError) as error:  # the user's to mend: no traceback
        raise SystemExit(f"noisear {arguments[0]}: {error}") from error


if __name__ == "__main__":
    main()
