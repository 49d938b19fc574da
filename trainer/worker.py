"""One worker's whole job, top to bottom: data, model, optimiser, range test, phases, judgement, files.

Every rank runs `run`; rank 0 alone writes. `python -m trainer.worker --config run.json` runs a job in one process.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali
import safetensors.torch
import torch

from pipelines.cache import Cache
from pipelines.errors import UserError
from pipelines.geometry import Centre
from pipelines.loader import Batch, Loader
from pipelines.manifest import Manifest, Quarantined, Samples
from pipelines.plan import RANGE_TEST_EPOCH, balanced
from trainer import checkpoint, evaluate, figures, losses, models, optim, precision, schedule
from trainer.config import Goal, TrainConfig
from trainer.ema import Ema
from trainer.interpret import confusion_matrix, most_confused
from trainer.journal import Journal
from trainer.loop import Learner, train_epoch
from trainer.lr_range import range_test
from trainer.mixing import Mixing
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder

Report = Callable[[dict[str, float]], None]


def run(path: Path, goal: Goal, ranks: Ranks, report: Report = lambda metrics: None) -> None:
    """Carry out the run prepared in the folder `path`, from its newest checkpoint if it has one.

    Args:
        path: the run's folder, the same on every rank.
        goal: the whole training, or the range test alone.
        ranks: this process among the others; the process group is up.
        report: told the metrics of each epoch, on every rank (an engine that watches the run).
    """
    with ExitStack() as closing:
        _run(path, goal, ranks, report, closing)


def _run(path: Path, goal: Goal, ranks: Ranks, report: Report, closing: ExitStack) -> None:
    started = time.time()
    folder, lead = RunFolder(path), ranks.rank == 0
    config = folder.read_config()
    journal = Journal(folder.journal if lead else None)
    closing.callback(journal.close)
    threads = config.threads or ranks.cores
    torch.set_num_threads(threads)

    # Data
    manifest = Manifest.read(folder.manifest)
    numbers = precision.resolve(config.precision, ranks.device)
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
    common: dict[str, Any] = {
        "size": config.size,
        "global_batch": config.batch,
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
    }
    weights_N = balanced(train_samples.labels_N) if config.sampling == "balanced" else None
    train = Loader(train_samples, augment=config.augment, weights_N=weights_N, repeats=config.repeats, **common)
    valid = Loader(valid_samples, augment=Centre(crop_pct=config.crop_pct), **common)

    # Model and optimiser
    model = models.build(config.model, head=config.head, classes=len(manifest.classes), size=config.size)
    model.load_state_dict(safetensors.torch.load_file(folder.initial))
    model = model.to(device=ranks.device).to(memory_format=torch.channels_last)
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
    )
    resumed = checkpoint.load(folder.checkpoints, learner) if goal == "train" else None
    journal.write(
        "run",
        name=path.name,
        command=goal,
        config=config.as_dict(),
        classes=list(manifest.classes),
        train=len(train_samples),
        valid=len(valid_samples),
        quarantined=len(manifest.quarantine),
        world_size=ranks.world_size,
        device=str(ranks.device),
        precision=numbers.name,
        steps_per_epoch=train.steps,
        epochs=sum(phase.epochs for phase in phases_of(config, 1.0, groups, train.steps)),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dali": nvidia.dali.__version__,
        },
        resumed_from=resumed and resumed.epoch * train.steps,
    )
    if lead and not resumed:
        show_batch(folder, train, manifest.classes)

    # Learning rate
    base_lr = resumed.base_lr if resumed else config.lr
    if base_lr is None or goal == "lr-find":
        first = phases_of(config, 1.0, groups, train.steps)[0]
        learner.train(first_group=first.freeze_to, train_bn=config.train_bn)
        journal.write("phase", phase="lr_find", epochs=0, steps=config.lr_find_steps, lr=[], first_step=0)
        curve = range_test(
            learner,
            endless(train),
            global_batch=config.batch,
            ratios=first.ratios,
            steps=config.lr_find_steps,
            seed=config.seed,
            journal=journal,
        )
        base_lr = curve.chosen
        if not curve.suggestions:
            journal.write(
                "warning",
                message=f"The range test's curve says nothing about the learning rate; going on with {base_lr:g}.",
            )
        journal.write("range_result", suggestions=curve.suggestions, chosen=base_lr)
        if lead:
            figures.plot_lr_find(
                folder.figure("lr_find"), curve.lrs, curve.losses, curve.smoothed, curve.suggestions, base_lr
            )
    if goal == "lr-find":
        return

    # Training
    judgement = None
    lost: dict[int, Quarantined] = {}  # files gone bad since the scan
    for phase in phases_of(config, base_lr, groups, train.steps):
        epochs = range(phase.first_epoch, phase.first_epoch + phase.epochs)
        begin = max(epochs.start, resumed.epoch if resumed else 0)
        if begin >= epochs.stop:
            continue
        updates = resumed.updates if resumed and begin == resumed.epoch > epochs.start else 0
        learner.train(first_group=phase.freeze_to, train_bn=config.train_bn)
        journal.write(
            "phase",
            phase=phase.name,
            epochs=phase.epochs,
            steps=phase.epochs * train.steps,
            lr=list(phase.lrs),
            first_step=epochs.start * train.steps,
        )
        for epoch in range(begin, epochs.stop):
            clock = time.perf_counter()
            train_loss, updates, speed = train_epoch(
                learner, train, phase, epoch, updates=updates, seed=config.seed, journal=journal
            )
            judgement = evaluate.judge(learner, valid)
            measured = judgement.metrics(manifest.classes)
            metrics = {
                "train_loss": train_loss,
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
                **metrics,
                images_per_second=speed,
                seconds=time.perf_counter() - clock,
            )
            if lead:
                position = checkpoint.Position(epoch=epoch + 1, updates=updates, base_lr=base_lr)
                saved = checkpoint.save(folder.checkpoints, learner, position)
                journal.write("checkpoint", step=(epoch + 1) * train.steps, path=str(saved.relative_to(path)))
            for spoiled in ranks.gather([*train.spoiled, *valid.spoiled]):
                if spoiled.id not in lost:
                    lost[spoiled.id] = Quarantined(path=spoiled.path, reason=spoiled.reason)
                    journal.write("quarantined", epoch=epoch, **asdict(spoiled))
            if lead and lost:
                folder.write_quarantine([*manifest.quarantine, *lost.values()])
            report(metrics)

    # Judgement and files
    if judgement is None:  # every epoch was done before, only the end was missing
        judgement = evaluate.judge(learner, valid)
    if lead:
        confusion_CC = confusion_matrix(judgement.labels_N, judgement.predicted_N, manifest.classes)
        figures.plot_confusion(folder.figure("confusion"), confusion_CC, manifest.classes)
        show_top_losses(folder, valid, judgement, manifest.classes)
        safetensors.torch.save_file(checkpoint.tensors(learner.judged), folder.model)
        journal.write(
            "finished",
            error_rate=judgement.error_rate,
            valid_loss=judgement.loss,
            per_class=[asdict(row) for row in judgement.metrics(manifest.classes).per_class],
            most_confused=[list(row) for row in most_confused(confusion_CC, manifest.classes)[:5]],
            seconds=time.time() - started,
            run_folder=str(path),
        )


def phases_of(config: TrainConfig, lr: float, groups: int, steps_per_epoch: int) -> list[schedule.Phase]:
    """The phases of a training whose head's peak rate is `lr`."""
    common = {"groups": groups, "steps_per_epoch": steps_per_epoch, "epochs": config.epochs}
    if config.schedule == "fine-tune":
        return schedule.fine_tune(
            base_lr=lr, freeze_epochs=config.freeze_epochs, layer_decay=config.layer_decay, **common
        )
    fit = {
        "one-cycle": schedule.fit_one_cycle,
        "flat-cos": schedule.fit_flat_cos,
        "warmup-linear": schedule.fit_warmup_linear,
    }[config.schedule]
    return fit(lr=lr if config.layer_decay is None else schedule.layerwise(lr, groups, config.layer_decay), **common)


