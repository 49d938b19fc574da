"""The verbs that look at the data before anything is trained on it: `show-batch` and `summary`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from cluster.source import Source, scanned
from pipelines.errors import UserError
from pipelines.geometry import Augment
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.labels import Labels
    from pipelines.manifest import Manifest

BATCH = 16  # images of a batch that are drawn
SAME = 12  # epochs of one image
COMPARED = 4  # images read in two ways


@dataclass(frozen=True, kw_only=True)
class Look(Source):
    """Adds how they are read, and which of them."""

    size: int = 224
    """Images are squares of this many pixels."""
    seed: int = 0
    """Seed of order and augmentation."""
    augment: Augment = field(default_factory=Augment)
    """What training does to an image."""
    image: str | None = None
    """Path of one image, relative to the folder. Default: the first."""


@dataclass(frozen=True, kw_only=True)
class ShowBatch(Look):
    """Adds what to draw, and where."""

    same: bool = False
    """Draw one image as the first 12 epochs show it."""
    compare: bool = False
    """Draw images read by one warp and by repeated interpolation, under the same draws, with a magnified detail."""
    out: Path = Path("show_batch.png")
    """Picture to write."""

    def __post_init__(self) -> None:
        if self.same and self.compare:
            raise UserError("--same and --compare are two pictures. Give one of them.")
        if self.image is not None and not (self.same or self.compare):
            raise UserError(f"--image {self.image} names one image: for --same or --compare, a batch has many.")


@dataclass(frozen=True, kw_only=True)
class Summary(Look):
    """Adds the size of the batch."""

    batch: int = 64
    """Images in a step."""


def show_batch(config: Annotated[ShowBatch, tyro.conf.arg(name="")]) -> None:
    """Draw a batch as training sees it, with its labels, or one image under many augmentations."""
    from pipelines import preview  # which takes seconds
    from trainer import figures

    console = Console()
    manifest, _ = _described(config, TrainConfig().global_batch, console)
    train = manifest.train
    view: dict[str, Any] = {"size": config.size, "seed": config.seed, "augment": config.augment}
    if config.same:
        position = preview.find(train, config.image)
        pictures, titles = preview.same_pictures(train, position, count=SAME, **view)
    elif config.compare:
        first = preview.find(train, config.image)
        tiles, titles = [], []
        spread = range(0, len(train), max(1, len(train) // COMPARED))[:COMPARED] if config.image is None else [first]
        for position in spread:
            pair = preview.compare(train, position, **view)
            tiles += [pair.once, pair.once_detail, pair.repeated, pair.repeated_detail]
            titles += ["one warp", "detail", f"{pair.interpolations} interpolations", "detail"]
        pictures = np.stack(tiles)
    else:
        pictures, titles = preview.batch_pictures(train, count=BATCH, **view)
    try:
        figures.plot_batch(config.out, pictures, titles)
    except OSError as error:
        raise UserError(
            f"The picture {config.out} cannot be written ({error.strerror}). Choose another --out."
        ) from None
    console.print(f"picture   {config.out}", highlight=False, markup=False, soft_wrap=True)


def summarise(config: Annotated[Summary, tyro.conf.arg(name="")]) -> None:
    """Tell one image's whole way: file, header, pixels, label, draw, matrices, output, batch; or where it ends."""
    from pipelines import preview  # which takes seconds

    console = Console()
    manifest, labels = _described(config, config.batch, console)
    lines = preview.summary(
        manifest,
        labels,
        config.image,
        size=config.size,
        seed=config.seed,
        batch=min(config.batch, len(manifest.train)),
        augment=config.augment,
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _described(look: Look, batch: int, console: Console) -> tuple[Manifest, Labels]:
    """Scan the folder and describe it."""
    from trainer.images import describe  # which takes seconds

    config = look.config(size=look.size, seed=look.seed, batch=batch, augment=look.augment)
    manifest, labels = scanned(config, console)
    describe(manifest, config, console)
    return manifest, labels
