"""Which workers a run has, and what starts them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from functools import partial
from pathlib import Path

import torch

from pipelines.errors import UserError
from trainer import mixing
from trainer.config import TrainConfig
from trainer.crew import Crew
from trainer.micro import micro_batches
from trainer.ranks import Launcher, Ranks


def resolve_crew(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of workers, and where they are to run, decided."""
    address = config.address or (os.environ.get("RAY_ADDRESS") if config.workers != 0 else None)
    if address is not None and config.workers is None:
        raise UserError(f"On a cluster ({address}) --workers must be given: how many, or LEAST:MOST as in 2:8.")
    workers = default_workers() if config.workers is None else config.workers
    config = dataclasses.replace(config, address=address, workers=workers)
    if address is None:
        check_workers(config.crew.least)
        if config.crew.elastic:  # nothing comes here, or goes
            config = dataclasses.replace(config, workers=min(config.crew.most, _places()))
    return config


def _places() -> int:
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def default_workers() -> int:
    """One for each GPU; without GPUs two, or one where there is only one core."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def check_workers(workers: int) -> None:
    """Raise UserError where this machine cannot give so many workers."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if gpus and workers > gpus:
        raise UserError(f"--workers {workers}: this machine has {gpus} GPUs, one for a worker. Choose {gpus} or less.")
    if not gpus and workers > cores:
        raise UserError(
            f"--workers {workers}: this machine has {cores} CPU cores and no GPU, and each worker takes a core. "
            f"Choose --workers {cores} or less."
        )


def check_batch(config: TrainConfig) -> None:
    """Raise UserError where the batch cannot be divided among the workers; one to be found is no matter yet."""
    crew = config.crew
    workers = crew.most
    if config.batch == "auto":
        return
    if config.batch < workers:
        raise UserError(
            f"--batch {config.batch} gives some of the {workers} workers no image. Choose --batch {2 * workers} or "
            "more, or fewer workers."
        )
    if config.batch < 2 * workers and not config.sync_bn:
        raise UserError(
            f"--batch {config.batch} gives some of the {workers} workers fewer than two images, and batch-norm has no "
            f"variance of one. Choose --batch {2 * workers} or more, fewer workers, or --sync-bn."
        )
    for size in crew.sizes:
        if config.mixup or config.cutmix:
            mixing.check(config.batch, size)
        micro_batches(config.batch, size, config.at_once)


def launcher(crew: Crew, address: str | None = None, **folders: Path) -> Launcher:
    """What starts the workers: this very process for none, else the engine registered as an entry point.

    Args:
        address: a cluster's; `None` is this machine.
        folders: for a cluster, `shared` for the engine's own files and `data`; all its machines see both.
    """
    if crew.most == 0:
        return lambda work, *_: work(Ranks(), lambda metrics: None)
    (entry,) = importlib.metadata.entry_points(
        group="onewarp.launchers", name="ray" if address is None else "ray-cluster"
    )
    return entry.load() if address is None else partial(entry.load(), address=address, **folders)
