"""One worker's whole job, top to bottom: data, model, optimiser, range test, phases, judgement, files.

Every rank runs `run`; rank 0 alone writes. `python -m trainer.worker --config run.json` runs a job in one process.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import socket
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import nvidia.dali
import safetensors.torch
import torch

from pipelines.cache import Cache
from pipelines.errors import UserError, first_line
from pipelines.geometry import Centre
from pipelines.loader import Batch, Loader
from pipelines.manifest import Manifest, Quarantined, Samples
from pipelines.plan import RANGE_TEST_EPOCH, balanced
from trainer import (
    batchnorm,
    checkpoint,
    evaluate,
    figures,
    losses,
    memory,
    models,
    optim,
    precision,
    schedule,
    stopping,
    worst,
)
from trainer.arrival import Arrival
from trainer.best import Best, keep, kept, taken_up
from trainer.config import Goal, TrainConfig
from trainer.ema import Ema
from trainer.guard import Guard, RewindError, chance_of, rewound
from trainer.interpret import confusion_matrix, most_confused
from trainer.journal import SCHEMA, Journal, read
from trainer.loop import Learner, train_epoch
from trainer.lr_range import range_test
from trainer.micro import micro_batches
from trainer.mixing import Mixing
from trainer.overfitting import advice, standard_errors
from trainer.position import Position
from trainer.ranks import Ranks, Report
from trainer.run_folder import RunFolder
from trainer.version import version
from trainer.watchdog import Watchdog


def run(
    path: Path,
    goal: Goal,
    ranks: Ranks,
    report: Report = lambda metrics: None,
    arrival: Arrival | None = None,
) -> None:
    """Carry out the run prepared in the folder `path`, from its newest checkpoint if it has one.

    Args:
        path: the run's folder, the same on every rank.
        goal: the whole training, or the range test alone.
        ranks: this process among the others; the process group is up.
        report: told the metrics of each epoch, on every rank (an engine that watches the run).
        arrival: when this process was ready, for the journal.

    Raises:
        OutOfMemoryError: there was not enough memory for the batch.
    """
    while True:
        try:
            with memory.told(ranks.rank), ExitStack() as closing:
                return _run(path, goal, ranks, report, arrival, closing)
        except RewindError:  # on all ranks after the same step
            pass
        gc.collect()  # the model that was, before there is another


def _run(path: Path, goal: Goal, ranks: Ranks, report: Report, arrival: Arrival | None, closing: ExitStack) -> None:
    started = time.time()
    folder, lead = RunFolder(path), ranks.rank == 0
    if not folder.config.exists():
        raise FileNotFoundError(f"{socket.gethostname()} does not see the run's folder {path}: mount it there, too")
    config = folder.read_config()
    if lead:
        closing.enter_context(folder.locked(patience=300))  # a worker that was killed may hang on its disk
    journal = Journal(folder.journal if lead else None)
    closing.callback(journal.close)
    request = folder.stop if lead else None
    asked = partial(stopping.asked, request)
    watchdog = Watchdog(folder.stalled, ranks, config.stall if config.crew.most else None)
    closing.callback(watchdog.close)
    threads = config.threads or ranks.cores
    torch.set_num_threads(threads)

    def stop(step: int) -> None:
        """Say why the run ends here; the same on all ranks."""
        if not any(ranks.gather([stopping.told_to_stop(request)])):
            journal.write("leaving", step=step)
            raise stopping.LeavingError
        journal.write("stopped", step=step)

    # Data
    manifest = Manifest.read(folder.manifest)
    numbers = precision.agreed(config.precision, ranks)
    numbers.set_tf32()
    statistics = models.statistics(config.model)
    train_samples, valid_samples = (
        part.share(config.subset, config.split_seed) for part in (manifest.train, manifest.valid)
    )
    cache = None
    if config.cache == "decoded":
        cache = closing.enter_context(
            Cache.open(
                manifest,
                limit=None if config.cache_limit is None else int(config.cache_limit * 1e9),
                keep=config.cache_keep,
                warn=lambda message: journal.write("warning", message=message),
            )
        )
    sizes = config.size_of_epochs
    common: dict[str, Any] = {
        "global_batch": config.global_batch,
        "seed": config.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "device": "gpu" if ranks.device.type == "cuda" else "cpu",
        "device_id": ranks.local_rank,
        "threads": threads,
        "mean": statistics.mean,
        "std": statistics.std,
        "half": numbers.half_images,
        "quality": config.quality,
        "cache": cache,
        "on_batch": watchdog.beat,
    }
    weights_N = balanced(train_samples.labels_N) if config.sampling == "balanced" else None
    train_at = partial(
        Loader, train_samples, augment=config.augment, weights_N=weights_N, repeats=config.repeats, **common
    )
    train = train_at(size=sizes[0])
    valid = Loader(valid_samples, augment=Centre(crop_pct=config.crop_pct), size=config.size, **common)

    # Model and optimiser
    model = models.build(config.model, head=config.head, classes=len(manifest.classes), size=config.size)
    model.load_state_dict(safetensors.torch.load_file(folder.initial))
    model = model.to(device=ranks.device)
    model = model.ordered(torch.channels_last if config.channels_last else torch.contiguous_format)
    if config.sync_bn:
        model = batchnorm.synchronised(model, ranks)
    optimizer = optim.build(
        model,
        config.weight_decay,
        config.size,
        name=config.optimizer,
        by_stage=config.layer_decay is not None,
        patterns=config.layer_groups or None,
    )
    groups = len(optim.groups_of(optimizer))
    learner = Learner(
        model=model,
        optimizer=optimizer,
        precision=numbers,
        ranks=ranks,
        loss=loss_of(config, train_samples, ranks.device),
        mixing=Mixing(mixup=config.mixup, cutmix=config.cutmix),
        classes=len(manifest.classes),
        ema=None if config.ema is None else Ema(model, config.ema),
        micro_batches=micro_batches(config.global_batch, ranks.world_size, config.at_once),
        clip_norm=config.clip_norm or optim.CLIP_NORM.get(config.optimizer),
        compression=config.grad_compression,
        compile=config.compile,
    )
    checkpoints = checkpoint.Checkpoints(
        folder.checkpoints, ranks, journal, every=config.checkpoint_every, minutes=config.checkpoint_minutes
    )
    closing.callback(checkpoints.wait)
    resumed = checkpoints.load(learner) if goal == "train" else None
    journal.write(
        "run",
        schema=SCHEMA,
        name=path.name,
        command=goal,
        config=config.as_dict(),
        classes=list(manifest.classes),
        train=len(train_samples),
        valid=len(valid_samples),
        quarantined=len(manifest.quarantine),
        digest=manifest.digest,
        world_size=ranks.world_size,
        device=str(ranks.device),
        precision=numbers.name,
        steps_per_epoch=train.steps,
        epochs=sum(phase.epochs for phase in phases_of(config, 1.0, groups, train.steps)),
        versions={
            "onewarp": version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dali": nvidia.dali.__version__,
        },
        resumed_from=resumed and resumed.epoch * train.steps + resumed.step,
        arrival=arrival and asdict(arrival),
    )
    if lead and not resumed and not folder.figure("show_batch").exists():
        with spared(journal, folder.figure("show_batch")):
            show_batch(folder, train, manifest.classes)

    # Learning rate
    base_lr = resumed.base_lr if resumed else config.lr
    if base_lr is None or goal == "lr-find":
        first = phases_of(config, config.lr or 1.0, groups, train.steps)[0]
        learner.train(first_group=first.freeze_to, train_bn=config.train_bn)
        journal.write("phase", phase="lr_find", epochs=0, steps=config.lr_find_steps, lr=[], first_step=0)
        curve = range_test(
            learner,
            endless(train),
            global_batch=config.global_batch,
            ratios=first.ratios,
            steps=config.lr_find_steps,
            seed=config.seed,
            journal=journal,
            asked=asked,
        )
        if curve is None:
            stop(0)
            return
        choice, base_lr = curve.choose(config.lr_choice)
        # Training needs a rate; who asks for one is told that there is none.
        found = base_lr if curve.suggestions or goal == "train" else None
        if choice != config.lr_choice:
            lacks = "is too short for slide" if curve.suggestions else "says nothing about the learning rate"
            instead = "" if found is None else f"; going on with {base_lr:g} ({choice})"
            journal.write("warning", message=f"The range test's curve {lacks}{instead}.")
        journal.write("range_result", suggestions=curve.suggestions, chosen=found, choice=choice)
        if lead:
            with spared(journal, file := folder.figure("lr_find")):
                figures.plot_lr_find(file, curve.lrs, curve.losses, curve.smoothed, curve.suggestions, found)
    if goal == "lr-find":
        return

    # Training
    judgement = None
    best = None
    guard = Guard(
        action=config.on_nan,
        chance=chance_of(learner.loss, len(manifest.classes)),
        left_out=frozenset(ranks.gather(rewound(read(folder.journal)) if lead else [])),
    )
    if lead and resumed:
        # The weights at hand are those of the epoch before, where it is that which is over.
        at_hand = None if resumed.step else resumed.epoch - 1
        best = taken_up(folder.best, resumed.best, checkpoint.tensors(learner.judged), at_hand)
        if best != resumed.best:
            journal.write("warning", message=f"The weights in {folder.best.name} are gone: the best are sought anew.")
    lost: dict[int, Quarantined] = {}  # files gone bad since the scan
    for phase in phases_of(config, base_lr, groups, train.steps):
        epochs = range(phase.first_epoch, phase.first_epoch + phase.epochs)
        begin = max(epochs.start, resumed.epoch if resumed else 0)
        if begin >= epochs.stop:
            continue
        if resumed and begin == resumed.epoch and (begin > epochs.start or resumed.step):
            position = replace(resumed, best=best)
        else:
            position = Position(epoch=begin, base_lr=base_lr, best=best)
            optim.forget(optimizer)
        learner.train(first_group=phase.freeze_to, train_bn=config.train_bn)
        journal.write(
            "phase",
            phase=phase.name,
            epochs=phase.epochs,
            steps=phase.epochs * train.steps,
            lr=list(phase.lrs),
            first_step=epochs.start * train.steps,
            sizes=list(sizes[epochs.start : epochs.stop]),
        )
        for epoch in range(begin, epochs.stop):
            clock = time.perf_counter()
            if train.size != sizes[epoch]:
                train = train_at(size=sizes[epoch])
            if config.compile:
                watchdog.restart()
            start = position
            steps = train_epoch(
                learner, train, phase, start, seed=config.seed, journal=journal, asked=asked, guard=guard
            )
            for position in steps:
                done = epoch * train.steps + position.step
                if position.step < train.steps and checkpoints.due(done):
                    checkpoints.save(learner, position, done, needed=False)
            if position.step < train.steps:
                watchdog.close()
                checkpoints.save(learner, position, done)  # one that was due may have been left out
                checkpoints.wait()
                stop(done)
                return
            speed = config.global_batch * (train.steps - start.step) / (time.perf_counter() - clock)
            if config.compile:
                watchdog.restart()
            judgement = evaluate.judge(learner, valid)
            measured = judgement.metrics(manifest.classes)
            metrics = {
                "train_loss": position.loss_sum / position.losses,
                "valid_loss": judgement.loss,
                "error_rate": judgement.error_rate,
                "top5_accuracy": measured.top5_accuracy,
                "macro_f1": measured.macro_f1,
                "calibration_error": measured.calibration_error,
            }
            journal.write(
                "epoch",
                epoch=epoch,
                phase=phase.name,
                size=train.size,
                **metrics,
                standard_errors=standard_errors(judgement.labels_N, judgement.predicted_N, judgement.losses_N),
                images_per_second=speed,
                seconds=time.perf_counter() - clock,
            )
            this = Best(epoch=epoch, error_rate=judgement.error_rate, valid_loss=judgement.loss)
            best = this if this.beats(best) else best
            position = Position(epoch=epoch + 1, updates=position.updates, base_lr=base_lr, best=best)
            checkpoints.save(
                learner, position, position.epoch * train.steps, best=folder.best if best is this else None
            )
            for spoiled in ranks.gather([*train.spoiled, *valid.spoiled]):
                if spoiled.id not in lost:
                    lost[spoiled.id] = Quarantined(path=spoiled.path, reason=spoiled.reason)
                    journal.write("quarantined", epoch=epoch, **asdict(spoiled))
            if lead and lost:
                with spared(journal, folder.quarantine):
                    folder.write_quarantine([*manifest.quarantine, *lost.values()])
            report(metrics)

    # Judgement and files
    if judgement is None:  # every epoch was done before, only the end was missing
        judgement = evaluate.judge(learner, valid)
    watchdog.close()
    if lead:
        confusion_CC = confusion_matrix(judgement.labels_N, judgement.predicted_N, manifest.classes)
        pairs = most_confused(confusion_CC, manifest.classes)[: worst.PAIRS]
        with spared(journal, folder.figure("confusion")):
            figures.plot_confusion(folder.figure("confusion"), confusion_CC, manifest.classes)
            worst.draw_losses(folder.figure("top_losses"), valid, judgement, manifest.classes)
            worst.draw_confused(folder.figure("confused"), valid, judgement, manifest.classes, pairs)
        keep(folder.model, checkpoint.tensors(learner.judged))
        checkpoints.wait()
        if kept(folder.best) != best:
            message = f"The storage did not take the weights of epoch {best and best.epoch}, which was the best."
            journal.write("warning", message=message)
            best = kept(folder.best)
        epochs = {event["epoch"]: event for event in read(folder.journal) if event["event"] == "epoch"}
        journal.write(
            "finished",
            error_rate=judgement.error_rate,
            valid_loss=judgement.loss,
            per_class=[asdict(row) for row in judgement.metrics(manifest.classes).per_class],
            most_confused=[list(row) for row in pairs],
            top_losses=worst.losses(judgement, valid.samples.paths, manifest.classes),
            best=best and asdict(best),
            advice=advice(
                [epochs[epoch] for epoch in sorted(epochs)], len(judgement.labels_N), sizes=bool(config.sizes)
            ),
            seconds=time.time() - started,
            run_folder=str(path),
        )


def phases_of(config: TrainConfig, lr: float | str, groups: int, steps_per_epoch: int) -> list[schedule.Phase]:
    """The phases of a training at the rate `lr`, as in `TrainConfig.lr`."""
    rate = schedule.read_rates(lr)
    common = {"groups": groups, "steps_per_epoch": steps_per_epoch, "epochs": config.epochs}
    if config.schedule == "fine-tune":
        assert not isinstance(rate, slice), "refused by TrainConfig"
        return schedule.fine_tune(
            base_lr=rate, freeze_epochs=config.freeze_epochs, layer_decay=config.layer_decay, **common
        )
    common["freeze_to"] = config.freeze_to
    fit = {
        "one-cycle": schedule.fit_one_cycle,
        "flat-cos": schedule.fit_flat_cos,
        "warmup-linear": schedule.fit_warmup_linear,
    }[config.schedule]
    if config.layer_decay is None or isinstance(rate, slice):
        return fit(lr=rate, **common)
    return fit(lr=schedule.layerwise(rate, groups, config.layer_decay), **common)


def loss_of(config: TrainConfig, samples: Samples, device: torch.device) -> losses.Loss:
    """The loss, with class weights from the whole training set."""
    weights_C = None
    if config.class_weights != "none":
        weights = losses.class_weights(samples.labels_N, len(samples.classes), config.class_weights)
        weights_C = torch.from_numpy(weights).float().to(device)
    return losses.named(
        config.loss, focal_gamma=config.focal_gamma, smoothing=config.label_smoothing, weights_C=weights_C
    )


@contextmanager
def spared(journal: Journal, file: Path) -> Generator[None]:
    """What the run can do without: where the storage does not take it, there is a warning."""
    try:
        yield
    except OSError as error:
        journal.write("warning", message=f"{file.name} cannot be written ({first_line(error)}).")


def endless(loader: Loader) -> Iterator[Batch]:
    """Training batches of epochs that training itself never reaches."""
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count(RANGE_TEST_EPOCH))


def show_batch(folder: RunFolder, loader: Loader, classes: tuple[str, ...]) -> None:
    """Draw the first images of the first training batch, as the model sees them."""
    batch = next(loader.epoch(0))
    titles = [classes[label] for label in batch.labels_N.tolist()]
    figures.plot_batch(folder.figure("show_batch"), loader.pictures(batch)[:16], titles[:16])


def main() -> None:
    """The whole job in one process: what tests run, and how a person debugs."""
    from trainer.job import fine_tune

    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with settings of TrainConfig")
    try:
        config = TrainConfig.read(parser.parse_args().config)
        fine_tune(TrainConfig.from_dict({**config.as_dict(), "workers": 0, "address": None}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
