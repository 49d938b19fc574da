"""The distributed learning-rate range test (Smith, "Cyclical learning rates for training neural networks", 2017)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.loader import Batch
from pipelines.plan import RANGE_TEST_EPOCH
from trainer.journal import Journal
from trainer.loop import Learner, train_step
from trainer.schedule import last_and_tenth

LOW, HIGH = 1e-5, 10.0
DIVERGED = 4.0  # times the best smoothed loss
CHOICE = "balanced"
FALLBACK = 1e-3  # the head's rate where the curve says nothing; what fastai calls Adam's "sensible default"


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """The curve of a range test; M steps were taken."""

    lrs: tuple[float, ...]
    """Rate of the last layer group at each step."""
    losses: tuple[float, ...]
    """Loss of each global batch."""
    smoothed: tuple[float, ...]
    """Its bias-corrected exponential average."""
    suggestions: dict[str, float]
    """Rates by the name of the method; empty where the curve carries no information."""

    @property
    def chosen(self) -> float:
        return self.suggestions.get(CHOICE, FALLBACK)


def range_test(
    learner: Learner, batches: Iterator[Batch], *, global_batch: int, steps: int, seed: int, journal: Journal
) -> RangeTest:
    """Raise the rate from 1e-5 to 10 over `steps` steps, on all ranks together, and leave the learner as it was.

    A multiplier is swept over the layer groups, so their ratios are those of training. Every decision comes from the
    all-reduced loss, so all ranks leave at the same step. Ends early when the smoothed loss passes four times its
    best, or is no number.
    """
    ratios = last_and_tenth(1.0, 1 + max(group["layer_group"] for group in learner.optimizer.param_groups))
    beta = 0.98 ** (100 / steps)  # fastai smooths with 0.98 over 100 steps: the same share of the sweep
    lrs, losses, smoothed = [], [], []
    average, best = 0.0, math.inf
    saved = _snapshot(learner)
    try:
        for step, batch in zip(range(steps), batches, strict=False):
            lr = LOW * (HIGH / LOW) ** (step / (steps - 1))
            hyper = [lr * ratio for ratio in ratios], 0.95
            loss = train_step(
                learner, batch, global_batch=global_batch, hyper=hyper, noise=(seed, RANGE_TEST_EPOCH, step)
            ).item()
            if not math.isfinite(loss):
                break
            average = beta * average + (1 - beta) * loss
            smooth = average / (1 - beta ** (step + 1))
            lrs.append(lr), losses.append(loss), smoothed.append(smooth)
            journal.write("range_step", step=step, lr=lr, loss=loss, smoothed=smooth)
            best = min(best, smooth)
            if smooth > DIVERGED * best:
                break
    finally:
        _restore(learner, saved)
    return RangeTest(
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestions=suggest(lrs, smoothed, steps),
    )


def suggest(lrs: list[float], smoothed: list[float], steps: int) -> dict[str, float]:
    """Suggested rates, from the curve without its first tenth and its last five points.

    `valley`, `steep` and `minimum` (a tenth of it) are fastai's. `balanced` is what a person reads off the plot, as
    the fastai book does: between the cautious valley and the bold tenth of the minimum, half-way on the log axis.
    Empty where the loss never fell by 2%: such a curve carries no information.
    """
    lrs_M, losses_M = np.array(lrs[steps // 10 : -5]), np.array(smoothed[steps // 10 : -5])
    if len(lrs_M) < 5 or losses_M.min() > 0.98 * losses_M[0]:
        return {}
    slope = np.diff(losses_M) / np.diff(np.log(lrs_M))
    valley, minimum = float(lrs_M[_valley(losses_M)]), float(lrs_M[losses_M.argmin()]) / 10
    return {
        "valley": valley,
        "steep": float(lrs_M[slope.argmin()]),
        "minimum": minimum,
        "balanced": math.sqrt(valley * minimum),
    }


def _valley(losses_M: np.ndarray) -> int:
    """Half-way between one and two thirds down the longest decreasing subsequence of the curve."""
    n = len(losses_M)
    longest = np.ones(n, int)
    first, last = 0, 0
    for i in range(1, n):
        for j in range(i):
            if losses_M[i] < losses_M[j] and longest[i] < longest[j] + 1:
                longest[i] = longest[j] + 1
            if longest[last] < longest[i]:
                last = i
                first = last - longest[last]
    third = (last - first) / 3
    return int(first + int(third) + int(third / 2))


def _snapshot(learner: Learner) -> dict[str, Any]:
    return {
        "model": {name: value.detach().clone() for name, value in learner.model.state_dict().items()},
        "optimizer": copy.deepcopy(learner.optimizer.state_dict()),
        "scaler": learner.scaler.state_dict(),
        "random": torch.get_rng_state(),
    }


def _restore(learner: Learner, saved: dict[str, Any]) -> None:
    learner.model.load_state_dict(saved["model"])
    learner.optimizer.state.clear()
    learner.optimizer.load_state_dict(saved["optimizer"])
    learner.scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["random"])
