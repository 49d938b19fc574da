"""Batches whose loss is no number, or explodes: all ranks do the same, at the same step, and the run is told why."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import safetensors.torch
import torch

from pipelines.errors import UserError
from tests.ranks import on_ranks
from trainer import loop
from trainer.guard import AT_LEAST, EXPLODED, SETTLED, Guard, chance_of, rewound
from trainer.journal import read
from trainer.losses import CrossEntropy, Focal, OneVsRest
from trainer.ranks import Ranks
from trainer.run_folder import RunFolder
from trainer.worker import run

STEPS = 53 // 8  # of an epoch
BAD = (1, 3)  # epoch, step
RUN = {"lr": 1e-3, "epochs": 2, "freeze_epochs": 1, "checkpoint_every": 2, "ema": 0.9}
BATCH_NORM = {"model": "test_resnet", "head": "fastai", "size": 32}


def train(ranks, path):
    run(path, "train", ranks)


def poisoned(ranks, path, at=(BAD,), what="images"):
    """Train, with images or a gradient of rank 0 that are no numbers in the batches `at`."""

    def wrapped(learner, batch, **kwargs):
        if kwargs["noise"][1:] in at and ranks.rank == 0:
            if what == "gradient":
                parameter = list(learner.model.parameters())[-1]
                with parameter.register_hook(lambda gradient: gradient * float("nan")):
                    return train_step(learner, batch, **kwargs)
            batch = replace(batch, images_NCHW=batch.images_NCHW * float("nan"))
        return train_step(learner, batch, **kwargs)

    train_step = loop.train_step
    with mock.patch.object(loop, "train_step", wrapped):
        run(path, "train", ranks)


def events(path, kind):
    return [event for event in read(path / "journal.jsonl") if event["event"] == kind]


def weights(path):
    return safetensors.torch.load_file(path / "model.safetensors")


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def with_action(path, action):
    folder = RunFolder(path)
    folder.config.write_text(json.dumps({**folder.read_config().as_dict(), "on_nan": action}))


def test_the_run_stops_and_names_the_images(prepared):
    path = prepared("run", **RUN)
    with pytest.raises(UserError, match=r"became nan at step 3 of epoch 1.*--on-nan rewind.*Its images are '") as told:
        poisoned(Ranks(), path)
    (bad,) = events(path, "bad_batch")
    assert (bad["epoch"], bad["step"], bad["action"], len(bad["images"])) == (*BAD, "stop", 8)
    assert all(repr(image) in str(told.value) for image in bad["images"][:3])
    assert events(path, "checkpoint")[-1]["step"] == STEPS + 2


@pytest.mark.parametrize("what", ["images", "gradient"])
@pytest.mark.parametrize("settings", [{}, BATCH_NORM], ids=["plain", "batch-norm"])
def test_a_batch_that_is_skipped_leaves_as_little_as_one_that_is_passed_over(prepared, copies, settings, what):
    skipping = prepared("skip", **RUN, **settings, on_nan="skip")
    rewinding = copies(skipping, "rewind")
    with_action(rewinding, "rewind")
    poisoned(Ranks(), skipping, what=what)
    poisoned(Ranks(), rewinding, what=what)
    assert [(bad["epoch"], bad["step"]) for bad in events(skipping, "bad_batch")] == [BAD]
    assert same(weights(skipping), weights(rewinding))
    assert all(value.isfinite().all() for value in weights(skipping).values())
    assert [event["resumed_from"] for event in events(rewinding, "run")] == [None, STEPS + 2]
    assert rewound(read(rewinding / "journal.jsonl")) == [BAD]
    losses = [[event["train_loss"] for event in events(path, "epoch")] for path in (skipping, rewinding)]
    assert losses[0] == losses[1]


def test_a_run_that_stopped_goes_on_without_the_batch(prepared, copies):
    stopped = prepared("run", **RUN)
    rewinding = copies(stopped, "rewind")
    with_action(rewinding, "rewind")
    with pytest.raises(UserError):
        poisoned(Ranks(), stopped)
    with_action(stopped, "rewind")
    poisoned(Ranks(), stopped)
    poisoned(Ranks(), rewinding)
    assert same(weights(stopped), weights(rewinding))


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_one_rank_decides_for_all(prepared, copies, action):
    two = prepared("two", **RUN, on_nan=action)
    one = copies(two, "one")
    on_ranks(2, poisoned, two)
    poisoned(Ranks(), one)
    assert [(bad["epoch"], bad["step"]) for bad in events(two, "bad_batch")] == [BAD]
    for ours, theirs in zip(weights(one).values(), weights(two).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_an_explosion_is_noticed(prepared):
    path = prepared("run", **{**RUN, "batch": 2, "checkpoint_every": 100})

    def wrapped(learner, batch, **kwargs):
        grave = replace(learner.loss, weights_C=torch.full((3,), 1e3))
        with mock.patch.object(learner, "loss", grave if kwargs["noise"][1:] == (1, SETTLED + 2) else learner.loss):
            return train_step(learner, batch, **kwargs)

    train_step = loop.train_step
    with (
        mock.patch.object(loop, "train_step", wrapped),
        pytest.raises(UserError, match=r"rose to \d.* at step 22 of epoch 1"),
    ):
        run(path, "train", Ranks())


def test_in_fp16_an_explosion_is_seen_too_late_to_be_skipped_and_that_is_told(prepared):
    path = prepared("run", **{**RUN, "batch": 2, "precision": "fp16"}, on_nan="skip")

    def wrapped(learner, batch, **kwargs):
        done = train_step(learner, batch, **kwargs)
        return done._replace(loss=done.loss * 1e4) if kwargs["noise"][1:] == (1, SETTLED + 2) else done

    train_step = loop.train_step
    with (
        mock.patch.object(loop, "train_step", wrapped),
        pytest.raises(UserError, match=r"rose to \d.* at step 22 of epoch 1"),
    ):
        run(path, "train", Ranks())
    assert [event["action"] for event in events(path, "bad_batch")] == ["stop"]


def test_what_never_ends_is_given_up(prepared):
    path = prepared("run", **{**RUN, "batch": 2}, on_nan="skip")
    with pytest.raises(UserError, match="became nan at step 19 of epoch 0"):
        poisoned(Ranks(), path, at=[(0, step) for step in range(26)])


def test_what_a_loss_may_be():
    guard = Guard(chance=2.0)
    largest = torch.finfo(torch.float32).max
    assert guard.most(1.0, SETTLED - 1) == largest
    assert guard.most(0.01 * SETTLED, SETTLED) == AT_LEAST * 2.0
    assert guard.most(3.0 * SETTLED, SETTLED) == EXPLODED * 3.0
    assert Guard().most(1.0, SETTLED) == largest


def test_chance_is_the_loss_of_a_network_that_says_nothing():
    ten = torch.tensor(10.0)
    assert chance_of(CrossEntropy(smoothing=0.1), 10) == pytest.approx(ten.log().item())
    assert chance_of(Focal(gamma=2.0), 10) == pytest.approx((0.9**2 * ten.log()).item())
    assert chance_of(OneVsRest(), 10) == pytest.approx((10 * torch.tensor(2.0).log()).item())


def test_weights_that_are_no_numbers_are_not_kept(prepared):
    """The last good checkpoint stays the last."""
    path = prepared("run", **RUN)

    def wrapped(learner, batch, **kwargs):
        done = train_step(learner, batch, **kwargs)
        if kwargs["noise"][1:] == (1, 1):
            next(learner.model.parameters()).data.fill_(float("nan"))
        return done

    train_step = loop.train_step
    with mock.patch.object(loop, "train_step", wrapped), pytest.raises(UserError, match="became nan at step 2 of"):
        run(path, "train", Ranks())
    assert events(path, "checkpoint")[-1]["step"] == STEPS
    (warning,) = events(path, "warning")
    assert f"no checkpoint of step {STEPS + 2}" in warning["message"]
