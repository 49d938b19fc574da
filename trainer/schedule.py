"""Learning rate and momentum as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.errors import UserError


class Curve(Protocol):
    """How the rate and the momentum run over the steps of a phase."""

    def lr(self, step: float) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        ...

    def momentum_at(self, step: float) -> float:
        """Momentum (Adam's first beta) of the same step."""
        ...


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
class FlatCosine:
    """fastai's `fit_flat_cos`: `max_lr`, and in the last quarter half a cosine down to `max_lr / div_final`."""

    steps: int
    """Optimiser steps of the curve."""
    max_lr: float
    """The flat learning rate."""
    pct_start: float = 0.75
    """Share of the steps in which the rate stays."""
    div_final: float = 1e5
    """Flat rate over last rate."""
    momentum: float = 0.9
    """Momentum of all steps."""

    def lr(self, step: float) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        start, top = self.max_lr, self.max_lr
        return two_cosines(step, self.pct_start * self.steps, self.steps, start, top, self.max_lr / self.div_final)

    def momentum_at(self, step: float) -> float:
        """Momentum of the same step."""
        return self.momentum


@dataclass(frozen=True, kw_only=True)
class WarmupLinear:
    """Two straight lines: from `max_lr / div` up to `max_lr`, and down towards 0, which the step after the last has.

    The warm-up is that of Goyal et al. ("Accurate, large minibatch SGD", 2017), the way down that of BERT.
    """

    steps: int
    """Optimiser steps of the curve."""
    max_lr: float
    """Peak learning rate."""
    pct_start: float = 0.1
    """Share of the steps in which the rate rises."""
    div: float = 25.0
    """Peak rate over first rate."""
    momentum: float = 0.9
    """Momentum of all steps."""

    def lr(self, step: float) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        peak, start = self.pct_start * self.steps, self.max_lr / self.div
        if step < peak:
            return start + (self.max_lr - start) * step / peak
        return self.max_lr * max(0.0, self.steps - step) / (self.steps - peak)

    def momentum_at(self, step: float) -> float:
        """Momentum of the same step."""
        return self.momentum


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one set of trainable groups and one curve of the rate."""

    name: str
    """`frozen` or `unfrozen`."""
    epochs: int
    first_epoch: int
    """Number of its first epoch in the run."""
    lrs: tuple[float, ...]
    """Peak learning rate of each layer group, from the input to the head."""
    cycle: Curve
    """The cycle of a peak rate of 1; a group's rate is its peak times this."""
    freeze_to: int = 0
    """First layer group that learns (`models.freeze_to`); negative numbers count from the end."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Rate of each layer group over that of the last."""
        return tuple(lr / self.lrs[-1] for lr in self.lrs)

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


def layerwise(high: float, n: int, decay: float) -> tuple[float, ...]:
    """`high` for the last group, and `decay` times the rate of the next for each before it (BEiT's layer decay)."""
    return tuple(high * decay ** (n - 1 - i) for i in range(n))


Rates = float | slice | Sequence[float]
"""A number: the rate of all layer groups. `slice(low, high)`: geometric from the input to the head. `slice(high)`: the
last group's, a tenth for the others. A sequence: one for each."""


def read_rates(lr: float | str) -> float | slice:
    """A rate as the command line has it: a number, `LOW:HIGH` as `slice(low, high)`, or `:HIGH` as `slice(high)`.

    Raises:
        UserError: it is none of them.
    """
    text = str(lr)
    try:
        bounds = [float(bound) for bound in text.removeprefix(":").split(":")]
    except ValueError:
        bounds = []
    if not 1 <= len(bounds) <= 2 - text.startswith(":") or not 0 < bounds[0] <= bounds[-1] < math.inf:
        raise UserError(
            f"--lr is {text}; it must be a number greater than 0, as 1e-3, or the rates of the first layers and of the "
            "head, LOW:HIGH, as 1e-6:1e-4, or :HIGH."
        )
    return slice(*bounds) if ":" in text else bounds[0]


def rates_in_words(lr: slice) -> str:
    """`LOW:HIGH` or `:HIGH`, in one spelling for each value."""
    return ":".join("" if bound is None else str(float(bound)) for bound in (lr.start, lr.stop))


def rates(lr: Rates, groups: int) -> tuple[float, ...]:
    """The rate of each of `groups` layer groups, as fastai reads its `lr`.

    Raises:
        UserError: a rate is not above 0, or their number is not that of the groups.
    """
    if isinstance(lr, slice):
        given = tuple(bound for bound in (lr.start, lr.stop) if bound is not None)
    else:
        given = tuple(lr) if isinstance(lr, Sequence) else (lr,)
    if not given or not min(given) > 0:
        raise UserError(f"The learning rate is {lr}; all rates must be greater than 0.")
    if isinstance(lr, slice):
        return last_and_tenth(*given, groups) if len(given) == 1 else geometric(*given, groups)
    if not isinstance(lr, Sequence):
        return given * groups
    if len(given) != groups:
        raise UserError(f"The {len(given)} learning rates {given} must be {groups}, one for each layer group.")
    return given


def fit_one_cycle(
    *,
    lr: Rates,
    groups: int,
    steps_per_epoch: int,
    epochs: int,
    pct_start: float = 0.25,
    div: float = 25.0,
    freeze_to: int = 0,
) -> list[Phase]:
    """The one phase of fastai's `fit_one_cycle`."""
    cycle = OneCycle(steps=epochs * steps_per_epoch, max_lr=1.0, pct_start=pct_start, div=div)
    return [_whole(cycle, rates(lr, groups), epochs, freeze_to)]


def fit_flat_cos(
    *, lr: Rates, groups: int, steps_per_epoch: int, epochs: int, pct_start: float = 0.75, freeze_to: int = 0
) -> list[Phase]:
    """The one phase of fastai's `fit_flat_cos`, for training from scratch."""
    cycle = FlatCosine(steps=epochs * steps_per_epoch, max_lr=1.0, pct_start=pct_start)
    return [_whole(cycle, rates(lr, groups), epochs, freeze_to)]


def fit_warmup_linear(
    *, lr: Rates, groups: int, steps_per_epoch: int, epochs: int, pct_start: float = 0.1, freeze_to: int = 0
) -> list[Phase]:
    """One phase of warm-up and linear decay, for training from scratch."""
    cycle = WarmupLinear(steps=epochs * steps_per_epoch, max_lr=1.0, pct_start=pct_start)
    return [_whole(cycle, rates(lr, groups), epochs, freeze_to)]


def _whole(cycle: Curve, lrs: tuple[float, ...], epochs: int, freeze_to: int) -> Phase:
    name = "frozen" if freeze_to else "unfrozen"
    return Phase(name=name, epochs=epochs, first_epoch=0, lrs=lrs, cycle=cycle, freeze_to=freeze_to)


def fine_tune(
    *,
    base_lr: float,
    groups: int,
    steps_per_epoch: int,
    epochs: int,
    freeze_epochs: int,
    lr_mult: float = 100.0,
    layer_decay: float | None = None,
) -> list[Phase]:
    """The phases of fastai's `fine_tune`: the head alone at the base rate, then everything at half of it.

    Frozen: `slice(base_lr)`, pct_start 0.99.
    Unfrozen: `slice(base_lr / 2 / lr_mult, base_lr / 2)`, pct_start 0.3, div 5; with `layer_decay` the rates are
    `layerwise` instead.
    """
    phases = []
    if freeze_epochs:
        cycle = OneCycle(steps=freeze_epochs * steps_per_epoch, max_lr=1.0, pct_start=0.99)
        lrs = last_and_tenth(base_lr, groups)
        phases.append(Phase(name="frozen", epochs=freeze_epochs, first_epoch=0, lrs=lrs, cycle=cycle, freeze_to=-1))
    if epochs:
        cycle = OneCycle(steps=epochs * steps_per_epoch, max_lr=1.0, pct_start=0.3, div=5.0)
        high = base_lr / 2
        lrs = geometric(high / lr_mult, high, groups) if layer_decay is None else layerwise(high, groups, layer_decay)
        phases.append(Phase(name="unfrozen", epochs=epochs, first_epoch=freeze_epochs, lrs=lrs, cycle=cycle))
    return phases
