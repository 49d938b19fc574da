"""The images that a model errs on: in words, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.loader import Loader
from trainer import figures
from trainer.evaluate import Judgement

SHOWN = 9  # images with the largest losses
PAIRS, EACH = 5, 4  # pairs of classes that are confused, and images of each


def losses(judgement: Judgement, paths: Sequence[str], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The images that the model is most wrong about; `judgement` is of the samples whose `paths` these are."""
    return [
        {
            "path": paths[judgement.positions_N[i]],
            "actual": classes[judgement.labels_N[i]],
            "predicted": classes[judgement.predicted_N[i]],
            "loss": float(judgement.losses_N[i]),
            "probability": float(judgement.confidence_N[i]),
        }
        for i in _worst(judgement, np.arange(len(judgement.losses_N)), SHOWN)
    ]


def draw_losses(path: Path, loader: Loader, judgement: Judgement, classes: Sequence[str]) -> None:
    """Draw them as the model saw them; `judgement` is of the loader's samples."""
    rows = losses(judgement, loader.samples.paths, classes)
    worst = _worst(judgement, np.arange(len(judgement.losses_N)), SHOWN)
    titles = [
        f"{row['predicted']} / {row['actual']} / {row['loss']:.2f} / {row['probability']:.2f}"
        + (" (right)" if row["predicted"] == row["actual"] else "")
        for row in rows
    ]
    found = _pictures(loader, judgement, worst)
    figures.plot_top_losses(path, list(found.values()), [titles[k] for k in found])


def draw_confused(
    path: Path, loader: Loader, judgement: Judgement, classes: Sequence[str], pairs: Sequence[tuple[str, str, int]]
) -> None:
    """Draw images of the first of these (actual, predicted, count), the largest losses first; nothing for no pairs."""
    rows = []
    label_of = {name: label for label, name in enumerate(classes)}
    for actual, predicted, count in pairs[:PAIRS]:
        these_N = (judgement.labels_N == label_of[actual]) & (judgement.predicted_N == label_of[predicted])
        worst = _worst(judgement, np.flatnonzero(these_N), EACH)
        rows.append((f"{actual} → {predicted} ({count})", list(_pictures(loader, judgement, worst).values())))
    if rows:
        figures.plot_confused(path, rows)
    else:
        path.unlink(missing_ok=True)


def _worst(judgement: Judgement, rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.argsort(-judgement.losses_N[rows], kind="stable")[:count]]


def _pictures(loader: Loader, judgement: Judgement, rows: np.ndarray) -> dict[int, np.ndarray]:
    """The images of these rows of the judgement, by their place among them; without those that can be read no more."""
    samples = loader.samples.subset(judgement.positions_N[rows])
    found: dict[int, np.ndarray] = {}
    for batch in loader.alone(samples).epoch(0):
        found.update(zip(batch.ids_N.tolist(), loader.pictures(batch), strict=True))
    return {k: found[id] for k, id in enumerate(samples.ids_N.tolist()) if id in found}
