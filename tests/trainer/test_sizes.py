"""Progressive resizing: the size is a function of the epoch, and nothing else of the training knows of it."""

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.errors import UserError
from tests.ranks import on_ranks
from trainer import TrainConfig
from trainer.config import Default
from trainer.journal import read
from trainer.ranks import Ranks
from trainer.sizes import read_sizes, size_of_each_epoch
from trainer.worker import run


def events(path, kind):
    return [event for event in read(path / "journal.jsonl") if event["event"] == kind]


def weights(path, name="model"):
    return safetensors.torch.load_file(path / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_size_of_each_epoch():
    stretches = read_sizes("128:3,160:3,224:2")
    assert stretches == ((128, 3), (160, 3), (224, 2))
    assert size_of_each_epoch(stretches, 1) == (128, 128, 128, 128, 160, 160, 160, 224, 224)
    config = TrainConfig(sizes="128:3,160:3,224:2")
    assert (config.size, config.epochs) == (224, 8)
    assert config.size_of_epochs == (128,) * 4 + (160,) * 3 + (224,) * 2
    assert TrainConfig(sizes="64:1,32:1", schedule="one-cycle").size_of_epochs == (64, 32)  # nothing is frozen
    assert TrainConfig().size_of_epochs == (160,) * 4


def test_sizes_replace_size_and_epochs_and_contradict_others():
    assert TrainConfig(sizes="96:2,128:2", size=128, epochs=4) == TrainConfig(sizes="96:2,128:2")
    assert TrainConfig.from_dict(TrainConfig(sizes="96:2,128:2").as_dict()) == TrainConfig(sizes="96:2,128:2")
    # 3 and 160 are the defaults: given, they contradict all the same
    for given, words in (({"epochs": 3}, "--epochs is 3; .* makes it 4"), ({"size": 160}, "--size is 160; .* it 128")):
        with pytest.raises(UserError, match=words):
            TrainConfig(sizes="96:2,128:2", **given)
    assert not isinstance(TrainConfig(sizes="96:2,128:2").epochs, Default)


@pytest.mark.parametrize(
    "text", ["", "128", "128:0", "128:2,", "128:2;160:1", "128:2, 160:1", "a:1", "-64:1", "64:1.5"]
)
def test_a_list_that_is_none_is_shown_one(text):
    with pytest.raises(UserError, match="--sizes is .*128:3,160:3,224:2"):
        TrainConfig(sizes=text)


def test_a_size_out_of_range_is_told():
    with pytest.raises(UserError, match="--sizes is 16; it must be between 32 and 1024"):
        TrainConfig(sizes="16:1,128:2")


GROWING = {"sizes": "32:1,40:1,48:1", "freeze_epochs": 1, "lr": 2e-3}


def test_a_run_that_stopped_between_sizes_goes_on_to_the_same_weights_to_the_bit(prepared, copies):
    undisturbed = prepared(
        "undisturbed", model="mobilenetv3_small_050", head="fastai", ema=0.9, **GROWING | {"lr": 1e-3}
    )
    for stop_after in (2, 3):
        stopped = copies(undisturbed, f"stopped{stop_after}")

        def stop(metrics, epochs=iter(range(1, 5)), after=stop_after):  # noqa: B008
            if next(epochs) == after:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run(stopped, "train", Ranks(), report=stop)
        run(stopped, "train", Ranks())
    run(undisturbed, "train", Ranks())
    (whole,) = events(undisturbed, "finished")
    for stop_after in (2, 3):
        stopped = undisturbed.with_name(f"stopped{stop_after}")
        for name in ("model", "best"):
            assert same(weights(stopped, name), weights(undisturbed, name)), name
        assert [event["size"] for event in events(stopped, "epoch")] == [32, 32, 40, 48]
        (resumed,) = events(stopped, "finished")
        assert (resumed["best"], resumed["advice"]) == (whole["best"], whole["advice"])


def test_only_the_images_differ_from_a_training_at_one_size(prepared):
    growing, constant = prepared("growing", **GROWING), prepared("constant", epochs=3, freeze_epochs=1, lr=2e-3)
    cached = prepared("cached", cache="decoded", **GROWING)
    for path in (growing, constant, cached):
        run(path, "train", Ranks())
    assert same(weights(growing), weights(cached))
    assert not same(weights(growing), weights(constant))
    # one cycle over all epochs of the whole model, the same groups, the same numbers of steps
    for name in ("step", "epoch", "lr"):
        assert [step.get(name) for step in events(growing, "step")] == [
            step.get(name) for step in events(constant, "step")
        ]
    for a, b in zip(events(growing, "phase"), events(constant, "phase"), strict=True):
        assert (a["phase"], a["steps"], a["lr"]) == (b["phase"], b["steps"], b["lr"])
    assert [phase["sizes"] for phase in events(growing, "phase")] == [[32], [32, 40, 48]]
    # the first step sees the same images, smaller
    first, other = events(growing, "step")[0]["loss"], events(constant, "step")[0]["loss"]
    assert first != other and first == pytest.approx(other, rel=0.3)


def train(ranks, path):
    run(path, "train", ranks)


def test_two_ranks_change_size_together(prepared, copies):
    alone = prepared("alone", **GROWING)
    together = copies(alone, "together")
    run(alone, "train", Ranks())
    on_ranks(2, train, together)
    one, two = ([step["loss"] for step in events(path, "step")] for path in (alone, together))
    assert len(one) == 4 * (53 // 8)
    assert np.abs(np.array(two) / one - 1).max() < 1e-4
    for a, b in zip(events(alone, "epoch"), events(together, "epoch"), strict=True):
        assert (a["error_rate"], a["size"]) == (b["error_rate"], b["size"])
        assert a["standard_errors"] == pytest.approx(b["standard_errors"], rel=1e-4)


def test_the_range_test_has_the_first_size(prepared):
    """Its first step, at a rate of 1e-5, has the loss of the first size's images."""
    small, growing, large = (
        prepared(name, freeze_epochs=0, lr_find_steps=20, **settings)
        for name, settings in (
            ("small", {"epochs": 1, "size": 32}),
            ("growing", {"sizes": "32:1,48:1"}),
            ("large", {"epochs": 1}),
        )
    )
    losses = {}
    for path in (small, growing, large):
        run(path, "lr-find", Ranks())
        losses[path.name] = [step["loss"] for step in events(path, "range_step")]
    assert losses["growing"] == losses["small"] != losses["large"]


def test_a_model_that_cannot_take_the_first_size_is_told_before_training(prepared):
    with pytest.raises(UserError, match="--model vit_tiny_patch16_224 takes no images of --size 64 beside its last"):
        prepared("run", model="vit_tiny_patch16_224", sizes="64:1,96:1", size=96)
