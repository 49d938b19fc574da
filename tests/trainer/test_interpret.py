from collections import Counter
from operator import itemgetter

import numpy as np
import pytest

from trainer.interpret import by_likeness, confusion_matrix, most_confused

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


def blocks(rng, sizes, noise=0):
    """A confusion matrix of groups of classes that are taken for one another, shuffled; and each class's group."""
    group_C = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    confusion_CC = np.where(group_C[:, None] == group_C, rng.integers(1, 9, (len(group_C),) * 2), 0)
    confusion_CC += rng.random(confusion_CC.shape) < noise
    np.fill_diagonal(confusion_CC, 40)
    return confusion_CC, group_C


@pytest.mark.parametrize("noise", [0, 0.01])
def test_classes_that_are_confused_stand_together(noise):
    for seed in range(5):
        confusion_CC, group_C = blocks(np.random.default_rng(seed), [7, 12, 3, 25, 13], noise)
        order_C = by_likeness(confusion_CC)
        assert sorted(order_C.tolist()) == list(range(60))
        borders = np.flatnonzero(np.diff(group_C[order_C]))
        assert len(borders) == 4  # each group in one piece


def test_the_two_most_alike_of_two_groups_meet():
    confusion_CC = np.diag([20] * 6)
    for a, b, count in ((0, 1, 9), (2, 3, 9), (1, 3, 4)):  # 0-1 and 2-3 are groups, whose ends 1 and 3 touch
        confusion_CC[a, b] = count
    assert by_likeness(confusion_CC).tolist() == [0, 1, 3, 2, 4, 5]


def test_a_matrix_without_confusion_keeps_its_order():
    assert by_likeness(np.diag([3, 0, 5, 1])).tolist() == [0, 1, 2, 3]
    assert by_likeness(np.zeros((0, 0), int)).tolist() == []


def test_shares_decide_and_not_counts():
    # Class 2 has 4 images, half of them lost to class 0, which is more than the 20 of 100 of class 1: it joins first.
    assert by_likeness(np.array([[100, 0, 0], [20, 80, 0], [2, 0, 2]])).tolist() == [2, 0, 1]


def test_a_large_group_draws_no_class_from_its_twin():
    confusion_CC = np.zeros((10, 10), int)
    for group in ((0, 1, 2), (3, 4, 5)):
        confusion_CC[np.ix_(group, group)] = 200
    for twins in ((6, 7), (8, 9)):  # each one is a little like all of a group, in sum more than like its twin
        confusion_CC[twins] = 250
        confusion_CC[twins[0], :3] = confusion_CC[twins[1], 3:6] = 100
    np.fill_diagonal(confusion_CC, 0)
    np.fill_diagonal(confusion_CC, 1000 - confusion_CC.sum(axis=1))
    order = by_likeness(confusion_CC).tolist()
    assert abs(order.index(6) - order.index(7)) == abs(order.index(8) - order.index(9)) == 1
