"""A job from the outside: prepare its folder, start its workers, watch its journal, tell how it ended."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from rich.console import Console

from pipelines.datasets import named_dataset
from pipelines.errors import UserError
from pipelines.firewall import MAX_PIXELS
from pipelines.labels import Csv, Labels, Regex
from pipelines.manifest import Manifest
from pipelines.scanning import Examine, is_current, scan
from pipelines.store import is_store
from trainer import (
    checkpoint,
    compiling,
    compression,
    journal,
    memory,
    mixing,
    models,
    precision,
    rehearsal,
    watchdog,
    weights,
)
from trainer.bar import counted
from trainer.best import Best
from trainer.config import Goal, TrainConfig
from trainer.micro import micro_batches
from trainer.progress import Progress
from trainer.ranks import Launcher, Ranks
from trainer.run_folder import RunFolder, printable, write_atomic
from trainer.stopping import StoppedError, listening
from trainer.tracking import Tracker, TrackingMode

# Settings that may differ when a run goes on: the images and their order stay the same. (Another number of workers
# draws other dropout and sees other batch statistics.)
FREE_TO_CHANGE = {"workers", "threads", "wandb", "runs", "name", "cache", "cache_limit", "cache_keep"}
FREE_TO_CHANGE |= {"micro_batch", "compile", "channels_last", "grad_compression", "checkpoint_every"}
FREE_TO_CHANGE |= {"restarts", "grace", "stall", "on_nan", "resume", "restart"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a training ended."""

    error_rate: float
    """Share of validation images misjudged, by the weights that are kept."""
    valid_loss: float
    most_confused: list[tuple[str, str, int]]
    """(actual, predicted, count), most frequent first, at most five."""
    quarantine: int
    """Files left out because they could not be decoded or labelled, at the scan or since."""
    seconds: float
    """Everything from the scan on."""
    folder: Path
    """Where everything of the run lies."""
    best: Best | None = None
    """The epoch whose weights are in `best.safetensors`: the lowest error of all."""
    advice: tuple[str, ...] = ()
    """What the epochs say about overfitting; sentences."""


def fine_tune(config: TrainConfig, console: Console | None = None) -> Result:
    """Train as `config` says, on as many workers as it says, and return how it ended.

    Raises:
        UserError: something about the data, the model or the machine that a person can mend.
        StoppedError: a signal came, and the run ended at a checkpoint.
    """
    started = time.time()
    events, folder, manifest = _carry_out(config, "train", console or Console())
    finished = next(event for event in reversed(events) if event["event"] == "finished")
    return Result(
        error_rate=finished["error_rate"],
        valid_loss=finished["valid_loss"],
        most_confused=[(a, p, n) for a, p, n in finished["most_confused"]],
        quarantine=len(manifest.quarantine) + sum(event["event"] == "quarantined" for event in events),
        seconds=time.time() - started,
        folder=folder.path,
        best=Best(**finished["best"]) if finished.get("best") else None,
        advice=tuple(finished.get("advice", ())),
    )


@dataclass(frozen=True, kw_only=True)
class LrFind:
    """What a range test found."""

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float]
    """Rates by method; empty where the curve carries no information."""
    folder: Path
    """Where the plot lies."""


def lr_find(config: TrainConfig, console: Console | None = None) -> LrFind:
    """Run the learning-rate range test alone, over all workers.

    Raises:
        UserError: as `fine_tune`.
    """
    events, folder, _ = _carry_out(config, "lr-find", console or Console())
    steps = [event for event in events if event["event"] == "range_step"]
    result = next(event for event in reversed(events) if event["event"] == "range_result")
    return LrFind(
        lrs=[step["lr"] for step in steps],
        losses=[step["loss"] for step in steps],
        suggestions=result["suggestions"],
        folder=folder.path,
    )


