"""What a trained run is applied to, and how; the command line is generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import UserError

MOST_TTA = 1000
Weights = Literal["last", "best"]


def check_table(path: Path) -> None:
    """Raise UserError where the name says neither CSV nor Parquet: better before the images are read than after."""
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(f"The predictions' file {path} must end in .csv or .parquet, which says how it is written.")


def check_threshold(threshold: float | None) -> None:
    """Raise UserError where it is no probability."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}; it must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ApplyConfig:
    """What evaluating and predicting have in common. Model, image size and classes are those of the run."""

    run: Path
    """Folder of a finished run, as runs/NAME."""
    weights: Weights = "last"
    """`last`: those that training ended with (their average with --ema). `best`: those of its best epoch, if kept."""
    tta: int = 0
    """Test-time augmentation: read each image this many times more, augmented as in training; 4 is usual. The mean of
    their probabilities counts 0.75, the plain image's 0.25, as in fastai."""
    workers: int | None = None
    """Processes that share the images. Default: one for each GPU; without GPUs 2, or 1 on one core; for up to 256
    readings none. 0 runs in this process, without Ray."""

    def __post_init__(self) -> None:
        for name in ("run", "out", "label_csv"):  # from Python a path may come as a string
            if isinstance(value := getattr(self, name, None), str):
                object.__setattr__(self, name, Path(value))
        if not 0 <= self.tta <= MOST_TTA:
            raise UserError(f"--tta is {self.tta}; it must be between 0, for none, and {MOST_TTA}.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers is {self.workers}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ApplyConfig):
    """Adds labelled images to judge the run by."""

    data: str | None = None
    """Folder of labelled images, or a store, or `breeds` or `pets`: its validation part where it has one, else all of
    it. Default: the run's own validation images."""
    label_regex: str | None = None
    """Labels from file names: the first group of this regular expression, as in '(.+)_\\d+\\.jpg$'."""
    label_csv: Path | None = None
    """Labels from a CSV file with the columns path,label[,split]; paths are relative to the data folder."""
    threshold: float | None = None
    """Count an image whose best class is less probable as declined: none of the classes. The error of all and of those
    that are left are both told. Default: 0.5 for a run with --loss one-vs-rest, else 0."""
    min_count: int = 1
    """Of the most confused classes, tell those that were confused at least so often."""
    out: Path | None = None
    """Folder to write. Default: evaluation-<name of the data> in the run's folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None:
            object.__setattr__(self, "data", str(self.data))
        check_threshold(self.threshold)
        if self.min_count < 1:
            raise UserError(f"--min-count is {self.min_count}; it must be 1 or more.")
        for flag, value in (("label-regex", self.label_regex), ("label-csv", self.label_csv)):
            if value is not None and self.data is None:
                raise UserError(f"--{flag} is {value}, and there is no --data: the run's own images have their labels.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ApplyConfig):
    """Adds images that nothing is known of, and what is written of them."""

    data: Path
    """Folder of images, at any depth, or a single image, or a store."""
    threshold: float | None = None
    """An image whose best class is less probable is none of the classes, and `predicted` stays empty. Default: 0.5 for
    a run with --loss one-vs-rest, else 0."""
    out: Path = Path("predictions.csv")
    """Table to write, .csv or .parquet; its paths are relative to the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "data", Path(self.data))
        check_threshold(self.threshold)
        check_table(self.out)
