"""The model of a step, and that its record hangs together; how near it comes, no test can say."""

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


def test_on_a_gpu_loading_hides_behind_computing_and_on_a_cpu_it_does_not():
    assert scaling.step(compute=3.0, loading=2.0, exposed=1.0, shared=False) == 4
    assert scaling.step(compute=1.0, loading=2.0, exposed=1.0, shared=False) == 3
    assert scaling.step(compute=1.0, loading=2.0, exposed=1.0, shared=True) == 4


def test_a_projection_is_bound_by_what_its_cores_read():
    options = scaling.ScalingOptions(gpu_speed=1000.0, gpu_batch=100, gpu_cores=4)
    cells = {(f.row, f.column): f.value for f in scaling.projected(options, {"JPEGs": 100.0, "a store": 500.0})}
    assert cells["projection: 1 H100, JPEGs", scaling.RATE] == pytest.approx(400)
    assert cells["projection: 1 H100, a store", scaling.RATE] == pytest.approx(1000)
    assert cells["projection: feeding one H100, JPEGs", scaling.CORES] == pytest.approx(10)
    shares = [cells[f"projection: {n} H100s, a store", scaling.EFFICIENCY] for n in ("8", "64", "512", "1,024")]
    assert 100 > shares[0] > shares[1] > shares[2] > shares[3] > 0


def test_the_record_holds_the_model_against_what_was_measured(small_set):
    record = scaling.main(scaling.ScalingOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure for figure in record.figures}
    for row in ("2 ranks, 8 images each", "2 ranks, 2 images each", "2 ranks, 8 images each, read meanwhile"):
        measured, predicted, compute = (
            cells[row, column].value for column in (scaling.MEASURED, scaling.PREDICTED, scaling.COMPUTE)
        )
        assert cells[row, scaling.ERROR].value == pytest.approx(predicted / measured)
        assert cells[row, scaling.NULL].value == pytest.approx(compute / measured)
        assert predicted > compute > 0
    plain, loaded = "2 ranks, 8 images each", "2 ranks, 8 images each, read meanwhile"
    read = cells[f"{loaded}: the loaders alone", scaling.MEASURED].value
    difference = cells[loaded, scaling.PREDICTED].value - cells[plain, scaling.PREDICTED].value
    assert difference == pytest.approx(read) and read > 0
    measured = cells[plain, scaling.MEASURED].value
    for name, row, ideal in (("strong", "1 rank, 16 images", 2), ("weak", "1 rank, 8 images", 1)):
        expected = 100 * cells[row, scaling.MEASURED].value / (ideal * measured)
        assert cells[f"{name} scaling from 1 to 2 ranks", scaling.IDEAL].value == pytest.approx(expected)
    rates = [figure.value for figure in record.figures if figure.column == scaling.RATE]
    assert len(rates) == 10 and rates[:5] == sorted(rates[:5])
    assert any("PROJECTION" in remark for remark in record.remarks)
