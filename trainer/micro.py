"""Gradient accumulation: a rank's part of a global batch is computed in micro-batches, one after the other."""

from __future__ import annotations

from pipelines.errors import UserError


def micro_batches(global_batch: int, world_size: int, most: int | None) -> int:
    """Into how many micro-batches each rank splits its part, so that none holds more than `most` images.

    The number is that of the largest part, on every rank, also where parts are unequal: whatever in the network talks
    to other ranks is called equally often on all. A part is split as evenly as can be.

    Raises:
        UserError: a micro-batch would hold one image alone.
    """
    if most is None:
        return 1
    smallest, largest = global_batch // world_size, -(-global_batch // world_size)

    def number(most: int) -> int:
        return -(-largest // most)

    if smallest // number(most) < 2 <= smallest:
        fits = next(more for more in range(most + 1, largest + 1) if smallest // number(more) >= 2)
        raise UserError(
            f"--micro-batch {most} splits the {smallest} images of a worker so that one is left alone, and batch-norm "
            f"has no variance of one. Choose --micro-batch {fits}, or another --batch."
        )
    return number(most)
