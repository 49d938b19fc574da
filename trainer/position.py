"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.best import Best


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands; with the seed these are all it needs to go on."""

    epoch: int
    """The epoch that comes next, or is going on."""
    step: int = 0
    """Global batches of it that are done."""
    updates: int = 0
    """Optimiser steps done in the current phase."""
    base_lr: float | str
    """The rate that the range test chose, or that the user gave (`TrainConfig.lr`)."""
    loss_sum: float = 0.0
    """Sum of the losses of the epoch's steps so far."""
    losses: int = 0
    """How many they are: a step that fp16 skips may have none."""
    best: Best | None = None
    """The best of the epochs before, on rank 0."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Position:
        """The inverse of `dataclasses.asdict`."""
        best = values.pop("best")
        return cls(**values, best=best and Best(**best))
