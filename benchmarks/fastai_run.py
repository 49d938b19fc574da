"""fastai on a folder of photographs, as chapter 5 of its book has it: a process that `benchmarks.photographs` starts.

    python -m benchmarks.fastai_run --data DIR --scratch DIR

Presizing, `aug_transforms`, `vision_learner`, `lr_find`, `fine_tune`: fastai's own defaults everywhere but for three
things that make it the same task as ours. The body starts from the same tensors. It is cut into layer groups where ours
is, which gives the three that chapter 5's ResNet has; of a body of timm fastai knows body and head alone, and the whole
body would learn at a hundredth of the head's rate. Images are normalised as those that the body was trained on. The
last line is the outcome in JSON.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import tyro

from trainer import models, weights


@dataclass(frozen=True, kw_only=True)
class FastaiOptions:
    """Chapter 5 on a folder with `train/` and another part, of class folders each."""

    data: Path
    """The folder."""
    scratch: Path
    """Takes what `lr_find` keeps meanwhile."""
    valid: str = "validation"
    """Name of the part to validate on."""
    model: str = "tf_efficientnet_lite0"
    """Body, by timm's name."""
    size: int = 160
    """Pixels that the model sees."""
    presized: int = 240
    """Pixels to which the loader's workers resize."""
    epochs: int = 3
    """Of `fine_tune`, after one with the head alone."""
    batch: int = 64
    """Images in a step."""
    workers: int = 2
    """Loader processes."""
    seed: int = 0
    """Of everything random."""
    channels_last: bool = False
    """fastai's `ChannelsLast`: another order of a tensor's memory, on CPUs a faster one for most models."""


def main(options: FastaiOptions) -> None:
    """Train, and print the outcome."""
    vision = import_module("fastai.vision.all")
    channels_last = import_module("fastai.callback.channelslast")
    vision.set_seed(options.seed)
    statistics = models.statistics(options.model)
    loaders = vision.ImageDataLoaders.from_folder(
        options.data,
        train="train",
        valid=options.valid,
        item_tfms=vision.Resize(options.presized),
        batch_tfms=[
            *vision.aug_transforms(size=options.size, min_scale=0.75),
            vision.Normalize.from_stats(statistics.mean, statistics.std),
        ],
        bs=options.batch,
        num_workers=options.workers,
    )

    def groups(network):
        classifier = models.Classifier(network[0].model, network[1])
        return vision.L(models.layer_groups(classifier, options.size))

    learner = vision.vision_learner(
        loaders,
        options.model,
        pretrained=False,
        splitter=groups,
        metrics=vision.error_rate,
        path=options.scratch,
        cbs=[channels_last.ChannelsLast()] if options.channels_last else None,
    )
    body = models.Classifier(learner.model[0].model, learner.model[1])
    weights.load(body, options.model, size=options.size, pretrained=True, weights=None)
    learner.freeze()  # as `pretrained=True` would have done

    started = time.perf_counter()
    with learner.no_bar():
        lr = float(learner.lr_find(show_plot=False).valley)
        found = time.perf_counter()
        learner.fine_tune(options.epochs, lr)
    _, _, error = learner.recorder.values[-1]
    outcome = {
        "error": float(error),
        "lr": lr,
        "lr_find_seconds": found - started,
        "train_seconds": time.perf_counter() - found,
        "train": len(loaders.train_ds),
        "valid": len(loaders.valid_ds),
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(tyro.cli(FastaiOptions, prog="python -m benchmarks.fastai_run", description=__doc__))