def _carry_out(config: TrainConfig, goal: Goal, console: Console) -> tuple[list[dict[str, Any]], RunFolder, Manifest]:
    from trainer.worker import run  # not before: it may itself be the program that runs

    workers = default_workers() if config.workers is None else config.workers
    config, caught, started = dataclasses.replace(config, workers=workers), [], time.time()
    check_workers(workers)
    check_batch(config)
    launch = launcher(workers)
    folder, manifest = prepare(config, console)
    if goal == "train" and any(event["event"] == "finished" for event in journal.read(folder.journal)):
        console.print(f"The run {folder.path.name} was finished before; this is how it ended.")
    else:
        try:
            with watched(folder, config.wandb, console), listening(folder.stop, config.grace) as caught:
                launch(partial(run, folder.path, goal), workers, config.restarts, partial(note_failure, folder))
        except memory.OutOfMemoryError as error:
            with console.status("The memory ran out. Trying which batch fits …"):
                raise UserError(f"{error} {rehearsal.advice(folder.read_config(), manifest, folder.initial)}") from None
    events = journal.read(folder.journal)
    begin = max(i for i, event in enumerate(events) if event["event"] == "run" and event["command"] == goal)
    if events[-1]["event"] == "stopped" and events[begin:][0]["time"] >= started:
        kept = [event["step"] for event in events if event["event"] == "checkpoint"]
        told = f"the last checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint yet"
        raise StoppedError(f"stopped after step {events[-1]['step']}; {told}", *caught[:1])
    return events[begin:], folder, manifest


def note_failure(folder: RunFolder, reasons: dict[int, str]) -> None:
    """Record what ended the workers; the one that writes the journal is ended, or about to be."""
    record = journal.Journal(folder.journal)
    for rank, stood in watchdog.notes(folder.stalled):
        record.write("stalled", rank=rank, stood=stood)
    for rank, reason in reasons.items():
        record.write("warning", message=f"Worker {rank} failed ({reason.rstrip('.')}).")
    with suppress(UserError):  # a full storage is no reason not to start again
        record.close()


