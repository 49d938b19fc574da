"""What binds, and what helps: the words are those of the numbers. Which it is here, no test can say."""

import pytest

from benchmarks import bottleneck
from benchmarks.bottleneck import BOTH, COPY, MODEL, READING, STORAGE, WAITING, DoctorOptions
from pipelines.errors import UserError


def test_what_both_do_together_decides():
    speeds = {STORAGE: 9000.0, READING: 2300.0, MODEL: 46.0, BOTH: 45.0, WAITING: 0.2}
    assert bottleneck.verdict(speeds) == (
        MODEL,
        "Computing binds: 45 images/s, 46 on images that lie in memory, and it waits for images 0.2% of the time.",
    )
    # Each alone is as fast as the other; but they share the cores.
    bound, words = bottleneck.verdict(speeds | {MODEL: 100.0, READING: 110.0, BOTH: 52.0, WAITING: 45.0})
    assert bound == READING
    assert words.startswith(
        "Decoding binds: 52 images/s, 100 on images that lie in memory, and it waits for images 45.0%"
    )
    slow = speeds | {MODEL: 2800.0, BOTH: 300.0}
    assert bottleneck.verdict(slow | {STORAGE: 300.0})[1].startswith("The storage binds: 300")
    assert bottleneck.verdict(slow | {COPY: 100.0})[1].startswith("The copy to the GPU binds: 300")


def test_only_what_helped_is_advised():
    gains = {"--precision bf16": 0.8, "--batch 128": 1.2, "--threads 8": 1.1}
    assert bottleneck.advice(MODEL, gains).startswith("Try first: --batch 128 (1.20 times as fast here). Tried: ")
    words = bottleneck.advice(MODEL, {"--precision bf16": 1.04})
    assert words.startswith("None of these is faster by 5%: --precision bf16. What is left: more GPUs or cores")


def test_everything_is_measured_and_each_switch_tried(small_set):
    record = bottleneck.main(DoctorOptions(data=str(small_set), quick=True, threads=1))
    cells = {figure.row: figure for figure in record.figures}
    assert {STORAGE, READING, MODEL, BOTH, WAITING} <= set(cells)
    assert all(sample > 0 for name in (STORAGE, READING, MODEL, BOTH) for sample in cells[name].samples)
    assert 0 <= cells[WAITING].value <= 100
    gains = [figure.row for figure in record.figures if figure.column == bottleneck.GAIN]
    verdict, advice = record.remarks
    assert "binds" in verdict
    assert gains and all(name in advice for name in gains)


def test_where_decoding_binds_a_store_is_tried(small_set, monkeypatch):
    monkeypatch.setattr(bottleneck, "verdict", lambda speeds: (READING, "Decoding binds."))
    record = bottleneck.main(DoctorOptions(data=str(small_set), quick=True))
    gains = {figure.row: figure.value for figure in record.figures if figure.column == bottleneck.GAIN}
    assert set(gains) == {"--cache decoded, or onewarp pack --decoded", "onewarp pack --encoded --short-side 64"}
    assert all(gain > 0 for gain in gains.values())


def test_a_batch_larger_than_the_set_is_refused(small_set):
    with pytest.raises(UserError, match="--batch 64 gives 53 images too few steps to measure. Choose --batch 10 or"):
        bottleneck.main(DoctorOptions(data=str(small_set)))
