"""Where a classifier errs: the confusion matrix and its largest entries."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def confusion_matrix(
    labels_N: npt.ArrayLike, predicted_N: npt.ArrayLike, classes: Sequence[str]
) -> npt.NDArray[np.int64]:
    """Count the samples of each (actual, predicted) pair of classes.

    `labels_N` and `predicted_N` are class indices in [0, len(classes)). Returns `confusion_CC`: int64,
    row = actual class, column = predicted class; its sum is N. Raises ValueError where the lengths differ
    or an index is outside the classes.
    """
    labels_N = np.asarray(labels_N, dtype=np.int64)
    predicted_N = np.asarray(predicted_N, dtype=np.int64)
    count = len(classes)
    if labels_N.ndim != 1 or labels_N.shape != predicted_N.shape:
        raise ValueError(f"labels {labels_N.shape} and predictions {predicted_N.shape} must be equally long vectors")
    for name, index_N in (("label", labels_N), ("prediction", predicted_N)):
        if index_N.size and not (index_N.min() >= 0 and index_N.max() < count):
            raise ValueError(f"{name}s from {index_N.min()} to {index_N.max()} do not fit {count} classes")
    return np.bincount(labels_N * count + predicted_N, minlength=count * count).reshape(count, count)


def most_confused(
    confusion_CC: npt.NDArray[np.integer], classes: Sequence[str], min_val: int = 1
) -> list[tuple[str, str, int]]:
    """The pairs of classes most often taken for one another: (actual, predicted, count).

    As fastai's `Interpretation.most_confused`: entries off the diagonal of at least `min_val`, by count
    descending; equal counts keep the order of the classes (actual first, then predicted).
    """
    counts_CC = np.asarray(confusion_CC)
    if counts_CC.shape != (len(classes), len(classes)):
        raise ValueError(f"a confusion matrix of shape {counts_CC.shape} does not fit {len(classes)} classes")
    wanted_CC = (counts_CC >= min_val) & ~np.eye(len(classes), dtype=bool)
    pairs = [
        (classes[actual], classes[predicted], int(counts_CC[actual, predicted]))
        for actual, predicted in zip(*np.nonzero(wanted_CC), strict=True)
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def by_likeness(confusion_CC: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """An order of the classes in which those that are taken for one another stand together, int64 [C].

    Average-linkage clustering: the two most alike groups become one, turned so that their most alike ends meet, until
    no two groups are alike. Likeness is the share of the two classes' images that went from either to the other.
    Groups then follow by their first class, so that a matrix without a confusion keeps its order.
    """
    counts_CC = np.asarray(confusion_CC, np.float64)
    shares_CC = counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1)
    likeness_CC = shares_CC + shares_CC.T
    groups = {index: [index] for index in range(len(counts_CC))}
    between_CC = likeness_CC.copy()  # summed over the members of two groups, each named by its first row
    np.fill_diagonal(between_CC, 0)
    sizes_C = np.ones(len(counts_CC))
    for _ in range(len(counts_CC) - 1):
        mean_CC = between_CC / (sizes_C[:, None] * sizes_C)
        a, b = divmod(int(mean_CC.argmax()), len(counts_CC))
        if mean_CC[a, b] == 0:
            break
        turns = [(left, right) for left in (groups[a], groups[a][::-1]) for right in (groups[b], groups[b][::-1])]
        left, right = max(turns, key=lambda turn: likeness_CC[turn[0][-1], turn[1][0]])
        groups[a] = left + right
        del groups[b]
        between_CC[a] += between_CC[b]
        between_CC[:, a] += between_CC[:, b]
        between_CC[[a, b], [a, b]] = 0
        between_CC[b] = between_CC[:, b] = 0
        sizes_C[a] += sizes_C[b]
    return np.array([index for group in groups.values() for index in group], np.int64)
