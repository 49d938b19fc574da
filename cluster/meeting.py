"""Where workers meet: a process group of torch's, in which SIGTERM asks a worker to stop.

What is here runs in the process of Ray's that starts the workers, and must not keep it waiting: torch is imported in
the workers alone.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from cluster import leaving
from pipelines.errors import UserError, first_line
from trainer import stopping
from trainer.stopping import WorkersError

PATIENCE = 1800.0  # seconds for a collective; `trainer.watchdog` has much less
MEETING = 300.0  # seconds to import torch and to meet
PARTING = 10.0  # seconds to leave a process group
STARTS = 3  # failures in a row, before any training


@dataclass
class Meeting(BackendConfig):
    """A process group."""

    backend: str = "gloo"
    """Of torch.distributed: gloo or nccl."""
    folder: Path | None = None
    """Where the workers of one machine meet, in a file. `None`: on a port of the first of them."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See `ray.train.backend.BackendConfig`."""
        return _Backend


class _Backend(Backend):
    """There is one for each process."""

    share_cuda_visible_devices = True
    failures = 0

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        with self._starting(worker_group):
            self._meet(worker_group, backend_config)

    @contextmanager
    def _starting(self, worker_group: Any) -> Generator[None]:
        """Failures are bounded, and let go of what the workers hold.

        Ray would start again after some of them for ever, after others never; and it holds on to their places, as for
        it the workers have started.
        """
        try:
            yield
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            worker_group._clear_state()
            self.failures += 1
            if self.failures == STARTS:
                raise WorkersError(f"The workers did not meet, {STARTS} times: {first_line(error)}") from error
            raise WorkerGroupStartupFailedError(first_line(error)) from error

    def _meet(self, worker_group: Any, meeting: Meeting) -> None:
        if meeting.folder is None:
            host, port = worker_group.execute_single(0, get_address_and_port)
            place = f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
        else:  # through a port they would meet on all interfaces
            place = f"file://{meeting.folder / uuid.uuid4().hex}"
        size = len(worker_group)
        joining = [worker_group.execute_single_async(at, _join, at, size, place, meeting.backend) for at in range(size)]
        ray.get(joining, timeout=MEETING)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        alone = backend_config.folder is not None
        with self._starting(worker_group):
            worker_group.execute(_listen, alone)  # work itself runs on another thread than the one that signals reach
            if not alone:  # one asks for all
                nodes = frozenset(worker.metadata.node_id for worker in worker_group.get_workers())
                worker_group.execute_single(0, leaving.watch, nodes)
        self.failures = 0

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with suppress(GetTimeoutError):  # then it ends with its processes
            ray.get(worker_group.execute_async(_part), timeout=PARTING)


def _join(rank: int, size: int, place: str, backend: str) -> None:
    import torch.distributed as dist

    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=size, timeout=patience)


def _part() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _listen(alone: bool) -> None:
    """On a cluster SIGTERM is what comes before a machine goes: the run is to go on without it."""
    told = stopping.stop if alone else stopping.leave
    signal.signal(signal.SIGTERM, lambda number, frame: told())
