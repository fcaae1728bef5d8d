"""What every training script needs and none should repeat: the run folder, its logs and its checkpoints.

A run folder holds ``config.yaml`` (the resolved configuration), ``provenance.json`` (commit, versions, hardware and
command of the first start, and of every resumption that differs), ``metrics.jsonl`` and TensorBoard files (one record
per update), and ``checkpoints/step-<n>/``: the policy (safetensors), ``state.pt`` (optimiser, schedule, counters) and
the configuration. All randomness of update ``u`` follows from ``(seed, u)``, so a resumed run equals an uninterrupted
one without any saved generator. Of several processes, the main one writes; all must see the folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from noisear_rl.checkpoints import (
    Network,
    check_finite,
    list_checkpoints,
    load_state,
    recover,
    remove_old,
    save_checkpoint,
    whole_checkpoints,
)
from noisear_rl.command import Stop, stop
from noisear_rl.config import check_config, to_mapping
from noisear_rl.distributed import all_sum, barrier, is_main, process, same_for_all
from noisear_rl.files import read_entries, write_atomically, write_entries
from noisear_rl.integrity import lock_folder
from noisear_rl.learning.interruption import Interruption
from noisear_rl.learning.records import RECORDS, append_record, forget_after, scores_of
from noisear_rl.learning.resumption import check_same_run, inputs_of
from noisear_rl.provenance import command_line, provenance
from noisear_rl.seeds import Stream, stream_rng


def next_prompts(prompts: Sequence[str], count: int, update: int, seed: int) -> list[str]:
    """The ``count`` prompts of an update, cycled in shuffled order; every round through them has its own order."""
    count = min(count, len(prompts))
    turn, offset = divmod(update * count, len(prompts))
    rounds = [stream_rng(seed, Stream.PROMPT_ORDER, turn + i).permutation(len(prompts)) for i in (0, 1)]
    return [prompts[i] for i in np.concatenate(rounds)[offset : offset + count]]


def split_by_prompt(prompts: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the rows of some prompts, so that no prompt is on both sides.

    Args:
        prompts: The prompt of every row; prompts may be repeated.
        share: Share of the distinct prompts to hold out; at least one is.
        seed: Seed of the choice.

    Returns:
        The rows to train on and the held-out rows, in order.

    Raises:
        ValueError: If either side would be empty.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(prompts))}
    order = stream_rng(seed, Stream.HELD_OUT_PROMPTS).permutation(len(names))
    is_held_out = np.isin([names[prompt] for prompt in prompts], order[: max(1, int(share * len(names)))])
    if is_held_out.all() or not is_held_out.any():
        raise ValueError(
            f"{len(names)} prompts in {len(prompts)} rows are too few to hold out a share of {share:g} of the prompts: "
            "use more prompts, or another held_out_share"
        )
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


@dataclass
class Counters:
    """The progress of a run.

    Attributes:
        step: Updates done.
        images: Images denoised for training.
        seconds: Time spent.
        reward_ema: Running mean of rewards, for algorithms that keep one.
        best: Best held-out figure so far, for algorithms that stop early.
        stale: Evaluations since then.
        skipped: Updates that were skipped or undone (:mod:`noisear_rl.learning.guards`).
        skipped_in_a_row: Those since the last update that was not.
    """

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    reward_ema: float | None = None
    best: float | None = None
    stale: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def average_reward(self, reward: float, decay: float) -> None:
        """Moves the running mean towards an update's mean reward."""
        known = reward if self.reward_ema is None else self.reward_ema
        self.reward_ema = decay * known + (1 - decay) * reward


