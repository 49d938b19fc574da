"""The best weights so far, kept beside the last ones."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
"""A model's state, as `checkpoint.tensors` gives it."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """The epoch with the lowest validation error so far; of two that are equal the one with the lower loss.

    Its error flatters it a little: it is the lowest of several, each of which is also luck.
    """

    epoch: int
    """Its number in the run, from 0."""
    error_rate: float
    valid_loss: float

    def beats(self, other: Best | None) -> bool:
        """Whether it is better; of two epochs alike the earlier one stays."""
        return other is None or self._rank < other._rank

    @property
    def _rank(self) -> tuple[float, float]:
        return self.error_rate, math.inf if math.isnan(self.valid_loss) else self.valid_loss


def keep(path: Path, tensors: Tensors, best: Best) -> None:
    """Write the weights, and whose they are, into a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    safetensors.torch.save_file(tensors, partial, metadata={"best": json.dumps(asdict(best))})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def taken_up(path: Path, best: Best | None, tensors: Tensors, at_hand: int | None) -> Best | None:
    """The best so far of a run that goes on from a checkpoint, and its file as it must be.

    A checkpoint is written before the file, so what can be missing is the file of the checkpoint's own epoch, whose
    weights are at hand. None where the file is gone or of another epoch: the search begins anew.

    Args:
        best: what the checkpoint says.
        tensors: of the model that is judged, as restored.
        at_hand: the epoch whose weights they are; None in the middle of one.
    """
    if best is None or kept(path) == best:
        return best
    if best.epoch != at_hand:
        return None
    keep(path, tensors, best)
    return best


def kept(path: Path) -> Best | None:
    """Whose weights the file holds, if it is there and whole."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return Best(**json.loads((file.metadata() or {})["best"]))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError):
        return None
