"""Starting workers with Ray Train."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from cluster import engine, leaving  # first: engine sets what Ray reads when it is imported

# isort: split
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.errors import UserError, first_line
from trainer import memory, stopping
from trainer.crew import Crew
from trainer.ranks import Failed, Ranks, Work


class WorkersError(RuntimeError):
    """The workers ended with an error that is no mistake of the user's."""


def launch(work: Work, crew: Crew, restarts: int = 0, failed: Failed | None = None) -> None:
    """Do `work` in processes of this machine, which make up a process group, and wait for their end.

    Where one of them dies or fails, all are ended and `work` begins again, in new ones; but for mistakes of the user's,
    which would be met again. Signals reach the handlers that were there before.

    Args:
        crew: how many processes.
        restarts: how often that may be.
        failed: told what ended the workers each time, by another process.

    Raises:
        OutOfMemoryError: the memory of a worker ran out, or a worker was ended because that of the machine did.
        UserError: a worker met a mistake of the user's.
        WorkersError: anything else that ended a worker.
    """
    scaling = ScalingConfig(num_workers=crew.most, use_gpu=torch.cuda.is_available())
    with engine.local(max(len(os.sched_getaffinity(0)), crew.most)) as scratch:
        fit(work, scaling, Path(scratch), restarts, failed, alone=True)


def fit(
    work: Work, scaling: ScalingConfig, shared: Path, restarts: int, failed: Failed | None, *, alone: bool = False
) -> None:
    """Do `work` on the cluster that this process has joined; see `launch`.

    Args:
        shared: folder that all its machines see, for the files of the engine.
        alone: this machine is all of it.
    """
    trainer = TorchTrainer(
        partial(_do, work),
        scaling_config=scaling,  # ty: ignore[invalid-argument-type]
        torch_config=Torch(backend="nccl" if scaling.use_gpu else "gloo", meeting=shared if alone else None),
        run_config=RunConfig(
            name="run",
            storage_path=str(shared / "storage"),
            failure_config=FailureConfig(max_failures=-1),  # ty: ignore[invalid-argument-type]
            callbacks=[Failures(failed, restarts, alone=alone)],  # ty: ignore[invalid-argument-type]
        ),  # ty: ignore[invalid-argument-type]
    )
    try:
        _beside(trainer.fit).result()
    except ray.train.TrainingFailedError as error:
        failure = getattr(error, "controller_failure", None)
        known = isinstance(failure, UserError | WorkersError)
        raise (failure if known else WorkersError(str(error))) from error


def _beside(fit: Callable[[], object]) -> Future[object]:
    """The future result of `fit` on a thread of its own: on the main thread it would take Ctrl-C for itself.

    Nobody waits for that thread where a signal ends the waiting: it ends with Ray.
    """
    future: Future[object] = Future()

    def run() -> None:
        try:
            future.set_result(fit())
        except BaseException as error:  # whatever it is, it is for the one who waits
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    return future


def _do(work: Work) -> None:
    """What each worker process does."""
    context = ray.train.get_context()
    ranks = Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )
    work(ranks, lambda metrics: ray.train.report(metrics))


def _meet(rank: int, place: str, config: Torch, world_size: int) -> None:
    patience = timedelta(seconds=config.timeout_s)
    dist.init_process_group(config.backend, init_method=place, rank=rank, world_size=world_size, timeout=patience)


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: Torch) -> None:
        if backend_config.meeting is None:
            return super().on_start(worker_group, backend_config)
        # Through a port the workers would meet on all interfaces.
        place = f"file://{backend_config.meeting / uuid.uuid4().hex}"
        size = len(worker_group)
        met = [worker_group.execute_single_async(at, _meet, at, place, backend_config, size) for at in range(size)]
        ray.get(met)
        return None

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(stopping.listen)  # work itself runs on another thread than the one that signals reach
        if backend_config.meeting is None:  # one asks for all
            nodes = frozenset(worker.metadata.node_id for worker in worker_group.get_workers())
            worker_group.execute_single(0, leaving.watch, nodes)


@dataclass
class Torch(TorchConfig):
    """A process group of torch's, of workers that SIGTERM asks to stop."""

    meeting: Path | None = None
    """Where the workers of one machine meet, in a file. `None`: on a port of the first of them."""

    @property
    def backend_cls(self) -> type:
        """See `ray.train.backend.BackendConfig`."""
        return _Backend


class Failures(UserCallback):
    """Sees what ended the workers before Ray starts them again, in the process of Ray's that does so.

    It also counts how often that was: a machine that left in good order is no failure.
    """

    def __init__(self, failed: Failed | None, restarts: int, *, alone: bool) -> None:
        self._failed, self._left, self._alone = failed, restarts, alone
        self._killed = memory.killed()

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Whatever ended for lack of memory until now was none of ours."""
        self._killed = memory.killed()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """An exception from here ends the training: what would be met again."""
        causes = [cause for error in worker_exceptions.values() for cause in _chain(error)]
        for cause in causes:
            if isinstance(cause, UserError):
                raise type(cause)(str(cause))
        if any(isinstance(cause, stopping.LeavingError) for cause in causes):
            return
        died = [
            each.health_check_failure for each in worker_exceptions.values() if hasattr(each, "health_check_failure")
        ]
        here = self._alone and memory.killed() > self._killed
        if died and (here or any(_ENDED_BY_RAY in str(each) for each in died)):
            which = "this" if self._alone else "a"
            raise memory.OutOfMemoryError(f"The memory of {which} machine ran out, and a worker was ended for it.")
        # A machine that was told to leave may be gone before its workers have; the others may be the first to say so.
        if not (leaving.some() or any(getattr(error, "preempted", False) for error in died)):
            if self._left == 0:
                raise WorkersError("\n".join(str(error) for error in worker_exceptions.values()))
            self._left -= 1
        if self._failed is not None:
            reasons = {
                rank: first_line(getattr(error, "health_check_failure", error))
                for rank, error in sorted(worker_exceptions.items())
            }
            self._failed(reasons)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


# What Ray says of a worker that it ended itself, before the kernel would.
_ENDED_BY_RAY = "due to the node running low on memory"
