"""Images per second, and core time an image, of our loader and of the other ways to read the same files.

    onewarp bench loaders --data DIR [--json FILE]

The ways take turns, round by round, so that a machine whose speed drifts does not favour one. In its turn a way reads
for `--seconds`, in whole batches, from files to normalised float images; a slow way finishes the batches it has begun.
Outside the clock are the start of workers and pipelines, the batches read ahead (drained before the clock starts), and
whatever the others still had to finish. Ratios are taken within a round, then their median.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.record import Figure, Options, Record, open_data
from pipelines import Augment, Loader, Samples, pack

OURS = "onewarp Loader, full augmentation"
STORED = "the same from a decoded store"
SPEED, COST = "img/s", "core-ms/img"
FASTER, CHEAPER = "ours ÷ this, by the clock", "ours ÷ this, by core time"
_LONG = 100_000  # images in an epoch, the set repeated: no epoch ends within a round


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Compare loaders."""

    size: int = 224
    """Pixels."""
    batch: int = 64
    """Images in a batch."""
    seconds: float = 3.0
    """How long each way reads in a round, at least."""
    rounds: int = 6
    """Measurements of each way; six is the fewest that have a 95% interval."""


def ours(samples: Samples, *, size: int, batch: int, threads: int) -> Iterator[int]:
    """The defaults of training."""
    loader = Loader(samples, size=size, global_batch=batch, augment=Augment(), threads=threads)
    epoch = 0
    while True:
        for read in loader.epoch(epoch):
            yield len(read.labels_N)
        epoch += 1


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way from files to batches."""

    name: str
    batches: Callable[..., Iterator[int]]
    """Called with samples and the keywords `size`, `batch` and `threads`; gives the number of images of each batch."""
    stored: bool = False
    """The samples are those of a decoded store, packed before the clock starts."""
    needs: tuple[str, ...] = ()
    """Distributions that are no dependencies of ours."""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(_MODULES.get(name, name)) is None]


_MODULES = {"opencv-python-headless": "cv2"}

WAYS = (
    Way(name=OURS, batches=ours),
    Way(name=STORED, batches=ours, stored=True),
    Way(name="DALI, decoding alone (the ceiling)", batches=peers.dali_decoding),
    Way(name="DALI as usual: resize 460, crop, warp_affine", batches=peers.dali_usual),
    Way(name="torchvision v2, repeated chain", batches=peers.torchvision_chain),
    Way(name="torchvision v2, RandomResizedCrop + flip", batches=peers.torchvision_crop),
    Way(
        name="albumentations, RandomResizedCrop + flip + light",
        batches=peers.albumentations,
        needs=("albumentations", "opencv-python-headless"),
    ),
    Way(name="fastai, presizing", batches=peers.fastai_presizing, needs=("fastai",)),
)


def core_seconds() -> float:
    """Core time of this process and of the worker processes it has now."""
    tick, ticks = os.sysconf("SC_CLK_TCK"), 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="utf-8", errors="replace") as stat:
            user, system = stat.read().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return time.process_time() + ticks / tick


def settle() -> None:
    """Wait until workers have filled their queues and rest."""
    before = core_seconds()
    while True:
        time.sleep(0.1)
        after = core_seconds()
        if after - before <= 0.02:
            return
        before = after


def measure(batches: Iterator[int], seconds: float, workers: int) -> tuple[float, float]:
    """(images per second, core-milliseconds an image) of one turn.

    Workers deliver in turn, so the clock starts and stops after as many batches as there are workers, or a multiple.
    """
    for _ in range(workers * peers.PREFETCHED):
        next(batches)
    images, cores, started = 0, core_seconds(), time.perf_counter()
    while True:
        for _ in range(workers):
            images += next(batches)
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return images / elapsed, 1000 * (core_seconds() - cores) / images


def main(options: LoaderOptions) -> Record:
    if options.quick:
        options = replace(options, seconds=0.2, rounds=2, batch=min(options.batch, 16))
    manifest = open_data(options)
    with tempfile.TemporaryDirectory(prefix="onewarp-") as scratch:
        store = pack(manifest, Path(scratch) / "store", kind="decoded", threads=options.threads)
        return compare(options, _long(manifest.train), _long(store.manifest.train))


def _long(samples: Samples) -> Samples:
    return samples.subset(np.tile(np.arange(len(samples)), -(-_LONG // len(samples))))


def compare(options: LoaderOptions, samples: Samples, stored: Samples) -> Record:
    """All ways on the same images, in files and in a store."""
    torch.set_num_threads(options.threads)  # of the main process, where fastai augments; a worker has one

    ways = [way for way in WAYS if not way.missing]
    skipped = {way.name: f"not installed: {', '.join(way.missing)}" for way in WAYS if way.missing}
    keywords = {"size": options.size, "batch": options.batch, "threads": options.threads}
    running = {way.name: way.batches(stored if way.stored else samples, **keywords) for way in ways}
    for name in reversed(running):  # workers are forked before DALI has threads
        next(running[name])
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, batches in running.items():
            settle()
            turns[name].append(measure(batches, options.seconds, options.threads))
    running.clear()  # ends the workers

    record = Record(
        title=f"Loaders, {options.size} px, batches of {options.batch}, {options.threads} threads or workers",
        name="loaders",
        options=options,
        figures=[figure for name, turns_R2 in turns.items() for figure in _figures(name, turns_R2, turns[OURS])],
        skipped=skipped,
        remarks=(
            f"Each way reads for at least {options.seconds:g} s a round, {options.rounds} rounds, the ways in turn; "
            "a ratio is taken within a round.",
        ),
        packages=tuple(package for way in ways for package in way.needs),
    )
    record.publish()
    return record


def _figures(name: str, turns: list[tuple[float, float]], ours: list[tuple[float, float]]) -> Iterator[Figure]:
    yield Figure(row=name, column=SPEED, samples=[speed for speed, _ in turns])
    yield Figure(row=name, column=COST, samples=[cost for _, cost in turns])
    if name != OURS:
        pairs = list(zip(turns, ours, strict=True))
        yield Figure(row=name, column=FASTER, samples=[our[0] / this[0] for this, our in pairs])
        yield Figure(row=name, column=CHEAPER, samples=[this[1] / our[1] for this, our in pairs])
