"""Several processes, one training: who takes part, what each one's share is, and sums over all of them.

``torchrun --nproc-per-node N -m forcedrop train config.yaml`` starts N processes and says so in environment variables. Every
process holds the same weights, computes the gradient of its share of each batch, and takes the same step from the sum, so the
training is that of one process up to rounding. Without ``torchrun`` everything here is the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from forcedrop.devices import pick_device
from forcedrop.training.config import ConfigError

T = TypeVar("T")
_PATIENCE = datetime.timedelta(hours=24)
"""How long a process waits for the others: calibration by the first may take long; the dead are ``torchrun``'s business."""


@dataclass(frozen=True)
class World:
    """The processes of one training; one by default.

    Attributes:
        rank: number of this process; 0 writes files and talks.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items of this process: dealt out like cards, none twice."""
        return list(items[self.rank :: self.size])

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, the same bits on each; ``values`` itself if there is one."""
        if self.size > 1:
            values = values.contiguous()
            distributed.all_reduce(values)
        return values

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this is the process that writes and talks, before and after a training too."""
    return os.environ.get("RANK", "0") == "0"


def own_device(name: str) -> torch.device:
    """Return the device that a training file names; with several processes, each one's own GPU.

    Raises:
        ValueError: if there is no such GPU.
        ConfigError: if one was named for several processes.
    """
    device = pick_device(name)
    if _world_size() == 1 or device.type == "cpu":
        return device
    if device != torch.device("cuda"):
        raise ConfigError(f"`device` must be cpu, cuda or auto for {_world_size()} processes, got {name}")
    place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= found:
        raise ConfigError(f"process {place} of this machine has no GPU of its own: torch sees {found}")
    return torch.device("cuda", place)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the other processes that ``torchrun`` started, over NCCL for a GPU and gloo otherwise, and leave at the end."""
    size = _world_size()
    if size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", timeout=_PATIENCE, device_id=device)
    else:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield world
    finally:
        distributed.destroy_process_group()
