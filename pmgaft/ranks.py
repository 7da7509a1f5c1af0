"""Several processes at one task: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from pmgaft.errors import PmgaftError

Thing = TypeVar("Thing")

_PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others; one that ends takes the others along at once, through torchrun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all of them. Alone, every method answers at once."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on the device, which nobody waits for."""
        if self.world == 1:
            return values
        summed = values.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def largest(self, number: float) -> float:
        """The maximum over all ranks; between the hosts, past the devices."""
        if self.world == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return float(found)

    def any(self, condition: bool) -> bool:
        """Whether it holds at any rank."""
        return bool(self.largest(float(condition)))

    def gathered(self, thing: Thing) -> list[Thing]:
        """Everyone's, in the order of the ranks, at the first rank; nothing at the others."""
        if self.world == 1:
            return [thing]
        everyones: list[Any] | None = [None] * self.world if self.first else None
        torch.distributed.gather_object(thing, everyones)
        return everyones or []

    def by_first(self, work: Callable[[], Thing]) -> Thing:
        """What the first rank's work gives, or raises, to every rank."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except PmgaftError as error:
                answer[1] = error
        torch.distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        found: Thing = answer[0]
        return found


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Meet the processes that torchrun started beside this one, and part from them at the end.

    Gives this process's place among them and its device: of a GPU machine's GPUs the one of its own.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    yield Ranks(rank=torch.distributed.get_rank(), world=world), device
    torch.distributed.destroy_process_group()  # not after a mistake: it would wait for ranks that wait for this one


def speaks() -> bool:
    """Whether this process is alone or the first of torchrun's: known before they have met."""
    return int(os.environ.get("RANK", "0")) == 0
