"""Starting the workers of a run with Ray Train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cluster import engine  # first: it sets what Ray reads when it is imported

# isort: split
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.errors import UserError
from trainer.config import Goal
from trainer.ranks import Ranks
from trainer.worker import run


class WorkersError(RuntimeError):
    """The workers ended with an error that is no mistake of the user's."""


def launch(folder: Path, goal: Goal, workers: int) -> None:
    """Run the prepared job in `folder` on `workers` processes of this machine and wait for its end.

    Raises:
        UserError: a worker met a mistake of the user's.
        WorkersError: anything else that ended a worker.
    """
    gpus = torch.cuda.device_count()
    with engine.local(max(len(os.sched_getaffinity(0)), workers)) as scratch:
        try:
            TorchTrainer(
                _work,
                train_loop_config={"folder": str(folder), "goal": goal},
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus)),  # ty: ignore[invalid-argument-type]
                torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
                run_config=RunConfig(name="run", storage_path=f"{scratch}/storage"),  # ty: ignore[invalid-argument-type]
            ).fit()
        except ray.train.TrainingFailedError as error:
            raise _told(error) from error


def _work(settings: dict[str, Any]) -> None:
    """What each worker process does."""
    context = ray.train.get_context()
    ranks = Ranks(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )
    run(Path(settings["folder"]), settings["goal"], ranks, report=lambda metrics: ray.train.report(metrics))


def _told(error: Exception) -> Exception:
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = cause.__cause__
    return WorkersError(str(error))
