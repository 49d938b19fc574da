"""The curves against torch's, and every rate and momentum of a training against those that fastai set."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.errors import UserError
from trainer.schedule import (
    FlatCosine,
    OneCycle,
    WarmupLinear,
    fine_tune,
    fit_flat_cos,
    fit_one_cycle,
    fit_warmup_linear,
    geometric,
    last_and_tenth,
    layerwise,
    rates,
    rates_in_words,
    read_rates,
    two_cosines,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/schedules.json").read_text())
RUN = {"groups": 3, "steps_per_epoch": 7}
TRAININGS = {
    "fine_tune(2)": fine_tune(base_lr=2e-3, epochs=2, freeze_epochs=1, **RUN),
    "fit_one_cycle(12, slice(1e-6, 1e-4))": fit_one_cycle(lr=slice(1e-6, 1e-4), epochs=12, **RUN),
    "fit_one_cycle(2, 3e-3)": fit_one_cycle(lr=3e-3, epochs=2, **RUN),
    "fit_flat_cos(4, slice(1e-3))": fit_flat_cos(lr=slice(1e-3), epochs=4, **RUN),
}


@pytest.mark.parametrize("training", TRAININGS)
# fastai finds the place in the cycle in float32; float64 is what it sets when it does that in double precision, too
@pytest.mark.parametrize(("kind", "tolerance"), [("float64", 1e-9), ("float32", 1e-8)])
def test_every_step_of_every_group_has_fastais_rate_and_momentum(training, kind, tolerance):
    assert (GOLDEN[kind]["groups"], GOLDEN[kind]["steps_per_epoch"]) == (RUN["groups"], RUN["steps_per_epoch"])
    theirs = GOLDEN[kind][training]
    ours = [phase.hyper(step) for phase in TRAININGS[training] for step in range(phase.epochs * 7)]
    assert len(ours) == len(theirs["lr"]) == len(theirs["momentum"])
    for (lrs, momentum), expected_lrs, expected_momentum in zip(ours, theirs["lr"], theirs["momentum"], strict=True):
        assert lrs == pytest.approx(expected_lrs, abs=tolerance * 1e-2, rel=1e-9 if kind == "float64" else 1e-5)
        assert momentum == pytest.approx(expected_momentum, abs=tolerance)


def torch_one_cycle(steps, max_lr, pct_start, div, div_final, beta1):
    """(lr, first beta) of Adam at each step, from torch itself."""
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=max_lr,
        total_steps=steps,
        pct_start=pct_start,
        div_factor=div,
        final_div_factor=div_final / div,  # torch counts it from the first rate, fastai and we from the peak
        base_momentum=beta1[1],
        max_momentum=beta1[0],
    )
    table = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        table.append((group["lr"], group["betas"][0]))
        optimizer.step()
        scheduler.step()
    return table


@pytest.mark.parametrize("steps", [2, 9, 100, 141])
@pytest.mark.parametrize(("pct_start", "div"), [(0.25, 25.0), (0.3, 5.0), (0.99, 25.0)])
def test_every_step_equals_torch(steps, pct_start, div):
    ours = OneCycle(steps=steps, max_lr=3e-3, pct_start=pct_start, div=div)
    # torch's last step is the end of the curve; ours, like fastai's, is one before it (see OneCycle)
    theirs = torch_one_cycle(steps + 1, 3e-3, (pct_start * steps + 1) / (steps + 1), div, 1e5, (0.95, 0.85))
    for step in range(steps):
        assert ours.lr(step) == pytest.approx(theirs[step][0], abs=1e-9, rel=1e-9)
        assert ours.momentum_at(step) == pytest.approx(theirs[step][1], abs=1e-9)


def test_the_curve_counted_as_torch_counts_equals_torch():
    theirs = torch_one_cycle(80, 1e-2, 0.3, 25.0, 1e4, (0.95, 0.85))
    for step in range(80):
        assert two_cosines(step, 0.3 * 80 - 1, 79, 4e-4, 1e-2, 1e-6) == pytest.approx(theirs[step][0], abs=1e-12)


def test_hand_written_table():
    cycle = OneCycle(steps=8, max_lr=1.0, pct_start=0.25, div=25, div_final=1e5)
    assert [cycle.lr(step) for step in (0, 1, 2)] == pytest.approx([0.04, 0.52, 1.0])
    assert cycle.lr(5) == pytest.approx((1 + 1e-5) / 2)
    assert cycle.lr(8) == pytest.approx(1e-5)
    assert [cycle.momentum_at(step) for step in (0, 2, 8)] == pytest.approx([0.95, 0.85, 0.95])


def test_fine_tune_has_fastais_phases():
    frozen, unfrozen = fine_tune(base_lr=2e-3, groups=3, steps_per_epoch=10, epochs=4, freeze_epochs=1)
    assert (frozen.name, frozen.epochs, frozen.first_epoch) == ("frozen", 1, 0)
    assert frozen.lrs == pytest.approx((2e-4, 2e-4, 2e-3))
    assert (frozen.cycle.pct_start, frozen.cycle.div, frozen.cycle.steps) == (0.99, 25.0, 10)
    assert (unfrozen.name, unfrozen.epochs, unfrozen.first_epoch) == ("unfrozen", 4, 1)
    assert unfrozen.lrs == pytest.approx((1e-5, 1e-4, 1e-3))
    assert (unfrozen.cycle.pct_start, unfrozen.cycle.div, unfrozen.cycle.steps) == (0.3, 5.0, 40)
    lrs, momentum = unfrozen.hyper(12)
    assert lrs == pytest.approx([1e-5, 1e-4, 1e-3])
    assert momentum == pytest.approx(0.85)


def test_rates_over_groups():
    assert geometric(1e-6, 1e-4, 3) == pytest.approx((1e-6, 1e-5, 1e-4))
    assert geometric(1e-6, 1e-4, 1) == (1e-4,)
    assert last_and_tenth(1e-2, 3) == pytest.approx((1e-3, 1e-3, 1e-2))


def test_rates_as_fastai_reads_them():
    assert rates(1e-3, 3) == (1e-3, 1e-3, 1e-3)
    assert rates(slice(1e-6, 1e-4), 3) == pytest.approx((1e-6, 1e-5, 1e-4))
    assert rates(slice(1e-2), 3) == pytest.approx((1e-3, 1e-3, 1e-2))
    assert rates(layerwise(8.0, 4, 0.5), 4) == (1.0, 2.0, 4.0, 8.0)


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (0.0, "greater than 0"),
        (slice(0.0, 1e-3), "greater than 0"),
        (slice(None), "greater than 0"),
        (float("nan"), "greater than 0"),
        ((1e-3, 1e-2), "The 2 learning rates .* must be 3"),
    ],
)
def test_rates_that_are_none_are_told(lr, words):
    with pytest.raises(UserError, match=words):
        rates(lr, 3)


@pytest.mark.parametrize(
    ("text", "lr", "words"),
    [
        ("1e-3", 1e-3, None),
        (2, 2.0, None),
        ("1e-6:1e-4", slice(1e-6, 1e-4), "1e-06:0.0001"),
        ("0.000001:.0001", slice(1e-6, 1e-4), "1e-06:0.0001"),
        (":1e-3", slice(1e-3), ":0.001"),
        ("1e-3:1e-3", slice(1e-3, 1e-3), "0.001:0.001"),
    ],
)
def test_rates_in_words(text, lr, words):
    assert read_rates(text) == lr
    if words is not None:
        assert rates_in_words(lr) == words
        assert read_rates(words) == lr


@pytest.mark.parametrize(
    "text", ["", ":", "1e-6:", "a", "1:2:3", ":1:2", "::1", "-1", "0", "0:1", "inf", "1:inf", "nan", "nan:1", "2:1"]
)
def test_words_that_are_no_rates(text):
    with pytest.raises(UserError, match="--lr is .*LOW:HIGH"):
        read_rates(text)


def test_warm_up_and_linear_decay_equal_torchs():
    steps, peak = 40, 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 25, total_iters=peak)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps - peak)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[peak])
    ours = WarmupLinear(steps=steps, max_lr=0.3, pct_start=0.1)
    for step in range(steps):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert ours.lr(steps) == 0.0
    (phase,) = fit_warmup_linear(lr=0.3, epochs=4, groups=2, steps_per_epoch=10)
    assert phase.hyper(peak) == ([0.3, 0.3], 0.9)


def test_the_flat_rate_ends_in_a_cosine():
    curve = FlatCosine(steps=8, max_lr=1.0)
    assert [curve.lr(step) for step in (0, 3, 6)] == [1.0, 1.0, 1.0]
    assert curve.lr(7) == pytest.approx((1 + 1e-5) / 2)
    assert curve.lr(8) == pytest.approx(1e-5)


def test_a_phase_knows_what_learns_and_in_which_ratios():
    frozen, unfrozen = fine_tune(base_lr=2e-3, groups=4, steps_per_epoch=1, epochs=1, freeze_epochs=1)
    assert (frozen.freeze_to, unfrozen.freeze_to) == (-1, 0)
    assert frozen.ratios == pytest.approx((0.1, 0.1, 0.1, 1.0))
    assert unfrozen.ratios == pytest.approx((0.01, 0.01 ** (2 / 3), 0.01 ** (1 / 3), 1.0))
    decayed = fine_tune(base_lr=2e-3, groups=4, steps_per_epoch=1, epochs=1, freeze_epochs=0, layer_decay=0.75)[0]
    assert decayed.lrs == pytest.approx([1e-3 * 0.75**depth for depth in (3, 2, 1, 0)])
    (second,) = fit_one_cycle(lr=1e-3, epochs=1, groups=4, steps_per_epoch=1, freeze_to=2)
    assert (second.name, second.freeze_to) == ("frozen", 2)
