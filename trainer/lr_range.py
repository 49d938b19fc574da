"""The distributed learning-rate range test (Smith, "Cyclical learning rates for training neural networks", 2017)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.loader import Batch
from pipelines.plan import RANGE_TEST_EPOCH
from trainer import optim
from trainer.journal import Journal
from trainer.loop import Learner, train_step
from trainer.schedule import last_and_tenth

LOW, HIGH = 1e-5, 10.0
STEPS = 20, 100  # fewest and most
DIVERGED = 4.0  # times the best smoothed loss
APART, DIFFERENT = 15, 0.005  # fastai's `lr_diff` and `thresh` of `slide`
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

    def choose(self, name: str) -> tuple[str, float]:
        """The suggestion `name`, and its name: another where the curve is too short for it, or says nothing."""
        for known in (name, CHOICE):
            if known in self.suggestions:
                return known, self.suggestions[known]
        return "default", FALLBACK


def range_test(
    learner: Learner,
    batches: Iterator[Batch],
    *,
    global_batch: int,
    steps: int,
    seed: int,
    journal: Journal,
    ratios: Sequence[float] | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> RangeTest | None:
    """Raise the rate from 1e-5 to 10 over `steps` steps, on all ranks together, and leave the learner as it was.

    A multiplier is swept over the layer groups, so their ratios are those of training. Every decision comes from the
    step and the all-reduced loss, which has the same bits on all ranks and is no number if one rank's part is none:
    all leave at the same step. Ends early when the smoothed loss passes four times its best, or is no number.

    Args:
        batches: this rank's parts of the global batches, at least `steps` of them.
        ratios: rate of each layer group over that of the last (`Phase.ratios` of the phase to come); by default a
            tenth for all but the last, as in `fine_tune`'s frozen phase.
        asked: whether this rank is asked to stop; then all leave after the same step, with `None`.

    Raises:
        UserError: there are too few steps for a curve, or more than anyone should wait for.
    """
    if not STEPS[0] <= steps <= STEPS[1]:
        raise UserError(f"--lr-find-steps is {steps}; it must be between {STEPS[0]} and {STEPS[1]}.")
    groups = len(optim.groups_of(learner.optimizer))
    ratios = last_and_tenth(1.0, groups) if ratios is None else ratios
    if len(ratios) != groups:
        raise ValueError(f"{len(ratios)} ratios for {groups} layer groups")
    beta = 0.98 ** (100 / steps)  # fastai smooths with 0.98 over 100 steps: the same share of the sweep
    lrs, losses, smoothed = [], [], []
    average, best = 0.0, math.inf
    with unchanged(learner):
        learner.model.train()
        for step, batch in zip(range(steps), batches, strict=False):
            lr = LOW * (HIGH / LOW) ** (step / (steps - 1))
            hyper = [lr * ratio for ratio in ratios], 0.95
            done = train_step(
                learner,
                batch,
                global_batch=global_batch,
                hyper=hyper,
                noise=(seed, RANGE_TEST_EPOCH, step),
                asked=asked(),
            )
            loss, stop, *_ = torch.stack(done.measured).tolist()
            if stop:
                return None
            if not math.isfinite(loss):
                break
            average = beta * average + (1 - beta) * loss
            smooth = average / (1 - beta ** (step + 1))
            lrs.append(lr), losses.append(loss), smoothed.append(smooth)
            journal.write("range_step", step=step, lr=lr, loss=loss, smoothed=smooth)
            best = min(best, smooth)
            if smooth > DIVERGED * best:
                break
    return RangeTest(
        lrs=tuple(lrs),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        suggestions=suggest(lrs, smoothed, steps),
    )


def suggest(lrs: Sequence[float], smoothed: Sequence[float], steps: int) -> dict[str, float]:
    """Suggested rates, from the curve without its first tenth and its last five points, and up to the first NaN.

    `valley`, `steep`, `minimum` (a tenth of it) and `slide` are fastai 2.8's; `slide` compares points that lie 15
    apart, and is left out where there are no two. `balanced` is what a person reads off the plot, as the fastai book
    does: between the cautious valley and the bold tenth of the minimum, half-way on the log axis. Empty where the
    loss never fell by 2%: such a curve carries no information.
    """
    lrs_M, losses_M = np.array(lrs[steps // 10 : -5]), np.array(smoothed[steps // 10 : -5])
    if np.isnan(losses_M).any():
        end = int(np.isnan(losses_M).argmax())
        lrs_M, losses_M = lrs_M[:end], losses_M[:end]
    if len(lrs_M) < 5 or losses_M.min() > 0.98 * losses_M[0]:
        return {}
    slope = np.diff(losses_M) / np.diff(np.log(lrs_M))
    valley, minimum = float(lrs_M[_valley(losses_M)]), float(lrs_M[losses_M.argmin()]) / 10
    found = {
        "valley": valley,
        "steep": float(lrs_M[slope.argmin()]),
        "minimum": minimum,
        "balanced": math.sqrt(valley * minimum),
    }
    if len(lrs_M) > APART:
        found["slide"] = float(lrs_M[_slide(losses_M)])
    return found


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


def _slide(losses_M: np.ndarray) -> int:
    """Two points `APART` slide down from the end for as long as the curve's slopes there differ; the left one's place.

    The slopes are per point, not per unit of the rate's logarithm, as in fastai: they depend on the number of steps.
    """
    slope_M = np.gradient(losses_M)
    found = left = len(losses_M) - 1 - APART
    while left >= 0 and abs(slope_M[left + APART] - slope_M[left]) > DIFFERENT:
        found = left
        left -= 1
    return found


@contextmanager
def unchanged(learner: Learner) -> Generator[None]:
    """Whatever happens inside, and however it ends, the learner is afterwards what it was, to the bit.

    The model's parameters and buffers, what of it learns and which parts are in training mode, the optimiser's state
    and groups, the loss scaler, and torch's random state. Gradients are not kept: between steps there are none.
    """
    model, device = learner.model, learner.ranks.device
    tensors = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    optimizer = copy.deepcopy(learner.optimizer.state_dict())
    scaler = learner.scaler.state_dict()
    random = torch.get_rng_state()
    random_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(model):
                tensor.copy_(tensors[name])
        for parameter, requires_grad in learning:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for module, training in modes:
            module.training = training
        learner.optimizer.state.clear()
        learner.optimizer.load_state_dict(optimizer)
        learner.scaler = learner.precision.scaler()  # one that was stopped within a step would refuse the next
        learner.scaler.load_state_dict(scaler)
        torch.set_rng_state(random)
        if random_cuda is not None:
            torch.cuda.set_rng_state(random_cuda, device)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, also those that a state dict leaves out."""
    return itertools.chain(model.named_parameters(), model.named_buffers())
