"""What the trainer costs beside the model: its step against a bare loop, and how long a real training waits for data.

    onewarp bench overhead --data DIR [--json FILE]

Ours is `trainer.loop.train_epoch`, with a journal on the disk, on batches that lie in memory; the bare loop is `bare`
below, with DDP as torch has it by default, and on several ranks once more with the settings that ours gives it: what
those save is not the loop's merit. All run in the same processes, on the same batches, from the same weights, at the
same rates, in fp32; they take turns, a block of steps each, and go the other way round after each. A block is timed in
whole: what an epoch costs at its beginning counts. Core time is that of the first rank's process: it knows nothing of
waiting, and so of who else uses the machine.

Waiting is what the journal of a real training says (`data_wait`): with the real loader, on the workers that training
starts by default.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from benchmarks.data import open_data
from benchmarks.first import first_model
from benchmarks.learning import InMemory
from benchmarks.record import Figure, Options, Record
from benchmarks.spawned import on_ranks, together
from pipelines import Augment, Loader, Samples
from pipelines.errors import UserError
from pipelines.loader import Batch
from trainer import TrainConfig, fine_tune, journal, models, optim, schedule, weights
from trainer.journal import Journal
from trainer.loop import Learner, dropout_seed, seed_dropout, train_epoch
from trainer.position import Position
from trainer.precision import Precision
from trainer.ranks import Ranks

OURS, BARE, TUNED = "ours, s a step", "bare loop, s a step", "bare loop with our DDP settings, s a step"
RATIO, CORES, TUNED_RATIO = "ours ÷ bare", "ours ÷ bare, by core time", "ours ÷ bare with our DDP settings"
COST = "µs a step"
SHARE, STEP, FIRST = "of the time, %", "a step, s", "first batch of an epoch, s"
_PEAK = 1e-3  # rate of the head
_FILLING = 3  # steps of an epoch in which the loader's queue fills; what follows is its steady state
_REPEATS = 300  # of what takes microseconds


@dataclass(frozen=True, kw_only=True)
class OverheadOptions(Options):
    """Measure what the trainer costs."""

    model: str = "tf_efficientnet_lite0"
    """Body; with its installed weights, where it has some."""
    head: Literal["fastai", "plain"] = "fastai"
    """As of training."""
    size: int = 160
    """Pixels."""
    batch: int = 64
    """Images in a step, over all ranks."""
    pairs: int = 12
    """Blocks of each of the two loops."""
    steps: int = 3
    """Steps in a block."""
    subset: float = 0.5
    """Share of the images that the real training reads, in one epoch with the head alone and one with everything."""
    workers: int | None = None
    """Processes of the real training. Default: as training has it; 0 is this process, without Ray."""


# ---- The bare loop


def bare(
    network: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, batches: Iterator[Batch]
) -> None:
    """What anybody would write."""
    network.train()
    for batch in batches:
        loss = cross_entropy(network(batch.images_NCHW), batch.labels_N)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def bare_parts(
    model: models.Classifier, options: OverheadOptions, ranks: Ranks, phase: schedule.Phase, *, tuned: bool
) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler]:
    """What the bare loop needs, each with its own defaults; `tuned` is with DDP as ours sets it."""
    network: nn.Module = model
    if ranks.world_size > 1:
        settings: Any = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": True}
        network = DistributedDataParallel(
            model,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            **(settings if tuned else {}),
        )
    optimizer = optim.build(model, 0.01, options.size)  # torch.optim.AdamW(…, fused=True) over three layer groups
    steps = _WARM_UP + options.pairs * options.steps
    scheduler = OneCycleLR(  # ours over n steps is torch's over n + 1, less the last: see `schedule.OneCycle`
        optimizer,
        max_lr=[phase.lrs[group["layer_group"]] for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=(0.3 * steps + 1) / (steps + 1),
        div_factor=5.0,
        final_div_factor=1e5 / 5.0,
    )
    return network, optimizer, scheduler


# ---- Both in turn

_WARM_UP = 2  # steps of each before the clock starts: the first ones allocate, and choose kernels


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What one number of ranks gave."""

    ours: list[tuple[float, float]]
    """(seconds, core-seconds of this rank) a step, of each block."""
    bare: list[tuple[float, float]]
    tuned: list[tuple[float, float]]
    """The bare loop with our settings of DDP; of one rank, which has no DDP, nothing."""
    parts: dict[str, float]
    """Microseconds a step of what the bare loop does not do."""
    apart: float
    """Most distance of our weights from a bare loop's at the end, over the way that those have gone."""


