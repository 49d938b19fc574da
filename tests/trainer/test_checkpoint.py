"""Stopped anywhere, a run goes on from its last whole checkpoint to the same weights, to the bit."""

import errno
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch.multiprocessing import ProcessExitedException

from pipelines.errors import UserError
from tests.ranks import on_ranks
from trainer import checkpoint, loop, stopping
from trainer.checkpoint import Checkpoints, damage_of
from trainer.journal import Journal, read
from trainer.position import Position
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder
from trainer.worker import run

STEPS = 53 // 8  # of an epoch
RUN = {"model": "test_resnet", "head": "fastai", "size": 32, "lr": 1e-3, "epochs": 2, "freeze_epochs": 1}
RUN |= {"checkpoint_every": 2}


def train(ranks, path):
    run(path, "train", ranks)


class StoppedError(Exception):
    pass


def stop():
    raise StoppedError


def train_until(ranks, path, step, end=stop):
    """Train `step` optimiser steps, and end within the next."""
    taken = iter(range(step))

    def wrapped(*args, **kwargs):
        if next(taken, None) is None:
            end()
        return train_step(*args, **kwargs)

    train_step = loop.train_step
    with mock.patch.object(loop, "train_step", wrapped):
        run(path, "train", ranks)


def kill_rank_1(ranks, path):
    def kill():
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train_until(ranks, path, STEPS + 3, kill)


