"""Real process groups for tests: several processes, gloo, no Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.ranks import Ranks

# Importing takes seconds; a server that has done it forks the ranks. It runs nothing itself, so it has no threads.
multiprocessing.set_forkserver_preload(["trainer.worker", "pipelines.reader", "tests.ranks"])


def _enter(
    rank: int,
    world_size: int,
    meeting: str,
    environment: dict[str, str],
    work: Callable[[Ranks, Path], None],
    path: Path,
) -> None:
    os.environ.update(environment)  # the server has that of its own start
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        work(
            Ranks(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size),
            path,
        )
    finally:
        dist.destroy_process_group()


def on_ranks(world_size: int, work: Callable[[Ranks, Path], None], path: Path) -> None:
    """Run `work(ranks, path)` in `world_size` processes; an exception in one fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        args = (world_size, f"{folder}/meeting", dict(os.environ), work, path)
        mp.start_processes(_enter, args=args, nprocs=world_size, start_method="forkserver")
