"""The best weights so far, kept beside the last ones."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from pipelines.errors import UserError, first_line

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


def keep(path: Path, tensors: Tensors, best: Best | None = None) -> None:
    """Write the weights, and which epoch's they are if it is the best one's, into a file that is there whole or not.

    Raises:
        UserError: the storage does not take it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        metadata = None if best is None else {"best": json.dumps(asdict(best))}
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({first_line(error)}). All that was trained is in the run's checkpoints. Make "
            "room, and go on with the same command and the run's --name."
        ) from None


def taken_up(path: Path, best: Best | None, tensors: Tensors, at_hand: int | None) -> Best | None:
    """The best so far of a run that goes on from a checkpoint, and its file as it must be.

    A checkpoint is written before the file, so what can be missing is the file of the checkpoint's own epoch, whose
    weights are at hand. None where the file is gone or of another epoch, or the storage does not take it: the search
    begins anew.

    Args:
        best: what the checkpoint says.
        tensors: of the model that is judged, as restored.
        at_hand: the epoch whose weights they are; None in the middle of one.
    """
    if best is None or kept(path) == best:
        return best
    if best.epoch != at_hand:
        return None
    with suppress(UserError):
        keep(path, tensors, best)
        return best
    return None


def kept(path: Path) -> Best | None:
    """Whose weights the file holds, if it is there and whole."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return Best(**json.loads((file.metadata() or {})["best"]))
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError):
        return None
