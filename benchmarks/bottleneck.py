"""Where is the bottleneck of a training on these images, on this machine, and which switch moves it?

    onewarp doctor DIR [--model NAME] [--size N] [--batch N] [--json FILE]

Everything is measured as a training does it, in one process on all cores: what reads and decodes, by itself; what
computes, by itself, on batches that lie in memory; both together, with the share of time that the model waits for
images. Whatever is slower binds. Then the switches that could help are tried, one at a time, and only what helped is
named.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead import InMemory
from benchmarks.record import Figure, Options, Record, open_data
from pipelines import Augment, Loader, Samples, pack
from pipelines.errors import UserError
from pipelines.loader import Batch
from pipelines.manifest import Manifest
from trainer import models, optim, precision, schedule, weights
from trainer.journal import Journal, read
from trainer.loop import Learner, train_epoch
from trainer.position import Position
from trainer.ranks import Ranks

SPEED, GAIN = "img/s", "with it ÷ without"
STORAGE, READING, MODEL, BOTH = "reading files, not cached", "the loader alone", "the model alone", "both together"
WAITING = "both together: waiting for images, %"
COPY = "copying images to the GPU"
HELPS = 1.05  # what is faster by less is no help
_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """Find what binds."""

    threads: int = len(os.sched_getaffinity(0))
    """Threads that decode, and that compute."""
    model: str = "tf_efficientnet_lite0"
    """Body."""
    size: int = 160
    """Pixels."""
    batch: int = 64
    """Images in a step."""
    rounds: int = 3
    """Measurements of each."""
    seconds: float = 6.0
    """How long each takes, at least."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What can be switched."""

    samples: Samples
    batch: int
    threads: int
    precision: str = "auto"


def loader_of(setting: Setting, options: DoctorOptions) -> Loader:
    statistics_ = models.statistics(options.model)
    device = Ranks().device
    return Loader(
        setting.samples,
        size=options.size,
        global_batch=setting.batch,
        augment=Augment(),
        threads=setting.threads,
        mean=statistics_.mean,
        std=statistics_.std,
        device="gpu" if device.type == "cuda" else "cpu",
        half=precision.resolve(setting.precision, device).half_images,
    )


def endless(loader: Loader) -> Iterator[Batch]:
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())


def reading(setting: Setting, options: DoctorOptions) -> float:
    """Images a second of the loader alone."""
    batches = endless(loader_of(setting, options))
    for _ in range(3):
        next(batches)
    return _rate(lambda: len(next(batches).labels_N), options.seconds)


