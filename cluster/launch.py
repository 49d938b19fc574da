"""Starting workers with Ray Train."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

from cluster import engine  # first: it sets what Ray reads when it is imported

# isort: split
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.errors import UserError, first_line
from trainer import memory, stopping
from trainer.ranks import Failed, Ranks, Work


class WorkersError(RuntimeError):
    """The workers ended with an error that is no mistake of the user's."""


def launch(work: Work, workers: int, restarts: int = 0, failed: Failed | None = None) -> None:
    """Do `work` in `workers` processes of this machine, which make up a process group, and wait for their end.

    Where one of them dies or fails, all are ended and `work` begins again, in new ones; but for mistakes of the user's,
    which would be met again. Signals reach the handlers that were there before.

    Args:
        restarts: how often that may be.
        failed: told what ended the workers each time, by another process.

    Raises:
        OutOfMemoryError: the memory of a worker ran out, or a worker was ended because that of the machine did.
        UserError: a worker met a mistake of the user's.
        WorkersError: anything else that ended a worker.
    """
    gpus = torch.cuda.device_count()
    with engine.local(max(len(os.sched_getaffinity(0)), workers)) as scratch:
        trainer = TorchTrainer(
            partial(_do, work),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus)),  # ty: ignore[invalid-argument-type]
            torch_config=Torch(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name="run",
                storage_path=f"{scratch}/storage",
                failure_config=FailureConfig(max_failures=restarts),  # ty: ignore[invalid-argument-type]
                callbacks=[Failures(failed)],  # ty: ignore[invalid-argument-type]
            ),  # ty: ignore[invalid-argument-type]
        )
        try:
            _beside(trainer.fit).result()
        except ray.train.TrainingFailedError as error:
            failure = getattr(error, "controller_failure", None)
            raise (failure if isinstance(failure, UserError) else WorkersError(str(error))) from error


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


class _Backend(TorchConfig().backend_cls):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(stopping.listen)  # work itself runs on another thread than the one that signals reach


class Torch(TorchConfig):
    """A process group of torch's, of workers that SIGTERM asks to stop."""

    @property
    def backend_cls(self) -> type:
        """See `ray.train.backend.BackendConfig`."""
        return _Backend


class Failures(UserCallback):
    """Sees what ended the workers before Ray starts them again, in the process of Ray's that does so."""

    def __init__(self, failed: Failed | None) -> None:
        self._failed = failed
        self._killed = memory.killed()

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        """Whatever ended for lack of memory until now was none of ours."""
        self._killed = memory.killed()

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """An exception from here ends the training: what would be met again."""
        for failure in worker_exceptions.values():
            cause: BaseException | None = failure
            while cause is not None:
                if isinstance(cause, UserError):
                    raise type(cause)(str(cause))
                cause = cause.__cause__
        died = [
            each.health_check_failure for each in worker_exceptions.values() if hasattr(each, "health_check_failure")
        ]
        if died and (memory.killed() > self._killed or any(_ENDED_BY_RAY in str(each) for each in died)):
            raise memory.OutOfMemoryError("The memory of this machine ran out, and a worker was ended for it.")
        if self._failed is not None:
            reasons = {
                rank: first_line(getattr(error, "health_check_failure", error))
                for rank, error in sorted(worker_exceptions.items())
            }
            self._failed(reasons)


# What Ray says of a worker that it ended itself, before the kernel would.
_ENDED_BY_RAY = "due to the node running low on memory"
