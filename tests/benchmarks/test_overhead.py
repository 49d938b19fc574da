"""The trainer beside a bare loop: the comparison is of the same learning, and its figures are what was measured."""

from functools import partial

import numpy as np
import pytest

from benchmarks import overhead
from benchmarks.spawned import on_ranks
from pipelines import scan
from pipelines.errors import UserError
from trainer import weights

OPTIONS = overhead.OverheadOptions(
    model="test_efficientnet", head="plain", size=32, batch=8, pairs=2, steps=2, threads=1
)


@pytest.mark.parametrize("world", [1, 2])
def test_both_loops_learn_the_same(small_set, world):
    turns = on_ranks(world, 1, partial(overhead.take_turns, OPTIONS, scan(small_set).train))
    assert turns.apart < 1e-3  # of the way from the first weights; `plain` has no dropout, which they draw differently
    assert len(turns.ours) == len(turns.bare) == 2
    assert len(turns.tuned) == (2 if world > 1 else 0)
    assert all(value > 0 for pair in (*turns.ours, *turns.bare, *turns.tuned) for value in pair)


def test_the_record_has_every_figure_and_its_ratios(small_set):
    record = overhead.main(overhead.OverheadOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure for figure in record.figures}
    alone, together = "1 rank, 1 thread", "2 ranks, 1 thread each"
    for row in (alone, together):
        for other, column in ((overhead.BARE, overhead.RATIO), (overhead.TUNED, overhead.TUNED_RATIO)):
            if (row, other) == (alone, overhead.TUNED):
                assert (row, column) not in cells
                continue
            ratios = np.divide(cells[row, overhead.OURS].samples, cells[row, other].samples)
            np.testing.assert_allclose(cells[row, column].samples, ratios)
        costs = [f.value for (name, column), f in cells.items() if column == overhead.COST and name.startswith(row)]
        assert len(costs) == 6 and costs[-1] == pytest.approx(sum(costs[:-1]))
    reduce = "the sum of the loss over all ranks"
    assert cells[f"{together}: {reduce}", overhead.COST].value > cells[f"{alone}: {reduce}", overhead.COST].value
    for phase in ("the head alone", "everything"):
        row = f"real training, {phase}: waiting for data"
        assert 0 <= cells[row, overhead.SHARE].value < 100
        assert len(cells[row, overhead.STEP].samples) == 6 - 3


def test_waiting_is_of_all_the_time_of_the_steady_state():
    # 4 images a step: after three that fill the queue, 1 s with a wait of 0.5 and 3 s with none.
    speeds, shares = [1.0, 2.0, 2.0, 4.0, 4 / 3], [0.9, 0.8, 0.7, 0.5, 0.0]
    steps = [{"images_per_second": speed, "data_wait": share} for speed, share in zip(speeds, shares, strict=True)]
    seconds, share, first = overhead.waited(steps, 4)
    assert seconds == pytest.approx([1.0, 3.0])
    assert share == pytest.approx(0.5 / 4)
    assert first == pytest.approx(0.9 * 4)


def test_too_few_images_are_told_before_anything_is_measured(small_set):
    with pytest.raises(UserError, match="53 images are 2 batches of 20, too few.*--subset or a smaller --batch"):
        overhead.main(overhead.OverheadOptions(data=str(small_set), batch=20, subset=1.0))


def test_the_benchmark_starts_from_installed_weights():
    assert weights.packaged(overhead.OverheadOptions().model) is not None
