"""The images that a model is most wrong about, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.loader import Loader
from trainer import figures
from trainer.evaluate import Judgement

SHOWN = 9


def draw(path: Path, loader: Loader, judgement: Judgement, classes: Sequence[str]) -> None:
    """Draw them as the model saw them; `judgement` is of the loader's samples."""
    worst = np.argsort(-judgement.losses_N, kind="stable")[:SHOWN]
    samples = loader.samples.subset(judgement.positions_N[worst])
    pictures: dict[int, np.ndarray] = {}
    for batch in loader.alone(samples).epoch(0):
        pictures.update(zip(batch.ids_N.tolist(), loader.pictures(batch), strict=True))
    title = {
        id: f"{classes[judgement.predicted_N[i]]} / {classes[judgement.labels_N[i]]} / "
        f"{judgement.losses_N[i]:.2f} / {judgement.confidence_N[i]:.2f}"
        for id, i in zip(samples.ids_N.tolist(), worst, strict=True)
    }
    figures.plot_top_losses(path, list(pictures.values()), [title[id] for id in pictures])
