"""The model of a step, and that its record hangs together; how near it comes, no test can say."""

import statistics

import pytest

from benchmarks import scaling
from benchmarks.scaling import Ring


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_fit_finds_the_ring_that_the_times_are_of(ranks):
    ring = Ring(latency=30e-6, bandwidth=2e9)
    sizes = [2**10, 2**14, 2**20, 2**25]
    found = Ring.fit(sizes, [ring.seconds(size, ranks) for size in sizes], ranks)
    assert (found.latency, found.bandwidth) == pytest.approx((ring.latency, ring.bandwidth))


def test_a_ring_sends_all_but_its_own_part_twice():
    ring = Ring(latency=0.0, bandwidth=1e9)
    assert ring.seconds(8e9, 1) == 0
    assert ring.seconds(8e9, 2) == pytest.approx(8)
    assert ring.seconds(8e9, 8) == pytest.approx(14)  # 2 · 7/8 · 8 s
    assert Ring(latency=1.0, bandwidth=1e30).seconds(1, 4) == pytest.approx(6)


def test_on_gpus_the_backward_pass_hides_all_but_the_last_bucket():
    size = 100 * 2**20
    inner = Ring(latency=scaling.NVLINK_LATENCY, bandwidth=scaling.REACHED * scaling.NVLINK)
    assert scaling.on_gpus(8, compute=1.0, size=size) == pytest.approx(inner.seconds(scaling.LAST, 8))
    bare = scaling.on_gpus(64, compute=0.0, size=size)
    outer = Ring(latency=scaling.INFINIBAND_LATENCY, bandwidth=scaling.REACHED * scaling.INFINIBAND)
    parts = [scaling.LAST, size - scaling.LAST]
    assert bare == pytest.approx(sum(inner.seconds(part, 8) + outer.seconds(part / 8, 8) for part in parts))
    assert bare > scaling.on_gpus(64, compute=0.001, size=size) > scaling.on_gpus(64, compute=1.0, size=size)


def test_the_slower_of_computing_and_loading_is_what_a_step_takes():
    assert scaling.step(compute=3.0, loading=2.0, exposed=1.0) == 4
    assert scaling.step(compute=1.0, loading=2.0, exposed=1.0) == 3


def test_the_record_holds_the_model_against_what_was_measured(small_set):
    record = scaling.main(scaling.ScalingOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure for figure in record.figures}
    row = "2 ranks, 4 images each"
    measured, predicted = (cells[row, column].value for column in (scaling.STEP, scaling.PREDICTED))
    assert cells[row, scaling.ERROR].value == pytest.approx(predicted / measured)
    apart = cells[f"{row}, without a word", scaling.STEP]
    assert predicted > statistics.median(apart.samples) > 0  # and nothing that is loaded
    assert len(apart.samples) == 2
    alone = cells["1 rank, 8 images", scaling.STEP].value
    assert cells["strong scaling from 1 to 2 ranks", "of the ideal, %"].value == pytest.approx(50 * alone / measured)
    rates = [figure.value for figure in record.figures if figure.column == scaling.RATE]
    assert rates == sorted(rates) and len(rates) == 6
    shares = [figure.value for figure in record.figures if figure.column == scaling.EFFICIENCY]
    assert shares[0] == 100 and all(0 < share <= 100 for share in shares)
    assert any("PROJECTION" in remark for remark in record.remarks)