def check_workers(workers: int) -> None:
    """Raise UserError where this machine cannot give so many workers."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    if gpus and workers > gpus:
        raise UserError(f"--workers {workers}: this machine has {gpus} GPUs, one for a worker. Choose {gpus} or less.")
    if not gpus and workers > cores:
        raise UserError(
            f"--workers {workers}: this machine has {cores} CPU cores and no GPU, and each worker takes a core. "
            f"Choose --workers {cores} or less."
        )


def check_batch(config: TrainConfig) -> None:
    """Raise UserError where the batch cannot be divided among the workers; one to be found is no matter yet."""
    workers = config.workers or 0
    if config.batch == "auto":
        return
    if config.batch < workers:
        raise UserError(
            f"--batch {config.batch} gives some of the {workers} workers no image. Choose --batch {2 * workers} or "
            "more, or fewer workers."
        )
    if config.batch < 2 * workers and not config.sync_bn:
        raise UserError(
            f"--batch {config.batch} gives some of the {workers} workers fewer than two images, and batch-norm has no "
            f"variance of one. Choose --batch {2 * workers} or more, fewer workers, or --sync-bn."
        )
    if config.mixup or config.cutmix:
        mixing.check(config.batch, max(1, workers))
    micro_batches(config.batch, max(1, workers), config.micro_batch)


def default_workers() -> int:
    """One for each GPU; without GPUs two, or one where there is only one core."""
    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def launcher(workers: int) -> Launcher:
    """What starts the workers: this very process for none, else the engine registered as an entry point."""
    if workers == 0:
        return lambda work, *_: work(Ranks(), lambda metrics: None)
    (entry,) = importlib.metadata.entry_points(group="onewarp.launchers", name="ray")
    return entry.load()


def prepare(config: TrainConfig, console: Console) -> tuple[RunFolder, Manifest]:
    """Scan the data, make the run's folder, and put into it all that the workers read.

    Everything that a person can get wrong about data and model is found here, before any worker starts.
    """
    models.check_known(config.model)
    compression.check(config.grad_compression)
    if config.compile:
        compiling.check(Ranks().device)
    if config.weights is not None and not config.weights.expanduser().is_file():
        raise UserError(f"--weights {config.weights}: there is no such file.")
    data, labels = resolve_data(config, console)
    name = config.name or _new_name(config.runs, data)
    folder = RunFolder(absolute(config.runs) / name)
    if config.resume and not folder.config.exists():
        there = sorted(path.parent.name for path in absolute(config.runs).glob("*/config.json"))
        names = f"there are {', '.join(there[:6])}{', …' if len(there) > 6 else ''}" if there else "there is no run"
        raise UserError(f"--resume: there is no run {name} in {config.runs}; {names}.")
    if config.restart and folder.path.exists():
        aside = next(p for i in itertools.count(1) if not (p := folder.path.with_name(f"{name}.before-{i}")).exists())
        with folder.locked(patience=1):
            folder.path.rename(aside)
        console.print(f"restart   what was there is now {aside}", highlight=False, markup=False, soft_wrap=True)
    config = dataclasses.replace(
        config,
        data=str(data),
        label_csv=config.label_csv and absolute(config.label_csv),
        weights=config.weights and absolute(config.weights),
        precision=precision.resolve(config.precision, Ranks().device).name,
        name=name,
        runs=absolute(config.runs),
    )
    if folder.config.exists():
        with console.status(f"Waiting for the end of another process of the run {name} …"), folder.locked():
            pass  # before anything is changed that it may read
        if config.batch == "auto":
            config = dataclasses.replace(config, batch=folder.read_config().batch)
            check_batch(config)
        _check_same(folder, config)
        manifest = Manifest.read(folder.manifest)
        if not is_current(manifest):
            raise UserError(
                f"The images under {data} have changed since the run {name} began. Give another --name to train "
                f"on them as they are now, or delete {folder.path}."
            )
        check_cache(config, manifest)
        write_atomic(folder.config, json.dumps(config.as_dict(), indent=2) + "\n")  # what was free to change
        return folder, manifest

    manifest = read_images(data, labels, config, console)
    describe(manifest, config, console)
    count = len(manifest.train.share(config.subset, config.split_seed))
    if config.batch != "auto" and config.batch > count:
        part = "" if config.subset == 1 else f" of --subset {config.subset:g}"
        raise UserError(
            f"--batch {config.batch} is larger than the {count} training images{part}. "
            f"Choose --batch {max(2, count // 4)} or less."
        )
    check_cache(config, manifest)
    torch.manual_seed(config.seed)
    model = models.build(config.model, head=config.head, classes=len(manifest.classes), size=config.size)
    for size in {*config.size_of_epochs} - {config.size}:
        models.check_takes(model, config.model, size)
    if config.layer_decay is None or config.layer_groups:
        models.layer_groups(model, config.size, config.layer_groups or None)
    else:
        models.stage_groups(model, config.size)
    source = weights.load(model, config.model, size=config.size, pretrained=config.pretrained, weights=config.weights)
    console.print(f"model     {config.model}, {config.head} head; weights: {source}", highlight=False, soft_wrap=True)
    if config.batch == "auto":
        config = dataclasses.replace(config, batch=largest_batch(config, manifest, model, count, console))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        manifest.write(folder.manifest)
        if manifest.quarantine:
            folder.write_quarantine(manifest.quarantine)
        safetensors.torch.save_file(checkpoint.tensors(model), folder.initial)
        # Last: a folder that has a configuration has everything.
        write_atomic(folder.config, json.dumps(config.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"The run's folder {folder.path} cannot be written ({error.strerror}). Choose another --runs folder."
        ) from None
    return folder, manifest


def largest_batch(
    config: TrainConfig, manifest: Manifest, model: models.Classifier, count: int, console: Console
) -> int:
    """The largest batch that fits, for `count` images to train on, with a line that says how it was found."""
    workers = max(1, config.workers or 0)
    allowed = memory.bounds(count, workers, config.repeats)
    with TemporaryDirectory(prefix="onewarp-") as scratch, console.status("Trying which batch fits …"):
        initial = Path(scratch) / "initial.safetensors"
        safetensors.torch.save_file(checkpoint.tensors(model), initial)
        found = rehearsal.choose(config, manifest, initial, allowed)
    console.print(f"batch     {found.words(workers, count)}", highlight=False, markup=False, soft_wrap=True)
    return found.batch


def check_cache(config: TrainConfig, manifest: Manifest) -> None:
    """Raise UserError where there is nothing for a cache to take."""
    if config.cache != "off" and manifest.store is not None:
        raise UserError(
            f"--cache {config.cache} is given, and {str(manifest.store)!r} is a store: the cache fills from files. "
            "Leave it out, or pack the images with --decoded."
        )


def resolve_data(config: TrainConfig, console: Console) -> tuple[Path, Labels]:
    """The folder that `--data` means, and where its labels come from."""
    with console.status(f"Getting the data set {config.data} …"):
        named = named_dataset(config.data)
    folder, regex = named or (absolute(Path(config.data)), None)
    if is_store(folder):
        packed = ("label_regex", "label_csv", "valid_fraction", "split_seed")
        given = next((name for name in packed if getattr(config, name) != getattr(TrainConfig, name)), None)
        if given is not None:
            raise UserError(
                f"--{given.replace('_', '-')} is given, and {str(folder)!r} is a store, which has its labels and its "
                "split from when it was packed. Leave it out, or pack the images again with it."
            )
    pattern = config.label_regex or regex
    if config.label_csv is not None:
        return folder, Csv(str(config.label_csv))
    return folder, Regex(pattern) if pattern else "folder"


def read_images(
    data: Path,
    labels: Labels,
    config: TrainConfig,
    console: Console,
    *,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
    examine: Examine | None = None,
    reuse: bool = True,
) -> Manifest:
    """Scan the folder, behind a bar; see `pipelines.scan`. By default all cores decode."""
    with counted(console, f"Reading {data}") as progress:
        return scan(
            data,
            labels=labels,
            valid_fraction=config.valid_fraction,
            split_seed=config.split_seed,
            max_pixels=max_pixels,
            threads=threads or len(os.sched_getaffinity(0)),
            progress=progress,
            examine=examine,
            reuse=reuse,
        )


def absolute(path: Path) -> Path:
    """One spelling for each place, so that the same run is known again from another folder."""
    return Path(os.path.abspath(path.expanduser()))


def _new_name(runs: Path, data: Path) -> str:
    """Data and time, and a number where that is taken."""
    base = f"{slug(data.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
    return next(name for name in names if not (absolute(runs) / name).exists())


def slug(name: str) -> str:
    """A folder name made of harmless characters."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "data"


