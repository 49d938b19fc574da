"""The training step and the epoch around it."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import UserError
from pipelines.loader import Batch, Loader
from pipelines.plan import rank_slice
from trainer import optim
from trainer.ema import Ema
from trainer.journal import Journal
from trainer.losses import CrossEntropy, Loss
from trainer.mixing import Mixing, mix
from trainer.models import Classifier, freeze_to
from trainer.precision import Precision
from trainer.ranks import Ranks
from trainer.schedule import Phase

Hyper = tuple[list[float], float]


@dataclass(kw_only=True)
class Learner:
    """What learns: the model, what updates it, and how its processes talk."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    precision: Precision
    ranks: Ranks
    loss: Loss = field(default_factory=CrossEntropy)
    mixing: Mixing = field(default_factory=Mixing)
    classes: int = 0
    """Of the logits; what mixing needs."""
    ema: Ema | None = None
    scaler: torch.amp.GradScaler = field(init=False)
    network: nn.Module = field(init=False)
    """The model as it is called: behind DDP where there are several ranks."""

    def __post_init__(self) -> None:
        self.scaler = self.precision.scaler()
        self.network = self.model

    @property
    def judged(self) -> Classifier:
        """The model to judge and to keep: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.model

    def train(self, *, first_group: int, train_bn: bool = True) -> None:
        """Choose what learns: the layer groups from `first_group` on; see `models.freeze_to`.

        DDP is made anew: it reduces the parameters that require a gradient when it is made.
        """
        freeze_to(self.model, optim.groups_of(self.optimizer), first_group, train_bn=train_bn)
        self.model.train()
        self.network = self.model
        gc.collect()  # an earlier DDP wrapper would go on reducing the same gradients until it is gone
        if self.ranks.world_size > 1:
            # Buffers stay local while training: batch statistics are averaged when they are used (see `optim`).
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                static_graph=True,
            )


def dropout_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of the step's dropout: a function of its place in the run, so there is no random state to save."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def train_step(
    learner: Learner, batch: Batch, *, global_batch: int, hyper: Hyper, noise: tuple[int, int, int]
) -> torch.Tensor:
    """One optimiser step on this rank's part of a global batch; returns the loss of the whole batch, a scalar tensor.

    Args:
        hyper: learning rate of each layer group, and momentum.
        noise: (seed, epoch, step), from which dropout is drawn.
    """
    optim.set_hyper(learner.optimizer, *hyper)
    torch.manual_seed(dropout_seed(*noise, learner.ranks.rank))
    images_NCHW, targets = batch.images_NCHW, batch.labels_N
    if learner.mixing:
        images_NCHW, targets = mix(
            images_NCHW,
            targets,
            classes=learner.classes,
            mixing=learner.mixing,
            places_N=rank_slice(np.arange(global_batch), learner.ranks.rank, learner.ranks.world_size),
            global_batch=global_batch,
            key=noise,
        )
    with learner.precision.autocast():
        logits_NC = learner.network(images_NCHW)
    loss_sum = learner.loss.total(logits_NC.float(), targets)
    # DDP averages over ranks; ranks may hold unequal parts. Scaled so, the result is the mean over the global batch.
    loss = loss_sum * (learner.ranks.world_size / global_batch)
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return learner.ranks.sum(loss_sum.detach()) / global_batch


def train_epoch(
    learner: Learner, loader: Loader, phase: Phase, epoch: int, *, updates: int, seed: int, journal: Journal
) -> tuple[float, int, float]:
    """Train one epoch of a phase; returns the mean loss, the optimiser steps of the phase so far, and images/s.

    `updates` counts steps that happened: one that the loss scaler skips does not advance the schedule.

    Raises:
        UserError: the loss is no longer a number. Every rank sees the same loss, so all stop here.
    """
    learner.model.train()
    global_batch = loader.plan.global_batch
    read_every = 1 if learner.ranks.device.type == "cpu" else 10  # reading a loss waits for the GPU
    unread: list[tuple[int, list[float], torch.Tensor]] = []
    total = 0.0
    started = clock = time.perf_counter()
    waited = 0.0
    batches = loader.epoch(epoch)
    for step in range(loader.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked

        hyper = phase.hyper(updates)
        scale = learner.scaler.get_scale()
        loss = train_step(learner, batch, global_batch=global_batch, hyper=hyper, noise=(seed, epoch, step))
        stepped = learner.scaler.get_scale() >= scale
        updates += stepped
        if stepped and learner.ema is not None:
            learner.ema.update(learner.model)

        unread.append((step, hyper[0], loss))
        if len(unread) < read_every and step + 1 < loader.steps:
            continue
        losses = torch.stack([loss for _, _, loss in unread]).tolist()
        now = time.perf_counter()
        seconds = now - clock
        for (at, lrs, _), value in zip(unread, losses, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"The loss became {value} at step {at} of epoch {epoch}, on all workers. Lower --lr (the rate was "
                    f"{lrs[-1]:.2g})"
                    + (" or use --precision bf16 or fp32." if learner.precision.name == "fp16" else ".")
                )
            journal.write(
                "step",
                step=epoch * loader.steps + at,
                epoch=epoch,
                loss=value,
                lr=lrs,
                images_per_second=global_batch * len(unread) / seconds,
                data_wait=waited / seconds,
            )
            total += value
        unread.clear()
        clock, waited = now, 0.0
    return total / loader.steps, updates, global_batch * loader.steps / (time.perf_counter() - started)
