"""End to end: the command is run as a process, its outcome is its journal's, and pairs are of one seed."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import photographs
from benchmarks.photographs import CHANNELS_LAST, FASTAI, OURS, PhotographOptions, Run
from pipelines import scan
from pipelines.errors import UserError


def test_quick_trains_ours_and_fastai_or_names_it(small_set):
    record = photographs.main(PhotographOptions(data=str(small_set), quick=True, channels_last=True))
    cells = {(figure.row, figure.column): figure.samples for figure in record.figures}
    there = find_spec("fastai") is not None
    assert set(record.skipped) == (set() if there else {FASTAI, CHANNELS_LAST})
    for way in (OURS, FASTAI, CHANNELS_LAST) if there else (OURS,):
        (error,), (wall,), (rate,) = (
            cells[way, column] for column in (photographs.ERROR, photographs.WALL, photographs.RATE)
        )
        assert 20 * error == pytest.approx(round(20 * error), abs=1e-4)  # of 20 images
        assert 0 <= error < 1
        (search,), (training,) = cells[way, photographs.RANGE_TEST], cells[way, photographs.TRAINING]
        assert 0 < search < wall and 0 < training < wall and search + training < wall
        assert 1e-7 < rate < 10
    assert "47 images to train on and 20 to validate on" in record.markdown()


def test_pairs_are_of_one_seed():
    def run(error, wall):
        return Run(error=error, wall=wall, lr=1e-3, lr_find_seconds=1, train_seconds=2, train=5, valid=4)

    runs = {OURS: [run(0.1, 10.0), run(0.3, 30.0)], FASTAI: [run(0.2, 40.0), run(0.25, 60.0)]}
    cells = {(figure.row, figure.column): figure for figure in photographs.figures(runs)}
    assert cells[FASTAI, photographs.WALL_RATIO].samples == [0.25, 0.5]
    assert cells[FASTAI, photographs.ERROR_DIFFERENCE].samples == pytest.approx([-0.1, 0.05])
    assert cells[FASTAI, photographs.ERROR_DIFFERENCE].value == pytest.approx(-0.025)  # of the means
    assert cells[OURS, photographs.ERROR].value == pytest.approx(0.2)
    assert (OURS, photographs.WALL_RATIO) not in cells


def test_the_outcome_of_ours_is_its_journals():
    events = [
        {"event": "run", "time": 5.0, "train": 50, "valid": 20},
        {"event": "phase", "time": 10.0},
        {"event": "range_result", "time": 13.0, "chosen": 2e-3},
        {"event": "phase", "time": 14.0},
        {"event": "checkpoint", "time": 20.0},
        {"event": "phase", "time": 21.0},
        {"event": "checkpoint", "time": 34.5},
        {"event": "finished", "time": 36.0, "error_rate": 0.15},
    ]
    run = photographs._of_journal(events)
    assert (run.error, run.lr, run.lr_find_seconds, run.train_seconds) == (0.15, 2e-3, 3.0, 20.5)
    assert (run.train, run.valid) == (50, 20)
    assert math.isnan(run.wall)


def test_a_share_of_each_class_is_copied_evenly(small_set, tmp_path):
    copy = photographs.reduced(small_set, 0.5, tmp_path / "copy")
    for part, whole in (("train", 53), ("valid", 23)):
        names = sorted(file.relative_to(copy) for file in (copy / part).rglob("*.jpg"))
        assert len(names) == pytest.approx(whole / 2, abs=2)
        assert {name.parts[1] for name in names} == {"class0", "class1", "class2"}
        assert all((copy / name).read_bytes() == (small_set / name).read_bytes() for name in names)
    numbers = [int(file.stem) for file in sorted((copy / "train" / "class0").iterdir())]
    assert numbers == [0, 6, 12, 18, 24, 30, 36, 42, 48]


def test_a_set_of_any_layout_is_laid_out_in_folders(small_set, tmp_path):
    manifest = scan(small_set / "train", valid_fraction=0.3)
    copy = photographs.laid_out(manifest, tmp_path / "copy")
    found = scan(copy)
    assert found.classes == manifest.classes
    for part, whole in ((found.train, manifest.train), (found.valid, manifest.valid)):
        ours, theirs = (sorted(zip((Path(p).name for p in x.paths), x.labels_N, strict=True)) for x in (part, whole))
        assert ours == theirs


def test_a_folder_without_a_split_is_told(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="validation/"):
        photographs.reduced(tmp_path, 0.5, tmp_path / "copy")


def test_a_training_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="there is no such thing"):
        photographs.finished(["-c", "raise SystemExit('there is no such thing')"], tmp_path)
