"""`onewarp pack` as a person types it."""

import os
import signal

import pytest

from cluster.pack import _termination_interrupts
from pipelines.store import Store


@pytest.mark.parametrize("words", [["--encoded"], ["--decoded", "--short-side", "64"]])
def test_it_packs_and_says_how_to_train(onewarp, small_set, tmp_path, words):
    told = onewarp("pack", str(small_set), "out", *words)
    assert told.returncode == 0, told.stderr
    assert "packed    76 images" in told.stdout
    assert "onewarp train --data out" in told.stdout
    store = Store.open(tmp_path / "out")
    assert (store.kind, len(store), len(store.manifest.train)) == (words[0].strip("-"), 76, 53)
    assert store.manifest.heights_N.min() == (64 if "--short-side" in words else 96)
    again = onewarp("pack", str(small_set), "out", *words)
    assert again.returncode == 0
    assert "packed    before: out holds just these images" in again.stdout


def test_bad_files_are_named(onewarp, tmp_path, small_set):
    root = tmp_path / "images"
    for part in ("train", "valid"):
        (root / part).mkdir(parents=True)
        for name in ("class0", "class1"):
            (root / part / name).symlink_to(small_set / part / name)
    for i in range(7):
        (root / "train" / f"class0.{i}").mkdir()
        (root / "train" / f"class0.{i}" / "bad\n.jpg").touch()
    told = onewarp("pack", "images", "out", "--encoded")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("the file is empty") == 5
    assert r"left out  'train/class0.0/bad\n.jpg': the file is empty" in told.stdout
    assert "and 2 more files" in told.stdout
    assert len(Store.open(tmp_path / "out").manifest.quarantine) == 7


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "--decoded and --encoded are both missing"),
        (["--decoded", "--encoded"], "exclude each other"),
        (["--decoded", "--quality", "80"], "--quality 80"),
        (["--encoded", "--quality", "80"], "--quality 80"),
        (["--encoded", "--short-side", "0"], "short_side is 0"),
        (["--encoded", "--label-regex", "x"], "has no group"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(onewarp, small_set, tmp_path, words, answer):
    told = onewarp("pack", str(small_set), "out", *words)
    assert told.returncode == 2
    assert answer in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert len(told.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_said_before_the_scan(onewarp, tmp_path):
    (tmp_path / "out").mkdir()
    told = onewarp("pack", "/nowhere", "out", "--encoded")
    assert told.returncode == 2
    assert "exists and is no store" in told.stderr


def test_being_ended_is_an_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _termination_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
