"""What more ranks give: steps measured on the cores that are here, a model of a step, and what it says of many GPUs.

    onewarp bench scaling --data DIR [--json FILE]

The model of a step is max(compute, loading) + the part of the all-reduce that nothing hides:

    all-reduce of S bytes over n ranks: 2 (n - 1) latency + 2 (n - 1)/n S ÷ bandwidth       (a ring)

All it knows is measured, and none of it from the steps that it is held against: compute is that of a rank whose
neighbours compute, too, without a word between them (they share memory and caches); the all-reduce is fitted to gloo's
times over a range of sizes, at rest; loading is the loader alone. On CPUs nothing hides an all-reduce, as it takes the
cores that compute. Two cores can show what a second rank costs. They cannot show a network.

What follows for GPUs is a projection and no measurement: from published link speeds, and from a compute speed that is
given. There an all-reduce hides behind the backward pass, two thirds of a step, all but its last bucket.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.first import first_model
from benchmarks.overhead import InMemory
from benchmarks.record import Figure, Options, Record, open_data
from benchmarks.spawned import on_ranks, together
from pipelines import Augment, Loader, Samples
from pipelines.errors import UserError
from trainer import models, optim, schedule
from trainer.journal import Journal
from trainer.loop import Learner, train_epoch
from trainer.position import Position
from trainer.precision import Precision
from trainer.ranks import Ranks

STEP, PREDICTED, ERROR = "measured, s a step", "the model, s a step", "model ÷ measured"
REDUCE, FITTED = "all-reduce, ms", "the fit, ms"
RATE, EFFICIENCY = "img/s, projected", "of as many single GPUs, %"
CORES = "cores a GPU, for JPEGs"
_WARM_UP = 2
_RATE = 1e-5

# Published: NVLink 4 of an HGX H100, each way; one NDR InfiniBand port for each GPU. What nccl reaches of either.
NVLINK, INFINIBAND, REACHED = 450e9, 50e9, 0.8  # bytes a second
NVLINK_LATENCY, INFINIBAND_LATENCY = 5e-6, 10e-6  # seconds a hop, software included
NODE = 8  # GPUs
BACKWARD = 2 / 3  # of compute
LAST = 25 * 2**20  # bytes: torch's bucket, the last of which has nothing to hide behind


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(Options):
    """Measure what more ranks give, and project."""

    model: str = "tf_efficientnet_lite0"
    """Body."""
    size: int = 160
    """Pixels."""
    batch: int = 64
    """Images in a step of the strong scaling, over all ranks; of the weak, two ranks have as many."""
    ranks: int = 2
    """Most ranks that are measured."""
    pairs: int = 8
    """Blocks of steps of each kind, in turn."""
    steps: int = 3
    """Steps in a block."""
    gpu_speed: float = 2800.0
    """Images that one H100 is assumed to compute in a second: about ResNet-50 at 224 px in NVIDIA's own examples."""
    gpu_gradient: float = 102.0
    """Megabytes of its gradient."""
    gpu_batch: int = 256
    """Images a GPU in a step of the projection."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """An all-reduce: seconds = 2 (n - 1) latency + 2 (n - 1)/n bytes ÷ bandwidth."""

    latency: float
    """Seconds a hop."""
    bandwidth: float
    """Bytes a second."""

    def seconds(self, size: float, ranks: int) -> float:
        return 2 * (ranks - 1) * self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    @classmethod
    def fit(cls, sizes_K: Sequence[float], seconds_K: Sequence[float], ranks: int) -> Ring:
        """To K measured times. Each counts by its relative error, as the sizes span orders of magnitude."""
        seconds = np.asarray(seconds_K, np.float64)
        hops, share = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
        rows_K2 = np.stack([np.full_like(seconds, hops), share * np.asarray(sizes_K, np.float64)], axis=1)
        (latency, inverse), *_ = np.linalg.lstsq(rows_K2 / seconds[:, None], np.ones_like(seconds), rcond=None)
        return cls(latency=max(0.0, float(latency)), bandwidth=1 / max(1e-18, float(inverse)))


def step(compute: float, loading: float, exposed: float) -> float:
    """The model, in seconds."""
    return max(compute, loading) + exposed


def on_gpus(ranks: int, compute: float, size: float) -> float:
    """What nothing hides of an all-reduce of `size` bytes over so many H100s, in nodes of eight: seconds.

    Within each node the gradient is reduced and scattered, each GPU sums its eighth with those of the other nodes, then
    the eighths are gathered.
    """
    local, nodes = min(ranks, NODE), -(-ranks // NODE)
    inner = Ring(latency=NVLINK_LATENCY, bandwidth=REACHED * NVLINK)
    outer = Ring(latency=INFINIBAND_LATENCY, bandwidth=REACHED * INFINIBAND)

    def seconds(size: float) -> float:
        return inner.seconds(size, local) + outer.seconds(size / local, nodes)

    last = min(size, LAST)
    return seconds(last) + max(0.0, seconds(size - last) - BACKWARD * compute)


# ---- Measured


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What so many ranks gave."""

    apart: list[float]
    """Seconds a step of a rank whose neighbours compute as well, without a word between them; the slowest rank's."""
    joined: list[float]
    """Seconds a step of all together."""
    bytes: int
    """Of the gradient."""
    reduced: dict[int, list[float]]
    """Seconds of an all-reduce, by its bytes."""


