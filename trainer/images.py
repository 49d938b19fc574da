"""The images that the settings mean: where they are, what they are, in words."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from rich.console import Console

from pipelines.datasets import named_dataset
from pipelines.errors import UserError
from pipelines.labels import Csv, Labels, Regex
from pipelines.limits import MAX_PIXELS
from pipelines.manifest import Manifest
from pipelines.scanning import Examine, scan
from pipelines.store import is_store
from trainer.bar import counted
from trainer.config import TrainConfig
from trainer.run_folder import absolute, printable


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
