"""A run whose storage fills up: it waits for room, or says in the end what was lost, and goes on when there is some."""

import threading
import time
from contextlib import contextmanager, suppress

import pytest

from benchmarks.faults import equal
from tests.commands import begun, events, onewarp, wait_for, weights
from tests.full_disk import small_disk

EPOCHS = 60
STEPS = 53 // 8 * EPOCHS
SETTINGS = ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "48", "--batch", "8"]
SETTINGS += ["--epochs", str(EPOCHS), "--freeze-epochs", "0", "--lr", "1e-3", "--wandb", "off", "--workers", "0"]
SETTINGS += ["--checkpoint-every", "4", "--name", "run"]


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    with small_disk(place, 24):
        yield place


@contextmanager
def full(disk):
    """No byte is free there, even where something is deleted."""
    filler, done = disk / "filler", threading.Event()

    def fill():
        with filler.open("wb", buffering=0) as file:
            while not done.wait(0.002):
                with suppress(OSError):
                    while True:
                        file.write(bytes(2**16))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        filler.unlink()


def steps(run):
    return [event["step"] for event in events(run, "step")]


def test_a_disk_that_fills_up_costs_nothing(small_set, tmp_path, temporary, disk):
    words = ["--data", small_set, *SETTINGS]
    calm = onewarp(tmp_path, temporary, "train", *words)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    run = disk / "run"
    with begun(tmp_path, temporary, "train", *words, "--runs", disk) as process:
        wait_for(lambda: len(steps(run)) > 20, process)
        with full(disk):
            time.sleep(2)
            assert process.poll() is None
        told = process.communicate()[0]
    assert process.returncode == 0, told
    assert "takes no checkpoint" in told and "training goes on" in told
    assert steps(run) == list(range(STEPS))
    assert equal(weights(run), weights(tmp_path / "runs/run"))


def test_a_disk_that_stays_full_is_told_and_the_run_goes_on_later(small_set, tmp_path, temporary, disk):
    words = ["--data", small_set, *SETTINGS, "--runs", disk]
    run = disk / "run"
    with begun(tmp_path, temporary, "train", *words) as process:
        wait_for(lambda: len(steps(run)) > 20, process)
        with full(disk):
            told = process.communicate()[0]
    assert process.returncode == 2, told
    assert "Make room, and go on with the same command" in " ".join(told.split())
    assert "Traceback" not in told
    again = onewarp(tmp_path, temporary, "train", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert sorted(set(steps(run))) == list(range(STEPS))
