"""Before any worker starts: the folder of a run, and in it all that its workers read."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from rich.console import Console

from pipelines.errors import UserError
from pipelines.manifest import Manifest
from pipelines.scanning import changes, is_current
from trainer import checkpoint, compiling, compression, journal, memory, models, precision, rehearsal, weights
from trainer.config import TrainConfig, flat
from trainer.images import describe, read_images, resolve_data
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder, absolute, write_atomic
from trainer.starting import check_batch

# Settings that may differ when a run goes on: the images and their order stay the same. (Another number of workers
# draws other dropout and sees other batch statistics.)
FREE_TO_CHANGE = {"workers", "address", "threads", "wandb", "runs", "name", "cache", "cache_limit", "cache_keep"}
FREE_TO_CHANGE |= {
    "micro_batch",
    "compile",
    "channels_last",
    "grad_compression",
    "checkpoint_every",
    "checkpoint_minutes",
}
FREE_TO_CHANGE |= {"restarts", "grace", "stall", "on_nan", "resume", "restart"}


def prepare(config: TrainConfig, console: Console) -> tuple[RunFolder, Manifest]:
    """Scan the data, make the run's folder, and put into it all that the workers read; last, its configuration.

    Everything that a person can get wrong about data and model is found here, before any worker begins its work.
    """
    models.check_known(config.model)
    compression.check(config.grad_compression)
    elsewhere = config.address is not None  # the workers' machines may have what this one has not
    if config.compile and not elsewhere:
        compiling.check(Ranks().device)
    if config.batch == "auto" and elsewhere:
        raise UserError("--batch auto measures this machine, and the workers run on others. Give --batch a number.")
    if config.weights is not None and not config.weights.expanduser().is_file():
        raise UserError(f"--weights {config.weights}: there is no such file.")
    given = config.precision
    data, labels = resolve_data(config, console)
    assert config.name is not None, "chosen by who wants the run"
    name, folder = config.name, RunFolder(absolute(config.runs) / config.name)
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
        precision=config.precision if elsewhere else precision.resolve(config.precision, Ranks().device).name,
        name=name,
        runs=absolute(config.runs),
    )
    if folder.config.exists():
        with console.status(f"Waiting for the end of another process of the run {name} …"), folder.locked():
            pass  # before anything is changed that it may read
        if config.batch == "auto":
            config = dataclasses.replace(config, batch=folder.read_config().batch)
            check_batch(config)
        if given == "auto":  # it goes on as it began, wherever that was
            config = dataclasses.replace(config, precision=folder.read_config().precision)
        _check_same(folder, config)
        manifest = Manifest.read(folder.manifest)
        # Those that went bad on the way have their stand-ins.
        spoiled = {event["path"] for event in journal.read(folder.journal) if event["event"] == "quarantined"}
        if not is_current(manifest, spoiled):
            raise UserError(
                f"The images under {data} have changed since the run {name} began: {'; '.join(changes(manifest))}. "
                "Put them back as they were to go on, or give another --name to train on them as they are now."
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
        groups = models.layer_groups(model, config.size, config.layer_groups or None)
    else:
        groups = models.stage_groups(model, config.size)
    if not -len(groups) <= config.freeze_to < len(groups):
        raise UserError(
            f"--freeze-to is {config.freeze_to}, and {config.model} has {len(groups)} layer groups here. Choose a "
            f"number from {-len(groups)} to {len(groups) - 1}."
        )
    source = weights.load(
        model,
        config.model,
        size=config.size,
        pretrained=config.pretrained,
        weights=config.weights,
        classes=manifest.classes,
    )
    console.print(f"model     {config.model}, {config.head} head; weights: {source}", highlight=False, soft_wrap=True)
    if config.batch == "auto":
        config = dataclasses.replace(config, batch=largest_batch(config, manifest, model, count, console))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with folder.locked():
            if folder.config.exists():
                raise UserError(
                    f"The run {folder.path} was begun by another command meanwhile. Choose another --name, or wait for "
                    "its end."
                )
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
    workers = max(1, config.crew.most)
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


def _check_same(folder: RunFolder, config: TrainConfig) -> None:
    before, now = flat(folder.read_config().as_dict()), flat(config.as_dict())
    changed = [key for key in now if key not in FREE_TO_CHANGE and now[key] != before[key]]
    if before["precision"] == "auto":  # chosen by the machines of a cluster
        changed = [key for key in changed if key != "precision"]
    if changed:
        told = ", ".join(f"--{key.replace('_', '-')} was {before[key]} and is now {now[key]}" for key in changed)
        raise UserError(
            f"The run {folder.path.name} exists with another configuration: {told}. "
            f"Give another --name, repeat the first settings to go on with it, or delete {folder.path}."
        )
