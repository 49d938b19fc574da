"""The training step and the epoch around it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import UserError
from pipelines.loader import Batch, Loader
from pipelines.plan import rank_slice
from trainer import compiling, optim
from trainer.compression import HOOKS
from trainer.config import Compression
from trainer.ema import Ema
from trainer.guard import IN_A_ROW, REWINDS, Guard, RewindError, images, refusal
from trainer.journal import Journal
from trainer.losses import CrossEntropy, Loss
from trainer.mixing import Mixing, mix
from trainer.models import Classifier, freeze_to
from trainer.position import Position
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
    micro_batches: int = 1
    """How many a rank's part of a global batch is split into; see `micro`."""
    clip_norm: float | None = None
    """Most L2 norm of the gradient."""
    compression: Compression = "none"
    compile: bool = False
    scaler: torch.amp.GradScaler = field(init=False)
    network: nn.Module = field(init=False)
    """The model as it is called: behind DDP where there are several ranks."""

    def __post_init__(self) -> None:
        self.scaler = self.precision.scaler()
        self.network = self.model
        if self.compile:
            for model in dict.fromkeys((self.model, self.judged)):
                compiling.compile_in_place(model)

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
                # A static graph counts the gradients of its first step, and takes those of micro-batches for its own.
                # Both let a model have parameters that take no part.
                static_graph=self.micro_batches == 1,
                find_unused_parameters=self.micro_batches > 1,
            )
            if self.compression != "none":
                self.network.register_comm_hook(None, HOOKS[self.compression])

    def split(self, images_NCHW: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of a step. Gradients add up; ranks exchange them with those of the last one alone."""
        parts = zip(images_NCHW.tensor_split(self.micro_batches), targets.tensor_split(self.micro_batches), strict=True)
        *first, last = parts
        alone = self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()
        with alone:
            yield from first
        yield last

    def copied_buffers(self, *, always: bool = False) -> list[torch.Tensor]:
        """What `restore` needs where a step may be skipped: batch-norm's statistics take in what overflows."""
        return [buffer.clone() for buffer in self.model.buffers()] if always or self.scaler.is_enabled() else []

    def norm(self) -> torch.Tensor:
        """L2 norm of the gradient, the same on all ranks, a scalar tensor."""
        return nn.utils.get_total_norm([each.grad for each in self.model.parameters() if each.grad is not None])

    def restore(self, buffers: list[torch.Tensor]) -> None:
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def clip(self) -> torch.Tensor | None:
        """Shorten the gradient to `clip_norm`; returns its L2 norm before, the same on all ranks, a scalar tensor."""
        if self.clip_norm is None:
            return None
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)


class Step(NamedTuple):
    """What an optimiser step was; the same on all ranks."""

    loss: torch.Tensor
    """Mean over the global batch, a scalar."""
    norm: torch.Tensor | None
    """L2 norm of the gradient before it was clipped, a scalar; `None` where nothing is clipped."""
    asked: torch.Tensor
    """How many ranks were asked to stop, a scalar."""
    happened: bool
    """Not where fp16 overflowed on any rank, or the loss was not what it must be: then it has left no trace, but a
    smaller loss scale."""

    @property
    def measured(self) -> list[torch.Tensor]:
        """The loss, how many were asked to stop, and the norm where there is one."""
        return [self.loss, self.asked, *([] if self.norm is None else [self.norm])]


