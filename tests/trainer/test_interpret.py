from collections import Counter
from operator import itemgetter

import numpy as np
import pytest

from trainer.interpret import confusion_matrix, most_confused

CLASSES = ["cat", "dog", "fox", "owl"]


@pytest.fixture
def drawn():
    rng = np.random.default_rng(7)
    return rng.integers(0, 4, 500), rng.integers(0, 4, 500)


def test_confusion_counts_every_pair_with_actual_in_rows(drawn):
    labels_N, predicted_N = drawn
    confusion_CC = confusion_matrix(labels_N, predicted_N, CLASSES)
    pairs = Counter(zip(labels_N.tolist(), predicted_N.tolist(), strict=True))
    assert confusion_CC.dtype == np.int64
    assert {(i, j): int(confusion_CC[i, j]) for i in range(4) for j in range(4)} == {
        (i, j): pairs[i, j] for i in range(4) for j in range(4)
    }


def test_classes_without_a_sample_have_rows_of_zeros():
    assert confusion_matrix([], [], CLASSES).tolist() == [[0] * 4] * 4
    assert confusion_matrix([3], [0], CLASSES)[3].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("labels", "predicted"), [([0, 1], [0]), ([4], [0]), ([0], [4]), ([-1], [0]), ([[0]], [[0]])])
def test_what_does_not_fit_is_refused(labels, predicted):
    with pytest.raises(ValueError, match=r"equally long|do not fit"):
        confusion_matrix(labels, predicted, CLASSES)


def test_most_confused_is_fastais(drawn):
    confusion_CC = confusion_matrix(*drawn, CLASSES)
    for min_val in (1, 30, 35):
        # fastai/interpret.py, ClassificationInterpretation.most_confused, line by line.
        cm = confusion_CC.copy()
        np.fill_diagonal(cm, 0)
        found = [(CLASSES[i], CLASSES[j], cm[i][j]) for i, j in zip(*np.where(cm >= min_val), strict=True)]
        assert most_confused(confusion_CC, CLASSES, min_val) == sorted(found, key=itemgetter(2), reverse=True)


def test_most_confused_orders_ties_by_class_and_leaves_the_diagonal_out():
    confusion_CC = np.array([[9, 2, 1], [2, 9, 0], [5, 2, 9]])
    assert most_confused(confusion_CC, ["c", "b", "a"]) == [
        ("a", "c", 5),
        ("c", "b", 2),
        ("b", "c", 2),
        ("a", "b", 2),
        ("c", "a", 1),
    ]
    assert most_confused(np.eye(3, dtype=int), ["c", "b", "a"], min_val=0)[0] == ("c", "b", 0)
    with pytest.raises(ValueError, match="does not fit"):
        most_confused(confusion_CC, ["c", "b"])
