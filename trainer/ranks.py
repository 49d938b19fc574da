"""What a worker knows of the others: its place among them, and sums over all of them; and what a worker is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from trainer.crew import Crew
from trainer.notes import Note

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

    def stack(self, values_V: torch.Tensor) -> torch.Tensor:
        """The vectors of all R ranks, [R, V], on each of them."""
        if self.world_size == 1:
            return values_V[None]
        there_V = values_V.to(self.device)
        rows = [torch.empty_like(there_V) for _ in range(self.world_size)]
        dist.all_gather(rows, there_V)
        return torch.stack(rows).to(values_V.device)

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all ranks, one behind the other, on each of them; the values are pickled."""
        if self.world_size == 1:
            return list(values)
        lists: list[list[T]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, values)
        return list(itertools.chain.from_iterable(lists))


Report = Callable[[dict[str, float]], None]
"""Tells metrics to an engine that watches the workers; each calls it equally often, and waits for the others in it."""

Work = Callable[[Ranks, Report], None]
"""What each worker does. It is pickled to get there; what it finds out it leaves in files."""

Wait = Callable[[], None]
"""Returns when all workers have ended well."""


class Launcher(Protocol):
    """Starts so many workers; see `cluster.launch.launch`."""

    def __call__(
        self, work: Work, crew: Crew, restarts: int = 0, note: Note | None = None, /
    ) -> AbstractContextManager[Wait]: ...