def take_turns(options: OverheadOptions, samples: Samples, ranks: Ranks, folder: Path) -> Turns:
    """The loops in turn, on each rank; `folder` takes the journal."""
    device, precision = ranks.device, Precision(name="fp32", device=ranks.device)
    torch.manual_seed(0)
    loader = Loader(
        samples,
        size=options.size,
        global_batch=options.batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        augment=Augment(),
        threads=1,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=ranks.local_rank,
    )
    block, warm_up = InMemory(loader, options.steps), InMemory(loader, _WARM_UP)
    first = first_model(options.model, head=options.head, classes=len(samples.classes), size=options.size)
    first = first.to(device=device).to(memory_format=torch.channels_last)
    (phase,) = schedule.fine_tune(
        base_lr=2 * _PEAK,
        groups=3,
        steps_per_epoch=_WARM_UP + options.pairs * options.steps,
        epochs=1,
        freeze_epochs=0,
    )

    model = copy.deepcopy(first)
    learner = Learner(model=model, optimizer=optim.build(model, 0.01, options.size), precision=precision, ranks=ranks)
    learner.train(first_group=phase.freeze_to)
    journal = Journal(folder / "journal.jsonl" if ranks.rank == 0 else None)
    position = Position(epoch=0, base_lr=_PEAK)

    def our_turn(batches: InMemory) -> None:
        nonlocal position
        loader: Any = batches
        *_, last = train_epoch(learner, loader, phase, position, seed=0, journal=journal)
        position = Position(epoch=last.epoch + 1, updates=last.updates, base_lr=_PEAK)

    turns: dict[str, Callable[[InMemory], None]] = {"ours": our_turn}
    others: dict[str, models.Classifier] = {}
    for name in ("bare", "tuned") if ranks.world_size > 1 else ("bare",):
        others[name] = copy.deepcopy(first)
        turns[name] = partial(_bare_turn, bare_parts(others[name], options, ranks, phase, tuned=name == "tuned"))

    def timed(turn: Callable[[InMemory], None]) -> tuple[float, float]:
        together(ranks)
        started, cores = time.perf_counter(), time.process_time()
        turn(block)
        together(ranks)
        return (time.perf_counter() - started) / options.steps, (time.process_time() - cores) / options.steps

    for turn in turns.values():
        turn(warm_up)
    took: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": [], "tuned": []}
    for pair in range(options.pairs):
        for name in turns if pair % 2 == 0 else reversed(turns):
            took[name].append(timed(turns[name]))
    parts = {name: 1e6 * seconds for name, seconds in beside_the_model(learner, phase, journal)}
    journal.close()
    apart = max(_distance(model, other) / _distance(other, first) for other in others.values())
    return Turns(**took, parts=parts, apart=apart)


def _bare_turn(parts: tuple[nn.Module, torch.optim.Optimizer, LRScheduler], batches: InMemory) -> None:
    bare(*parts, batches.epoch())


def _distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((p - q).detach().double().square().sum()) for p, q in pairs) ** 0.5


def beside_the_model(learner: Learner, phase: schedule.Phase, journal: Journal) -> Iterator[tuple[str, float]]:
    """Seconds a step of each thing that `train_epoch` does and the bare loop does not, by itself."""
    ranks, optimizer = learner.ranks, learner.optimizer
    loss = torch.ones((), device=ranks.device)
    lrs, _ = phase.hyper(0)
    fields = {"step": 1000, "epoch": 10, "loss": 1.234567, "lr": lrs, "images_per_second": 34.56789, "data_wait": 1e-5}
    things: dict[str, Callable[[int], object]] = {
        "the sum of the loss over all ranks": lambda step: ranks.sum(loss),
        "reading the loss": lambda step: torch.stack([loss]).tolist(),
        "rates and momentum": lambda step: optim.set_hyper(optimizer, *phase.hyper(step % 10)),
        "the seed of dropout": lambda step: seed_dropout(ranks.device, dropout_seed(0, 0, step, ranks.rank)),
        "a line of the journal": lambda step: journal.write("step", **fields),
    }
    for name, thing in things.items():
        thing(0)
        together(ranks)
        started = time.perf_counter()
        for step in range(_REPEATS):
            thing(step)
        together(ranks)
        yield name, (time.perf_counter() - started) / _REPEATS


# ---- A real training


