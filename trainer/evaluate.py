"""Judging a model: every image of a set counts exactly once, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipelines.errors import UserError
from pipelines.loader import Loader
from trainer import optim
from trainer.loop import Learner


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the model says of each of N samples, in the order of the set; the same on every rank."""

    positions_N: np.ndarray
    """Their places in the set: all of them, but those whose files have gone bad since the scan."""
    labels_N: np.ndarray
    """True classes."""
    predicted_N: np.ndarray
    """Predicted classes."""
    losses_N: np.ndarray
    """Cross-entropy, nats."""
    confidence_N: np.ndarray
    """Probability given to the predicted class."""

    @property
    def error_rate(self) -> float:
        return float((self.predicted_N != self.labels_N).mean())

    @property
    def loss(self) -> float:
        return float(self.losses_N.mean())


def judge(learner: Learner, loader: Loader) -> Judgement:
    """Run the model over a validation set on all ranks.

    Each rank fills the rows of the samples it saw in a table of all samples, and the tables are summed: a row that
    no rank or two ranks had seen would show in its count. Files gone bad since the scan are told of by the rank that
    met them, and left out.

    Raises:
        UserError: no image of the set can be read any more.
    """
    optim.average_batch_statistics(learner.model, learner.ranks)
    ids_V = torch.from_numpy(loader.samples.ids_N)  # ascending: a split keeps the manifest's order
    table_V4 = torch.zeros(len(ids_V), 4, dtype=torch.float64)  # predicted, loss, confidence, times seen
    learner.model.eval()
    with torch.inference_mode():
        for batch in loader.epoch(0):
            with learner.precision.autocast():
                logits_NC = learner.model(batch.images_NCHW)
            logits_NC = logits_NC.float()
            confidence_N, predicted_N = logits_NC.softmax(dim=1).max(dim=1)
            losses_N = cross_entropy(logits_NC, batch.labels_N, reduction="none")
            rows_N = torch.searchsorted(ids_V, batch.ids_N)
            seen_N = torch.ones_like(losses_N)
            columns = (predicted_N, losses_N, confidence_N, seen_N)
            table_V4[rows_N] += torch.stack([column.double() for column in columns], dim=1).cpu()
    learner.model.train()
    table_V4 = learner.ranks.sum(table_V4.to(learner.ranks.device)).cpu()
    expected_V = torch.ones(len(ids_V))
    for spoiled in learner.ranks.gather(list(loader.spoiled)):
        expected_V[torch.searchsorted(ids_V, spoiled.id)] = 0
    wrong = (table_V4[:, 3] != expected_V).nonzero().flatten()
    if len(wrong):
        raise RuntimeError(f"validation sample {ids_V[wrong[0]]} was counted {table_V4[wrong[0], 3]:.0f} times")
    positions_N = expected_V.nonzero().flatten().numpy()
    if not len(positions_N):
        raise UserError(
            f"None of the {len(ids_V)} validation images under {str(loader.samples.root)!r} can be read any more; "
            f"{loader.samples.paths[0]!r} is one of them. Put the images back, then repeat the command."
        )
    table_N4 = table_V4[positions_N].numpy()
    return Judgement(
        positions_N=positions_N,
        labels_N=loader.samples.labels_N[positions_N],
        predicted_N=table_N4[:, 0].astype(np.int64),
        losses_N=table_N4[:, 1],
        confidence_N=table_N4[:, 2],
    )
