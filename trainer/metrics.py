"""What is said of a judged set: error, accuracy, top-5, F1, each class's precision and recall, calibration.

All of it follows from three numbers for each sample: the predicted class, the probability given to it, and the true
class's place. So ranks share three columns and no table of samples by classes, which for 50,000 images of 1,000
classes would be 200 MB; and where each sample stands in the columns once, the same on every rank, so is the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BINS = 15  # of the calibration error


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """How one class fares; 0 where nothing is divided by nothing."""

    name: str
    images: int
    """Of this class."""
    predicted: int
    """Said to be of this class."""
    right: int
    """Both."""
    precision: float
    """right / predicted."""
    recall: float
    """right / images."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The summary of a judged set; `dataclasses.asdict` makes it ready for JSON."""

    images: int
    right: int
    error_rate: float
    """Share of images whose predicted class is wrong."""
    accuracy: float
    """1 - error_rate."""
    top5_accuracy: float
    """Share of images whose class is among the five most probable; 1 where there are no more."""
    macro_f1: float
    """Mean over classes of the harmonic mean of precision and recall; a class neither there nor said has no part."""
    calibration_error: float
    """Expected calibration error: mean distance between confidence and accuracy over 15 bins of equal width, weighted
    by their images (Guo et al., "On calibration of modern neural networks", ICML 2017)."""
    per_class: tuple[ClassMetrics, ...]
    """In the order of the classes."""


def places(scores_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """How many classes come before the true one by descending score (logits or probabilities), int64 [N].

    Of equal scores the lower class comes first, as for `argmax`: 0 means that the prediction is right. Scores that
    are no numbers put the true class last.
    """
    true_N1 = scores_NC.gather(1, labels_N[:, None])
    earlier_NC = torch.arange(scores_NC.shape[1], device=scores_NC.device) < labels_N[:, None]
    before_NC = ~(scores_NC <= true_N1) | ((scores_NC == true_N1) & earlier_NC)
    return before_NC.sum(dim=1).clamp(max=scores_NC.shape[1] - 1)


def summarise(
    labels_N: np.ndarray,
    predicted_N: np.ndarray,
    confidence_N: np.ndarray,
    places_N: np.ndarray,
    classes: Sequence[str],
) -> Metrics:
    """The summary of N samples, N at least 1.

    Args:
        labels_N: true classes, int64.
        predicted_N: predicted classes, int64.
        confidence_N: probability given to the predicted class, float64.
        places_N: see `places`, int64.
        classes: name of each class.
    """
    # Not before it is needed: it brings pyplot, which a worker has no other use for.
    from torchmetrics.functional import classification as tm

    count = len(classes)
    labels, predicted = torch.from_numpy(labels_N), torch.from_numpy(predicted_N)
    counts_C5 = tm.multiclass_stat_scores(predicted, labels, count, average=None)
    right_C, false_C, _, _, images_C = counts_C5.unbind(dim=1)
    columns = (column.tolist() for column in (images_C, right_C + false_C, right_C))
    # A probability that rounding took past 1 would be read as a logit, and all others with it.
    confidence = torch.from_numpy(confidence_N.clip(0.0, 1.0))
    right = int(right_C.sum())
    return Metrics(
        images=len(labels_N),
        right=right,
        error_rate=(len(labels_N) - right) / len(labels_N),
        accuracy=right / len(labels_N),
        top5_accuracy=float((places_N < 5).mean()),
        macro_f1=float(tm.multiclass_f1_score(predicted, labels, count)),
        # Of the chosen class against all others it is a binary question: right or not.
        calibration_error=float(tm.binary_calibration_error(confidence, (predicted == labels).long(), n_bins=BINS)),
        per_class=tuple(
            ClassMetrics(
                name=name,
                images=images,
                predicted=said,
                right=hits,
                precision=hits / max(said, 1),
                recall=hits / max(images, 1),
            )
            for name, images, said, hits in zip(classes, *columns, strict=True)
        ),
    )