def weights(path):
    return safetensors.torch.load_file(path / "model.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def events(path, kind):
    return [event for event in read(path / "journal.jsonl") if event["event"] == kind]


@pytest.mark.parametrize(
    "recipe",
    [
        {"optimizer": "adamw", "ema": 0.9, "mixup": 0.2},
        {"optimizer": "sgd"},
        {"optimizer": "lamb", "precision": "fp16"},
    ],
    ids=lambda recipe: recipe["optimizer"],
)
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_bit(prepared, copies, recipe):
    undisturbed = prepared("undisturbed", **RUN, **recipe)
    stopped = copies(undisturbed, "stopped")
    for steps in (1, STEPS - 1, STEPS):  # before the first checkpoint, in the first epoch, in the second
        with pytest.raises(StoppedError):
            train_until(Ranks(), stopped, steps)
    run(stopped, "train", Ranks())
    run(undisturbed, "train", Ranks())
    assert same(weights(undisturbed), weights(stopped))
    assert [event["resumed_from"] for event in events(stopped, "run")] == [None, None, 4, 10]
    losses = [{event["step"]: event["loss"] for event in events(path, "step")} for path in (undisturbed, stopped)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3 * STEPS
    assert [event["train_loss"] for event in events(undisturbed, "epoch")] == [
        event["train_loss"] for event in events(stopped, "epoch")
    ]


def test_a_killed_rank_costs_the_steps_since_the_checkpoint_and_no_bit(prepared, copies):
    """Batch statistics differ from rank to rank in mid-epoch, and each rank takes its own up again."""
    undisturbed = prepared("undisturbed", **RUN, ema=0.9)
    stopped = copies(undisturbed, "stopped")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(2, kill_rank_1, stopped)
    on_ranks(2, train, stopped)
    on_ranks(2, train, undisturbed)
    assert same(weights(undisturbed), weights(stopped))
    # The kill may have met the newest checkpoint while it was written.
    assert events(stopped, "run")[1]["resumed_from"] in (STEPS, STEPS + 2)


def ask_within_the_third_step(ranks, path):
    """Rank 0 finds the request, which the driver leaves, before the fourth."""
    request = RunFolder(path).stop
    train_until(ranks, path, 2, partial(request.write_text, "SIGTERM") if ranks.rank == 0 else lambda: None)


def ask_rank_1_in_the_range_test(ranks, path):
    """As SIGTERM does to a worker."""
    if ranks.rank == 1:
        stopping._asked.set()
    run(path, "train", ranks)


def test_a_run_that_is_asked_to_stop_ends_at_a_checkpoint_and_goes_on_to_the_bit(prepared, copies):
    undisturbed = prepared("undisturbed", **{**RUN, "checkpoint_every": 100})
    stopped = copies(undisturbed, "stopped")
    on_ranks(2, ask_within_the_third_step, stopped)
    RunFolder(stopped).stop.unlink()
    assert read(stopped / "journal.jsonl")[-1]["event"] == "stopped"
    assert [event["step"] for event in events(stopped, "checkpoint")] == [4]
    on_ranks(2, train, stopped)
    on_ranks(2, train, undisturbed)
    assert same(weights(undisturbed), weights(stopped))
    assert len(events(stopped, "step")) == 3 * STEPS


def test_a_range_test_that_is_asked_to_stop_leaves_nothing_to_go_on_from(prepared):
    path = prepared("run", **{**RUN, "lr": None})
    on_ranks(2, ask_rank_1_in_the_range_test, path)
    assert [event["step"] for event in events(path, "stopped")] == [0]
    assert events(path, "checkpoint") == events(path, "step") == events(path, "range_result") == []


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("model.safetensors", "cut"),
        ("optimizer.safetensors", "altered"),
        ("state.json", "gone"),
        ("checksums.json", "cut"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(prepared, copies, whole, file, harm):
    path, expected = whole
    stopped = copies(path, f"{harm}-{file}")
    before, newest = sorted((stopped / "checkpoints").iterdir())
    content = (newest / file).read_bytes()
    middle = len(content) // 2
    if harm == "gone":
        (newest / file).unlink()
    else:
        other = (
            content[:middle]
            if harm == "cut"
            else bytes([content[middle] ^ 1]).join((content[:middle], content[middle + 1 :]))
        )
        (newest / file).write_bytes(other)
    assert damage_of(before) is None
    run(stopped, "train", Ranks())
    (warning,) = events(stopped, "warning")
    assert newest.name in warning["message"] and file in warning["message"]
    assert events(stopped, "run")[-1]["resumed_from"] == int(before.name.removeprefix("step-"))
    assert same(weights(stopped), expected)


@pytest.fixture
def whole(prepared, copies):
    """A run with two checkpoints in mid-epoch, and the weights it ends with."""
    settings = RUN | {"model": "resnet10t", "epochs": 1, "freeze_epochs": 0, "head": "plain"}
    path = prepared("whole", **settings)
    undisturbed = copies(path, "to-the-end")
    with pytest.raises(StoppedError):
        train_until(Ranks(), path, 5)
    run(undisturbed, "train", Ranks())
    return path, weights(undisturbed)


def test_a_storage_that_takes_nothing_costs_checkpoints_and_not_the_run(prepared):
    path = prepared("run", **RUN)
    (path / "checkpoints").write_text("in the way")
    run(path, "train", Ranks())
    first, last = events(path, "warning")  # and not one for each of its nine checkpoints
    assert "takes no checkpoint" in first["message"]
    assert "did not take the weights of epoch" in last["message"]
    assert not events(path, "checkpoint")
    assert events(path, "finished")[0]["best"] is None


def test_what_a_killed_writer_left_is_cleaned_up_and_never_read(prepared):
    path = prepared("run", **RUN | {"epochs": 1, "freeze_epochs": 0})
    left = path / "checkpoints" / ".step-99999999.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    run(path, "train", Ranks())
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert events(path, "run")[0]["resumed_from"] is None


def test_a_storage_that_fails_for_a_moment_costs_no_checkpoint(prepared, whole, copies, monkeypatch):
    stopped = copies(whole[0], "hiccup")
    newest = max((stopped / "checkpoints").iterdir()).name
    monkeypatch.setattr(checkpoint, "READ_AGAIN", 0.0)
    failing = iter([OSError(errno.ESTALE, "Stale file handle")] * 2)
    checksum = checkpoint._checksum

    def fail_twice(file):
        for error in failing:
            raise error
        return checksum(file)

    monkeypatch.setattr(checkpoint, "_checksum", fail_twice)
    run(stopped, "train", Ranks())
    assert events(stopped, "run")[-1]["resumed_from"] == int(newest.removeprefix("step-"))
    assert not events(stopped, "warning")


def test_a_storage_that_fails_for_good_is_told_and_nothing_is_set_aside(whole, copies, monkeypatch):
    stopped = copies(whole[0], "gone")
    before = sorted((stopped / "checkpoints").iterdir())
    monkeypatch.setattr(checkpoint, "READ_AGAIN", 0.0)
    monkeypatch.setattr(checkpoint, "_checksum", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(UserError, match="checkpoints cannot be read .*Input/output error.* --name"):
        run(stopped, "train", Ranks())
    assert sorted((stopped / "checkpoints").iterdir()) == before


def test_where_no_checkpoint_is_whole_nothing_begins_at_the_beginning(whole, copies):
    stopped = copies(whole[0], "all damaged")
    for folder in (stopped / "checkpoints").iterdir():
        (folder / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match="All checkpoints in .* are damaged .*state.json.*--restart"):
            run(stopped, "train", Ranks())


def test_a_stop_right_behind_a_checkpoint_leaves_it_as_it_is(prepared, tmp_path):
    path = prepared("run", **RUN)
    with pytest.raises(StoppedError):
        train_until(Ranks(), path, 2 * STEPS)
    newest = max((path / "checkpoints").iterdir())
    before = (newest / "state.json").stat().st_mtime_ns
    learner, position = mock.Mock(), Position(epoch=1, base_lr=1e-3)
    written = Checkpoints(path / "checkpoints", Ranks(), Journal(path / "journal.jsonl"))
    with mock.patch.object(checkpoint, "snapshot", return_value=({"model": {}}, {})):
        written.save(learner, position, int(newest.name.removeprefix("step-")))
        written.wait()
    assert (newest / "state.json").stat().st_mtime_ns == before and damage_of(newest) is None


def test_checkpoints_may_come_by_the_clock(tmp_path, monkeypatch):
    now = iter([0.0, 59.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(now))
    written = Checkpoints(tmp_path, Ranks(), Journal(None), minutes=1)
    assert not written.due(9)  # it has not looked
    assert not written.due(10)
    assert not written.due(15)
    assert written.due(20)


def due_by_rank_0s_clock(ranks, minutes):
    written = Checkpoints(Path(), ranks, Journal(None), minutes=minutes if ranks.rank == 0 else 1000.0)
    assert written.due(checkpoint.LOOK) == (minutes < 1)


def test_the_clock_of_rank_0_is_everybodys():
    for minutes in (1e-9, 1000.0):
        on_ranks(2, due_by_rank_0s_clock, minutes)


@pytest.mark.parametrize("name", ["confusion.png", "show_batch.png", "model.safetensors"])
def test_what_a_storage_does_not_take_at_the_end_costs_no_training(prepared, name):
    path = prepared("run", **RUN | {"epochs": 1, "freeze_epochs": 0})
    (path / name / "in the way").mkdir(parents=True)
    if name == "model.safetensors":
        with pytest.raises(UserError, match="model.safetensors cannot be written.* --name"):
            run(path, "train", Ranks())
        shutil.rmtree(path / name)
        run(path, "train", Ranks())  # the same command: all epochs are done
        assert len(events(path, "epoch")) == 1
    else:
        run(path, "train", Ranks())
        told = [event["message"] for event in events(path, "warning")]
        assert any(f"{name} cannot be written" in message for message in told) or name == "show_batch.png"
    assert events(path, "finished")
