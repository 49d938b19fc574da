"""Metrics by hand, by NumPy, by torchmetrics on the whole table; and on the parts of any number of ranks."""

import json
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as tm

from trainer.metrics import places, summarise


def judged(logits_NC, labels_N):
    confidence_N, predicted_N = logits_NC.softmax(dim=1).max(dim=1)
    columns = (predicted_N, confidence_N.double(), places(logits_NC, labels_N))
    return [column.numpy() for column in columns]


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(4)
    labels_N = torch.randint(0, 9, (700,), generator=generator)  # of 12: three classes have no image
    logits_NC = torch.randn(700, 12, generator=generator)
    logits_NC[torch.arange(700), labels_N] += 1.5
    logits_NC[:350] *= 4  # too sure of itself; the others are too modest
    logits_NC[:, 11] = -20  # is never said
    return logits_NC, labels_N


def test_a_set_of_six_by_hand():
    metrics = summarise(
        np.array([0, 0, 0, 1, 1, 2]),
        np.array([0, 0, 1, 1, 0, 1]),
        np.array([0.95, 0.85, 0.89, 0.65, 0.95, 1.0]),
        np.array([0, 0, 5, 0, 4, 7]),
        ["a", "b", "c", "d"],
    )
    assert (metrics.images, metrics.right, metrics.error_rate, metrics.accuracy) == (6, 3, 0.5, 0.5)
    assert metrics.top5_accuracy == 4 / 6
    a, b, c, d = metrics.per_class
    assert (a.name, a.images, a.predicted, a.right, a.precision, a.recall) == ("a", 3, 3, 2, 2 / 3, 2 / 3)
    assert (b.name, b.images, b.predicted, b.right, b.precision, b.recall) == ("b", 2, 3, 1, 1 / 3, 1 / 2)
    assert (c.name, c.images, c.predicted, c.right, c.precision, c.recall) == ("c", 1, 0, 0, 0.0, 0.0)
    assert (d.name, d.images, d.predicted, d.right, d.precision, d.recall) == ("d", 0, 0, 0, 0.0, 0.0)
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)  # d has no part
    # Of the fifteenths the last holds 0.95, 0.95 and 1.0, one of them right; the others stand alone.
    expected = (abs(0.85 - 1) + abs(0.89 - 0) + abs(0.65 - 1) + abs(2.9 - 1)) / 6
    assert metrics.calibration_error == pytest.approx(expected)


def test_columns_tell_what_the_whole_table_tells(drawn):
    logits_NC, labels_N = drawn
    probabilities_NC = logits_NC.softmax(dim=1)
    metrics = summarise(labels_N.numpy(), *judged(logits_NC, labels_N), [f"class {i}" for i in range(12)])
    options = {"num_classes": 12, "average": "micro"}
    assert metrics.accuracy == pytest.approx(tm.multiclass_accuracy(probabilities_NC, labels_N, **options).item())
    top5 = tm.multiclass_accuracy(probabilities_NC, labels_N, top_k=5, **options).item()
    assert metrics.accuracy + 0.1 < metrics.top5_accuracy == pytest.approx(top5)
    assert metrics.macro_f1 == pytest.approx(tm.multiclass_f1_score(probabilities_NC, labels_N, 12).item())
    table = tm.multiclass_calibration_error(probabilities_NC.double(), labels_N, 12, n_bins=15).item()
    assert metrics.calibration_error == pytest.approx(table, rel=1e-6)
    for name, function in (("precision", tm.multiclass_precision), ("recall", tm.multiclass_recall)):
        expected_C = function(probabilities_NC, labels_N, 12, average=None)
        assert [getattr(each, name) for each in metrics.per_class] == pytest.approx(expected_C.tolist(), rel=1e-6)
    assert metrics.error_rate == (logits_NC.argmax(dim=1) != labels_N).double().mean().item()


def test_calibration_is_its_formula(drawn):
    logits_NC, labels_N = drawn
    predicted_N, confidence_N, places_N = judged(logits_NC, labels_N)
    right_N = predicted_N == labels_N.numpy()
    expected = 0.0
    for low in np.arange(15) / 15:
        here_N = (confidence_N >= low) & (confidence_N < low + 1 / 15)
        if here_N.any():
            expected += here_N.mean() * abs(confidence_N[here_N].mean() - right_N[here_N].mean())
    metrics = summarise(labels_N.numpy(), predicted_N, confidence_N, places_N, ["x"] * 12)
    assert metrics.calibration_error == pytest.approx(expected, rel=1e-9)


def test_a_probability_rounded_past_one_is_no_logit():
    arguments = np.array([0, 1]), np.array([0, 0]), np.array([1.0 + 1e-7, 0.3]), np.array([0, 1])
    assert summarise(*arguments, ["a", "b"]).calibration_error == pytest.approx(0.15)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_summary_is_the_same_for_any_number_of_ranks(drawn, world):
    """The ranks' columns, each sample's row filled by one of them, add up to the columns of one rank."""
    logits_NC, labels_N = drawn
    table_N3 = np.zeros((700, 3))
    for rank in range(world):
        rows_N = np.arange(rank, 700, world)
        part_N3 = np.zeros((700, 3))
        part_N3[rows_N] = np.stack(judged(logits_NC[rows_N], labels_N[rows_N]), axis=1)
        table_N3 += part_N3
    classes = [f"class {i}" for i in range(12)]
    predicted_N, confidence_N, places_N = table_N3.T
    together = summarise(labels_N.numpy(), predicted_N.astype(int), confidence_N, places_N.astype(int), classes)
    assert together == summarise(labels_N.numpy(), *judged(logits_NC, labels_N), classes)


def test_places_count_what_comes_before_and_break_ties_as_argmax():
    scores_NC = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    labels_N = torch.tensor([0, 1, 0, 2, 2])
    assert places(scores_NC, labels_N).tolist() == [0, 2, 0, 2, 1]
    assert ((places(scores_NC, labels_N) == 0) == (scores_NC.argmax(dim=1) == labels_N)).all()
    assert places(torch.full((1, 3), torch.nan), torch.tensor([0])).tolist() == [2]


def test_the_summary_is_ready_for_json(drawn):
    logits_NC, labels_N = drawn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = summarise(labels_N.numpy(), *judged(logits_NC, labels_N), ["x"] * 12)
    text = json.dumps(asdict(metrics), allow_nan=False)
    assert json.loads(text)["per_class"][3]["images"] == int((labels_N == 3).sum())
