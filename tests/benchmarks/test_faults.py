"""The benchmark of kills, where it can be short: no cluster, and one kill while a checkpoint is written."""

import os

import pytest

from benchmarks import faults
from benchmarks.faults import FaultOptions, Outcome, cells, whole


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_a_kill_in_the_writing_of_a_checkpoint_costs_no_bit(small_set):
    record = faults.main(FaultOptions(data=str(small_set), quick=True, kills=0, stops=0))
    found = {figure.column: figure.samples for figure in record.figures}
    assert found == {faults.COUNT: [1.0], faults.SAME: [1.0]}


@pytest.mark.parametrize(
    ("losses", "good"),
    [
        ([(0, 1.0), (1, 0.5), (1, 0.5), (2, 0.3), (3, 0.2)], True),
        ([(0, 1.0), (1, 0.5), (1, 0.4), (2, 0.3), (3, 0.2)], False),  # one differs when it is done again
        ([(0, 1.0), (1, 0.5), (3, 0.2)], False),  # one is missing
        ([(0, 1.0), (1, 0.5), (2, 0.3), (3, 0.2), (4, 0.1)], False),  # one is no part of the plan
    ],
)
def test_a_run_is_whole_with_each_step_and_one_loss_of_it(losses, good):
    assert whole([{"step": step, "loss": loss} for step, loss in losses], 4) == good


def test_the_worst_of_kills_is_told():
    found = {
        figure.column: figure.samples for figure in cells("a worker", Outcome([3.0, 9.0], [11.0, 10.0], same=True))
    }
    assert found[faults.LOST] == [9.0] and found[faults.SLOWEST] == [11.0] and found[faults.COUNT] == [2.0]
