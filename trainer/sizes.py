"""Progressive resizing: the size of the images as a pure function of the epoch."""

from __future__ import annotations

import re

from pipelines.errors import UserError

Stretch = tuple[int, int]
"""Size in pixels, and for how many epochs."""

STRETCHES = re.compile(r"\d{1,9}:[1-9]\d{0,8}(,\d{1,9}:[1-9]\d{0,8})*")


def read_sizes(text: str) -> tuple[Stretch, ...]:
    """`SIZE:EPOCHS,SIZE:EPOCHS,…` as numbers, at least one epoch of each size.

    Raises:
        UserError: the text is no such list.
    """
    if not STRETCHES.fullmatch(text):
        raise UserError(
            f"--sizes is {text!r}; it must be SIZE:EPOCHS for each size in turn, with commas and without spaces, as "
            "in 128:3,160:3,224:2."
        )
    pairs = (stretch.split(":") for stretch in text.split(","))
    return tuple((int(size), int(epochs)) for size, epochs in pairs)


def size_of_each_epoch(stretches: tuple[Stretch, ...], frozen: int) -> tuple[int, ...]:
    """The size of the training images in each epoch of a run; its first `frozen` have that of the first stretch."""
    whole = [size for size, epochs in stretches for _ in range(epochs)]
    return (*[stretches[0][0]] * frozen, *whole)
