"""What is minimised, and what a logit means: cross-entropy, focal loss, one against the rest.

A loss here is a loss of each sample; the step sums this rank's and divides by the size of the *global batch*, also
where classes have weights. The other convention, torch's, divides by the sum of the weights that happen to be in the
batch: what a sample teaches then depends on its neighbours, and the sum has to be all-reduced before `backward`, on
each rank, or the result depends on the number of ranks. `class_weights` are scaled so that their mean over the
training samples is 1, which keeps the loss, and with it the learning rate, where it was.

All losses are linear in the targets: loss(t) = sum over c of t_c w_c loss(class c). So MixUp's mixture of two losses
is the loss of the mixed target, and a class's weight goes with its share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss(ABC):
    """What is common to the losses. Logits are float32 or float64 [N, C].

    Targets are class indices int64 [N], or each class's share [N, C], whose rows sum to 1.
    """

    smoothing: float = 0.0
    """Label smoothing: this share of each target is spread evenly over all classes (Szegedy et al., 2016)."""
    weights_C: torch.Tensor | None = None
    """Weight of each class, float32 on the logits' device; see `class_weights`."""

    @abstractmethod
    def each(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each sample, [N], nats."""

    def total(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the samples' losses, a scalar: over all ranks, divided by the global batch, it is the loss."""
        return self.each(logits_NC, targets).sum()

    def probabilities(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """What the logits say of each class, [N, C]; rows sum to 1."""
        return logits_NC.softmax(dim=1)

    def logits(self, probabilities_NC: torch.Tensor) -> torch.Tensor:
        """Logits that have these `probabilities`, finite, [N, C]."""
        return probabilities_NC.clamp(min=torch.finfo(probabilities_NC.dtype).tiny).log()

    def _shares(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Targets as smoothed shares [N, C]."""
        classes = logits_NC.shape[1]
        shares_NC = one_hot(targets, classes) if targets.ndim == 1 else targets
        return shares_NC.to(logits_NC.dtype) * (1 - self.smoothing) + self.smoothing / classes

    def _weighted(self, shares_NC: torch.Tensor) -> torch.Tensor:
        return shares_NC if self.weights_C is None else shares_NC * self.weights_C


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy(Loss):
    """Softmax cross-entropy, torch's own, to the bit."""

    def each(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._torch(logits_NC, targets, "none")

    def total(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._torch(logits_NC, targets, "sum")

    def _torch(self, logits_NC: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        return cross_entropy(
            logits_NC, targets, weight=self.weights_C, label_smoothing=self.smoothing, reduction=reduction
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Focal(Loss):
    """Focal loss over a softmax: -(1 - p)^gamma log p of the true class, so that easy samples count for little.

    Lin et al., "Focal loss for dense object detection", ICCV 2017, whose alpha are our class weights. With gamma 0 it
    is cross-entropy.
    """

    gamma: float = 2.0
    """How fast a sample that is well classified stops to count; 0 or more."""

    def each(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_p_NC = logits_NC.log_softmax(dim=1)
        # 1 - p without cancellation; kept off 0, where a power below 1 has no finite slope.
        rest_NC = (-torch.expm1(log_p_NC)).clamp(min=torch.finfo(log_p_NC.dtype).tiny)
        focal_NC = -(rest_NC**self.gamma) * log_p_NC
        return (self._weighted(self._shares(logits_NC, targets)) * focal_NC).sum(dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class OneVsRest(Loss):
    """Binary cross-entropy of each class against all others, summed over the classes.

    Each class decides for itself, so that all of them can decline: see `predictions.decide`. The weight of a sample's
    class counts for all its C decisions (Cui et al., 2019, sec. 4).
    """

    def each(self, logits_NC: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shares_NC = self._shares(logits_NC, targets)
        if self.weights_C is None:
            return binary_cross_entropy_with_logits(logits_NC, shares_NC, reduction="none").sum(dim=1)
        weighted_NC = self._weighted(shares_NC)
        weights_N1 = weighted_NC.sum(dim=1, keepdim=True)
        # sum_c t_c w_c loss(class c), written as one binary cross-entropy, which is exact for large logits.
        targets_NC = weighted_NC / weights_N1
        binary_NC = binary_cross_entropy_with_logits(logits_NC, targets_NC, reduction="none")
        return (weights_N1 * binary_NC).sum(dim=1)

    def probabilities(self, logits_NC: torch.Tensor) -> torch.Tensor:
        """What the logits say of each class, float64 [N, C]; each row's sum may be anything from 0 to C."""
        # In float32 every logit above 17 is a certainty, and the largest of several would be lost.
        return logits_NC.double().sigmoid()

    def logits(self, probabilities_NC: torch.Tensor) -> torch.Tensor:
        return probabilities_NC.logit(eps=torch.finfo(probabilities_NC.dtype).eps)


def named(kind: str, *, focal_gamma: float, smoothing: float = 0.0, weights_C: torch.Tensor | None = None) -> Loss:
    """The loss that `--loss` names."""
    common = {"smoothing": smoothing, "weights_C": weights_C}
    if kind == "focal":
        return Focal(gamma=focal_gamma, **common)
    return {"cross-entropy": CrossEntropy, "one-vs-rest": OneVsRest}[kind](**common)


def class_weights(
    labels_N: np.ndarray, classes: int, kind: Literal["inverse", "effective"], beta: float = 0.999
) -> np.ndarray:
    """A weight for each class, float64 [C], larger for rare ones; their mean over the samples is 1.

    Args:
        labels_N: the training set's classes. (Not a rank's, nor a batch's: weights belong to the run.)
        classes: C. A class without a sample gets weight 1.
        kind: `inverse`: of the number of samples, so that all classes weigh the same in total. `effective`: of the
            effective number of samples, (1 - beta^n) / (1 - beta), where each new sample adds less to what the earlier
            ones have told (Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019).
        beta: between 0 and 1, both excluded: from no weights at all towards `inverse`.
    """
    counts_C = np.bincount(labels_N, minlength=classes)
    there_C = counts_C > 0
    effective_C = -np.expm1(counts_C * np.log(beta)) / (1 - beta) if kind == "effective" else counts_C
    weights_C = there_C / np.maximum(effective_C, np.finfo(np.float64).tiny)
    return np.where(there_C, weights_C * (counts_C.sum() / (counts_C @ weights_C)), 1.0)