def waiting(options: OverheadOptions) -> Iterator[Figure]:
    """What the journal of a real training says of each phase."""
    with tempfile.TemporaryDirectory(prefix="onewarp-overhead-") as runs:
        result = fine_tune(
            TrainConfig(
                data=options.data,
                model=options.model,
                head=options.head,
                pretrained=weights.packaged(options.model) is not None,
                size=options.size,
                batch=options.batch,
                subset=options.subset,
                epochs=1,
                freeze_epochs=1,
                lr=2 * _PEAK,
                workers=options.workers,
                threads=options.threads if options.workers == 0 else None,
                precision="fp32",
                wandb="off",
                runs=Path(runs),
            ),
            Console(quiet=True),
        )
        steps = [event for event in journal.read(result.folder / "journal.jsonl") if event["event"] == "step"]
    for epoch, name in enumerate(("the head alone", "everything")):
        row = f"real training, {name}: waiting for data"
        seconds, share, first = waited([step for step in steps if step["epoch"] == epoch], options.batch)
        yield Figure(row=row, column=SHARE, samples=[100 * share])
        yield Figure(row=row, column=STEP, samples=seconds)
        yield Figure(row=row, column=FIRST, samples=[first])


def waited(steps: list[dict], batch: int) -> tuple[list[float], float, float]:
    """Of an epoch's step events: (seconds of each step, share of them spent waiting, wait for the first batch, s).

    The first two are of the steady state. A share is of all the time together: a long wait counts for what it is.
    """
    seconds = [batch / step["images_per_second"] for step in steps]
    waits = [step["data_wait"] * took for step, took in zip(steps, seconds, strict=True)]
    steady = seconds[_FILLING:]
    return steady, sum(waits[_FILLING:]) / sum(steady), waits[0]


def main(options: OverheadOptions) -> Record:
    samples = open_data(options).train
    if options.quick:
        few = min(1.0, 64 / len(samples))
        tiny = {"model": "test_efficientnet", "size": 32, "batch": 8, "pairs": 2, "steps": 2, "subset": few}
        options = replace(options, **tiny, workers=0, threads=1)
    steps = round(options.subset * len(samples)) // options.batch
    if steps <= _FILLING:  # told now, and not when the loops have been measured
        raise UserError(
            f"{round(options.subset * len(samples))} images are {steps} batches of {options.batch}, too few to have a "
            f"steady state. Choose a larger --subset or a smaller --batch."
        )
    gpus = torch.cuda.device_count()
    figures: list[Figure] = []
    skipped = {}
    for world_size in (1, 2):
        threads = max(1, options.threads // world_size)
        each = "GPU" if gpus else f"{threads} thread" + ("s" if threads > 1 else "")
        row = f"{world_size} rank{'s' if world_size > 1 else ''}, {each}" + (" each" if world_size > 1 else "")
        if gpus and world_size > gpus:
            skipped[row] = f"there is {gpus} GPU"
            continue
        figures += _figures(row, on_ranks(world_size, threads, partial(take_turns, options, samples)))
    figures += waiting(options)

    record = Record(
        title=f"What the trainer costs, {options.model}, {options.size} px, global batch {options.batch}",
        name="overhead",
        options=options,
        figures=figures,
        skipped=skipped,
        remarks=(
            f"The loops take turns, {options.steps} steps each, {options.pairs} times; a ratio is of one round.",
            f"What ours does beside is the mean of {_REPEATS} in a row, alone; most of it is part of the ratio above.",
            f"Waiting is of an epoch's steps after its first {_FILLING}, all together.",
        ),
    )
    record.publish()
    return record


def _figures(row: str, turns: Turns) -> Iterator[Figure]:
    columns = {OURS: turns.ours, BARE: turns.bare, TUNED: turns.tuned}
    for column, loop in columns.items():
        if loop:
            yield Figure(row=row, column=column, samples=[seconds for seconds, _ in loop])
    for column, loop, i in ((RATIO, turns.bare, 0), (CORES, turns.bare, 1), (TUNED_RATIO, turns.tuned, 0)):
        if loop:
            ratios = [our[i] / their[i] for our, their in zip(turns.ours, loop, strict=True)]
            yield Figure(row=row, column=column, samples=ratios)
    for name, cost in turns.parts.items():
        yield Figure(row=f"{row}: {name}", column=COST, samples=[cost])
    everything, whole = f"{row}: all of that", sum(turns.parts.values())
    bare = statistics.median(seconds for seconds, _ in turns.bare)
    yield Figure(row=everything, column=COST, samples=[whole])
    yield Figure(row=everything, column="of a bare step, %", samples=[1e-4 * whole / bare])
