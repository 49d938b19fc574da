"""Images per second, and core time an image, of our loader and of the other ways to read the same files.

    onewarp bench loaders --data DIR [--json FILE]

The ways take turns, round by round, so that a machine whose speed drifts does not favour one. In its turn a way reads
for `--seconds`, in whole batches, from files to normalised float images; a slow way finishes the batches it has begun.
Outside the clock are the start of workers and pipelines, the batches read ahead (drained before the clock starts), and
whatever the others still had to finish. Ratios are taken within a round, then their median.

All of that on `--threads` threads or workers, then in fewer rounds on one. Memory is measured beforehand, of each way
in a process of its own. The last columns are of the same photographs at 0.1 to 12 megapixels.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import footprint, megapixels, peers
from benchmarks.data import long, open_data, part_of
from benchmarks.record import Figure, Options, Record
from pipelines import Augment, Loader, Samples, pack

OURS = "onewarp Loader, full augmentation"
STORED = "the same from a decoded store"
SPEED, COST = "img/s", "core-ms/img"
SINGLE, MEMORY = "img/s, one thread", "memory, MB"
FASTER, CHEAPER = "ours ÷ this, by the clock", "ours ÷ this, by core time"
FIXED, EACH = "core-ms/img, of no pixels", "core-ms/megapixel"
CEILING, CROP = "DALI, decoding alone (the ceiling)", "torchvision v2, RandomResizedCrop + flip"
LAW = (OURS, CEILING, CROP)
_LAW_IMAGES, _LAW_BATCH = 16, 8
_STORED_PIXELS = 2e9  # of the decoded store, 3 bytes each: of a larger set a part is stored


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(Options):
    """Compare loaders."""

    size: int = 224
    """Pixels."""
    batch: int = 64
    """Images in a batch."""
    seconds: float = 1.0
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
    library: str | None = None
    """A system library that they want."""
    imports: tuple[str, ...] = ()
    """Modules that this way alone uses."""

    @property
    def missing(self) -> list[str]:
        names = [name for name in self.needs if find_spec(_MODULES.get(name, name)) is None]
        if self.library is not None and find_library(self.library) is None:
            names.append(f"the system's lib{self.library}")
        return names


_MODULES = {"opencv-python-headless": "cv2"}
_SINGLE_ROUNDS = 3

WAYS = (
    Way(name=OURS, batches=ours),
    Way(name=STORED, batches=ours, stored=True),
    Way(name=CEILING, batches=peers.dali_decoding),
    Way(name="DALI as usual: resize 460, crop, warp_affine", batches=peers.dali_usual),
    Way(name="torchvision v2, repeated chain", batches=peers.torchvision_chain),
    Way(name=CROP, batches=peers.torchvision_crop),
    Way(name="timm, training transform", batches=peers.timm_train, imports=("timm.data",)),
    Way(
        name="albumentations, RandomResizedCrop + flip + light",
        batches=peers.albumentations,
        needs=("albumentations", "opencv-python-headless"),
        imports=("cv2", "albumentations", "albumentations.pytorch"),
    ),
    Way(
        name="SPDL, decode and resize alone",
        batches=peers.spdl_resized,
        needs=("spdl",),
        library="avutil",
        imports=("spdl.io", "spdl.pipeline"),
    ),
    Way(name="fastai, presizing", batches=peers.fastai_presizing, needs=("fastai",), imports=("fastai.vision.all",)),
)


def core_seconds() -> float:
    """Core time of this process and of the worker processes it has now."""
    tick, ticks = os.sysconf("SC_CLK_TCK"), 0
    for child in multiprocessing.active_children():
        with open(f"/proc/{child.pid}/stat", encoding="utf-8", errors="replace") as stat:
            user, system = stat.read().rpartition(")")[2].split()[11:13]
        ticks += int(user) + int(system)
    return time.process_time() + ticks / tick


def settle(most: float = 10.0) -> None:
    """Wait until workers have filled their queues and rest; no longer than `most` seconds, as some never rest."""
    before, end = core_seconds(), time.perf_counter() + most
    while time.perf_counter() < end:
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
    sizes = megapixels.MEGAPIXELS
    if options.quick:
        options = replace(options, seconds=0.1, rounds=2, batch=min(options.batch, 16))
        sizes = sizes[:2]
    manifest = open_data(options)
    train = manifest.train
    held = train.share(min(1.0, _STORED_PIXELS / float((train.heights_N * train.widths_N.astype(np.int64)).sum())), 0)
    with tempfile.TemporaryDirectory(prefix="onewarp-") as scratch:
        folder = Path(scratch)
        store = pack(part_of(manifest, held), folder / "store", kind="decoded", threads=options.threads)
        law = {size: long(megapixels.at(size, train, _LAW_IMAGES, folder)) for size in sizes}
        return compare(options, long(train), long(store.manifest.train), law)


def compare(options: LoaderOptions, samples: Samples, stored: Samples, law: dict[float, Samples]) -> Record:
    """All ways on the same images, in files and in a store; some of them on those of the law, by megapixels."""
    ways = {way.name: way for way in WAYS if not way.missing}
    skipped = {way.name: f"not installed: {', '.join(way.missing)}" for way in WAYS if way.missing}
    shape = {"size": options.size, "batch": options.batch}

    def of(way: Way, threads: int) -> Callable[[], Iterator[int]]:
        return partial(way.batches, stored if way.stored else samples, **shape, threads=threads)

    memory = {
        name: footprint.megabytes(of(way, options.threads), 2 * options.seconds, way.imports)
        for name, way in ways.items()
    }
    turns = take_turns({name: of(way, options.threads) for name, way in ways.items()}, options, options.threads)
    single: dict[str, Turns] = {}
    if options.threads > 1:
        fewer = replace(options, rounds=min(options.rounds, _SINGLE_ROUNDS), seconds=options.seconds / 2)
        single = take_turns({name: of(way, 1) for name, way in ways.items()}, fewer, 1)
    figures = [figure for name in turns for figure in _figures(name, turns, memory, single)]
    figures += _law_figures(options, law)

    record = Record(
        title=f"Loaders, {options.size} px, batches of {options.batch}, {options.threads} threads or workers",
        name="loaders",
        options=options,
        figures=figures,
        skipped=skipped,
        remarks=(
            f"Each way reads for at least {options.seconds:g} s a round, {options.rounds} rounds, the ways in turn; "
            "a ratio is taken within a round.",
            "The clock runs from files to normalised float images; workers and pipelines have started before, and "
            "what they have read ahead is used up.",
            "Memory is the most that reading takes beside the imported libraries, workers included.",
            f"Of the sizes: {_LAW_IMAGES} pictures each, shrunk photographs or mosaics of them, in batches of "
            f"{_LAW_BATCH}; the line through the costs of a round is fixed + each × megapixels.",
        ),
        packages=tuple(package for way in ways.values() for package in way.needs),
    )
    record.publish()
    return record


Turns = list[tuple[float, float]]
"""(images per second, core-milliseconds an image) of each round."""


def take_turns(ways: dict[str, Callable[[], Iterator[int]]], options: LoaderOptions, threads: int) -> dict[str, Turns]:
    """Each way's rounds."""
    torch.set_num_threads(threads)  # of the main process, where fastai augments; a worker has one
    running = {name: begin() for name, begin in ways.items()}
    for name in reversed(running):  # workers are forked before DALI has threads
        next(running[name])
    turns: dict[str, Turns] = {name: [] for name in running}
    for _ in range(options.rounds):
        for name, batches in running.items():
            settle()
            turns[name].append(measure(batches, options.seconds, threads))
    running.clear()  # ends the workers
    return turns


