"""Which images a verb works on, and how it comes to know them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from trainer.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.labels import Labels
    from pipelines.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Source:
    """Which images; the settings mean what they mean for `train`."""

    data: tyro.conf.Positional[str]
    """Folder of images; or `breeds`, the embedded set; or `pets`, the Oxford-IIIT pets (800 MB download)."""
    label_regex: str | None = None
    """Labels from file names: the first group of this regular expression, as in '(.+)_\\d+\\.jpg$'."""
    label_csv: Path | None = None
    """Labels from a CSV file with the columns path,label[,split]; paths are relative to the data folder."""
    valid_fraction: float = 0.2
    """Share of the images held out where the data brings no split of its own."""
    split_seed: int = 42
    """Seed of that split."""

    def config(self, **settings: Any) -> TrainConfig:
        """The same of a training, which checks them all, with further `settings` of it."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(Source)}, **settings)


def scanned(config: TrainConfig, console: Console, **options: Any) -> tuple[Manifest, Labels]:
    """Scan the folder as `train` would; `options` are those of `read_images`."""
    from trainer.images import read_images, resolve_data  # which takes seconds

    folder, labels = resolve_data(config, console)
    return read_images(folder, labels, config, console, **options), labels
