"""Starting workers on a Ray cluster that runs already."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import environment

os.environ.setdefault(environment.OTHERS, "1")

# isort: split
from cluster import engine, rounds
from cluster.doctor import refuse_the_ill
from cluster.launch import beside, fit

# isort: split
import ray
from ray.train.v2.api.config import ScalingConfig
from rich.console import Console

from pipelines.errors import UserError
from trainer.notes import Note

if TYPE_CHECKING:
    from trainer.crew import Crew
    from trainer.ranks import Wait, Work

GIVEN = "8"  # seconds that room which was there may take to be given; then the number is decided anew
PATIENCE = 600.0  # seconds for the machines of a cluster to start


@contextmanager
def launch(
    work: Work,
    crew: Crew,
    restarts: int = 0,
    note: Note | None = None,
    *,
    address: str,
    shared: Path,
    data: Path | None = None,
) -> Generator[Wait]:
    """Do `work` on the cluster that answers at `address`, each process on a GPU, or on a core where Ray knows of none.

    Args:
        shared: a folder for files of Ray's, which all machines see under this path; gone afterwards.
        data: a folder that all machines read.

    Raises:
        UserError: there is no such cluster, or too little room in it, or one of its machines lacks something.

    Everything else is as with `cluster.launch.launch`.
    """
    with engine.joined(address):
        gpus = wait_for_room(crew, address)
        refuse_the_ill(rounds.examine(data, shared.parent, thorough=False))
        if crew.elastic:
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", GIVEN)
        shutil.rmtree(shared, ignore_errors=True)  # of a process that was killed
        shared.mkdir(parents=True)
        try:
            scaling = ScalingConfig(
                num_workers=(crew.least, crew.most) if crew.elastic else crew.most,
                use_gpu=gpus > 0,
                # Workers on CPUs take all cores of a machine, so they keep apart; those with GPUs are near each other.
                placement_strategy="PACK" if gpus else "SPREAD",
            )
            yield beside(partial(fit, work, scaling, shared, restarts, note)).result
        finally:
            shutil.rmtree(shared, ignore_errors=True)


def wait_for_room(crew: Crew, address: str, patience: float = PATIENCE) -> int:
    """The GPUs of the cluster, once there is room for the least crew: its machines may still be starting, or others
    may use them.

    Raises:
        UserError: there is too little after `patience` seconds. Ray would wait for ever.
    """
    deadline, told = time.monotonic() + patience, False
    say = partial(Console(stderr=True).print, highlight=False, soft_wrap=True)
    while True:
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        there = gpus or cores
        free = int(ray.available_resources().get("GPU" if gpus else "CPU", 0))
        if crew.least <= free:
            if not gpus:
                say(f"workers   on CPU cores: the cluster at {address} has no GPU")
            return gpus
        words = f"the cluster at {address} has " + (f"{gpus} GPUs" if gpus else f"{cores} CPU cores and no GPU")
        words += f", {free} of them free" if free < there else ""
        if time.monotonic() > deadline:
            raise UserError(
                f"--workers {crew}: {words}, one for a worker. Choose fewer, or add machines"
                + (", or wait for the end of other jobs" if crew.least <= there else "")
                + ". (Those that start only when they are asked for are asked for by LEAST:MOST, where the least are "
                "there.)"
            )
        if not told:
            told = True
            say(f"waiting   for room for {crew.least} workers; {words}")
        time.sleep(0.5)