def measure(options: ScalingOptions, samples: Samples, share: int, ranks: Ranks, folder: Path) -> Measured:
    """Steps of `share` images a rank, alone side by side and together, in turn; then all-reduces."""
    turns = {
        "apart": _training(options, samples, share, Ranks(local_rank=ranks.local_rank), folder / f"apart{ranks.rank}"),
        "joined": _training(options, samples, share, ranks, folder / f"joined{ranks.rank}"),
    }
    took: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn(_WARM_UP)
    for pair in range(options.pairs):
        names = list(turns) if pair % 2 == 0 else list(reversed(turns))
        for name in names:
            together(ranks)
            started = time.perf_counter()
            turns[name](options.steps)
            own = (time.perf_counter() - started) / options.steps
            took[name].append(max(ranks.gather([own])))
    size = sum(p.numel() * p.element_size() for p in _model(options, len(samples.classes)).parameters())
    return Measured(**took, bytes=size, reduced=dict(_reduced(ranks, size)))


def _reduced(ranks: Ranks, size: int) -> Iterator[tuple[int, list[float]]]:
    if ranks.world_size == 1:
        return
    for count in (2**10, 2**14, 2**18, 2**20, 2**22, size):
        tensor, times = torch.zeros(count // 4, device=ranks.device), []
        for _ in range(12):
            together(ranks)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - started
            times.append(max(ranks.gather([took])))
        yield count, times[2:]


def _model(options: ScalingOptions, classes: int) -> models.Classifier:
    model = first_model(options.model, head="plain", classes=classes, size=options.size)
    return model.to(memory_format=torch.channels_last)


def _training(
    options: ScalingOptions, samples: Samples, share: int, ranks: Ranks, folder: Path
) -> Callable[[int], None]:
    """Train everything for so many steps, on batches that lie in memory."""
    folder.mkdir()
    loader = Loader(
        samples,
        size=options.size,
        global_batch=share * ranks.world_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=Augment(),
        threads=1,
        device="gpu" if ranks.device.type == "cuda" else "cpu",
        device_id=ranks.local_rank,
    )
    torch.manual_seed(0)
    model = _model(options, len(samples.classes)).to(device=ranks.device)
    numbers = Precision(name="fp32", device=ranks.device)
    optimizer = optim.build(model, 0.01, options.size)
    learner = Learner(model=model, optimizer=optimizer, precision=numbers, ranks=ranks)
    learner.train(first_group=0)
    (phase,) = schedule.fit_flat_cos(lr=_RATE, groups=3, steps_per_epoch=1000, epochs=1)
    journal = Journal(folder / "journal.jsonl")
    held = {count: InMemory(loader, count) for count in {_WARM_UP, options.steps}}
    epochs = itertools.count()

    def train(steps: int) -> None:
        batches: Any = held[steps]
        position = Position(epoch=next(epochs), base_lr=_RATE)
        for _ in train_epoch(learner, batches, phase, position, seed=0, journal=journal):
            pass

    return train


def loading(samples: Samples, seconds: float) -> float:
    """Images a second of the loader alone, at 224 pixels on one thread."""
    loader = Loader(samples, size=224, global_batch=16, augment=Augment(), threads=1)
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for _ in range(4):
        next(batches)
    read, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        read += len(next(batches).labels_N)
    return read / elapsed


# ---- The record


def main(options: ScalingOptions) -> Record:
    samples = open_data(options).train
    if options.quick:
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 8, "pairs": 2, "steps": 2}
        options = replace(options, **tiny)
    gpus = torch.cuda.device_count()
    if gpus and options.ranks > gpus:
        raise UserError(f"--ranks {options.ranks}: there are {gpus} GPUs. Choose no more.")
    figures: list[Figure] = []
    speed = loading(samples, 0.3 if options.quick else 5.0)
    whole, half = options.batch, options.batch // options.ranks
    alone = {share: on_ranks(1, 1, partial(measure, options, samples, share)) for share in (whole, half)}
    there = on_ranks(options.ranks, 1, partial(measure, options, samples, half))
    ring = Ring.fit(list(there.reduced), [statistics.median(times) for times in there.reduced.values()], options.ranks)

    for share, measured in alone.items():
        figures.append(Figure(row=f"1 rank, {share} images", column=STEP, samples=measured.joined))
    row = f"{options.ranks} ranks, {half} images each"
    apart = statistics.median(there.apart)
    predicted = step(apart, 0.0, ring.seconds(there.bytes, options.ranks))
    figures += [
        Figure(row=f"{row}, without a word", column=STEP, samples=there.apart),
        Figure(row=row, column=STEP, samples=there.joined),
        Figure(row=row, column=PREDICTED, samples=[predicted]),
        Figure(row=row, column=ERROR, samples=[predicted / statistics.median(there.joined)]),
    ]
    strong = statistics.median(alone[whole].joined) / statistics.median(there.joined)
    weak = statistics.median(alone[half].joined) / statistics.median(there.joined)
    for name, value in (("strong", strong / options.ranks), ("weak", weak)):
        words = f"{name} scaling from 1 to {options.ranks} ranks"
        figures.append(Figure(row=words, column="of the ideal, %", samples=[100 * value]))
    for size, times in there.reduced.items():
        row = f"{size / 1e3:,.0f} kB over {options.ranks} ranks"
        figures.append(Figure(row=row, column=REDUCE, samples=[1e3 * seconds for seconds in times]))
        figures.append(Figure(row=row, column=FITTED, samples=[1e3 * ring.seconds(size, options.ranks)]))
    figures += projected(options, speed)

    record = Record(
        title=f"Scaling, {options.model}, {options.size} px, global batch {options.batch}",
        name="scaling",
        options=options,
        figures=figures,
        skipped={},
        remarks=(
            "Steps are of batches in memory, so nothing is loaded; what a training waits for its loader is in the "
            "record of overhead.",
            f"Gradient: {there.bytes / 1e6:.1f} MB. Ring: {1e6 * ring.latency:.0f} µs a hop, "
            f"{ring.bandwidth / 1e9:.2f} GB/s.",
            f"H100 rows are a PROJECTION: {options.gpu_speed:,.0f} images/s a GPU are assumed, {options.gpu_batch} "
            f"images each, a gradient of {options.gpu_gradient:g} MB; {100 * REACHED:.0f}% of NVLink's "
            f"{NVLINK / 1e9:.0f} and InfiniBand's {INFINIBAND / 1e9:.0f} GB/s. Cores feed a GPU with 224 px images as "
            f"fast as it computes: one core of this machine reads {speed:,.0f} of these files a second; `mixed` "
            "decoding on the GPU is not measured.",
        ),
    )
    record.publish()
    return record


def projected(options: ScalingOptions, speed: float) -> Iterator[Figure]:
    """What the model says of many GPUs."""
    size = 1e6 * options.gpu_gradient
    compute = options.gpu_batch / options.gpu_speed
    for ranks in (1, 8, 16, 64, 256, 1024):
        seconds = step(compute, 0.0, on_gpus(ranks, compute, size) if ranks > 1 else 0.0)
        row = f"projection: {ranks:,} H100" + ("s" if ranks > 1 else "")
        yield Figure(row=row, column=RATE, samples=[ranks * options.gpu_batch / seconds])
        yield Figure(row=row, column=EFFICIENCY, samples=[100 * compute / seconds])
    yield Figure(row="projection: feeding one H100", column=CORES, samples=[options.gpu_speed / speed])
