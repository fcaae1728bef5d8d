"""Several processes at one task: which rows each of them works on, and sums over all of them.

Every process holds a copy of the network and works on its part of a batch. A sum over all processes, divided by the
number of rows of all of them, is what one process would compute: the number of processes does not change a result, and
all of them take the same decisions. In a single process all of this does nothing.

    torchrun --nproc-per-node 4 -m noisear_rl.cli ppo --config shapes/ppo

Shapes: ``n`` rows of all processes, ``b`` rows of this one.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed, nn

from noisear_rl import heartbeat

if TYPE_CHECKING:
    from accelerate import PartialState

LAUNCHERS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
PATIENCE = timedelta(days=1)  # for the slowest process; one that dies is noticed sooner, by noisear_rl/heartbeat.py


@functools.cache
def process() -> PartialState:
    """This process among those that were launched, which the first call joins: on accelerators by NCCL, else by gloo.

    Raises:
        ValueError: If fewer processes found each other than were asked for.
    """
    from accelerate import PartialState  # here, since environments import this module
    from accelerate.utils import get_int_from_env, parse_flag_from_env

    launched = get_int_from_env(LAUNCHERS, 1)
    alone = launched == 1 and "WORLD_SIZE" not in os.environ  # `torchrun` names even a single process
    if alone and parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "`accelerate launch --cpu` asks for several processes, but starts one: use `torchrun`, or `--config_file` "
            "with configs/accelerate/cpu.yaml"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (
        launched > 1 and (accelerator is None or accelerator.type == "mps")
    )
    options = {"timeout": PATIENCE} | ({"backend": "gloo"} if cpu else {}) if launched > 1 else {}
    state = PartialState(cpu=cpu, **options)
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but {state.num_processes} joined: start them by `torchrun`, or by "
            "`accelerate launch --config_file` with a file of configs/accelerate"
        )
    if launched > 1:
        print(f"process {state.process_index} of {launched} on {state.device}", file=sys.stderr, flush=True)
        heartbeat.start(state.process_index, launched)
    return state


def num_processes() -> int:
    """How many processes work together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes."""
    return num_processes() == 1 or distributed.get_rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if num_processes() > 1:
        process().wait_for_everyone()


@dataclass(frozen=True)
class Part:
    """The part of a batch that this process works on.

    Attributes:
        rows: ``(b,)`` where the rows are in this process's tensors. A process without any takes a stand-in, whose
            weight is 0, so that all processes take the same steps.
        places: ``(b,)`` where they are among the rows of all processes, ascending; empty for a stand-in.
        total: ``n``.
    """

    rows: np.ndarray
    places: np.ndarray
    total: int

    @property
    def weight(self) -> float:
        """The share of the rows: a mean over this part, times this, sums up to the mean over all rows."""
        return len(self.places) / self.total

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all rows, from that over this part; any shape, the same in every process."""
        return all_sum(value.detach() * self.weight)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(b, …)`` of all processes: ``(n, …)``, in the order of the batch if each part is contiguous."""
        return gather_rows(values[: len(self.places)])

    def local(self) -> Part:
        """The same part of tensors that hold nothing but its rows."""
        return Part(np.arange(len(self.rows)), self.places, self.total)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of this part ``(b, …)`` of values ``(n, …)``; a stand-in's are 0."""
        return values[self.places] if len(self.places) else torch.zeros_like(values[:1])

    def followed_by(self, other: Part) -> Part:
        """This part and one of further rows, of tensors that hold this part's rows and then the other's."""
        rows = np.r_[np.arange(len(self.places)), len(self.rows) + np.arange(len(other.places))]
        places = np.r_[self.places, self.total + other.places]
        return Part(rows if len(rows) else np.zeros(1, dtype=np.int64), places, self.total + other.total)

    def split(self, count: int) -> Iterator[Part]:
        """Micro-batches, equally many in every process; their ``rows`` are those of this part."""
        count = max(1, min(count, -(-self.total // num_processes())))
        for rows in np.array_split(np.arange(len(self.rows)), count):
            places = self.places[rows[rows < len(self.places)]]
            yield Part(self.rows[rows] if len(rows) else self.rows[:1], places, self.total)


def shard(total: int, what: str | None = None) -> Part:
    """This process's part of ``total`` rows, contiguous; its ``rows`` are places in the whole, too.

    Args:
        total: ``n``.
        what: Names rows of which every process must have one.

    Raises:
        ValueError: If a process has none of them.
    """
    count, rank = num_processes(), distributed.get_rank() if num_processes() > 1 else 0
    if what and total < count:
        raise ValueError(f"{total} {what} are too few for {count} processes")
    places = np.arange(total * rank // count, total * (rank + 1) // count)
    return Part(places if len(places) else np.zeros(1, dtype=np.int64), places, total)


def among(batch: np.ndarray | torch.Tensor, held: np.ndarray) -> Part:
    """This process's part of a batch.

    Args:
        batch: ``(n,)`` numbers of rows, in the numbering of all processes.
        held: The numbers of this process's rows, ascending, in the order of its tensors.
    """
    batch = np.asarray(batch.cpu() if isinstance(batch, torch.Tensor) else batch)
    places = np.flatnonzero(np.isin(batch, held))
    rows = np.searchsorted(held, batch[places])
    return Part(rows if len(rows) else np.zeros(1, dtype=np.int64), places, len(batch))


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, the same in each of them. The tensor itself may change."""
    if num_processes() == 1:
        return tensor
    total = tensor.to(process().device)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def sum_gradients(network: nn.Module) -> None:
    """Replaces gradients by their sums over all processes, each of which weighted its loss by its part's weight."""
    if num_processes() > 1:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        total = all_sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, values in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))


def gather_rows(values: torch.Tensor) -> torch.Tensor:
    """Rows ``(b, …)`` of all processes, one after the other: ``(n, …)``. Gradients flow into this process's own."""
    count = num_processes()
    if count == 1:
        return values
    device = process().device
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    lengths[distributed.get_rank()] = len(values)
    sizes = all_sum(lengths).tolist()
    wire = torch.uint8 if values.dtype == torch.bool else values.dtype
    padded = torch.zeros(max(sizes), *values.shape[1:], dtype=wire, device=device)
    padded[: len(values)] = values.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    rows = [part[:size].to(values) for part, size in zip(parts, sizes, strict=True)]
    rows[distributed.get_rank()] = values
    return torch.cat(rows)


def gather_objects(items: list[Any]) -> list[Any]:
    """The items of all processes, one after the other."""
    if num_processes() == 1:
        return items
    found: list[list[Any]] = [[]] * num_processes()
    distributed.all_gather_object(found, items)
    return [item for part in found for item in part]


def same_for_all(value: str, what: str) -> None:
    """Refuses what differs between processes.

    Raises:
        ValueError: If it does.
    """
    if num_processes() > 1:
        values = gather_objects([value])
        if len(set(values)) > 1:
            raise ValueError(f"{what} differs between processes, {values}: all machines must see the same folder")


def same_everywhere(network: nn.Module) -> None:
    """Copies the main process's weights to the others."""
    if num_processes() > 1:
        for tensor in network.state_dict().values():
            sent = tensor.to(process().device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
            distributed.broadcast(sent, 0)
            tensor.copy_(sent)
