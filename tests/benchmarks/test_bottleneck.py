"""What binds, and what helps: the words are those of the numbers. Which it is here, no test can say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bottleneck, learning
from benchmarks.bottleneck import APART, BOTH, COPY, JOINED, MODEL, READING, STORAGE, WAITING, DoctorOptions
from pipelines import scan
from pipelines.errors import UserError
from trainer import journal


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
    assert bottleneck.verdict(slow | {COPY: 310.0})[1].startswith("The copy to the GPU binds: 300")


def test_what_is_slower_alone_than_both_together_does_not_bind_them():
    speeds = {STORAGE: 300.0, READING: 2000.0, MODEL: 3000.0, BOTH: 1500.0, WAITING: 50.0}
    bound, words = bottleneck.verdict(speeds)
    assert bound == READING
    assert words.endswith(" The first epoch, whose files are not cached yet, gets no more than 300 a second.")
    bound, words = bottleneck.verdict(speeds | {BOTH: 2950.0})
    assert bound == MODEL and words.endswith("no more than 300 a second.")
    assert "first epoch" not in bottleneck.verdict(speeds | {STORAGE: 1600.0})[1]


def test_the_all_reduce_is_what_lies_between_side_by_side_and_together():
    share, words = bottleneck.exchange(8, 1000.0, 750.0)
    assert share == pytest.approx(0.25)
    assert words == "On 8 workers the all-reduce takes 25.0% of a step: 750 images/s, 1,000 without it."
    assert bottleneck.exchange(2, 100.0, 101.0)[0] == 0


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
    verdict, reduced, advice = record.remarks
    assert "binds" in verdict and "On 2 workers the all-reduce takes" in reduced
    assert all(cells[name].value > 0 for name in (APART, JOINED))
    assert gains and all(name in advice for name in gains)


def test_where_decoding_binds_a_store_is_tried(small_set, monkeypatch):
    monkeypatch.setattr(bottleneck, "verdict", lambda speeds: (READING, "Decoding binds."))
    record = bottleneck.main(DoctorOptions(data=str(small_set), quick=True))
    gains = {figure.row: figure.value for figure in record.figures if figure.column == bottleneck.GAIN}
    assert {name for name in gains if "workers" not in name} == {
        "--cache decoded, or onewarp pack --decoded",
        "onewarp pack --encoded --short-side 64",
    }
    assert all(gain > 0 for gain in gains.values())


def test_an_all_reduce_that_takes_its_time_has_its_switches_tried(small_set, monkeypatch):
    monkeypatch.setattr(bottleneck, "exchange", lambda workers, apart, joined: (0.5, "It takes half of it."))
    record = bottleneck.main(DoctorOptions(data=str(small_set), quick=True))
    gains = {figure.row: figure.value for figure in record.figures if figure.column == bottleneck.GAIN}
    assert {"--grad-compression fp16, on 2 workers", "--batch 16, on 2 workers"} <= set(gains)
    assert all(gain > 0 for gain in gains.values())


def test_two_trainings_each_compute_with_their_own_threads(small_set, tmp_path, monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append(torch.get_num_threads())
        yield from ()

    monkeypatch.setattr(learning, "train_epoch", note)
    monkeypatch.setattr(learning, "read", lambda _: [])
    setting = learning.Setting(samples=scan(small_set).train, model="test_efficientnet", size=32, batch=8, threads=1)
    one = learning.Training(setting, tmp_path / "one")
    two = learning.Training(replace(setting, threads=2), tmp_path / "two")
    for training in (one, two, one):
        training.run(loaded=False, steps=1)
    assert seen == [1, 2, 1]


def test_a_turn_has_the_steps_it_is_asked_for_and_not_its_first_ones(small_set, tmp_path):
    setting = learning.Setting(samples=scan(small_set).train, model="test_efficientnet", size=32, batch=8)
    training = learning.Training(setting, tmp_path)
    for loaded in (False, True):
        took = training.run(loaded=loaded, steps=5)  # 53 images are six batches: the set is repeated
        assert took.steps == 5
        assert 0 <= took.waited < took.seconds
    told = [len(journal.read(tmp_path / f"{epoch}.jsonl")) for epoch in (0, 1)]
    assert told == [learning.FIRST + 5] * 2


def test_a_batch_larger_than_the_set_is_refused(small_set):
    with pytest.raises(UserError, match="--batch 64 is more than the 53 images for training"):
        bottleneck.main(DoctorOptions(data=str(small_set)))
