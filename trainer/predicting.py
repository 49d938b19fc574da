"""`predict`: what a trained run, or an export of one, says of images that nothing is known of."""

from __future__ import annotations

import os

from rich.console import Console

from pipelines.manifest import Quarantined
from trainer.apply_config import PredictConfig
from trainer.bar import counted
from trainer.predictions import Predictions, finished
from trainer.run_folder import absolute


def predict(config: PredictConfig, console: Console | None = None) -> Predictions:
    """Apply a run or an export to a folder of images, and write the table.

    Raises:
        UserError: the run, the images, or the place to write to cannot be used.
    """
    from trainer import exported  # whom DALI and torch, which may not be there, do not concern

    console = console or Console()
    return exported.predict(config, console) if exported.is_export(absolute(config.run)) else _by_run(config, console)


def _by_run(config: PredictConfig, console: Console) -> Predictions:
    from pipelines.scanning import scan_to_apply
    from trainer.apply import apply, scratch_in
    from trainer.starting import check_workers
    from trainer.trained import open_run

    trained, _ = open_run(absolute(config.run), config.weights)
    check_workers(config.workers or 0)
    data, file = absolute(config.data), absolute(config.out)
    trained.describe(config.tta, console)
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
    return finished(
        file,
        paths=tuple(samples.paths[position] for position in scores.positions_N.tolist()),
        classes=trained.classes,
        best_NK=scores.best_NK,
        probabilities_NK=scores.probabilities_NK,
        threshold=trained.threshold if config.threshold is None else config.threshold,
        left_out=(*found.quarantine, *(Quarantined(path=bad.path, reason=bad.reason) for bad in scores.spoiled)),
    )