class Run:
    """A run folder, its logs and its checkpoints.

    Args:
        folder: The run folder; made if missing.
        config: The resolved configuration, a dataclass.
        resume: Resume from the newest checkpoint. Otherwise a folder that holds one is refused.
        wandb: Also log to Weights & Biases.
        may_change: Options that may differ when the run is resumed, besides those that only concern its length, logs
            and memory (:data:`noisear_rl.learning.resumption.MAY_CHANGE`).

    SIGTERM and SIGINT end it as :mod:`~noisear_rl.learning.interruption` says, until :meth:`close`.

    Raises:
        FileExistsError: If the folder holds a run and ``resume`` is false.
        InUseError: If another process trains in the folder.
        DamagedError: If there are checkpoints to resume from, but none is whole.
        ValueError: If an option is out of range, a resumed run has another algorithm or other options than before, or
            several processes do not see the same folder.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        resume: bool = False,
        wandb: bool = False,
        may_change: Collection[str] = (),
    ):
        check_config(config)
        if wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "--wandb: the package wandb is not installed: `pip install wandb`, or leave the option out"
            )
        self.folder, self.config, self.device = Path(folder), config, process().device
        if list_checkpoints(self.folder) and not resume:
            raise FileExistsError(f"{folder} holds a run: pass --resume to continue it, or choose another --output-dir")
        self._lock = lock_folder(self.folder) if is_main() else None
        if is_main():
            recover(self.folder)
            if resume:
                next(whole_checkpoints(self.folder), None)  # moves newer damaged ones aside
            if not list_checkpoints(self.folder):
                (self.folder / RECORDS).unlink(missing_ok=True)  # of a run that was killed before it saved anything
        barrier()
        log_with = ["tensorboard", *(["wandb"] if wandb else [])]
        project = ProjectConfiguration(str(self.folder), logging_dir=str(self.folder / "tensorboard"))
        self.accelerator = Accelerator(log_with=log_with, project_config=project)
        self._checkpoint = list_checkpoints(self.folder)[-1:]
        same_for_all(str(self._checkpoint), f"{folder}: the newest checkpoint")
        if self._checkpoint:
            check_same_run(self._checkpoint[0], config, may_change)
        self._inputs = inputs_of(config)  # now: the files may be edited meanwhile
        self._start: dict[str, Any] | None = {"step": 0, **provenance(), "command": command_line()}
        self._tracked = self._stopping = False
        if is_main():
            write_atomically(self.folder / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
            if not self._checkpoint:
                self._record_start()
        flag = "" if resume or not hasattr(config, "resume") else " --resume"
        self._interruption = Interruption(f"Resume with: {command_line()}{flag}")
        self._interruption.install()

    def log(self, values: dict[str, float], step: int) -> None:
        """Writes one record to TensorBoard and ``metrics.jsonl``, in the main process."""
        if not is_main():
            return
        self._record_start()
        if not self._tracked:  # records after the checkpoint that a killed process left are hidden
            self.accelerator.init_trackers("noisear-rl", init_kwargs={"tensorboard": {"purge_step": step}})
            self._tracked = True
        self.accelerator.log(values, step=step)
        append_record(self.folder, {"step": step, **values})

    def save(self, network: Network, counters: Counters, **parts: Any) -> None:
        """Writes a checkpoint, in the main process.

        Args:
            network: The policy, or another network.
            counters: The run's progress.
            **parts: Objects with ``state_dict``: optimiser, schedule.

        Raises:
            ValueError: If a network holds NaN or infinite values; the checkpoints so far are kept.
        """
        for name, part in {"the network": network, **parts}.items():
            if isinstance(part, torch.nn.Module):
                check_finite(part, f"update {counters.step} is not saved: {name}")
        if not is_main():
            self._stop_if_asked(counters)
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        counts = {"counters": dataclasses.asdict(counters)}
        options, records = to_mapping(self.config), self.folder / RECORDS
        save_checkpoint(self.folder, counters.step, network, counts | state, options, records, self._inputs)
        if keep := getattr(self.config, "keep_checkpoints", 0):
            remove_old(self.folder, keep, scores_of(self.folder))
        self._stop_if_asked(counters)

    @property
    def stopping(self) -> bool:
        """Whether a signal asked the run to save and stop; ask once per update."""
        self._interruption.ready = True
        asked = torch.tensor([float(self._interruption.asked is not None)], device=self.device)
        self._stopping = bool(all_sum(asked).item())  # in all processes, if it was asked of one
        return self._stopping

    def _stop_if_asked(self, counters: Counters) -> None:
        if self._stopping:
            self.close()
            message = f"saved update {counters.step}. {self._interruption.advice}"
            if is_main():
                stop(message, 0)
            raise Stop(message, 0)

    def load(self, network: Any, **parts: Any) -> Counters:
        """Restores the newest whole checkpoint, if there is one; returns the run's progress.

        Raises:
            DamagedError: If the records before it are damaged.
            ValueError: If it is of another network or algorithm.
        """
        found = self._checkpoint[0] if self._checkpoint else None
        if found is None:
            return Counters()
        saved = type(network).from_pretrained(str(found))
        if saved.config != network.config:
            raise ValueError(f"{found} holds a network of another configuration: {saved.config}, not {network.config}")
        state = load_state(found)
        if missing := sorted({"counters", *parts} - state.keys()):
            raise ValueError(f"{found} was saved by another algorithm, or with other options: it holds no {missing[0]}")
        network.load_state_dict(saved.state_dict())
        for name, part in parts.items():
            part.load_state_dict(state[name])
        counters = Counters(**state["counters"])
        if is_main():
            forget_after(self.folder, counters.step)
        if self._start is not None:
            self._start["step"] = counters.step
        return counters

    def _record_start(self) -> None:
        """Adds this process to ``provenance.json``, once, unless it is what the updates before it ran with."""
        if self._start is None:
            return
        path, step = self.folder / "provenance.json", self._start["step"]
        known = read_entries(path)
        starts = [start for start in known if start["step"] < step]  # the updates of later ones are repeated
        if not starts or starts[-1] | {"step": step} != self._start:
            starts.append(self._start)
        write_entries(path, starts)
        self._start = None

    def close(self) -> None:
        """Flushes the logs, waits for all processes, and gives back the folder and the signals."""
        self._interruption.remove()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        barrier()
        if self._lock is not None:
            self._lock.release()
