"""A whole job on two real Ray workers, and what it leaves behind."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks.processes import left_running
from tests.commands import events, onewarp

SETTINGS = ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "48", "--batch", "8"]
SETTINGS += ["--epochs", "1", "--lr", "1e-3", "--wandb", "off"]


def train(data, folder, temporary, *words, settings=SETTINGS):
    return onewarp(folder, temporary, "train", "--data", data, *settings, *words)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_two_workers_train_and_agree_with_one(small_set, tmp_path, temporary):
    two = train(small_set, tmp_path, temporary, "--name", "two", "--workers", "2")
    assert two.returncode == 0, two.stdout + two.stderr
    assert left_running(temporary) == {}
    assert list(temporary.iterdir()) == []
    assert "error rate" in two.stdout
    assert "go on with  onewarp train" in two.stdout
    zero = train(small_set, tmp_path, temporary, "--name", "zero", "--workers", "0")
    assert zero.returncode == 0, zero.stdout + zero.stderr
    assert [event["world_size"] for event in events(tmp_path / "runs/two", "run")] == [2]
    losses = {name: [event["loss"] for event in events(tmp_path / "runs" / name, "step")] for name in ("two", "zero")}
    assert len(losses["two"]) == 12
    assert losses["two"] == pytest.approx(losses["zero"], rel=1e-4)

    # The run is applied by two workers as by one, its images read once each.
    tables = []
    for workers in ("2", "0"):
        out = tmp_path / f"{workers}.parquet"
        words = ["--tta", "1", "--workers", workers, "--out", out]
        told = onewarp(tmp_path, temporary, "predict", "runs/two", small_set, *words)
        assert told.returncode == 0, told.stdout + told.stderr
        assert "images    76\n" in told.stdout
        tables.append(pq.read_table(out).to_pydict())
    assert len(set(tables[0]["path"])) == 76
    for name, column in tables[0].items():
        other = tables[1][name]
        assert column == (pytest.approx(other, abs=1e-6, rel=0) if name.startswith("probability") else other)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_a_mistake_met_by_a_worker_is_told_in_words(small_set, tmp_path, temporary):
    settings = [*SETTINGS, "--weight-decay", "0"]
    settings[settings.index("1e-3")] = "1e30"
    long = temporary / ("long" * 10)  # too long for Ray's sockets, which then lie elsewhere
    long.mkdir()
    told = train(small_set, tmp_path, long, "--name", "bad", "--workers", "2", settings=settings)
    assert told.returncode == 2, told.stdout + told.stderr
    assert "Lower --lr" in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert left_running(long) == {}
    assert list(long.iterdir()) == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")
def test_workers_that_have_started_end_with_what_prepares_their_run(small_set, tmp_path, temporary):
    told = train(small_set, tmp_path, temporary, "--workers", "2", "--subset", "0.1")
    assert told.returncode == 2, told.stdout + told.stderr
    assert "--batch 8 is larger than the 6 training images of --subset 0.1" in told.stderr
    assert left_running(temporary) == {}
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "runs").exists()


HANDLED = """
import os, signal, threading, time
from cluster import engine

caught, up, leave = [], threading.Event(), threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: caught.append(number))

def run():
    with engine.local(1):
        up.set()
        leave.wait()

thread = threading.Thread(target=run)
thread.start()
up.wait()
for number in (signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
time.sleep(0.5)
leave.set()
thread.join()
print(*map(int, caught))
"""


def test_signals_reach_their_handlers_though_ray_has_its_own_beside_them(temporary):
    told = subprocess.run(
        [sys.executable, "-c", HANDLED],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        check=False,
    )
    assert told.stdout == "15 2\n", told.stdout + told.stderr
