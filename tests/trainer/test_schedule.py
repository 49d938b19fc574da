"""The one-cycle policy against torch's, and fine-tuning against fastai's numbers."""

import pytest
import torch

from trainer.schedule import OneCycle, fine_tune, geometric, last_and_tenth, two_cosines


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
