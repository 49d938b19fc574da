"""What becomes of a batch whose loss is no number, or far above what it was."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.loader import Loader
from trainer.config import OnNan
from trainer.losses import Loss
from trainer.run_folder import printable

EXPLODED = 10  # times the mean of the epoch's losses before,
AT_LEAST = 5  # and as often that of a network that says nothing: a batch of a few hard images is no explosion
SETTLED = 20  # losses that make a mean
IN_A_ROW = 20  # batches that `skip` passes over before it gives up
REWINDS = 10


class RewindError(Exception):
    """Raised on all ranks after the same step: the run is to go on from its last checkpoint, without a batch."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Judges losses of global batches. All ranks see the same ones, so they act alike."""

    action: OnNan = "stop"
    chance: float = float("inf")
    """The loss of a network that says nothing; see `chance_of`."""
    left_out: Collection[tuple[int, int]] = ()
    """(epoch, step) of the batches that earlier rewinds leave out."""

    def most(self, loss_sum: float, losses: int) -> float:
        """The largest loss that a step may have, after so many of the epoch with such a sum; a float32."""
        largest = torch.finfo(torch.float32).max
        return min(largest, max(EXPLODED * loss_sum / losses, AT_LEAST * self.chance)) if losses >= SETTLED else largest


def chance_of(loss: Loss, classes: int) -> float:
    """The loss of logits that are all zero, as a mean over the classes."""
    device = "cpu" if loss.weights_C is None else loss.weights_C.device
    labels_C = torch.arange(classes, device=device)
    return loss.total(torch.zeros(classes, classes, device=device), labels_C).item() / classes


def rewound(events: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """(epoch, step) of the batches for which a run went back to its last checkpoint; by its journal."""
    found = (event for event in events if event["event"] == "bad_batch" and event["action"] == "rewind")
    return [(event["epoch"], event["step"]) for event in found]


def images(loader: Loader, epoch: int, step: int) -> list[str]:
    """The paths of the images of a global batch, those of all ranks."""
    positions_N, _ = loader.plan.entries(epoch, step)
    return [loader.samples.paths[position] for position in positions_N.tolist()]


def refusal(loss: float, epoch: int, step: int, paths: list[str], lr: float, precision: str) -> UserError:
    """What is said where such a batch ends the run."""
    became = f"rose to {loss:.4g}" if math.isfinite(loss) else f"became {loss}"
    shown = ", ".join(repr(printable(path)) for path in paths[:3])
    return UserError(
        f"The loss {became} at step {step} of epoch {epoch}, on all workers. Lower --lr (the rate was {lr:.2g})"
        + (" or use --precision bf16 or fp32" if precision == "fp16" else "")
        + f"; or go on from the last checkpoint without this batch, by the same command with the run's --name and "
        f"--on-nan rewind. Its images are {shown}{', …' if len(paths) > 3 else ''}; the journal has them all."
    )
