"""What more ranks give: steps measured on the cores that are here, a model of a step, and what it says of many GPUs.

    onewarp bench scaling --data DIR [--json FILE]

The model of a step is max(compute, loading) + the part of the all-reduce that nothing hides:

    all-reduce of S bytes over n ranks: 2 (n - 1) latency + 2 (n - 1)/n S ÷ bandwidth       (a ring)

It knows what is measured, none of it in the steps that it is held against: compute of ranks that compute side by side,
without a word; loading of their loaders alone; all-reduces of other sizes, at rest. On CPUs loading takes the cores
that compute, so both add up, and nothing hides an all-reduce. It is held against steps of many images, of few (where
the all-reduce is a large part), and of images that are read meanwhile; beside it stands what computing alone predicts.
Two cores can show what a second rank costs. They cannot show a network.

What follows for GPUs is a projection: from published link speeds, a compute speed that is given, and what a core here
reads. There an all-reduce hides behind the backward pass, two thirds of a step, all but its last bucket.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.data import open_data, part_of
from benchmarks.learning import FIRST, Setting, Training, loader_of
from benchmarks.record import Figure, Options, Record
from benchmarks.spawned import on_ranks, together
from pipelines import Loader, Manifest, Samples, pack
from pipelines.errors import UserError
from trainer.ranks import Ranks

MEASURED, PREDICTED, ERROR = "measured, s a step", "the model, s a step", "model ÷ measured"
COMPUTE, NULL = "computing alone, s a step", "computing alone ÷ measured"
REDUCE, FITTED = "all-reduce, ms", "the fit, ms"
RATE, EFFICIENCY = "img/s, projected", "of as many single GPUs, %"
CORES = "cores that feed one GPU"
IDEAL = "of the ideal, %"
_FEW = 8  # of a rank's images in the step of few, one in so many; two at least, as batch-norm wants

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
    """Images in a step of the strong scaling, over all ranks; of the weak, so many ranks have as many together."""
    ranks: int = 2
    """Most ranks that are measured; there are no more than there are GPUs, where there are any."""
    pairs: int = 6
    """Turns of each kind, one after the other."""
    steps: int = 3
    """Steps in a turn."""
    gpu_speed: float = 2800.0
    """Images that one H100 is assumed to compute in a second: about ResNet-50 at 224 px in NVIDIA's own examples."""
    gpu_gradient: float = 102.0
    """Megabytes of its gradient."""
    gpu_batch: int = 256
    """Images a GPU in a step of the projection."""
    gpu_cores: int = 14
    """Cores of its machine for each GPU in the projection: 112 for eight, as in a DGX H100."""


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


def step(compute: float, loading: float, exposed: float, *, shared: bool) -> float:
    """The model, in seconds; `shared` where loading takes the cores that compute."""
    return (compute + loading if shared else max(compute, loading)) + exposed


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
    """What so many ranks gave: seconds a step, the slowest rank's, of each turn."""

    whole: list[float]
    """One rank with all the images, the others at rest."""
    alone: list[float]
    """One rank with its share."""
    apart: list[float]
    """All with their shares, without a word between them."""
    joined: list[float]
    """All together."""
    few_apart: list[float]
    """The same two with few images each."""
    few_joined: list[float]
    reading: list[float]
    """What the loaders take for a step, alone, each on one thread."""
    loaded: list[float]
    """All together, their images read meanwhile."""
    gradient: int
    """Bytes."""
    reduced: dict[int, list[float]]
    """Seconds of an all-reduce, by its bytes."""


