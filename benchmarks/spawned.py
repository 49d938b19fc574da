"""A measurement on several ranks: processes of this machine that make up a process group, without Ray."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.ranks import Ranks

T = TypeVar("T")
Work = Callable[[Ranks, Path], T]
"""What each rank does; the folder is theirs together."""


def on_ranks(world_size: int, threads: int, work: Work[T]) -> T:
    """What `work` returns on the first of `world_size` ranks, each of which has `threads` of torch's threads."""
    with tempfile.TemporaryDirectory(prefix="onewarp-bench-") as scratch:
        folder = Path(scratch)
        if world_size == 1:
            with _threads(threads):
                return work(Ranks(), folder)
        mp.spawn(_rank, args=(world_size, threads, work, folder), nprocs=world_size)
        return pickle.loads((folder / "returned").read_bytes())


def _rank(rank: int, world_size: int, threads: int, work: Work[T], folder: Path) -> None:
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    try:
        returned = work(Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size), folder)
        if rank == 0:
            (folder / "returned").write_bytes(pickle.dumps(returned))
    finally:
        dist.destroy_process_group()


def together(ranks: Ranks) -> None:
    """Wait for this rank's device, and for the other ranks."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    if ranks.world_size > 1:
        dist.barrier()


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
