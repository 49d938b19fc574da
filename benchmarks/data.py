"""The images that a benchmark reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.record import Options
from pipelines import Manifest, Samples, scan
from pipelines.datasets import named_dataset
from pipelines.labels import Regex

_LONG = 100_000


def folder_of(options: Options) -> tuple[Path, str | None]:
    """The folder that the options mean, absolute, and how labels are read from its files' names, where they are."""
    return named_dataset(options.data) or (Path(options.data).resolve(), None)


def open_data(options: Options) -> Manifest:
    """The manifest of the folder or embedded data set that the options name."""
    named = named_dataset(options.data)
    if named:
        return scan(named[0], labels=Regex(named[1]), threads=options.threads)
    return scan(options.data, threads=options.threads)


def part_of(manifest: Manifest, few: Samples) -> Manifest:
    """The manifest of these training images and of one for validation."""
    rows_N = np.sort(np.concatenate([few.ids_N, manifest.valid.ids_N[:1]]))
    return manifest.part(rows_N)


def long(samples: Samples) -> Samples:
    """The set repeated until it has 100,000 images or more: no epoch of it ends while something is measured."""
    return samples.subset(np.tile(np.arange(len(samples)), -(-_LONG // len(samples))))
