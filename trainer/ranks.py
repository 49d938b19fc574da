"""What a worker knows of the others: its place among them, and sums over all of them."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place in the process group; one process alone needs no group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Place among the workers of this machine: the index of its GPU."""
    local_world_size: int = 1
    """Workers on this machine: they share its cores."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def cores(self) -> int:
        """This worker's share of the machine's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, the same bits on each of them; `values` itself is overwritten."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one behind the other, on each of them; the values are pickled."""
        if self.world_size == 1:
            return list(values)
        lists: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, values)
        return list(itertools.chain.from_iterable(lists))
