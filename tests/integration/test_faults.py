"""A run on two Ray workers, hit where it hurts: it goes on by itself, or by the same command, and loses nothing."""

import io
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.faults import equal, whole
from benchmarks.processes import left_running, workers
from tests.commands import PATIENCE, begun, events, wait_for, weights
from tests.listening import listening
from tests.ranks import on_ranks
from trainer import TrainConfig, worker
from trainer.prepare import prepare

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers take two cores")

EPOCHS = 20  # and one with the body frozen; on a fast machine a hit takes more steps to arrive
STEPS = 53 // 8 * (EPOCHS + 1)
SETTINGS = ["--model", "test_convnext", "--head", "plain", "--no-pretrained", "--size", "48", "--batch", "8"]
SETTINGS += ["--epochs", str(EPOCHS), "--lr", "1e-3", "--wandb", "off", "--checkpoint-every", "4"]
SETTINGS += ["--stall", "15", "--grace", "10"]  # on a busy machine a step may take some seconds


@contextmanager
def training(data, folder, temporary):
    """The command, which has started its workers and taken some steps when this yields."""
    run, words = folder / "runs/run", ["--data", data, "--name", "run", "--workers", "2", *SETTINGS]
    runs = len(events(run, "run"))
    with begun(folder, temporary, "train", *words, WANDB_API_KEY="0" * 40) as process:
        wait_for(lambda: len(events(run, "run")) > runs and moves(run), process)
        yield process


def moves(run):
    """Its workers have taken some steps since they were started last, and written a checkpoint."""
    found = events(run)
    return [event["event"] for event in found[found.index(events(run, "run")[-1]) :]].count("step") >= 6


def environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


def finish(process):
    told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def undisturbed(small_set, tmp_path_factory):
    """The weights of the same run on two processes without Ray, which nothing happens to."""
    settings = {"model": "test_convnext", "head": "plain", "pretrained": False, "size": 48, "batch": 8, "lr": 1e-3}
    settings |= {"epochs": EPOCHS, "data": str(small_set), "runs": tmp_path_factory.mktemp("runs"), "workers": 2}
    folder, _ = prepare(TrainConfig(**settings, name="run"), Console(file=io.StringIO()))
    on_ranks(2, train, folder.path)
    return weights(folder.path)


def train(ranks, path):
    worker.run(path, "train", ranks)


def test_workers_that_die_or_stand_still_are_started_again_and_cost_no_bit(small_set, tmp_path, temporary, undisturbed):
    run = tmp_path / "runs/run"
    with training(small_set, tmp_path, temporary) as process:
        places = listening(left_running(temporary))
        assert len(places) > 3
        assert {address for address, _ in places} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert all(b"WANDB_API_KEY=\0" in environment(pid) for pid in workers(temporary))
        os.kill(workers(temporary)[-1], signal.SIGKILL)
        wait_for(lambda: len(events(run, "run")) == 2 and moves(run), process)
        os.kill(workers(temporary)[-1], signal.SIGSTOP)
        told = finish(process)
    assert "failed" in told and "stood still" in told and "resumed from step" in told
    assert len(events(run, "run")) == 3
    stood = {event["rank"]: event["stood"] for event in events(run, "stalled")}
    assert sorted(stood) == [0, 1]
    assert any("T (stopped)" in told for told in stood.values())
    assert all("worker.py" in told for told in stood.values())
    assert whole(events(run, "step"), STEPS) and equal(weights(run), undisturbed)
    assert left_running(temporary) == {}
    assert list(temporary.iterdir()) == []


def test_signals_end_a_run_at_a_checkpoint_and_nothing_is_lost(small_set, tmp_path, temporary, undisturbed):
    run = tmp_path / "runs/run"
    for number, to in enumerate(["driver", "worker"]):
        with training(small_set, tmp_path, temporary) as process:
            os.kill(process.pid if to == "driver" else workers(temporary)[-1], signal.SIGTERM)
            told = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 128 + signal.SIGTERM, told
        assert "Traceback" not in told
        stopped = events(run, "stopped")[number]
        assert events(run, "checkpoint")[-1]["step"] == stopped["step"]
        assert f"stopped after step {stopped['step']}" in told
        assert left_running(temporary) == {}
    assert len(events(run, "step")) == len({event["step"] for event in events(run, "step")})  # none twice
    with training(small_set, tmp_path, temporary) as process:
        for pid in workers(temporary):
            os.kill(pid, signal.SIGSTOP)
        process.terminate()
        told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "did not end within 10 seconds" in told
    assert left_running(temporary) == {}
    with training(small_set, tmp_path, temporary) as process:
        process.kill()
        process.communicate()
    with training(small_set, tmp_path, temporary) as process:
        finish(process)
    resumed = [event["resumed_from"] for event in events(run, "run")]
    stopped = [event["step"] for event in events(run, "stopped")]
    # Workers that stood still may go on when Ray has let go of them: then they leave a checkpoint, too.
    assert 2 <= len(stopped) <= 3 and resumed[1 : 1 + len(stopped)] == stopped
    assert sorted(resumed[2:]) == resumed[2:]
    assert whole(events(run, "step"), STEPS) and equal(weights(run), undisturbed)
