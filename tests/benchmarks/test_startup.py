"""Start-up: both ways run, and their moments come in the order in which things happen."""

import pytest

from benchmarks import startup
from benchmarks.startup import RAY, TORCHRUN, Started


def test_quick_starts_by_ray_and_by_torchrun(small_set):
    record = startup.main(startup.StartupOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure for figure in record.figures}
    for name in (RAY, TORCHRUN):
        at = {moment: cells[f"{words}, s", name].value for moment, words in startup.MOMENTS.items()}
        assert 0 < at["process"] < at["met"] < at["imported"] < at["ready"] < at["first"] < at["finished"] < at["end"]
        assert at["prepared"] < at["ready"]
        assert 0 < cells[startup.STEP, name].value < at["end"]


def test_ratios_are_of_pairs():
    def started(first, step):
        return Started(moments=dict.fromkeys(startup.MOMENTS, first), step=step)

    found = {RAY: [started(30.0, 1.0), started(20.0, 2.0)], TORCHRUN: [started(10.0, 2.0), started(20.0, 2.0)]}
    cells = {(figure.row, figure.column): figure.samples for figure in startup.figures(found)}
    assert cells[f"{startup.MOMENTS['first']}, s", startup.RATIO] == [3.0, 1.0]
    assert cells[startup.STEP, startup.RATIO] == pytest.approx([0.5, 1.0])
