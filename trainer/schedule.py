"""Learning rate and momentum as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` along half a cosine, `share` from 0 to 1."""
    return end + (start - end) * (1.0 + math.cos(math.pi * share)) / 2.0


def two_cosines(step: float, peak: float, last: float, start: float, top: float, end: float) -> float:
    """`start` at step 0, `top` at step `peak`, `end` at step `last`, cosines between them."""
    if step <= peak:
        return cosine(start, top, step / peak) if peak > 0 else top
    return cosine(top, end, min(1.0, (step - peak) / (last - peak)))


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The one-cycle policy (Smith, "A disciplined approach to neural network hyper-parameters", 2018).

    The rate rises from `max_lr / div` to `max_lr` and falls to `max_lr / div_final`; the momentum does the opposite.
    fastai reads the cycle at step / steps, so that the very end is never reached; torch's `OneCycleLR` counts so
    that its last step is the end. They are the same curve: fastai's over n steps is torch's over n + 1
    (`total_steps=n + 1, pct_start=(pct_start * n + 1) / (n + 1)`, less the last), and ours is fastai's.
    """

    steps: int
    """Optimiser steps of the cycle."""
    max_lr: float
    """Peak learning rate."""
    pct_start: float = 0.25
    """Share of the steps in which the rate rises."""
    div: float = 25.0
    """Peak rate over first rate."""
    div_final: float = 1e5
    """Peak rate over last rate."""
    momentum: tuple[float, float, float] = (0.95, 0.85, 0.95)
    """Momentum (Adam's first beta) at the start, at the peak and at the end."""

    def lr(self, step: float) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        return self._at(step, self.max_lr / self.div, self.max_lr, self.max_lr / self.div_final)

    def momentum_at(self, step: float) -> float:
        """Momentum of the same step."""
        return self._at(step, *self.momentum)

    def _at(self, step: float, start: float, top: float, end: float) -> float:
        return two_cosines(step, self.pct_start * self.steps, self.steps, start, top, end)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one set of trainable groups and one cycle."""

    name: str
    """`frozen` or `unfrozen`."""
    epochs: int
    first_epoch: int
    """Number of its first epoch in the run."""
    lrs: tuple[float, ...]
    """Peak learning rate of each layer group, from the input to the head."""
    cycle: OneCycle
    """The cycle of a peak rate of 1; a group's rate is its peak times this."""

    def hyper(self, step: int) -> tuple[list[float], float]:
        """Learning rate of each layer group, and momentum, at optimiser step `step` of this phase."""
        share = self.cycle.lr(step)
        return [lr * share for lr in self.lrs], self.cycle.momentum_at(step)


def geometric(low: float, high: float, n: int) -> tuple[float, ...]:
    """n rates from `low` to `high` in equal ratios (fastai's `even_mults`)."""
    return (high,) if n == 1 else tuple(low * (high / low) ** (i / (n - 1)) for i in range(n))


def last_and_tenth(high: float, n: int) -> tuple[float, ...]:
    """`high` for the last group, a tenth for the others (fastai's `slice(high)`)."""
    return (*[high / 10] * (n - 1), high)


def fine_tune(
    *,
    base_lr: float,
    groups: int,
    steps_per_epoch: int,
    epochs: int,
    freeze_epochs: int,
    lr_mult: float = 100.0,
) -> list[Phase]:
    """The phases of fastai's `fine_tune`: the head alone at the base rate, then everything at half of it.

    Frozen: `slice(base_lr)`, pct_start 0.99.
    Unfrozen: `slice(base_lr / 2 / lr_mult, base_lr / 2)`, pct_start 0.3, div 5.
    """
    phases = []
    if freeze_epochs:
        cycle = OneCycle(steps=freeze_epochs * steps_per_epoch, max_lr=1.0, pct_start=0.99)
        lrs = last_and_tenth(base_lr, groups)
        phases.append(Phase(name="frozen", epochs=freeze_epochs, first_epoch=0, lrs=lrs, cycle=cycle))
    if epochs:
        cycle = OneCycle(steps=epochs * steps_per_epoch, max_lr=1.0, pct_start=0.3, div=5.0)
        lrs = geometric(base_lr / 2 / lr_mult, base_lr / 2, groups)
        phases.append(Phase(name="unfrozen", epochs=epochs, first_epoch=freeze_epochs, lrs=lrs, cycle=cycle))
    return phases