def measure(options: ScalingOptions, samples: Samples, share: int, ranks: Ranks, folder: Path) -> Measured:
    """Each kind of step, in turn; then all-reduces."""
    one, n, steps = Ranks(local_rank=ranks.local_rank), ranks.world_size, options.steps
    few = _few(share)

    def training(name: str, batch: int, among: Ranks) -> Training:
        setting = Setting(samples=samples, model=options.model, size=options.size, batch=batch, head="plain")
        return Training(replace(setting, precision="fp32"), folder / f"{name}{ranks.rank}", among)

    joined = training("joined", n * share, ranks)
    trainings = {
        "apart": training("apart", share, one),
        "joined": joined,
        "few_apart": training("few_apart", few, one),
        "few_joined": training("few_joined", n * few, ranks),
    }
    turns: dict[str, Callable[[], float]] = {
        name: partial(_step, each, steps=steps, loaded=False) for name, each in trainings.items()
    }
    turns["loaded"] = partial(_step, joined, steps=steps, loaded=True)
    loader = loader_of(joined.setting, ranks)
    turns["reading"] = lambda: reading(loader, FIRST, 4 * steps)
    if ranks.rank == 0:  # the others wait meanwhile, which takes no core
        turns["whole"] = partial(_step, training("whole", n * share, one), steps=steps, loaded=False)
        turns["alone"] = partial(_step, trainings["apart"], steps=steps, loaded=False)
    took: dict[str, list[float]] = {name: [] for name in ("whole", "alone", *turns)}
    for turn in range(options.pairs):
        names = list(took)
        for name in names if turn % 2 == 0 else reversed(names):
            together(ranks)
            own = turns[name]() if name in turns else 0.0
            took[name].append(max(ranks.gather([own])))
    return Measured(**took, gradient=joined.gradient, reduced=dict(_reduced(ranks)))


