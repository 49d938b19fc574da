"""Judging a model: every image of a set counts exactly once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipelines.errors import UserError
from pipelines.loader import Loader
from trainer import optim
from trainer.loop import Learner
from trainer.metrics import Metrics, places, summarise


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
    """By the loss of training, without label smoothing and class weights; nats."""
    confidence_N: np.ndarray
    """Probability given to the predicted class."""
    places_N: np.ndarray
    """Classes more probable than the true one."""

    @property
    def error_rate(self) -> float:
        return float((self.predicted_N != self.labels_N).mean())

    @property
    def loss(self) -> float:
        return float(self.losses_N.mean())

    def metrics(self, classes: Sequence[str]) -> Metrics:
        """Everything that counts and shares tell."""
        return summarise(self.labels_N, self.predicted_N, self.confidence_N, self.places_N, classes)


def judge(learner: Learner, loader: Loader) -> Judgement:
    """Run the model over a validation set on all ranks.

    Each rank fills the rows of the samples it saw in a table of all samples, and the tables are summed: a row that
    no rank or two ranks had seen would show in its count. Files gone bad since the scan are told of by the rank that
    met them, and left out.

    Raises:
        UserError: no image of the set can be read any more.
    """
    model = learner.judged
    # Smoothing and class weights are for learning: without them losses of different trainings can be compared.
    loss = replace(learner.loss, smoothing=0.0, weights_C=None)
    # The one that is learning too: what is saved of it is of all ranks. A set would have an order on each rank.
    for each in dict.fromkeys((learner.model, model)):
        optim.average_batch_statistics(each, learner.ranks)
    ids_V = torch.from_numpy(loader.samples.ids_N)  # ascending: a split keeps the manifest's order
    table_V5 = torch.zeros(len(ids_V), 5, dtype=torch.float64)  # predicted, loss, confidence, place, times seen
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in loader.epoch(0):
            with learner.precision.autocast():
                logits_NC = model(batch.images_NCHW)
            logits_NC = logits_NC.float()
            probabilities_NC = loss.probabilities(logits_NC)
            confidence_N, predicted_N = probabilities_NC.max(dim=1)
            losses_N = loss.each(logits_NC, batch.labels_N)
            places_N = places(probabilities_NC, batch.labels_N)
            rows_N = torch.searchsorted(ids_V, batch.ids_N)
            seen_N = torch.ones_like(losses_N)
            columns = (predicted_N, losses_N, confidence_N, places_N, seen_N)
            table_V5[rows_N] += torch.stack([column.double() for column in columns], dim=1).cpu()
    model.train(training)
    table_V5 = learner.ranks.sum(table_V5.to(learner.ranks.device)).cpu()
    expected_V = torch.ones(len(ids_V))
    for spoiled in learner.ranks.gather(list(loader.spoiled)):
        expected_V[torch.searchsorted(ids_V, spoiled.id)] = 0
    wrong = (table_V5[:, 4] != expected_V).nonzero().flatten()
    if len(wrong):
        raise RuntimeError(f"validation sample {ids_V[wrong[0]]} was counted {table_V5[wrong[0], 4]:.0f} times")
    positions_N = expected_V.nonzero().flatten().numpy()
    if not len(positions_N):
        raise UserError(
            f"None of the {len(ids_V)} validation images under {str(loader.samples.root)!r} can be read any more; "
            f"{loader.samples.paths[0]!r} is one of them. Put the images back, then repeat the command."
        )
    table_N5 = table_V5[positions_N].numpy()
    return Judgement(
        positions_N=positions_N,
        labels_N=loader.samples.labels_N[positions_N],
        predicted_N=table_N5[:, 0].astype(np.int64),
        losses_N=table_N5[:, 1],
        confidence_N=table_N5[:, 2],
        places_N=table_N5[:, 3].astype(np.int64),
    )
