"""The range test: its suggestions, its end, and that it leaves no trace."""

import math

import numpy as np
import pytest
import torch

from pipelines.geometry import Augment
from pipelines.loader import Loader
from pipelines.scanning import scan
from tests.ranks import on_ranks
from trainer import models, optim, precision
from trainer.journal import Journal, read
from trainer.loop import Learner, train_step
from trainer.lr_range import HIGH, LOW, range_test, suggest
from trainer.ranks import Ranks
from trainer.worker import endless, run


def make_learner(ranks=Ranks()):  # noqa: B008
    torch.manual_seed(0)
    model = models.build("resnet18", head="fastai", classes=3, size=64).to(memory_format=torch.channels_last)
    return Learner(
        model=model,
        optimizer=optim.build(model, 0.01, 64),
        precision=precision.resolve("fp32", torch.device("cpu")),
        ranks=ranks,
    )


@pytest.fixture(scope="module")
def loader(small_set):
    return Loader(scan(small_set).train, size=32, global_batch=8, augment=Augment())


def everything(learner):
    state = {f"model.{name}": value.clone() for name, value in learner.model.state_dict().items()}
    for i, group in enumerate(learner.optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            for name, value in learner.optimizer.state.get(parameter, {}).items():
                state[f"{i}.{j}.{name}"] = value.clone()
    state["random"] = torch.get_rng_state()
    return state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def curve(learner, loader, tmp_path, steps=20):
    return range_test(
        learner,
        endless(loader),
        global_batch=8,
        steps=steps,
        seed=0,
        journal=Journal(tmp_path / "journal.jsonl"),
    )


def test_it_leaves_the_learner_as_it_was_to_the_bit(loader, tmp_path):
    learner = make_learner()
    learner.train(frozen=False)
    train_step(learner, next(loader.epoch(0)), global_batch=8, hyper=([1e-3] * 3, 0.9), noise=(0, 0, 0))
    before = everything(learner)
    result = curve(learner, loader, tmp_path)
    assert same(before, everything(learner))
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) > 5
    assert result.lrs[0] == pytest.approx(LOW)
    ratios = np.diff(np.log(result.lrs))
    assert ratios == pytest.approx(math.log(HIGH / LOW) / 19)
    assert [e["loss"] for e in read(tmp_path / "journal.jsonl")] == list(result.losses)


def test_also_when_it_ends_by_an_error(loader, tmp_path):
    learner = make_learner()
    before = everything(learner)

    def breaking():
        yield from list(loader.epoch(0))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        range_test(learner, breaking(), global_batch=8, steps=20, seed=0, journal=Journal(tmp_path / "journal.jsonl"))
    assert same(before, everything(learner))


def test_it_ends_where_the_loss_is_no_number(loader, tmp_path):
    learner = make_learner()
    batches = list(loader.epoch(0))
    batches[4].images_NCHW[3] = math.nan
    result = range_test(
        learner, iter(batches), global_batch=8, steps=20, seed=0, journal=Journal(tmp_path / "journal.jsonl")
    )
    assert len(result.losses) == 4
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


def two_ranks(ranks, path):
    run(path, "lr-find", ranks)


def test_two_ranks_give_the_curve_of_one(prepared, copies):
    alone = prepared("alone", lr_find_steps=20)
    together = copies(alone, "together")
    run(alone, "lr-find", Ranks())
    on_ranks(2, two_ranks, together)
    one, two = (
        [e["loss"] for e in read(path / "journal.jsonl") if e["event"] == "range_step"] for path in (alone, together)
    )
    assert len(one) == len(two) > 10
    assert two == pytest.approx(one, rel=1e-3)
    assert (alone / "lr_find.png").stat().st_size > 5000


def valley_shaped(steps=100):
    """Flat, then falling between 1e-4 and 1e-1, then rising steeply."""
    lrs = [LOW * (HIGH / LOW) ** (i / (steps - 1)) for i in range(steps)]
    position = np.log10(lrs)
    losses = 2.0 - 1.2 / (1 + np.exp(-3 * (position + 2.5))) + np.exp(4 * (position - 0.2))
    return lrs, losses.tolist()


def test_suggestions_on_a_curve_with_a_known_shape():
    lrs, losses = valley_shaped()
    found = suggest(lrs, losses, 100)
    used = slice(10, -5)
    assert found["minimum"] == pytest.approx(lrs[used][int(np.argmin(losses[used]))] / 10)
    assert 10**-2.7 < found["steep"] < 10**-2.3  # the logistic falls fastest at 10^-2.5
    assert 1e-4 < found["valley"] < 10 * found["minimum"]
    assert found["balanced"] ** 2 == pytest.approx(found["valley"] * found["minimum"])


def test_the_valley_is_fastais():
    """A decreasing run from index 2 to 8, by hand: (8 - 7) / 3 sections as fastai counts them."""
    lrs = np.geomspace(1e-4, 1e-1, 15).tolist()
    losses = [2.0, 2.1, 2.2, 1.9, 1.7, 1.5, 1.2, 1.0, 0.9, 1.4, 2.0, 3.0, 4.0, 5.0, 6.0]
    # of the 10 points left, the longest decreasing subsequence is 2.2 … 0.9: 7 long, ends at 8, begins (as fastai
    # counts) at 1; a third of it is 7/3, so the index is 1 + 2 + 1 = 4
    assert suggest(lrs, losses, 0)["valley"] == pytest.approx(lrs[4])


@pytest.mark.parametrize("losses", [[2.0] * 60, np.linspace(2, 3, 60).tolist(), [2.0, 1.0]])
def test_a_curve_without_information_suggests_nothing(losses):
    lrs = np.geomspace(LOW, HIGH, 60)[: len(losses)].tolist()
    assert suggest(lrs, losses, 60) == {}
