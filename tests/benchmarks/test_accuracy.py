"""Trainings that differ in nothing but interpolation; which is better, no test can say."""

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import ONE, AccuracyOptions, Made
from benchmarks.record import Figure
from pipelines import Loader, scan
from trainer import models


def test_a_chain_gives_the_batches_of_the_plan(lossless_set):
    """With the warp of the Loader itself in place of another way they would be its batches."""
    samples = scan(lossless_set).train
    loader = Loader(samples, size=32, global_batch=8, seed=3, augment=accuracy.UNLIT)
    made = Made(samples, accuracy._presized, 32, 3)
    statistics = models.Statistics(mean=(0.5,) * 3, std=(0.5,) * 3)
    chain = accuracy.Chain(loader, made, statistics, 2, 1)
    for epoch in range(2):
        ours, theirs = list(loader.epoch(epoch)), list(chain.epoch(epoch))
        assert len(ours) == len(theirs) == 6
        for one, other in zip(ours, theirs, strict=True):
            assert one.step == other.step
            assert torch.equal(one.ids_N, other.ids_N) and torch.equal(one.labels_N, other.labels_N)
            apart = (one.images_NCHW - other.images_NCHW).abs().mean() / 2
            assert apart < 0.05  # of the range: the same draws; another draw is three times as far


@pytest.mark.parametrize("read", accuracy.SERVERS.values(), ids=accuracy.SERVERS)
def test_servers_read_the_centred_square(lossless_set, read):
    pytest.importorskip("cv2")
    samples = scan(lossless_set).valid
    (batch,) = Loader(samples, size=48, global_batch=len(samples)).epoch(0)
    ours_NHWC = 127.5 * (batch.images_NCHW.permute(0, 2, 3, 1).numpy() + 1)
    for position in range(len(samples)):
        theirs_HWC = read(str(samples.root / samples.paths[position]), 48)
        assert np.abs(ours_NHWC[position] - theirs_HWC).mean() < 6  # of 255


def test_the_record_has_every_way_and_paired_differences(small_set):
    record = accuracy.main(AccuracyOptions(data=str(small_set), quick=True))
    cells = {(figure.row, figure.column): figure for figure in record.figures}
    assert cells[ONE, accuracy.ERROR].centre == "mean"
    for name in accuracy.OTHERS:
        worse = np.subtract(cells[name, accuracy.ERROR].samples, cells[ONE, accuracy.ERROR].samples)
        np.testing.assert_allclose(cells[name, accuracy.WORSE].samples, worse)
    served = [figure for figure in record.figures if figure.column.startswith(accuracy.SERVED)]
    assert len(served) == 3 * (len(accuracy.SERVERS) - len(record.skipped))
    for figure in served:
        name, server = figure.row.removeprefix("trained by "), figure.column.removeprefix(accuracy.SERVED)
        skew = np.subtract(figure.samples, cells[name, accuracy.ERROR].samples)  # one for each seed
        np.testing.assert_allclose(cells[figure.row, accuracy.SKEW + server].samples, skew)
    assert sum("told from one warp" in remark or "than one warp" in remark for remark in record.remarks) == 2


def test_the_verdict_is_the_intervals():
    def of(*samples):
        return accuracy.verdict(Figure(row="a chain", column=accuracy.WORSE, samples=list(samples), centre="mean"))

    assert of(2.0, 2.1, 1.9) == "By 3 seeds a chain is worse than one warp: the interval of the differences excludes 0."
    assert "is better" in of(-2.0, -2.1, -1.9)
    assert "cannot be told" in of(-2.0, 2.1, 0.1)