def loss_of(config: TrainConfig, samples: Samples, device: torch.device) -> losses.Loss:
    """The loss, with class weights from the whole training set."""
    weights_C = None
    if config.class_weights != "none":
        weights = losses.class_weights(samples.labels_N, len(samples.classes), config.class_weights)
        weights_C = torch.from_numpy(weights).float().to(device)
    common = {"smoothing": config.label_smoothing, "weights_C": weights_C}
    if config.loss == "focal":
        return losses.Focal(gamma=config.focal_gamma, **common)
    return {"cross-entropy": losses.CrossEntropy, "one-vs-rest": losses.OneVsRest}[config.loss](**common)


def endless(loader: Loader) -> Iterator[Batch]:
    """Training batches of epochs that training itself never reaches."""
    return itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count(RANGE_TEST_EPOCH))


def show_batch(folder: RunFolder, loader: Loader, classes: tuple[str, ...]) -> None:
    """Draw the first images of the first training batch, as the model sees them."""
    batch = next(loader.epoch(0))
    titles = [classes[label] for label in batch.labels_N.tolist()]
    figures.plot_batch(folder.figure("show_batch"), loader.pictures(batch)[:16], titles[:16])


def show_top_losses(folder: RunFolder, loader: Loader, judgement: evaluate.Judgement, classes: tuple[str, ...]) -> None:
    """Draw the validation images that the model is most wrong about."""
    worst = np.argsort(-judgement.losses_N, kind="stable")[:9]
    samples = loader.samples.subset(judgement.positions_N[worst])
    pictures: dict[int, np.ndarray] = {}
    for batch in loader.alone(samples).epoch(0):
        pictures.update(zip(batch.ids_N.tolist(), loader.pictures(batch), strict=True))
    title = {
        id: f"{classes[judgement.predicted_N[i]]} / {classes[judgement.labels_N[i]]} / "
        f"{judgement.losses_N[i]:.2f} / {judgement.confidence_N[i]:.2f}"
        for id, i in zip(samples.ids_N.tolist(), worst, strict=True)
    }
    figures.plot_top_losses(folder.figure("top_losses"), list(pictures.values()), [title[id] for id in pictures])


def main() -> None:
    """The whole job in one process: what tests run, and how a person debugs."""
    from trainer.job import fine_tune

    parser = argparse.ArgumentParser(prog="python -m trainer.worker", description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with settings of TrainConfig")
    try:
        config = TrainConfig.read(parser.parse_args().config)
        fine_tune(TrainConfig.from_dict({**config.as_dict(), "workers": 0}))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
