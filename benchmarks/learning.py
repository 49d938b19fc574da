"""Training as a benchmark wants it: the trainer's own loop, at a rate that moves nothing, as long as it is asked."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import long
from benchmarks.first import first_model
from pipelines import Augment, Loader, Samples
from pipelines.loader import Batch
from trainer import models, optim, precision, schedule
from trainer.config import Compression
from trainer.journal import Journal, read
from trainer.loop import Learner, train_epoch
from trainer.position import Position
from trainer.ranks import Ranks

FIRST = 3  # steps of a turn that do not count: queues fill, kernels are chosen
_HELD = 4  # batches in memory, which the steps go through in a circle
_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how."""

    samples: Samples
    model: str
    size: int
    batch: int
    """Images in a step, over all ranks."""
    head: str = "fastai"
    threads: int = 1
    """Of each rank: they decode, and they compute."""
    precision: str = "auto"
    compression: Compression = "none"


class InMemory:
    """As much of a loader as `train_epoch` asks for: an epoch of `steps` batches that are there already."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.plan, self.steps = loader.plan, steps
        self._held = list(itertools.islice(loader.epoch(0), _HELD))

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The same batches in every epoch."""
        return itertools.islice(itertools.cycle(self._held), start_step, self.steps)


def loader_of(setting: Setting, ranks: Ranks = Ranks()) -> Loader:  # noqa: B008  frozen
    """As in training; its epochs are long."""
    statistics = models.statistics(setting.model)
    return Loader(
        long(setting.samples),
        size=setting.size,
        global_batch=setting.batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=Augment(),
        threads=setting.threads,
        mean=statistics.mean,
        std=statistics.std,
        device="gpu" if ranks.device.type == "cuda" else "cpu",
        device_id=ranks.local_rank,
        half=precision.resolve(setting.precision, ranks.device).half_images,
    )


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a turn took."""

    steps: int
    seconds: float
    waited: float
    """Of the seconds, those in which the model waited for images."""

    @property
    def step(self) -> float:
        """Seconds."""
        return self.seconds / self.steps


class Training:
    """Everything learns, on this rank and those that do the same."""

    def __init__(self, setting: Setting, folder: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008  frozen
        folder.mkdir(parents=True, exist_ok=True)
        self.setting, self._folder = setting, folder
        self._numbers = precision.resolve(setting.precision, ranks.device)
        torch.manual_seed(0)
        classes = len(setting.samples.classes)
        model = first_model(setting.model, head=setting.head, classes=classes, size=setting.size)
        model = model.to(device=ranks.device).ordered(torch.channels_last)
        optimizer = optim.build(model, 0.01, setting.size)
        self._learner = Learner(
            model=model,
            optimizer=optimizer,
            precision=self._numbers,
            ranks=ranks,
            compression=setting.compression,
        )
        self._learner.train(first_group=0)
        groups = len(optim.groups_of(optimizer))
        (self._phase,) = schedule.fit_flat_cos(lr=_RATE, groups=groups, steps_per_epoch=10**6, epochs=1)
        self._loader, self._epochs = loader_of(setting, ranks), itertools.count()

    @cached_property
    def _held(self) -> InMemory:
        return InMemory(self._loader, 10**6)

    @property
    def gradient(self) -> int:
        """Bytes."""
        return sum(p.numel() * p.element_size() for p in self._learner.model.parameters() if p.requires_grad)

    def run(self, *, loaded: bool, steps: int, seconds: float = 0.0) -> Took:
        """So many steps at least, and for so long at least, after the `FIRST` ones.

        Of several ranks each must be asked for the same steps and for no seconds.

        Args:
            loaded: the images are read meanwhile; else they lie in memory.
        """
        torch.set_num_threads(self.setting.threads)  # these are the process's, and another training may have set them
        self._numbers.set_tf32()
        epoch = next(self._epochs)
        batches: Any = self._loader if loaded else self._held
        start, journal = Position(epoch=epoch, base_lr=_RATE), Journal(self._folder / f"{epoch}.jsonl")
        learning: Any = train_epoch(self._learner, batches, self._phase, start, seed=0, journal=journal)
        now, began, first, step = 0.0, 0.0, 0, 0
        with closing(learning):
            for position in learning:
                now, step = time.perf_counter(), position.step
                if not first:
                    began, first = (now, step) if step >= FIRST else (0.0, 0)
                elif step - first >= steps and now - began >= seconds:
                    break
        journal.close()
        told = [event for event in read(self._folder / f"{epoch}.jsonl") if event["event"] == "step"][first:]
        waited = sum(event["data_wait"] * self.setting.batch / event["images_per_second"] for event in told)
        return Took(steps=step - first, seconds=now - began, waited=waited)
