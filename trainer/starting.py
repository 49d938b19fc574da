"""Which workers a run has, and what starts them."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import os
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.datasets import NAMES
from pipelines.errors import UserError
from trainer.arrival import Arrival
from trainer.config import Goal, TrainConfig
from trainer.crew import Crew
from trainer.micro import micro_batches
from trainer.notes import note
from trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from trainer.ranks import Launcher, Ranks, Report, Wait

POLL = 0.05  # seconds


def resolve_crew(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of workers, and where they are to run, decided."""
    address = config.address or (os.environ.get("RAY_ADDRESS") if config.workers != 0 else None)
    if address == "local":  # Ray's own word for none
        address = None
    if address is not None and config.workers is None:
        raise UserError(f"On a cluster ({address}) --workers must be given: how many, or LEAST:MOST as in 2:8.")
    workers = default_workers() if config.workers is None else config.workers
    config = dataclasses.replace(config, address=address, workers=workers)
    if address is None:
        check_workers(config.crew.least)
        if config.crew.elastic:  # nothing comes here, or goes
            config = dataclasses.replace(config, workers=min(config.crew.most, _places()))
    return config


def gpus() -> int:
    """GPUs that torch sees; where there is no driver, torch, which takes seconds to import, is not asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def _places() -> int:
    return gpus() or len(os.sched_getaffinity(0))


def default_workers() -> int:
    """One for each GPU; without GPUs two, or one where there is only one core."""
    return gpus() or min(2, len(os.sched_getaffinity(0)))


def check_workers(workers: int) -> None:
    """Raise UserError where this machine cannot give so many workers."""
    there, cores = gpus(), len(os.sched_getaffinity(0))
    if there and workers > there:
        raise UserError(
            f"--workers {workers}: this machine has {there} GPUs, one for a worker. Choose {there} or less."
        )
    if not there and workers > cores:
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
            from trainer import mixing

            mixing.check(config.batch, size)
        micro_batches(config.batch, size, config.at_once)


def launcher(crew: Crew, address: str | None = None, **folders: Path) -> Launcher:
    """What starts the workers: this very process for none, else the engine registered as an entry point.

    Args:
        address: a cluster's; `None` is this machine.
        folders: for a cluster, `shared` for the engine's own files and `data`; all its machines see both.
    """
    if crew.most == 0:
        from trainer.ranks import Ranks

        return lambda work, *_: nullcontext(partial(work, Ranks(), lambda metrics: None))
    (entry,) = importlib.metadata.entry_points(
        group="onewarp.launchers", name="ray" if address is None else "ray-cluster"
    )
    return entry.load() if address is None else partial(entry.load(), address=address, **folders)


class Workers(ExitStack):
    """The workers of a run."""

    def __init__(self, config: TrainConfig, goal: Goal, folder: RunFolder) -> None:
        super().__init__()
        self._config, self._goal, self._folder = config, goal, folder
        self._wait: Wait | None = None

    def begin_early(self) -> None:
        """Start them before their run is prepared, if they are on this machine and its folder of images is there."""
        config = self._config
        named = config.data in NAMES or Path(config.data).expanduser().is_dir()
        if config.crew.most and config.address is None and config.batch != "auto" and named:
            self._begin(early=True)

    def work(self) -> None:
        """Start them, if they are not yet, and return when all have ended well; see `cluster.launch.launch`."""
        if self._wait is None:
            self._begin(early=False)
        assert self._wait is not None
        self._wait()

    def _begin(self, *, early: bool) -> None:
        config, folder = self._config, self._folder
        places = {}
        if config.address is not None:
            places = {"shared": folder.engine, "data": Path(folder.read_config().data)}
        launch = launcher(config.crew, config.address, **places)
        tell = partial(note, folder.journal, folder.stalled)
        work = partial(_work, folder, self._goal, early)
        self._wait = self.enter_context(launch(work, config.crew, config.restarts, tell))


def _work(folder: RunFolder, goal: Goal, early: bool, ranks: Ranks, report: Report) -> None:
    """What a worker does; one that comes early has everything imported when the run is prepared."""
    met = time.time()
    from trainer.worker import run  # not before: it may itself be the program that runs

    arrival = Arrival(met=met)
    while early and not folder.config.exists():
        time.sleep(POLL)
    run(folder.path, goal, ranks, report, arrival)
