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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.first import first_model
from benchmarks.overhead import InMemory
from benchmarks.record import Figure, Options, Record, open_data
from pipelines import Augment, Loader, Samples, pack
from pipelines.errors import UserError
from pipelines.loader import Batch
from pipelines.manifest import Manifest
from trainer import models, optim, precision, schedule
from trainer.journal import Journal, read
from trainer.loop import Learner, train_epoch
from trainer.position import Position
from trainer.ranks import Ranks

SPEED, GAIN = "img/s", "with it ÷ without"
STORAGE, READING, MODEL, BOTH = "reading files, not cached", "the loader alone", "the model alone", "both together"
WAITING = "both together: waiting for images, %"
COPY = "copying images to the GPU"
HELPS = 1.05  # what is faster by less is no help
FIRST = 3  # steps of an epoch that do not count
FEWEST = 4  # steps that are counted, at least
SOME = 1000  # images on which stores are tried
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
    """Files a second that the storage gives to as many threads, none from the kernel's cache; `None` of a store."""
    if samples.store is not None:
        return None
    paths = itertools.cycle(os.path.join(samples.root, path) for path in samples.paths)

    def one(path: str) -> None:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.read()

    with ThreadPoolExecutor(options.threads) as pool:

        def some() -> int:
            return len(list(pool.map(one, itertools.islice(paths, 32 * options.threads))))

        return _rate(some, options.seconds / 3)


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
        model = first_model(options.model, head="fastai", classes=classes, size=options.size)
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

        The first steps of an epoch, in which queues fill and kernels are chosen, do not count.
        """
        images, took, waited = 0, 0.0, 0.0
        began = time.perf_counter()
        while took < self._options.seconds:
            epoch = next(self._epochs)
            file = self._folder / f"{epoch}.jsonl"
            journal = Journal(file)
            steps = self._loader.steps if loaded else FIRST + 1000
            batches: Any = self._loader if loaded else InMemory(self._loader, steps)
            start = Position(epoch=epoch, base_lr=_RATE)
            counted: tuple[float, int] | None = None
            for position in train_epoch(self._learner, batches, self._phase, start, seed=0, journal=journal):
                now = time.perf_counter()
                if counted is None:
                    counted = (now, position.step) if position.step >= FIRST else None
                    continue
                images += self._setting.batch * (position.step - counted[1])
                took += now - counted[0]
                counted = (now, position.step)
                if took > self._options.seconds and images >= FEWEST * self._setting.batch:
                    break
            journal.close()
            told = [event for event in read(file) if event["event"] == "step"][FIRST:]
            waited += sum(event["data_wait"] * self._setting.batch / event["images_per_second"] for event in told)
            if not images and time.perf_counter() - began > 20 * self._options.seconds:
                break
        return images / max(took, 1e-9), waited / max(took, 1e-9)


def main(options: DoctorOptions) -> Record:
    manifest = open_data(options)
    if options.quick:
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 8, "rounds": 1, "seconds": 0.3}
        options = replace(options, **tiny)
    least = (FIRST + 2) * options.batch
    if len(manifest.train) < least:
        raise UserError(
            f"--batch {options.batch} gives {len(manifest.train)} images too few steps to measure. Choose "
            f"--batch {max(2, len(manifest.train) // (FIRST + 2))} or less."
        )
    setting = Setting(samples=manifest.train, batch=options.batch, threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="onewarp-doctor-") as scratch:
        figures, words, skipped = examine(manifest, setting, options, Path(scratch))
    record = Record(
        title=f"What binds: {options.model}, {options.size} px, batches of {options.batch}",
        name="bottleneck",
        options=options,
        figures=figures,
        skipped=skipped,
        remarks=words,
    )
    record.publish()
    return record


def examine(
    manifest: Manifest, setting: Setting, options: DoctorOptions, scratch: Path
) -> tuple[list[Figure], tuple[str, ...], dict[str, str]]:
    """All figures, what they say, and what could not be tried."""
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
    bound, words = verdict({name: statistics.median(samples) for name, samples in told.items()})
    skipped: dict[str, str] = {}
    gains = {name: gain(*both, options) for name, both in _tried(bound, manifest, setting, options, scratch, skipped)}
    figures += [Figure(row=name, column=GAIN, samples=samples) for name, samples in gains.items()]
    middle = {name: statistics.median(samples) for name, samples in gains.items()}
    return figures, (words, advice(bound, middle)), skipped


def verdict(speeds: dict[str, float]) -> tuple[str, str]:
    """What binds, by images a second: `READING`, `STORAGE`, `COPY` or `MODEL`; and that in a sentence.

    The loader shares the cores with the model, so what each does alone does not decide: what both do together does.
    """
    whole, both = speeds[MODEL], speeds[BOTH]
    waits = f"it waits for images {speeds[WAITING]:.1f}% of the time"
    if both * HELPS >= whole:
        return MODEL, f"Computing binds: {both:,.0f} images/s, {whole:,.0f} on images that lie in memory, and {waits}."
    ways = [name for name in (STORAGE, COPY) if name in speeds and speeds[name] < HELPS * speeds[READING]]
    bound = min(ways, key=lambda name: speeds[name], default=READING)
    what = {READING: "Decoding", STORAGE: "The storage", COPY: "The copy to the GPU"}[bound]
    return bound, (
        f"{what} binds: {both:,.0f} images/s, {whole:,.0f} on images that lie in memory, and {waits}; alone it gives "
        f"{speeds[bound]:,.0f}."
    )


def advice(bound: str, gains: dict[str, float]) -> str:
    """Which of the switches that were tried to use first."""
    helps = {name: gain for name, gain in gains.items() if gain >= HELPS}
    tried = ", ".join(gains) or "nothing"
    if helps:
        best = max(helps, key=lambda name: helps[name])
        return f"Try first: {best} ({helps[best]:.2f} times as fast here). Tried: {tried}."
    more = "more GPUs or cores, a smaller --model or --size" if bound == MODEL else "more cores, or smaller files"
    return f"None of these is faster by 5%: {tried}. What is left: {more}."


def gain(without: Training, with_it: Training, options: DoctorOptions) -> list[float]:
    """How much faster a training is with a switch, of each round; the two take turns."""
    pairs = [(without.speed(loaded=True)[0], with_it.speed(loaded=True)[0]) for _ in range(options.rounds)]
    return [fast / slow for slow, fast in pairs]


def _tried(
    bound: str, manifest: Manifest, setting: Setting, options: DoctorOptions, scratch: Path, skipped: dict[str, str]
) -> Iterator[tuple[str, tuple[Training, Training]]]:
    """Each switch that could help what binds: its name, and a training without and one with it."""
    numbers = itertools.count()

    def training(setting: Setting) -> Training:
        folder = scratch / f"switch{next(numbers)}"
        folder.mkdir()
        return Training(setting, options, folder)

    cores = len(os.sched_getaffinity(0))
    others = {}
    if setting.threads < cores:
        others[f"--threads {cores}"] = replace(setting, threads=cores)
    if bound == MODEL:
        others["--precision bf16"] = replace(setting, precision="bf16")
        if 2 * (FIRST + 2) * setting.batch <= len(setting.samples):
            others[f"--batch {2 * setting.batch}"] = replace(setting, batch=2 * setting.batch)
    for name, other in others.items():
        yield name, (training(setting), training(other))
    torch.set_num_threads(setting.threads)
    if bound == MODEL or setting.samples.store is not None:
        return
    # Of a large set a part tells the same, and fits anywhere.
    few = manifest.train.share(min(1.0, max(SOME, 10 * setting.batch) / len(manifest.train)), 0)
    plain = replace(setting, samples=few)
    side = 2 * options.size
    switches: dict[str, dict[str, Any]] = {
        "--cache decoded, or onewarp pack --decoded": {"kind": "decoded"},
        f"onewarp pack --encoded --short-side {side}": {"kind": "encoded", "short_side": side},
    }
    for number, (name, how) in enumerate(switches.items()):
        try:
            stored = pack(_part(manifest, few), scratch / f"store{number}", threads=setting.threads, **how)
        except UserError as error:
            skipped[name] = str(error)
            continue
        yield name, (training(plain), training(replace(setting, samples=stored.manifest.train)))


def _part(manifest: Manifest, few: Samples) -> Manifest:
    """The manifest of these training images and of one for validation."""
    rows_N = np.sort(np.concatenate([few.ids_N, manifest.valid.ids_N[:1]]))
    return manifest.part(rows_N)