def _law_figures(options: LoaderOptions, law: dict[float, Samples]) -> Iterator[Figure]:
    ways = {way.name: way for way in WAYS if way.name in LAW}
    fewer = replace(options, rounds=min(options.rounds, _SINGLE_ROUNDS), seconds=options.seconds / 2)
    costs: dict[str, list[list[float]]] = {name: [] for name in ways}
    for size, samples in law.items():
        shape = {"size": options.size, "batch": _LAW_BATCH, "threads": options.threads}
        begins: dict[str, Callable[[], Iterator[int]]] = {
            name: partial(way.batches, samples, **shape) for name, way in ways.items()
        }
        for name, turns in take_turns(begins, fewer, options.threads).items():
            yield Figure(row=name, column=f"{COST} of {size:g} MP", samples=[cost for _, cost in turns])
            costs[name].append([cost for _, cost in turns])
    for name, of_name in costs.items():
        lines = [megapixels.slope(list(law), of_round) for of_round in zip(*of_name, strict=True)]
        yield Figure(row=name, column=FIXED, samples=[fixed for fixed, _ in lines])
        yield Figure(row=name, column=EACH, samples=[each for _, each in lines])


def _figures(
    name: str, turns: dict[str, Turns], memory: dict[str, float], single: dict[str, Turns]
) -> Iterator[Figure]:
    yield Figure(row=name, column=SPEED, samples=[speed for speed, _ in turns[name]])
    yield Figure(row=name, column=COST, samples=[cost for _, cost in turns[name]])
    if name != OURS:
        pairs = list(zip(turns[name], turns[OURS], strict=True))
        yield Figure(row=name, column=FASTER, samples=[our[0] / this[0] for this, our in pairs])
        yield Figure(row=name, column=CHEAPER, samples=[this[1] / our[1] for this, our in pairs])
    if name in single:
        yield Figure(row=name, column=SINGLE, samples=[speed for speed, _ in single[name]])
    yield Figure(row=name, column=MEMORY, samples=[memory[name]])