def dropout_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of the step's dropout: a function of its place in the run, so there is no random state to save."""
    return int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_dropout(device: torch.device, seed: int) -> None:
    """As `torch.manual_seed` for the CPU and `device`; that one also asks for kinds of device that are not there, and
    notes each time a stack trace for each of them, which takes longer than everything else beside the model."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def train_step(
    learner: Learner,
    batch: Batch,
    *,
    global_batch: int,
    hyper: Hyper,
    noise: tuple[int, int, int],
    asked: bool = False,
    most: float | None = None,
) -> Step:
    """One optimiser step on this rank's part of a global batch.

    Args:
        hyper: learning rate of each layer group, and momentum.
        noise: (seed, epoch, step), from which dropout is drawn.
        asked: whether this rank is asked to stop; the others are told on the way, with the loss.
        most: a step whose loss is above it, or whose loss or gradient is no number, does not happen. (Knowing that
            takes time: before the weights change, and on a GPU by waiting for it.) `None`: every step happens, but for
            those that the scaler of fp16 skips.
    """
    optim.set_hyper(learner.optimizer, *hyper)
    seed_dropout(learner.ranks.device, dropout_seed(*noise, learner.ranks.rank))
    scale, buffers = learner.scaler.get_scale(), learner.copied_buffers(always=most is not None)
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
    loss_sum = torch.zeros((), device=images_NCHW.device)
    for images_MCHW, part in learner.split(images_NCHW, targets):
        with learner.precision.autocast():
            logits_MC = learner.network(images_MCHW)
        part_sum = learner.loss.total(logits_MC.float(), part)
        # DDP averages over ranks, whose parts may be unequal: scaled so, the sum is the mean over the global batch.
        loss = part_sum * (learner.ranks.world_size / global_batch)
        learner.scaler.scale(loss).backward()
        loss_sum += part_sum.detach()
    told_2 = learner.ranks.sum(torch.stack([loss_sum, torch.full_like(loss_sum, asked)]))
    mean = told_2[0] / global_batch
    norm = learner.clip()
    happened = most is None or bool(mean <= most and (learner.norm() if norm is None else norm).isfinite())
    if happened:
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        happened = learner.scaler.get_scale() >= scale
    learner.optimizer.zero_grad(set_to_none=True)
    if not happened:
        learner.restore(buffers)
    return Step(mean, norm, told_2[1], happened)


def train_epoch(
    learner: Learner,
    loader: Loader,
    phase: Phase,
    start: Position,
    *,
    seed: int,
    journal: Journal,
    asked: Callable[[], bool] = lambda: False,
    guard: Guard = Guard(),  # noqa: B008  frozen
) -> Iterator[Position]:
    """Train an epoch of a phase, from where `start` stands to its end; tells where the run stands, step by step.

    It ends before, after the same step on every rank, where any of them is `asked` to stop. Of batches whose loss is no
    number, or explodes, the `guard` decides.

    `updates` counts steps that happened: one that the loss scaler skips does not advance the schedule. The loss of such
    a step may be no number; it is then left out of the mean, and null in the journal.
    On a GPU the losses of ten steps are read at once, and the position is told as often: reading waits for the GPU.

    Raises:
        UserError: the loss of a step is no number or exploded, and the guard does not help; or fp16 overflows whatever
            the loss is scaled by. Every rank sees the same loss and scale, so all stop here.
        RewindError: likewise, where the guard rewinds.
    """
    learner.model.train()
    global_batch, epoch = loader.plan.global_batch, start.epoch
    updates, total, counted = start.updates, start.loss_sum, start.losses
    # fp16's scaler already skips what is no number.
    scaled, skipped = learner.scaler.is_enabled(), 0
    checking = guard.action != "stop" and not scaled
    # Reading a loss waits for the GPU. So does the scaler at each step, and knowing it before the weights change.
    read_every = 1 if learner.ranks.device.type == "cpu" or scaled or checking else 10
    unread: list[tuple[int, list[float], Step]] = []
    clock, waited, stop = time.perf_counter(), 0.0, False
    batches = loader.epoch(epoch, start.step)
    for step in range(start.step, loader.steps):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before

        hyper = phase.hyper(updates)
        if (epoch, step) not in guard.left_out:
            done = train_step(
                learner,
                batch,
                global_batch=global_batch,
                hyper=hyper,
                noise=(seed, epoch, step),
                asked=asked(),
                most=guard.most(total, counted) if checking else None,
            )
            updates += done.happened
            if done.happened and learner.ema is not None:
                learner.ema.update(learner.model)
            unread.append((step, hyper[0], done))

        if len(unread) < read_every and step + 1 < loader.steps:
            continue
        rows = torch.stack([torch.stack(done.measured) for _, _, done in unread]).tolist() if unread else []
        now = time.perf_counter()
        seconds = now - clock
        for (at, lrs, done), row in zip(unread, rows, strict=True):
            bad = not row[0] <= guard.most(total, counted) or (checking and not done.happened)
            if bad and (done.happened or checking):
                skipped += 1
                paths, name = images(loader, epoch, at), learner.precision.name
                # In fp16 a loss is seen when its step has happened: what exploded is too late to skip.
                action = "stop" if done.happened and guard.action == "skip" else guard.action
                journal.write("bad_batch", epoch=epoch, step=at, loss=repr(row[0]), action=action, images=paths)
                if guard.action == "rewind" and len(guard.left_out) < REWINDS:
                    raise RewindError
                if done.happened or skipped == IN_A_ROW:
                    raise refusal(row[0], epoch, at, paths, lrs[-1], name)
            else:
                skipped = 0
            measured = dict(zip(("loss", "asked", "grad_norm"), row, strict=False))
            stop = measured.pop("asked") > 0 or stop
            journal.write(
                "step",
                step=epoch * loader.steps + at,
                epoch=epoch,
                **{name: value if np.isfinite(value) else None for name, value in measured.items()},
                **({} if done.happened else {"skipped": True}),
                lr=lrs,
                images_per_second=global_batch * len(unread) / seconds,
                data_wait=waited / seconds,
            )
            if np.isfinite(row[0]) and not (bad and checking):
                total, counted = total + row[0], counted + 1
        if learner.scaler.get_scale() < 1:
            raise UserError(
                f"The gradient overflows in fp16 even where the loss is scaled by less than 1: at step {step} of "
                f"epoch {epoch}, on all workers. Use --precision bf16 or fp32, or lower --lr (the rate was "
                f"{hyper[0][-1]:.2g})."
            )
        unread.clear()
        yield replace(start, step=step + 1, updates=updates, loss_sum=total, losses=counted)
        if stop:
            return
        clock, waited = time.perf_counter(), 0.0
    if not counted:
        raise UserError(
            f"No loss of epoch {epoch} was a number: the network overflows in fp16. Use --precision bf16 or fp32."
        )
