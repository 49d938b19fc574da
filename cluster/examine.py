"""The firewall's work as Ray tasks, on whatever machines there are."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from cluster import engine  # first: it sets what Ray reads when it is imported

# isort: split
import ray
from ray.exceptions import RayError, RayTaskError

from pipelines import firewall
from pipelines.errors import UserError, first_line
from pipelines.firewall import Decoded, Progress, Refused
from pipelines.scanning import Examine

CHUNK = 256  # files in a task: some tenths of a second, against some milliseconds that a task costs


def over_ray(address: str | None) -> Examine:
    """What `pipelines.scan` takes as `examine`: it starts or joins Ray when there are files, and leaves it again.

    Args:
        address: where a cluster answers, all of whose machines must see the folder; `None` for this machine.
    """

    def examine(files: Sequence[str], *, progress: Progress | None, max_pixels: int) -> list[Decoded | Refused]:
        try:
            with engine.at(address):
                return _examine(files, progress, max_pixels)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from None
            raise UserError(
                f"--address {address or 'local'}: the scan ended on the cluster with {type(cause).__name__}: "
                f"{first_line(cause)}. Check that its machines have this version of the package, or scan without "
                "--address."
            ) from error

    return examine


def _examine(files: Sequence[str], progress: Progress | None, max_pixels: int) -> list[Decoded | Refused]:
    chunks = [files[at : at + CHUNK] for at in range(0, len(files), CHUNK)]
    tasks = [_examine_chunk.remote(chunk, max_pixels) for chunk in chunks]
    size = dict(zip(tasks, map(len, chunks), strict=True))
    waiting, done = tasks, 0
    while waiting:
        finished, waiting = ray.wait(waiting)
        done += sum(size[task] for task in finished)
        if progress is not None:
            progress(done, len(files))
    return [verdict for task in tasks for verdict in ray.get(task)]


@ray.remote(num_cpus=1)
def _examine_chunk(files: Sequence[str], max_pixels: int) -> list[Decoded | Refused]:
    # A machine without the folder would refuse its every image.
    if not any(os.path.lexists(file) for file in files):
        raise UserError(
            f"The machine {socket.gethostname()} of the cluster does not see {os.path.dirname(files[0])!r}. Mount the "
            "images at the same place on each machine, or scan without --address."
        )
    return firewall.examine(files, threads=1, max_pixels=max_pixels)
