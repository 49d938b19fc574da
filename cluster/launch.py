"""Starting the workers of a run with Ray Train."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

# Ray reads these when it is imported; see each name for what it does.
QUIET_AND_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no reports home
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local cluster listens on loopback alone
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # also how often reports are collected and failures seen
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in QUIET_AND_LOCAL.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
import ray.train  # noqa: E402
import torch  # noqa: E402
from ray.train import RunConfig, ScalingConfig  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer  # noqa: E402

from pipelines.errors import UserError  # noqa: E402
from trainer.config import Goal  # noqa: E402
from trainer.ranks import Ranks  # noqa: E402
from trainer.worker import run  # noqa: E402

OBJECT_STORE_BYTES = 100 * 2**20  # workers share files, not objects
LONGEST_TEMPORARY = 24  # characters: Ray's sockets lie 83 deeper, and a socket's path ends at 107


class WorkersError(RuntimeError):
    """The workers ended with an error that is no mistake of the user's."""


def launch(folder: Path, goal: Goal, workers: int) -> None:
    """Run the prepared job in `folder` on `workers` processes of this machine and wait for its end.

    Raises:
        UserError: a worker met a mistake of the user's.
        WorkersError: anything else that ended a worker.
    """
    gpus = torch.cuda.device_count()
    temporary = tempfile.gettempdir()
    if len(temporary) > LONGEST_TEMPORARY:
        temporary = "/tmp"
    with tempfile.TemporaryDirectory(prefix="onewarp-", dir=temporary) as scratch:
        ray.init(
            address="local",
            num_cpus=max(len(os.sched_getaffinity(0)), workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=scratch,
            runtime_env={"env_vars": {"TMPDIR": scratch}},  # Ray kills its workers: what libraries leave goes with it
        )
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
        finally:
            ray.shutdown()


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