def _check_same(folder: RunFolder, config: TrainConfig) -> None:
    before, now = _flat(folder.read_config().as_dict()), _flat(config.as_dict())
    changed = [key for key in now if key not in FREE_TO_CHANGE and now[key] != before[key]]
    if changed:
        told = ", ".join(f"--{key.replace('_', '-')} was {before[key]} and is now {now[key]}" for key in changed)
        raise UserError(
            f"The run {folder.path.name} exists with another configuration: {told}. "
            f"Give another --name, repeat the first settings to go on with it, or delete {folder.path}."
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by the names of their flags: `augment.flip`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": below for key, below in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def describe(manifest: Manifest, config: TrainConfig, console: Console) -> None:
    """Say what was found, and how batches divide it."""
    found(manifest, config, console, "in quarantine.txt in the run's folder")
    train, valid = (part.share(config.subset, config.split_seed) for part in (manifest.train, manifest.valid))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if config.subset < 1:
        say(f"subset    {len(train):,} to train, {len(valid):,} to validate: {config.subset:.3g} of each class")
    if config.batch == "auto":
        return
    steps, left = divmod(len(train), config.batch)
    if left and steps:
        words = f"{steps} of {config.batch} an epoch; the last {left} images of each epoch's order are dropped"
        say(f"batches   {words}")


def found(manifest: Manifest, config: TrainConfig, console: Console, where: str) -> None:
    """Say what was found; `where` tells the place of the whole list of files left out."""
    train, valid = manifest.train, manifest.valid
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    drawn = f"at random, seed {config.split_seed}, {config.valid_fraction:.0%}"
    split = {"folders": "by folders", "csv": "by the table", "random": drawn}[manifest.split_from]
    shown = ", ".join(manifest.classes[:6]) + (", …" if len(manifest.classes) > 6 else "")
    widths, heights = manifest.widths_N, manifest.heights_N
    say(f"images    {len(train):,} to train, {len(valid):,} to validate (split {split})")
    say(f"classes   {len(manifest.classes)}: {shown}")
    say(f"sizes     {widths.min()}–{widths.max()} pixels wide, {heights.min()}–{heights.max()} high")
    for note in manifest.notes:
        say(f"note      {note}")
    for warning in manifest.warnings:
        say(f"warning   {warning}", style="yellow")
    for bad in manifest.quarantine[:5]:
        say(f"left out  {printable(bad.path)}: {bad.reason}")
    more = len(manifest.quarantine) - 5
    if more > 0:
        say(f"left out  … and {more} more files; all are named {where}")


@contextmanager
def watched(folder: RunFolder, wandb_mode: TrackingMode, console: Console) -> Generator[None]:
    """Show and track what is written to the journal from now on, while the workers run."""
    stop = threading.Event()
    offset = journal.whole(folder.journal)

    with Progress(console) as progress:

        def warn(message: str) -> None:
            progress.on({"event": "warning", "time": time.time(), "message": message})

        tracker = Tracker(folder.path, wandb_mode, warnings=warn)

        def tell(on: Callable[[dict[str, Any]], None]) -> None:
            for event in journal.follow(folder.journal, stop, offset=offset):
                on(event)

        # Each reads for itself: a tracking server that does not answer must not hold up the display.
        readers = [threading.Thread(target=tell, args=(reader.on,)) for reader in (progress, tracker)]
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            stop.set()
            for reader in readers:
                reader.join()
            tracker.close()


def summary(result: Result, config: TrainConfig, console: Console) -> None:
    """The last words of a training on the terminal."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say("")
    say(f"error rate  {result.error_rate:.4f}   (validation loss {result.valid_loss:.4f}, {result.seconds:.0f} s)")
    if result.best is not None:
        say(f"best epoch  {result.best.epoch}, error rate {result.best.error_rate:.4f}, kept in best.safetensors")
    for sentences in result.advice:
        say(f"note        {sentences}", style="yellow")
    if result.quarantine:
        say(f"left out    {result.quarantine} files, named in quarantine.txt")
    if result.most_confused:
        say("most confused (actual → predicted)")
        for actual, predicted, count in result.most_confused:
            say(f"  {count:4d}  {actual} → {predicted}")
    say(f"run         {result.folder}")
    say("            " + ", ".join(sorted(p.name for p in result.folder.iterdir() if not p.name.startswith("."))))
    say("go on with  " + shlex.join(_continuing(result, config)))


def _continuing(result: Result, config: TrainConfig) -> list[str]:
    """The command that trains the result further: the same data, split and settings, another seed."""
    replaced = {
        "data",
        "name",
        "lr",
        "pretrained",
        "weights",
        "epochs",
        "sizes",
        "freeze_epochs",
        "seed",
        "resume",
        "restart",
    }
    words = ["onewarp", "train", "--data", config.data]
    defaults = _flat(TrainConfig().as_dict())
    for name, value in _flat(config.as_dict()).items():
        if name not in replaced and value != defaults[name]:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", *(value if isinstance(value, tuple) else [str(value)])]
    model = os.path.relpath(RunFolder(result.folder).model)
    return [*words, "--weights", model, "--freeze-epochs", "0", "--epochs", "3", "--seed", str(config.seed + 1)]
