"""Gradient accumulation: a rank's part of a global batch is computed in micro-batches, one after the other."""

from __future__ import annotations

from pipelines.errors import UserError
from trainer.crew import Crew


def micro_batches(global_batch: int, world_size: int, most: int | None) -> int:
    """Into how many micro-batches each rank splits its part, so that none holds more than `most` images.

    The number is that of the largest part, on every rank, also where parts are unequal: whatever in the network talks
    to other ranks is called equally often on all. A part is split as evenly as can be.

    Raises:
        UserError: a micro-batch would hold one image alone.
    """
    if most is None:
        return 1
    if not _fits(global_batch, world_size, most):
        smallest, more = global_batch // world_size, most
        while not _fits(global_batch, world_size, more):
            more += 1
        raise UserError(
            f"--micro-batch {most} splits the {smallest} images of a worker so that one is left alone, and batch-norm "
            f"has no variance of one. Choose --micro-batch {more}, or another --batch."
        )
    return _number(global_batch, world_size, most)


def share(global_batch: int, crew: Crew) -> int:
    """The part of a worker where there are the most of them: what each computes at once, however few are left.

    So neither the memory that a step takes nor what batch-norm sees depends on their number. A few more, where one
    image would be left alone.
    """
    most = max(2, -(-global_batch // crew.most))
    while not all(_fits(global_batch, size, most) for size in crew.sizes):
        most += 1
    return most


def _number(global_batch: int, world_size: int, most: int) -> int:
    largest = -(-global_batch // world_size)
    return -(-largest // most)


def _fits(global_batch: int, world_size: int, most: int) -> bool:
    """Whether no image is left alone that was not so before."""
    smallest = global_batch // world_size
    return smallest < 2 or smallest // _number(global_batch, world_size, most) >= 2
