"""Starting workers with Ray Train."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import engine  # first: it sets what Ray reads when it is imported

# isort: split
import ray
import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.meeting import Meeting
from cluster.restarts import Failures
from cluster.room import Alone, Elastic, Running
from pipelines.errors import UserError
from trainer import allocation
from trainer.notes import Note
from trainer.stopping import WorkersError

if TYPE_CHECKING:
    from trainer.crew import Crew
    from trainer.ranks import Wait, Work


@contextmanager
def launch(work: Work, crew: Crew, restarts: int = 0, note: Note | None = None) -> Generator[Wait]:
    """Do `work` in processes of this machine, which make up a process group; yields what waits for their end.

    They start beside what the caller goes on with; what leaves the context before their end ends them. Where one of
    them dies or fails, all are ended and `work` begins again, in new ones; but for mistakes of the user's, which would
    be met again. Signals reach the handlers that were there before.

    Args:
        crew: how many processes.
        restarts: how often that may be.
        note: told what ended the workers each time, by another process.

    What waits raises:
        OutOfMemoryError: the memory of a worker ran out, or a worker was ended because that of the machine did.
        UserError: a worker met a mistake of the user's.
        WorkersError: anything else that ended a worker.
    """
    up: Future[None] = Future()
    left = threading.Event()

    def train() -> None:
        # Whole on one thread: what Ray starts ends with the thread that started it.
        with engine.local(max(len(os.sched_getaffinity(0)), crew.most)) as scratch:
            up.set_result(None)
            import torch  # which takes seconds

            scaling = ScalingConfig(num_workers=crew.most, use_gpu=torch.cuda.is_available())
            if left.is_set():
                raise WorkersError("left before it began")
            fit(work, scaling, Path(scratch), restarts, note, alone=True)

    done = beside(train)
    try:
        yield done.result
    finally:
        left.set()
        wait([up, done], return_when=FIRST_COMPLETED)
        engine.rearm()
        if not done.done():
            engine.end()  # and with it the training
            wait([done], timeout=2 * engine.PATIENCE)


def fit(
    work: Work,
    scaling: ScalingConfig,
    shared: Path,
    restarts: int,
    note: Note | None,
    *,
    alone: bool = False,
) -> None:
    """Do `work` on the cluster that this process has joined; see `launch`.

    Args:
        shared: folder that all its machines see, for the files of the engine.
        alone: this machine is all of it.
    """
    trainer = _Trainer(
        partial(_do, work),
        scaling_config=scaling,
        backend_config=Meeting("nccl" if scaling.use_gpu else "gloo", shared if alone else None),
        run_config=RunConfig(
            name="run",
            storage_path=str(shared / "storage"),
            worker_runtime_env={"env_vars": {} if scaling.use_gpu else allocation.environment()},
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Failures(note, restarts, alone=alone), Running()],  # ty: ignore[invalid-argument-type]
        ),
    )
    if scaling.elasticity_enabled:
        trainer.policy = Elastic(scaling, note)
    elif alone:
        trainer.policy = Alone(scaling)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failure = getattr(error, "controller_failure", None)
        known = isinstance(failure, UserError | WorkersError)
        raise (failure if known else WorkersError(str(error))) from error


class _Trainer(DataParallelTrainer):
    policy: ScalingPolicy | None = None  # in place of Ray's

    def _create_default_callbacks(self) -> list[Any]:
        # Each has a process of its own: for Ray's data, of which there is none here; for a cluster that goes on where
        # its training does not.
        idle = (DatasetsCallback, *([PlacementGroupCleanerCallback] if isinstance(self.policy, Alone) else []))
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.policy is not None:
            parts["scaling_policy"] = self.policy
        return super()._initialize_and_run_controller(**parts)


def beside(act: Callable[[], Any]) -> Future[Any]:
    """The future result of `act` on a thread of its own: on the main thread Ray would take Ctrl-C for itself.

    Where a signal ends the waiting for it, it ends with Ray.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # whatever it is, it is for the one who waits
            future.set_exception(error)

    threading.Thread(target=run, name="beside", daemon=True).start()
    return future


def _do(work: Work) -> None:
    """What each worker process does."""
    import torch

    from trainer.ranks import Ranks

    context = ray.train.get_context()
    ranks = Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    work(ranks, lambda metrics: ray.train.report(metrics))
