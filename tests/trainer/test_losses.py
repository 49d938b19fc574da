"""Losses against their papers' formulas in float64, against torch, and against their own slopes."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from trainer.apply import best
from trainer.losses import CrossEntropy, Focal, OneVsRest, class_weights
from trainer.predictions import NONE, decide

N, C = 12, 5
LOSSES = [CrossEntropy(), Focal(), OneVsRest()]


def decided(probabilities_NC, threshold=0.0):
    return decide(*(part.numpy() for part in best(probabilities_NC)), threshold)


@pytest.fixture
def drawn():
    rng = np.random.default_rng(3)
    logits_NC, labels_N = 3 * rng.normal(size=(N, C)), rng.integers(0, C, N)
    shares_NC, weights_C = rng.dirichlet(np.ones(C), N), rng.uniform(0.2, 3, C)
    return logits_NC, labels_N, shares_NC, weights_C


def formula(loss, logits_NC):
    """The loss of each sample if it were of each class, [N, C], as the papers write it."""
    p_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    yes_NC = 1 / (1 + np.exp(-logits_NC))
    if isinstance(loss, CrossEntropy):
        return -np.log(p_NC)
    if isinstance(loss, Focal):
        return -((1 - p_NC) ** loss.gamma) * np.log(p_NC)
    no_N1 = -np.log(1 - yes_NC).sum(axis=1, keepdims=True)
    return no_N1 + np.log(1 - yes_NC) - np.log(yes_NC)


@pytest.mark.parametrize("loss", [*LOSSES, Focal(gamma=0.5), Focal(gamma=5.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_a_loss_is_its_formula_with_the_targets_as_weights(drawn, loss, smoothing, weighted, soft):
    logits_NC, labels_N, shares_NC, weights_C = drawn
    loss = dataclasses.replace(loss, smoothing=smoothing, weights_C=torch.tensor(weights_C) if weighted else None)
    targets_NC = shares_NC if soft else np.eye(C)[labels_N]
    smooth_NC = (1 - smoothing) * targets_NC + smoothing / C  # Szegedy et al., 2016
    expected_N = (smooth_NC * (weights_C if weighted else 1) * formula(loss, logits_NC)).sum(axis=1)
    targets = torch.tensor(shares_NC if soft else labels_N)
    assert loss.each(torch.tensor(logits_NC), targets).numpy() == pytest.approx(expected_N, rel=1e-12)
    assert loss.total(torch.tensor(logits_NC), targets).item() == pytest.approx(expected_N.sum(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_mixture_is_the_mixture_of_the_losses(drawn, loss):
    logits_NC, labels_N, _, weights_C = map(torch.tensor, drawn)
    loss = dataclasses.replace(loss, weights_C=weights_C)
    others_N = labels_N.roll(1)
    one_NC, other_NC = torch.eye(C).double()[labels_N], torch.eye(C).double()[others_N]
    apart_N = 0.3 * loss.each(logits_NC, labels_N) + 0.7 * loss.each(logits_NC, others_N)
    assert torch.allclose(loss.each(logits_NC, 0.3 * one_NC + 0.7 * other_NC), apart_N, rtol=1e-12)


def test_the_plain_loss_is_torchs_to_the_bit():
    logits_NC, labels_N = torch.randn(64, 37), torch.randint(0, 37, (64,))
    assert CrossEntropy().total(logits_NC, labels_N).equal(cross_entropy(logits_NC, labels_N, reduction="sum"))
    assert CrossEntropy().each(logits_NC, labels_N).equal(cross_entropy(logits_NC, labels_N, reduction="none"))


def test_focal_without_focus_is_cross_entropy(drawn):
    logits_NC, labels_N, *_ = map(torch.tensor, drawn)
    expected_N = cross_entropy(logits_NC, labels_N, reduction="none")
    assert torch.allclose(Focal(gamma=0.0).each(logits_NC, labels_N), expected_N, rtol=1e-12)


@pytest.mark.parametrize("loss", [Focal(gamma=0.5), Focal(gamma=2.0), OneVsRest()])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_finite_differences(drawn, loss, weighted):
    logits_NC, _, shares_NC, weights_C = map(torch.tensor, drawn)
    loss = dataclasses.replace(loss, smoothing=0.1, weights_C=weights_C if weighted else None)
    assert torch.autograd.gradcheck(lambda x_NC: loss.each(x_NC, shares_NC), logits_NC.requires_grad_())


@pytest.mark.parametrize("loss", [*LOSSES, Focal(gamma=0.5), Focal(gamma=0.0), OneVsRest(weights_C=torch.ones(3))])
@pytest.mark.parametrize("size", [60.0, 2e4])
def test_logits_that_are_certain_leave_loss_and_gradient_finite(loss, size):
    logits_NC = torch.tensor([[size, 0.0, -size]] * 3, requires_grad=True)
    total = loss.total(logits_NC, torch.tensor([0, 1, 2]))
    total.backward()
    assert total.item() > size
    assert torch.isfinite(logits_NC.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("world", [2, 3, 5])
def test_weighted_losses_and_gradients_are_those_of_one_rank(drawn, loss, world):
    logits_NC, labels_N, _, weights_C = map(torch.tensor, drawn)
    loss = dataclasses.replace(loss, weights_C=weights_C, smoothing=0.1)

    def part(rank, world):
        """The loss and the gradient of a linear model, as the training step of a rank computes them."""
        matrix_CC = torch.eye(C, dtype=torch.float64, requires_grad=True)
        own = slice(N * rank // world, N * (rank + 1) // world)
        loss_sum = loss.total(logits_NC[own] @ matrix_CC, labels_N[own])
        (loss_sum * (world / N)).backward()
        return loss_sum.item() / N, matrix_CC.grad

    total, grad_CC = part(0, 1)
    totals, grads = zip(*(part(rank, world) for rank in range(world)), strict=True)
    assert sum(totals) == pytest.approx(total, rel=1e-12)
    assert torch.allclose(torch.stack(grads).mean(dim=0), grad_CC, rtol=1e-10)  # the mean over ranks is DDP's
    assert grad_CC.abs().max() > 0.1


@pytest.mark.parametrize(("kind", "beta"), [("inverse", 0.999), ("effective", 0.9), ("effective", 0.9999)])
def test_class_weights_are_their_formula_and_leave_the_scale(kind, beta):
    counts_C = np.array([1000, 0, 1, 70, 7])
    labels_N = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts_C))
    weights_C = class_weights(labels_N, 5, kind, beta)
    there = [0, 2, 3, 4]
    n_C = counts_C[there]
    expected_C = 1 / n_C if kind == "inverse" else (1 - beta) / (1 - beta**n_C)  # Cui et al., 2019, eq. 4
    assert weights_C[there] / weights_C[0] == pytest.approx(expected_C / expected_C[0], rel=1e-9)
    assert weights_C[labels_N].mean() == pytest.approx(1.0, rel=1e-12)
    assert weights_C[1] == 1.0
    if kind == "inverse":  # all classes weigh the same
        assert np.ptp(weights_C[there] * n_C) == pytest.approx(0.0, abs=1e-9)


def test_one_against_the_rest_can_say_none_of_these():
    logits_NC = torch.tensor([[-3.0, -2.0, -4.0], [-3.0, 1.0, 2.0], [-1.0, 0.0, -1.0], [30.0, 35.0, 25.0]])
    probabilities_NC = OneVsRest().probabilities(logits_NC)
    assert probabilities_NC.numpy() == pytest.approx(1 / (1 + np.exp(-logits_NC.double().numpy())), rel=1e-12)
    assert decided(probabilities_NC, 0.5).tolist() == [NONE, 2, 1, 1]
    assert decided(probabilities_NC, 0.6).tolist() == [NONE, 2, NONE, 1]
    assert decided(probabilities_NC).tolist() == [1, 2, 1, 1]


def test_a_model_learns_to_decline_what_it_was_never_shown():
    rng = np.random.default_rng(0)
    centres_32 = np.array([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0]])
    labels_N = torch.tensor(rng.integers(0, 3, 300))
    points_N2 = torch.tensor(centres_32[labels_N] + rng.normal(size=(300, 2)))
    # Bumps around the classes: far away all features vanish, and only the biases speak.
    features = lambda x_N2: torch.exp(-(torch.cdist(x_N2, torch.tensor(centres_32)) ** 2) / 4)
    layer = torch.nn.Linear(3, 3).double()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (OneVsRest().total(layer(features(points_N2)), labels_N) / 300).backward()
        optimizer.step()
    with torch.no_grad():
        known_N = decided(OneVsRest().probabilities(layer(features(points_N2))), 0.5)
        strange_N = decided(OneVsRest().probabilities(layer(features(points_N2 + 40))), 0.5)
    assert (known_N == labels_N.numpy()).mean() > 0.9
    assert (strange_N == NONE).all()
