"""The verbs that apply a trained run to images: `evaluate` and `predict`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from trainer.apply_config import EvaluateConfig, PredictConfig


@dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluateConfig):
    """Of `onewarp evaluate RUN`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Predict(PredictConfig):
    """Of `onewarp predict RUN DIR`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]


def evaluate(config: tyro.conf.OmitArgPrefixes[Evaluate]) -> None:
    """Judge a trained run by labelled images: error, precision and recall of each class, what is confused with what.

    Without --data by the images that it was validated on. All GPUs or CPU cores share the images.
    """
    from trainer import evaluating  # which takes seconds

    console = Console()
    with _interruptible():
        result = evaluating.evaluate_run(config, console)
    evaluating.summary(result, console)


def predict(config: tyro.conf.OmitArgPrefixes[Predict]) -> None:
    """Apply a trained run to any folder of images, and write a table: for each the best classes and probabilities.

    RUN may be an export. Files that cannot be read are named and left out. All GPUs or CPU cores share the images.
    """
    from trainer import predicting, predictions  # which take a second

    console = Console()
    with _interruptible():
        result = predicting.predict(config, console)
    predictions.summary(result, console)


@contextmanager
def _interruptible() -> Generator[None]:
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted before all was written")
        sys.exit(130)