def _few(share: int) -> int:
    return max(2, share // _FEW)


def _step(training: Training, *, steps: int, loaded: bool) -> float:
    return training.run(loaded=loaded, steps=steps).step


def reading(loader: Loader, first: int, steps: int) -> float:
    """Seconds for a batch of the loader alone, after the first ones."""
    batches = loader.epoch(0)
    for _ in itertools.islice(batches, first):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(batches, steps):
        pass
    return (time.perf_counter() - started) / steps


def _reduced(ranks: Ranks) -> Iterator[tuple[int, list[float]]]:
    for size in (2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26):
        tensor, times = torch.zeros(size // 4, device=ranks.device), []
        for _ in range(12):
            together(ranks)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            if tensor.is_cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - started
            times.append(max(ranks.gather([took])))
        yield size, times[2:]


# ---- The record


def main(options: ScalingOptions) -> Record:
    if options.batch < 4 * options.ranks:
        raise UserError(
            f"--batch {options.batch} is too few images for steps of many and of few on {options.ranks} ranks. Choose "
            f"{4 * options.ranks} or more."
        )
    manifest = open_data(options)
    if options.quick:
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 16, "pairs": 1, "steps": 1}
        options = replace(options, **tiny)
    gpus, skipped = torch.cuda.device_count(), {}
    most = min(options.ranks, gpus) if gpus else options.ranks
    if most < options.ranks:
        skipped[f"{most + 1} ranks and more"] = f"there {'are' if gpus > 1 else 'is'} {gpus} GPU{'s' * (gpus > 1)}"
    figures: list[Figure] = []
    remarks = [
        "Steps in fp32, of batches in memory but where it says so. A ratio of scaling is of one turn; a prediction is "
        "of the medians of all turns.",
    ]
    for count in range(2, most + 1):
        share = max(1, options.batch // count)
        there = on_ranks(count, 1, partial(measure, options, manifest.train, share))
        seconds = [statistics.median(times) for times in there.reduced.values()]
        ring = Ring.fit(list(there.reduced), seconds, count)
        figures += held_against(there, ring, count, share, shared=not gpus)
        remarks.append(
            f"{count} ranks: a gradient of {there.gradient / 1e6:.1f} MB; a ring with {1e6 * ring.latency:.0f} µs a "
            f"hop and {ring.bandwidth / 1e9:.2f} GB/s."
        )
    speeds = dict(feeding(manifest, 0.3 if options.quick else 4.0))
    figures += projected(options, speeds)
    jpegs = next(iter(speeds.values()))
    record = Record(
        title=f"Scaling, {options.model}, {options.size} px, global batch {options.batch}",
        name="scaling",
        options=options,
        figures=figures,
        skipped={**skipped, "cores that feed one GPU with `mixed` decoding": "it needs a GPU to be measured"},
        remarks=(
            *remarks,
            f"H100 rows are a PROJECTION: {options.gpu_speed:,.0f} images/s a GPU are assumed, {options.gpu_batch} "
            f"images each, a gradient of {options.gpu_gradient:g} MB; {100 * REACHED:.0f}% of NVLink's "
            f"{NVLINK / 1e9:.0f} and InfiniBand's {INFINIBAND / 1e9:.0f} GB/s; {options.gpu_cores} cores for each GPU, "
            f"that read as many 224 px images as cores here, {jpegs:,.0f} of these files a second.",
        ),
    )
    record.publish()
    return record


def held_against(there: Measured, ring: Ring, count: int, share: int, *, shared: bool) -> Iterator[Figure]:
    """What was measured on `count` ranks of `share` images each, and what the model says of it."""
    exposed = ring.seconds(there.gradient, count)
    few = _few(share)
    yield Figure(row=f"1 rank, {count * share} images", column=MEASURED, samples=there.whole)
    yield Figure(row=f"1 rank, {share} images", column=MEASURED, samples=there.alone)
    for row, apart, load, joined in (
        (f"{count} ranks, {share} images each", there.apart, None, there.joined),
        (f"{count} ranks, {few} images each", there.few_apart, None, there.few_joined),
        (f"{count} ranks, {share} images each, read meanwhile", there.apart, there.reading, there.loaded),
    ):
        compute, measured = statistics.median(apart), statistics.median(joined)
        loading = statistics.median(load) if load else 0.0
        predicted = step(compute, loading, exposed, shared=shared)
        yield Figure(row=row, column=MEASURED, samples=joined)
        yield Figure(row=row, column=PREDICTED, samples=[predicted])
        yield Figure(row=row, column=ERROR, samples=[predicted / measured])
        yield Figure(row=row, column=COMPUTE, samples=apart)
        yield Figure(row=row, column=NULL, samples=[compute / measured])
        if load:
            yield Figure(row=f"{row}: the loaders alone", column=MEASURED, samples=load)
    for name, one, ideal in (("strong", there.whole, count), ("weak", there.alone, 1)):
        shares = [100 * first / (ideal * all_) for first, all_ in zip(one, there.joined, strict=True)]
        yield Figure(row=f"{name} scaling from 1 to {count} ranks", column=IDEAL, samples=shares)
    for size, times in there.reduced.items():
        row = f"{size / 1e3:,.0f} kB over {count} ranks"
        yield Figure(row=row, column=REDUCE, samples=[1e3 * seconds for seconds in times])
        yield Figure(row=row, column=FITTED, samples=[1e3 * ring.seconds(size, count)])


# ---- Projected


def feeding(manifest: Manifest, seconds: float) -> Iterator[tuple[str, float]]:
    """By the kind of files, how many images of 224 pixels one core reads in a second."""
    few = part_of(manifest, manifest.train.share(min(1.0, 1000 / len(manifest.train)), 0))
    yield "JPEGs", _speed(few.train, seconds)
    with tempfile.TemporaryDirectory(prefix="onewarp-scaling-") as scratch:
        store = pack(few, Path(scratch) / "store", kind="decoded", threads=1)
        yield "a decoded store", _speed(store.manifest.train, seconds)


def _speed(samples: Samples, seconds: float) -> float:
    setting = Setting(samples=samples, model="tf_efficientnet_lite0", size=224, batch=16)
    loader = loader_of(setting)
    steps = max(1, round(seconds / reading(loader, FIRST, 4)))
    return setting.batch / reading(loader, FIRST, steps)


def projected(options: ScalingOptions, speeds: dict[str, float]) -> Iterator[Figure]:
    """What the model says of many GPUs, and how many cores feed one of them; `speeds` are of one core."""
    size = 1e6 * options.gpu_gradient
    compute = options.gpu_batch / options.gpu_speed
    for files, speed in speeds.items():
        loading = options.gpu_batch / (options.gpu_cores * speed)
        for ranks in (1, 8, 64, 512, 1024):
            exposed = on_gpus(ranks, compute, size) if ranks > 1 else 0.0
            seconds = step(compute, loading, exposed, shared=False)
            row = f"projection: {ranks:,} H100{'s' * (ranks > 1)}, {files}"
            yield Figure(row=row, column=RATE, samples=[ranks * options.gpu_batch / seconds])
            yield Figure(row=row, column=EFFICIENCY, samples=[100 * compute / seconds])
    for files, speed in speeds.items():
        row = f"projection: feeding one H100, {files}"
        yield Figure(row=row, column=CORES, samples=[options.gpu_speed / speed])
