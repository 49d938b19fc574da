"""What the epochs' verdicts say about overfitting, in words, and how much of them is chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

CHANCE = 0.1  # most flat trainings in which an epoch is called worse than the best that came before it


def standard_errors(labels_N: np.ndarray, predicted_N: np.ndarray, losses_N: np.ndarray) -> dict[str, float]:
    """How far error, macro F1 and loss would scatter over other validation sets of the same size.

    That of the error is the binomial one. That of macro F1 is by the delta method: each image moves the F1 of its true
    and of its predicted class, so what classes share is accounted for (as in Takahashi et al., "Confidence interval for
    micro-averaged F1 and macro-averaged F1 scores", 2022).

    Args:
        labels_N: true classes, int64.
        predicted_N: predicted classes, int64.
        losses_N: nats.
    """
    count = len(labels_N)
    right_N = labels_N == predicted_N
    error = 1 - right_N.mean()
    classes = int(max(labels_N.max(), predicted_N.max())) + 1
    hits_C = np.bincount(labels_N[right_N], minlength=classes) / count
    misses_C = (
        np.bincount(labels_N[~right_N], minlength=classes) + np.bincount(predicted_N[~right_N], minlength=classes)
    ) / count
    there_C = 2 * hits_C + misses_C > 0  # F1 = 2 hits / (2 hits + misses); a class neither there nor said has none
    whole_C = np.where(there_C, 2 * hits_C + misses_C, 1.0)
    by_hit_C, by_miss_C = 2 * misses_C / whole_C**2, -2 * hits_C / whole_C**2
    moved_N = np.where(right_N, by_hit_C[labels_N], by_miss_C[labels_N] + by_miss_C[predicted_N]) / there_C.sum()
    return {
        "error_rate": math.sqrt(error * (1 - error) / count),
        "macro_f1": math.sqrt((moved_N**2).mean() / count),
        "valid_loss": float(losses_N.std() / math.sqrt(count)),
    }


def advice(epochs: Sequence[Mapping[str, Any]], images: int, *, sizes: bool = False) -> list[str]:
    """What to make of the way the verdicts went: sentences for a person, none where there is nothing to say.

    The last epoch is compared with the best one, by error and by macro F1. It is called worse where the difference is
    beyond the chance of the validation set: so many standard errors that of ten trainings that stay at one level for
    as many epochs, at most one is called worse (Bonferroni's bound: the best of several is also the luckiest). Two
    verdicts on the same images, most of which are surely right or surely wrong, are taken to differ by no more than the
    standard error of one verdict; on different images it would be 1.4 times as much.

    The advice is that of fastai's book, chapter 5: to train again, from the same start, with as many epochs as were
    best. Under one cycle the weights of an epoch in the middle have not been annealed.

    Args:
        epochs: `epoch` events of a journal, in order, one for each epoch of the run.
        images: number of validation images.
        sizes: the epochs were given as `--sizes`.
    """
    if len(epochs) < 2:
        return []
    last = epochs[-1]
    lowest_error = min(epochs, key=lambda epoch: epoch["error_rate"])
    highest_f1 = max(epochs, key=lambda epoch: epoch["macro_f1"])
    deviations = NormalDist().inv_cdf(1 - CHANCE / (len(epochs) - 1))

    def chance(name: str, best: Mapping[str, Any]) -> float:
        return deviations * max(epoch["standard_errors"][name] for epoch in (best, last))

    error_rose = last["error_rate"] - lowest_error["error_rate"]
    if error_rose > chance("error_rate", lowest_error):
        return [
            f"Overfitting: the validation error was lowest in epoch {lowest_error['epoch']} "
            f"({lowest_error['error_rate']:.4f}) and ended at {last['error_rate']:.4f}. {images} images tell that from "
            f"chance (± {chance('error_rate', lowest_error):.4f}). {_again(epochs, lowest_error, sizes)}"
        ]
    if highest_f1["macro_f1"] - last["macro_f1"] > chance("macro_f1", highest_f1):
        return [
            f"Overfitting in some classes: macro F1 was highest in epoch {highest_f1['epoch']} "
            f"({highest_f1['macro_f1']:.4f}) and ended at {last['macro_f1']:.4f}, while the error over all {images} "
            f"images is no worse than chance allows. Where rare classes matter: {_again(epochs, highest_f1, sizes)}"
        ]
    told = []
    if error_rose > 0:
        told.append(
            f"The validation error was lowest in epoch {lowest_error['epoch']} ({lowest_error['error_rate']:.4f}). The "
            f"{last['error_rate']:.4f} at the end is no worse as far as {images} images can tell "
            f"(± {chance('error_rate', lowest_error):.4f})."
        )
    finite = [epoch for epoch in epochs if math.isfinite(epoch["valid_loss"] or math.nan)]
    lowest_loss = min(finite, key=lambda epoch: epoch["valid_loss"], default=last)
    if last in finite and last["valid_loss"] - lowest_loss["valid_loss"] > chance("valid_loss", lowest_loss):
        before, after = lowest_loss["error_rate"], last["error_rate"]
        went = "kept falling" if after < before else "did not get worse"
        told.append(
            f"Over-confidence, not overfitting: the validation loss rose from {lowest_loss['valid_loss']:.4f} (epoch "
            f"{lowest_loss['epoch']}) to {last['valid_loss']:.4f} while the error {went} ({before:.4f}, then "
            f"{after:.4f}). The model is as good a judge as before, and too sure where it errs; fewer epochs would not "
            "mend that. Where its probabilities matter, --label-smoothing or --mixup may."
        )
    return told


def _again(epochs: Sequence[Mapping[str, Any]], best: Mapping[str, Any], sizes: bool) -> str:
    """With how many epochs to train again."""
    frozen = sum(epoch["phase"] == "frozen" for epoch in epochs)
    whole = best["epoch"] - frozen + 1
    if whole < 1:
        return (
            "Training the whole model made it worse than the head alone had been: train again with a lower --lr, or "
            f"with --freeze-epochs {best['epoch'] + 1} --epochs 0."
        )
    how = f"--sizes of {whole} epochs in all" if sizes else f"--epochs {whole}"
    return (
        f"Train again from the start with {how}: here the weights of epoch {best['epoch']}, in best.safetensors, were "
        "taken in the middle of a cycle; in one of their own they are annealed."
    )
