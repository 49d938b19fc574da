"""A run on a Ray cluster whose nodes come and go: as many workers as there is room for, and every batch once."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import safetensors.torch
from PIL import Image

from benchmarks.nodes import RAY, nodes
from benchmarks.processes import MARK, left_running, workers
from trainer.journal import read

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two nodes take two cores")

BATCH, IMAGES, PATIENCE = 8, 6400, 180
STEPS = IMAGES // BATCH
SETTINGS = ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "128", "--batch", str(BATCH)]
SETTINGS += ["--epochs", "1", "--freeze-epochs", "0", "--lr", "1e-3", "--wandb", "off", "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def long_set(tmp_path_factory):
    """One epoch that takes as long as nodes do to come and go: many small images."""
    root = tmp_path_factory.mktemp("data") / "long"
    for label in range(2):
        for split, count in (("train", IMAGES // 2), ("valid", 10)):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (i % 256, i // 256, 100 * label + 50 * (split == "valid"))
                Image.new("RGB", (64, 64), colour).save(folder / f"{i}.bmp")
    return root


@contextmanager
def training(data, folder, temporary, address, crew, *words):
    command = [sys.executable, "-m", "cluster.cli", "train", "--data", str(data), "--name", "run"]
    process = subprocess.Popen(
        [*command, *SETTINGS, "--address", address, "--workers", crew, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, **RAY, "TMPDIR": str(temporary), MARK: str(temporary), "COLUMNS": "120"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def doctor(address, *words, folder, temporary):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "doctor", "--cluster", "--address", address, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **RAY, "TMPDIR": str(temporary), "COLUMNS": "200"},
        check=False,
    )


def events(run, *kinds):
    return [event for event in read(run / "journal.jsonl") if event["event"] in kinds]


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def moves(run, starts, world_size):
    """Its workers were started so often, the last time as so many, and have taken steps and kept them since."""
    found = read(run / "journal.jsonl")
    begun = [i for i, event in enumerate(found) if event["event"] == "run"]
    if len(begun) < starts:
        return False
    assert found[begun[starts - 1]]["world_size"] == world_size
    kinds = [event["event"] for event in found[begun[starts - 1] :]]
    return kinds.count("step") >= 15 and "checkpoint" in kinds


def losses(run):
    """Of each step; of one that was done again, the same each time."""
    found = {}
    for event in events(run, "step"):
        assert found.setdefault(event["step"], event["loss"]) == pytest.approx(event["loss"], rel=1e-4)
    return found


def test_nodes_leave_and_come_and_no_batch_is_lost(long_set, tmp_path, temporary):
    run = tmp_path / "runs/run"
    with nodes(temporary) as cluster:
        first, second = cluster.add(), cluster.add()
        looked = doctor(cluster.address, "--data", str(long_set), folder=tmp_path, temporary=temporary)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        assert looked.stdout.count(" MB/s") == 3  # the head and two nodes
        assert "All is well." in looked.stdout
        # One failure may be: that of the node that is killed. One that leaves in good order is none.
        with training(long_set, tmp_path, temporary, cluster.address, "1:2", "--restarts", "1") as process:
            wait_for(lambda: moves(run, 1, 2), process)
            second.kill()
            wait_for(lambda: moves(run, 2, 1), process)
            third = cluster.add()
            wait_for(lambda: moves(run, 3, 2), process)
            # One that is told to go gives time for a checkpoint, and no step is done twice.
            first.process.send_signal(signal.SIGTERM)
            wait_for(lambda: moves(run, 4, 1), process)
            told = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, told
        assert "on 1 worker\n" in told and "on 2 workers\n" in told
        (left,) = events(run, "leaving")
        started = events(run, "run")
        assert started[3]["resumed_from"] == left["step"]
        assert third.process.poll() is None and workers(third.mark) == []
        assert not (run / ".engine").exists()
        assert left_running(temporary) == {}
    assert sorted(losses(run)) == list(range(STEPS))
    alone = tmp_path / "alone"
    alone.mkdir()
    words = ["--data", str(long_set), "--name", "run", "--workers", "0"]
    command = [sys.executable, "-m", "cluster.cli", "train", *words, *SETTINGS]
    subprocess.run(command, cwd=alone, check=True, capture_output=True)
    expected = losses(alone / "runs/run")
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    one, other = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (run, alone / "runs/run"))
    for name, value in other.items():
        assert (one[name] - value).abs().max() < 1e-3