def storage(samples: Samples, options: DoctorOptions) -> float | None:
    """Files a second that the storage gives, none of them from the kernel's cache; `None` of a store."""
    if samples.store is not None:
        return None
    paths = itertools.cycle(os.path.join(samples.root, path) for path in samples.paths)

    def one() -> int:
        with open(next(paths), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.read()
        return 1

    return _rate(one, options.seconds / 3)


def copying(setting: Setting, options: DoctorOptions) -> float | None:
    """Images a second that reach the GPU from the memory of the host; `None` where there is no GPU."""
    device = Ranks().device
    if device.type != "cuda":
        return None
    host = torch.empty(setting.batch, 3, options.size, options.size, dtype=torch.float16).pin_memory()

    def one() -> int:
        host.to(device)
        torch.cuda.synchronize()
        return setting.batch

    return _rate(one, options.seconds / 3)


def _rate(act: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        done += act()
    return done / elapsed


class Training:
    """Everything learns, at a rate that moves nothing."""

    def __init__(self, setting: Setting, options: DoctorOptions, folder: Path) -> None:
        self._setting, self._options = setting, options
        torch.set_num_threads(setting.threads)
        ranks = Ranks()
        numbers = precision.resolve(setting.precision, ranks.device)
        numbers.set_tf32()
        classes = len(setting.samples.classes)
        model = models.build(options.model, head="fastai", classes=classes, size=options.size)
        if weights.packaged(options.model) is not None:
            weights.load(model, options.model, size=options.size, pretrained=True, weights=None)
        model = model.to(device=ranks.device).ordered(torch.channels_last)
        optimizer = optim.build(model, 0.01, options.size)
        self._learner = Learner(model=model, optimizer=optimizer, precision=numbers, ranks=ranks)
        self._learner.train(first_group=0)
        self._loader = loader_of(setting, options)
        groups = len(optim.groups_of(optimizer))
        (self._phase,) = schedule.fit_flat_cos(lr=_RATE, groups=groups, steps_per_epoch=10**6, epochs=1)
        self._folder, self._epochs = folder, itertools.count()

    def speed(self, *, loaded: bool) -> tuple[float, float]:
        """Images a second, and the share of time spent waiting for them; on batches in memory, or `loaded` ones.

        The first steps, in which queues fill and kernels are chosen, do not count.
        """
        epoch = next(self._epochs)
        file = self._folder / f"{epoch}.jsonl"
        journal = Journal(file)
        steps = self._loader.steps if loaded else 10**6
        batches: Any = self._loader if loaded else InMemory(self._loader, steps)
        started = time.perf_counter()
        position = Position(epoch=epoch, base_lr=_RATE)
        for _ in train_epoch(self._learner, batches, self._phase, position, seed=0, journal=journal):
            if time.perf_counter() - started > self._options.seconds:
                break
        journal.close()
        told = [event for event in read(file) if event["event"] == "step"]
        counted = told[min(3, len(told) - 1) :]
        seconds = [self._setting.batch / event["images_per_second"] for event in counted]
        waited = [event["data_wait"] * took for event, took in zip(counted, seconds, strict=True)]
        return self._setting.batch / statistics.fmean(seconds), sum(waited) / sum(seconds)


def main(options: DoctorOptions) -> Record:
    manifest = open_data(options)
    if options.quick:
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 8, "rounds": 1, "seconds": 0.3}
        options = replace(options, **tiny)
    if len(manifest.train) < options.batch:
        raise UserError(f"--batch {options.batch} is larger than the {len(manifest.train)} images. Choose a smaller.")
    setting = Setting(samples=manifest.train, batch=options.batch, threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="onewarp-doctor-") as scratch:
        figures, words = examine(manifest, setting, options, Path(scratch))
    record = Record(
        title=f"What binds: {options.model}, {options.size} px, batches of {options.batch}",
        name="bottleneck",
        options=options,
        figures=figures,
        skipped={},
        remarks=words,
    )
    record.publish()
    return record


def examine(
    manifest: Manifest, setting: Setting, options: DoctorOptions, scratch: Path
) -> tuple[list[Figure], tuple[str, ...]]:
    """All figures, and what they say."""
    told: dict[str, list[float]] = {}
    training = Training(setting, options, scratch)
    for _ in range(options.rounds):
        for name, value in (
            (STORAGE, storage(setting.samples, options)),
            (READING, reading(setting, options)),
            (COPY, copying(setting, options)),
        ):
            if value is not None:
                told.setdefault(name, []).append(value)
        told.setdefault(MODEL, []).append(training.speed(loaded=False)[0])
        speed, waited = training.speed(loaded=True)
        told.setdefault(BOTH, []).append(speed)
        told.setdefault(WAITING, []).append(100 * waited)
    figures = [
        Figure(row=name, column="" if name == WAITING else SPEED, samples=samples) for name, samples in told.items()
    ]
    middle = {name: statistics.median(samples) for name, samples in told.items()}
    bound, words = verdict(middle)
    gains = dict(_tried(bound, manifest, setting, options, scratch, middle))
    for name, samples in gains.items():
        figures.append(Figure(row=name, column=GAIN, samples=samples))
    return figures, (words, advice(bound, {name: statistics.median(samples) for name, samples in gains.items()}))


def verdict(speeds: dict[str, float]) -> tuple[str, str]:
    """What binds, by images a second: `READING`, `STORAGE`, `COPY` or `MODEL`; and that in a sentence."""
    bound = min((name for name in (MODEL, READING, STORAGE, COPY) if name in speeds), key=lambda name: speeds[name])
    waits = f"the model waits for images {speeds[WAITING]:.1f}% of the time"
    if bound == MODEL:
        left = speeds[READING] / speeds[MODEL]
        return bound, f"Computing binds: the loader could feed {left:.1f} times as much, and {waits}."
    what = {READING: "Decoding", STORAGE: "The storage", COPY: "The copy to the GPU"}[bound]
    return bound, f"{what} binds: {speeds[bound]:,.0f} images/s, of {speeds[MODEL]:,.0f} that compute, and {waits}."


def advice(bound: str, gains: dict[str, float]) -> str:
    """Which of the switches that were tried to use first."""
    helps = {name: gain for name, gain in gains.items() if gain >= HELPS}
    tried = ", ".join(gains)
    if helps:
        best = max(helps, key=lambda name: helps[name])
        return f"Try first: {best} ({helps[best]:.2f} times as fast here). Tried: {tried}."
    more = "more GPUs or cores, a smaller --model or --size" if bound == MODEL else "more cores, or smaller files"
    return f"None of these is faster by 5%: {tried}. What is left: {more}."


def _tried(
    bound: str, manifest: Manifest, setting: Setting, options: DoctorOptions, scratch: Path, middle: dict[str, float]
) -> Iterator[tuple[str, list[float]]]:
    """Each switch that could help what binds: its name, and how much faster that is with it."""
    cores = len(os.sched_getaffinity(0))
    if bound == MODEL:
        others = {"--precision bf16": replace(setting, precision="bf16")}
        if 2 * setting.batch <= len(setting.samples):
            others[f"--batch {2 * setting.batch}"] = replace(setting, batch=2 * setting.batch)
        if setting.threads < cores:
            others[f"--threads {cores}"] = replace(setting, threads=cores)
        for number, (name, other) in enumerate(others.items()):
            folder = scratch / f"switch{number}"
            folder.mkdir()
            tried = Training(other, options, folder)
            with_it = [tried.speed(loaded=False)[0] for _ in range(options.rounds)]
            yield name, [speed / middle[MODEL] for speed in with_it]
        torch.set_num_threads(setting.threads)
        return
    if setting.samples.store is None:
        stored = pack(manifest, scratch / "store", kind="decoded", threads=setting.threads).manifest.train
        speeds = [reading(replace(setting, samples=stored), options) for _ in range(options.rounds)]
        yield "--cache decoded, or onewarp pack --decoded", [speed / middle[READING] for speed in speeds]
    if setting.threads < cores:
        speeds = [reading(replace(setting, threads=cores), options) for _ in range(options.rounds)]
        yield f"--threads {cores}", [speed / middle[READING] for speed in speeds]
