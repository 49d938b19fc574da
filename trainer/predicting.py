"""`predict`: what a trained run says of images that nothing is known of."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pipelines.manifest import Quarantined
from pipelines.scanning import scan_to_apply
from trainer import predictions
from trainer.apply import apply, scratch_in
from trainer.apply_config import PredictConfig
from trainer.bar import counted
from trainer.losses import NONE, decide
from trainer.run_folder import absolute, printable, write_quarantine
from trainer.starting import check_workers
from trainer.trained import Trained, open_run

NAMED = 5  # files left out that are named on the terminal
COUNTED = 20  # classes whose images are


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a run says of N images, in the order of their paths. K = min(5, C)."""

    paths: tuple[str, ...]
    """Relative to the folder."""
    classes: tuple[str, ...]
    """Of the run."""
    predicted_N: np.ndarray
    """The most probable class by index, int64; `losses.NONE`, -1, where it does not reach the threshold."""
    best_NK: np.ndarray
    """The most probable classes, int64, most probable first."""
    probabilities_NK: np.ndarray
    """Their probabilities, float64."""
    left_out: tuple[Quarantined, ...]
    """Files that could not be read, and why."""
    threshold: float
    file: Path
    """The table."""

    @property
    def predicted(self) -> list[str | None]:
        """The classes by name."""
        return [None if label == NONE else self.classes[label] for label in self.predicted_N.tolist()]


def predict(config: PredictConfig, console: Console | None = None) -> Predictions:
    """Apply a run to a folder of images, and write the table.

    Raises:
        UserError: the run, the images, or the place to write to cannot be used.
    """
    console = console or Console()
    trained, _ = open_run(absolute(config.run), config.weights)
    check_workers(config.workers or 0)
    threshold = config.threshold
    if threshold is None:
        threshold = 0.5 if trained.config.loss == "one-vs-rest" else 0.0
    data, file = absolute(config.data), absolute(config.out)
    describe(trained, config.tta, console)
    with scratch_in(file.parent, "--out") as scratch:
        with counted(console, f"Reading {data}") as progress:
            found = scan_to_apply(data, labels=None, threads=len(os.sched_getaffinity(0)), progress=progress)
        for note in found.notes:
            console.print(f"note      {note}", highlight=False, markup=False, soft_wrap=True)
        samples = found.samples
        scores = apply(
            trained,
            samples,
            tta=config.tta,
            workers=config.workers,
            scratch=scratch,
            console=console,
        )
    # Of the K best, most probable first, `decide` chooses the first or none.
    places_N = decide(torch.from_numpy(scores.probabilities_NK), threshold).numpy()
    result = Predictions(
        paths=tuple(samples.paths[position] for position in scores.positions_N.tolist()),
        classes=trained.classes,
        predicted_N=np.where(places_N == NONE, NONE, scores.best_NK[:, 0]),
        best_NK=scores.best_NK,
        probabilities_NK=scores.probabilities_NK,
        left_out=(*found.quarantine, *(Quarantined(path=bad.path, reason=bad.reason) for bad in scores.spoiled)),
        threshold=threshold,
        file=file,
    )
    predictions.write(
        file,
        paths=result.paths,
        predicted_N=result.predicted_N,
        best_NK=result.best_NK,
        probabilities_NK=result.probabilities_NK,
        classes=result.classes,
    )
    list_left_out(left_out_file(file), result.left_out)
    return result


def left_out_file(table: Path) -> Path:
    """Where the files that a table lacks are listed."""
    return table.with_name(f"{table.stem}-quarantine.txt")


def list_left_out(path: Path, left_out: Sequence[Quarantined]) -> None:
    """List them, and their reasons; where there are none, there is no list, nor that of an earlier time."""
    if left_out:
        write_quarantine(path, left_out)
    else:
        path.unlink(missing_ok=True)


def describe(trained: Trained, tta: int, console: Console) -> None:
    """Say which model is applied."""
    config = trained.config
    words = f"{config.model}, {config.size} px, {len(trained.classes)} classes, weights {trained.weights.name}"
    views = f", {tta} augmented readings an image" if tta else ""
    console.print(f"run       {trained.path}: {words}{views}", highlight=False, markup=False, soft_wrap=True)


def tell_left_out(left_out: Sequence[Quarantined], listed: Path, console: Console) -> None:
    """Name the first files that were left out, and the list of all of them."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    for bad in left_out[:NAMED]:
        say(f"left out  {printable(bad.path)}: {bad.reason}")
    if left_out:
        say(f"left out  {len(left_out):,} files, all named in {listed}")


def summary(result: Predictions, console: Console) -> None:
    """The last words of `predict` on the terminal."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    tell_left_out(result.left_out, left_out_file(result.file), console)
    say(f"images    {len(result.paths):,}")
    counts = Counter(result.predicted)
    none = counts.pop(None, 0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0] or ""))
    for name, count in ordered[:COUNTED]:
        say(f"  {count:8,}  {printable(name or '')}")
    if len(ordered) > COUNTED:
        rest = ordered[COUNTED:]
        say(f"  {sum(count for _, count in rest):8,}  of {len(rest):,} more classes")
    if result.threshold > 0:
        say(f"  {none:8,}  none of the classes: the best is less probable than {result.threshold:g}")
    say(f"table     {result.file}")
