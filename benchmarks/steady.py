"""What must hold however long a run is and however large the data: memory, the start of an epoch, scan, and the plan.

    onewarp bench steady --data DIR [--json FILE]

Memory is what the kernel says is resident (`/proc/self/statm`), before and after `--steps` steps that follow
`--warm-up`, over as many epochs as that takes; "not freed" is the same with what glibc keeps given back both times, and
tells a leak from an allocator that holds on. A scan takes turns with decoding the same files by DALI alone; the cache
folder is a fresh one each time, so that nothing remembered helps.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from benchmarks import peers
from benchmarks.data import open_data
from benchmarks.record import Figure, Options, Record
from pipelines import Augment, Loader, Manifest, Samples, scan
from pipelines.datasets import named_dataset
from pipelines.geometry import UNIFORMS
from pipelines.labels import Regex
from pipelines.plan import Plan, permutation, uniforms

_BATCH = 64
_COLUMN = "figure"
_LARGE, _SMALL = 10_000_000, 1_000  # samples of a plan
_STEPS = 1000  # one after another, as training takes them, whose cost is averaged
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class SteadyOptions(Options):
    """Measure what should not grow."""

    size: int = 224
    """Pixels, where the start of an epoch is measured."""
    steps: int = 5000
    """Steps between the two looks at the memory, in batches of 16 at 64 pixels."""
    warm_up: int = 500
    """Steps before the first look."""
    rounds: int = 6
    """Measurements of everything else; six is the fewest that have a 95% interval."""


def resident() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def give_back() -> None:
    """Make glibc return to the kernel what was freed and it keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def peak() -> Generator[list[float]]:
    """Inside, the list is empty; afterwards it holds by how many MB the resident memory rose at its highest."""
    found: list[float] = []
    give_back()  # or it would be given out again unseen
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the high-water mark back to what is resident now
    before = resident()
    yield found
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found.append(int(high) * 1024 / MB - before)


def growth(samples: Samples, options: SteadyOptions) -> Iterator[Figure]:
    """Resident memory over many steps: what it grew by, and how it went."""
    batch = min(16, len(samples))
    loader = Loader(samples, size=64, global_batch=batch, augment=Augment(), threads=options.threads)

    def steps() -> Iterator[None]:
        epoch = 0
        while True:
            for _ in loader.epoch(epoch):
                yield
            epoch += 1

    running = steps()
    for _ in range(options.warm_up):
        next(running)
    looks = [resident()]
    give_back()
    held = resident()
    for part in range(10):  # evenly, the last look after the last step
        for _ in range(options.steps * (part + 1) // 10 - options.steps * part // 10):
            next(running)
        looks.append(resident())
    grown = f"memory grown over {options.steps:,} steps of {batch}, MB"
    yield Figure(row=grown, column=_COLUMN, samples=[looks[-1] - looks[0]])
    give_back()
    yield Figure(row="of that not freed, MB", column=_COLUMN, samples=[resident() - held])
    yield Figure(row="memory at ten looks on the way, MB", column=_COLUMN, samples=looks[1:])


def starts(samples: Samples, options: SteadyOptions) -> Iterator[Figure]:
    """Seconds from asking for an epoch to its first batch, at its first, middle and last step."""
    batch = min(_BATCH, len(samples))
    loader = Loader(samples, size=options.size, global_batch=batch, augment=Augment(), threads=options.threads)
    next(loader.epoch(0))
    taken: dict[str, list[float]] = {}
    new_epoch = count(1)  # one that nothing is remembered of
    for _ in range(options.rounds):
        for name, step in (("first", 0), ("middle", loader.steps // 2), ("last", loader.steps - 1)):
            started = time.perf_counter()
            next(loader.epoch(next(new_epoch), start_step=step))
            taken.setdefault(name, []).append(time.perf_counter() - started)
    for name, seconds in taken.items():
        yield Figure(row=f"start of an epoch at its {name} step, s", column=_COLUMN, samples=seconds)


def scanning(manifest: Manifest, options: SteadyOptions) -> Iterator[Figure]:
    """A scan's speed beside that of decoding the files it found usable."""
    named = named_dataset(options.data)
    labels = Regex(named[1]) if named else "folder"
    paths = [*peers.files(manifest.train), *peers.files(manifest.valid)]
    scanned, alone = [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        for _ in peers.dali_decode_only(paths, min(_BATCH, len(paths)), options.threads):
            pass
        alone.append(time.perf_counter() - started)
        with _fresh_cache():
            started = time.perf_counter()
            scan(manifest.root, labels=labels, threads=options.threads)
            scanned.append(time.perf_counter() - started)
    ratios = [decoding / scanning for decoding, scanning in zip(alone, scanned, strict=True)]
    yield Figure(row="speed of a scan ÷ decoding alone", column=_COLUMN, samples=ratios)
    yield Figure(row="scan, files/s", column=_COLUMN, samples=[len(paths) / seconds for seconds in scanned])
    yield Figure(row="decoding alone, files/s", column=_COLUMN, samples=[len(paths) / seconds for seconds in alone])


@contextmanager
def _fresh_cache() -> Generator[None]:
    before = os.environ.get("ONEWARP_CACHE")
    with tempfile.TemporaryDirectory(prefix="onewarp-steady-") as folder:
        os.environ["ONEWARP_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["ONEWARP_CACHE"]
            if before is not None:
                os.environ["ONEWARP_CACHE"] = before


def planning(options: SteadyOptions) -> Iterator[Figure]:
    """The order of a large epoch, in whole and to its first batch, and a step of it beside one of a small epoch."""
    seconds, peaks, first = [], [], []
    steps: dict[int, list[float]] = {_SMALL: [], _LARGE: []}
    for seed in range(options.rounds):
        with peak() as risen:
            started = time.perf_counter()
            permutation(seed, 0, _LARGE)
            seconds.append(time.perf_counter() - started)
        peaks += risen
        for n in steps:
            plan = Plan(n=n, global_batch=_BATCH, seed=seed)
            started = time.perf_counter()
            plan.batch(1, 0)
            if n == _LARGE:
                first.append(time.perf_counter() - started)
            started = time.perf_counter()
            for step in range(_STEPS):
                uniforms(seed, 1, plan.batch(1, step % plan.steps), UNIFORMS)
            steps[n].append(1e6 * (time.perf_counter() - started) / _STEPS)
    yield Figure(row=f"order of a whole epoch of {_LARGE:,}, s", column=_COLUMN, samples=seconds)
    yield Figure(row=f"order of a whole epoch of {_LARGE:,}, peak MB", column=_COLUMN, samples=peaks)
    yield Figure(row=f"first batch of an epoch of {_LARGE:,}, s", column=_COLUMN, samples=first)
    for n, taken in steps.items():
        yield Figure(row=f"a step's order and random numbers among {n:,}, µs", column=_COLUMN, samples=taken)


def main(options: SteadyOptions) -> Record:
    if options.quick:
        options = replace(options, steps=100, warm_up=20, rounds=2)
    manifest = open_data(options)
    record = Record(
        title=f"What should not grow, {options.threads} threads",
        name="steady",
        options=options,
        figures=[
            *planning(options),
            *starts(manifest.train, options),
            *scanning(manifest, options),
            *growth(manifest.train, options),
        ],
        skipped={},
        remarks=(f"Epochs are of batches of {_BATCH}; a step's cost is the mean of {_STEPS:,} in a row.",),
    )
    record.publish()
    return record
