"""A run on a Ray cluster whose nodes come and go: as many workers as there is room for, and every batch once."""

import os
import signal

import pytest
from PIL import Image

from benchmarks.nodes import RAY, nodes
from benchmarks.processes import left_running, workers
from tests.commands import PATIENCE, begun, events, onewarp, wait_for, weights

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two nodes take two cores")

BATCH, IMAGES = 8, 6400
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


def moves(run, starts, world_size):
    """Its workers were started so often, the last time as so many, and have taken steps and kept them since."""
    found = events(run)
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
        place = ["--address", cluster.address, "--data", long_set]
        looked = onewarp(tmp_path, temporary, "doctor", "--cluster", *place, **RAY)
        assert looked.returncode == 0, looked.stdout + looked.stderr
        assert looked.stdout.count(" MB/s") == 3  # the head and two nodes
        assert "All is well." in looked.stdout
        # One failure may be: that of the node that is killed. One that leaves in good order is none.
        words = [*place, "--name", "run", *SETTINGS, "--workers", "1:2", "--restarts", "1"]
        with begun(tmp_path, temporary, "train", *words, **RAY) as process:
            wait_for(lambda: moves(run, 1, 2), process)
            second.kill()
            wait_for(lambda: moves(run, 2, 1), process)
            third = cluster.add()
            wait_for(lambda: moves(run, 3, 2), process)
            # One that is told to go gives time for a checkpoint, and no step is done twice.
            first.process.send_signal(signal.SIGTERM)
            wait_for(lambda: moves(run, 4, 1), process)
            told = process.communicate(timeout=2 * PATIENCE)[0]  # most of the steps are done here
        assert process.returncode == 0, told
        assert "on 1 worker\n" in told and "on 2 workers\n" in told
        # Nor where a machine comes: its workers begin at a checkpoint.
        started = events(run, "run")
        assert [started[i]["resumed_from"] for i in (2, 3)] == [event["step"] for event in events(run, "leaving")]
        assert third.process.poll() is None and workers(third.mark) == []
        assert not (run / ".engine").exists()
        assert left_running(temporary) == {}
    assert sorted(losses(run)) == list(range(STEPS))
    alone = tmp_path / "alone"
    alone.mkdir()
    told = onewarp(alone, temporary, "train", "--data", long_set, "--name", "run", *SETTINGS, "--workers", "0")
    assert told.returncode == 0, told.stdout + told.stderr
    expected = losses(alone / "runs/run")
    assert losses(run) == pytest.approx(expected, rel=1e-3)
    one, other = (weights(folder) for folder in (run, alone / "runs/run"))
    for name, value in other.items():
        assert (one[name] - value).abs().max() < 1e-3
