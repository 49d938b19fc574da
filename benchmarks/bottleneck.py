"""Where is the bottleneck of a training on these images, on this machine, and which switch moves it?

    onewarp doctor DIR [--model NAME] [--size N] [--batch N] [--json FILE]

Everything is measured as a training does it, in one process on all cores: what reads and decodes, by itself; what
computes, by itself, on batches that lie in memory; both together, with the share of time that the model waits for
images. Whatever is slower binds. Then the workers that a training here starts compute with and without a word between
them: what lies between is the all-reduce. At last the switches that could help are tried, one at a time, and only what
helped is named.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import open_data, part_of
from benchmarks.learning import FIRST, Setting, Training, loader_of
from benchmarks.record import Figure, Options, Record
from benchmarks.spawned import on_ranks, together
from pipelines import Samples, pack
from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.store import Store
from trainer import precision
from trainer.ranks import Ranks
from trainer.starting import default_workers

SPEED, GAIN = "img/s", "with it ÷ without"
STORAGE, READING, MODEL, BOTH = "reading files, not cached", "the loader alone", "the model alone", "both together"
WAITING = "both together: waiting for images, %"
COPY = "copying to the GPU what the loader copies"
APART, JOINED = "workers that compute side by side", "the same, with their all-reduce"
HELPS = 1.05  # what is faster by less is no help
FEWEST = 4  # steps that are counted, at least
SOME = 1000  # images on which stores are tried


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
    seconds: float = 4.0
    """How long each takes, at least."""


def reading(setting: Setting, options: DoctorOptions) -> float:
    """Images a second of the loader alone."""
    loader = loader_of(setting)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for _ in range(FIRST):
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
    """Images a second that reach the GPU from the memory of the host: files, or the pixels of a decoded store, as it is
    there that they become a batch. `None` where there is no GPU."""
    device, samples = Ranks().device, setting.samples
    if device.type != "cuda":
        return None
    size = float(samples.bytes_N.mean())
    if samples.store is not None and Store.open(samples.store).kind == "decoded":
        size = 3 * float((samples.heights_N.astype(float) * samples.widths_N).mean())
    host = torch.empty(setting.batch * round(size), dtype=torch.uint8).pin_memory()

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


def speed(training: Training, options: DoctorOptions, *, loaded: bool) -> tuple[float, float]:
    """Images a second, and the share of time spent waiting for them."""
    took = training.run(loaded=loaded, steps=1 if options.quick else FEWEST, seconds=options.seconds)
    return training.setting.batch / took.step, took.waited / took.seconds


def side_by_side(
    settings: dict[str, Setting], rounds: int, steps: int, ranks: Ranks, folder: Path
) -> dict[str, list[float]]:
    """Images a second of all workers together: `APART`, as in `settings[JOINED]`, then each setting; in turn."""
    joined = settings[JOINED]
    own = replace(joined, batch=joined.batch // ranks.world_size)
    turns = {APART: Training(own, folder / f"apart{ranks.rank}", Ranks(local_rank=ranks.local_rank))}
    for number, (name, setting) in enumerate(settings.items()):
        turns[name] = Training(setting, folder / f"{number}-{ranks.rank}", ranks)
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, training in turns.items():
            together(ranks)
            took = max(ranks.gather([training.run(loaded=False, steps=steps).step]))
            speeds[name].append((joined if name == APART else training.setting).batch / took)
    return speeds


def main(options: DoctorOptions) -> Record:
    manifest = open_data(options)
    if options.quick:
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 8, "rounds": 1, "seconds": 0.3}
        options = replace(options, **tiny)
    if len(manifest.train) < options.batch:
        raise UserError(
            f"--batch {options.batch} is more than the {len(manifest.train)} images for training. Choose a smaller one."
        )
    if options.batch < 2:
        raise UserError(f"--batch {options.batch}: batch-norm has no variance of one image. Choose 2 or more.")
    setting = Setting(
        samples=manifest.train,
        model=options.model,
        size=options.size,
        batch=options.batch,
        threads=options.threads,
    )
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
    training = Training(setting, scratch / "training")
    for _ in range(options.rounds):
        for name, value in (
            (STORAGE, storage(setting.samples, options)),
            (READING, reading(setting, options)),
            (COPY, copying(setting, options)),
        ):
            if value is not None:
                told.setdefault(name, []).append(value)
        told.setdefault(MODEL, []).append(speed(training, options, loaded=False)[0])
        images, waited = speed(training, options, loaded=True)
        told.setdefault(BOTH, []).append(images)
        told.setdefault(WAITING, []).append(100 * waited)
    middle = {name: statistics.median(samples) for name, samples in told.items()}
    bound, words = verdict(middle)
    skipped: dict[str, str] = {}
    gains = {name: gain(*both, options) for name, both in _tried(bound, manifest, setting, options, scratch, skipped)}
    remarks = [words]
    workers = default_workers()
    if workers > 1 and setting.batch >= 2 * workers:
        each = replace(setting, threads=max(1, setting.threads // workers), batch=setting.batch // workers * workers)
        steps = max(1 if options.quick else 2, round(options.seconds * middle[MODEL] / setting.batch))
        speeds, words, helped = _exchanged(each, workers, steps, options)
        told, gains = told | speeds, gains | helped
        remarks.append(words)
    figures = [
        Figure(row=name, column="" if name == WAITING else SPEED, samples=samples) for name, samples in told.items()
    ]
    figures += [Figure(row=name, column=GAIN, samples=samples) for name, samples in gains.items()]
    remarks.append(advice(bound, {name: statistics.median(samples) for name, samples in gains.items()}))
    return figures, tuple(remarks), skipped


def _exchanged(
    each: Setting, workers: int, steps: int, options: DoctorOptions
) -> tuple[dict[str, list[float]], str, dict[str, list[float]]]:
    """Speeds without and with the all-reduce; what they say; and what switches gain, where it takes its time."""

    def speeds_of(settings: dict[str, Setting]) -> dict[str, list[float]]:
        return on_ranks(workers, each.threads, partial(side_by_side, settings, options.rounds, steps))

    speeds = speeds_of({JOINED: each})
    share, words = exchange(workers, statistics.median(speeds[APART]), statistics.median(speeds[JOINED]))
    if share <= 1 - 1 / HELPS:
        return speeds, words, {}
    others = {"--grad-compression fp16": replace(each, compression="fp16")}
    if 2 * each.batch <= len(each.samples):
        others[f"--batch {2 * each.batch}"] = replace(each, batch=2 * each.batch)
    tried = speeds_of({JOINED: each, **others})
    gains = {
        f"{name}, on {workers} workers": [new / old for new, old in zip(tried[name], tried[JOINED], strict=True)]
        for name in others
    }
    return speeds, words, gains


def exchange(workers: int, apart: float, joined: float) -> tuple[float, str]:
    """The share of a step that the all-reduce takes, from images a second without and with it; and a sentence of it."""
    share = max(0.0, 1 - joined / apart)
    return share, (
        f"On {workers} workers the all-reduce takes {100 * share:.1f}% of a step: {joined:,.0f} images/s, "
        f"{apart:,.0f} without it."
    )


def verdict(speeds: dict[str, float]) -> tuple[str, str]:
    """What binds, by images a second: `READING`, `STORAGE`, `COPY` or `MODEL`; and that in a sentence.

    The loader shares the cores with the model, so what each does alone does not decide: what both do together does.
    And what is slower alone than both together does not bind them: the files are cached after an epoch, where there is
    memory for them.
    """
    whole, both = speeds[MODEL], speeds[BOTH]
    waits = f"it waits for images {speeds[WAITING]:.1f}% of the time"
    cold = ""
    if speeds.get(STORAGE, both) * HELPS < both:
        cold = f" The first epoch, whose files are not cached yet, gets no more than {speeds[STORAGE]:,.0f} a second."
    if both * HELPS >= whole:
        words = f"Computing binds: {both:,.0f} images/s, {whole:,.0f} on images that lie in memory, and {waits}."
        return MODEL, words + cold
    most = HELPS * min(both, speeds[READING])
    ways = [name for name in (STORAGE, COPY) if both <= HELPS * speeds.get(name, 0.0) <= HELPS * most]
    bound = min(ways, key=lambda name: speeds[name], default=READING)
    what = {READING: "Decoding", STORAGE: "The storage", COPY: "The copy to the GPU"}[bound]
    return bound, (
        f"{what} binds: {both:,.0f} images/s, {whole:,.0f} on images that lie in memory, and {waits}; alone it gives "
        f"{speeds[bound]:,.0f}.{cold}"
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
    ratios = []
    for turn in range(options.rounds):
        pair = (without, with_it) if turn % 2 == 0 else (with_it, without)
        speeds = {training: speed(training, options, loaded=True)[0] for training in pair}
        ratios.append(speeds[with_it] / speeds[without])
    return ratios


def _tried(
    bound: str, manifest: Manifest, setting: Setting, options: DoctorOptions, scratch: Path, skipped: dict[str, str]
) -> Iterator[tuple[str, tuple[Training, Training]]]:
    """Each switch that could help what binds: its name, and a training without and one with it."""
    numbers = itertools.count()

    def training(setting: Setting) -> Training:
        return Training(setting, scratch / f"switch{next(numbers)}")

    cores = len(os.sched_getaffinity(0))
    others = {}
    if setting.threads < cores:
        others[f"--threads {cores}"] = replace(setting, threads=cores)
    if bound == MODEL:
        device = Ranks().device
        if precision.resolve(setting.precision, device).name != "bf16":
            others["--precision bf16"] = replace(setting, precision="bf16")
        if 2 * setting.batch <= len(setting.samples):
            others[f"--batch {2 * setting.batch}"] = replace(setting, batch=2 * setting.batch)
    for name, other in others.items():
        yield name, (training(setting), training(other))
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
            stored = pack(part_of(manifest, few), scratch / f"store{number}", threads=setting.threads, **how)
        except UserError as error:
            skipped[name] = str(error)
            continue
        yield name, (training(plain), training(replace(setting, samples=stored.manifest.train)))
