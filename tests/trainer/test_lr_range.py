"""The range test: its suggestions, its end, and that it leaves no trace."""

import json
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.geometry import Augment
from pipelines.loader import Batch, Loader
from pipelines.scanning import scan
from tests.ranks import on_ranks
from trainer import models, optim, precision
from trainer.journal import Journal, read
from trainer.loop import Learner, train_step
from trainer.lr_range import FALLBACK, HIGH, LOW, RangeTest, range_test, suggest
from trainer.ranks import Ranks
from trainer.schedule import fine_tune
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
    learner.train(first_group=0)
    train_step(learner, next(loader.epoch(0)), global_batch=8, hyper=([1e-3] * 3, 0.9), noise=(0, 0, 0))
    before = everything(learner)
    result = curve(learner, loader, tmp_path)
    assert same(before, everything(learner))
    assert len(result.lrs) == len(result.losses) == len(result.smoothed) > 5
    assert result.lrs[0] == pytest.approx(LOW)
    ratios = np.diff(np.log(result.lrs))
    assert ratios == pytest.approx(math.log(HIGH / LOW) / 19)
    assert [e["loss"] for e in read(tmp_path / "journal.jsonl")] == list(result.losses)


@pytest.fixture
def one_thread():
    """Layers as small as these gain nothing from a second thread, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Hidden(nn.Module):
    """Counts its calls in a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, images_NCHW):
        self.calls += self.training
        return images_NCHW


def tiny_learner(ranks=Ranks(), *, number="fp32", optimizer="adamw"):  # noqa: B008
    """Two convolutions with batch-norms, at 1/4 and at 1/16, and fastai's head."""
    torch.manual_seed(0)
    early = nn.Sequential(Hidden(), nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
    late = nn.Sequential(nn.Conv2d(8, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
    body = nn.Sequential(OrderedDict(early=early, late=late))
    model = models.Classifier(body, models.build_head("fastai", 8, 3))
    return Learner(
        model=model,
        optimizer=optim.build(model, 0.01, 32, name=optimizer),
        precision=precision.resolve(number, torch.device("cpu")),
        ranks=ranks,
    )


def tiny_batches(count=30, size=8, first=0):
    """Seeded images whose brightness is their label."""
    for step in range(count):
        generator = torch.Generator().manual_seed(first + step)
        labels_N = torch.randint(3, (size,), generator=generator)
        images_NCHW = torch.randn(size, 3, 32, 32, generator=generator) + labels_N[:, None, None, None]
        yield Batch(step=step, images_NCHW=images_NCHW, labels_N=labels_N, ids_N=torch.arange(size))


def tiny_test(learner, batches, path, **options):
    journal = Journal(path / f"journal{learner.ranks.rank}.jsonl")
    return range_test(learner, batches, **{"global_batch": 8, "steps": 20, "seed": 0, "journal": journal, **options})


def whole(learner):
    """`everything`, and what a training could notice beyond it."""
    state = everything(learner)
    state |= {f"buffer.{name}": value.clone() for name, value in learner.model.named_buffers()}
    state["learning"] = torch.tensor([p.requires_grad for p in learner.model.parameters()])
    state["modes"] = torch.tensor([module.training for module in learner.model.modules()])
    state["gradients"] = torch.tensor([p.grad is not None for p in learner.model.parameters()])
    numbers = list(learner.scaler.state_dict().values())
    for group in learner.optimizer.param_groups:
        numbers += [group["lr"], *group.get("betas", ()), group.get("momentum", 0.0), float(group.get("step", -1))]
    state["numbers"] = torch.tensor(numbers)
    return state


def used(learner, number):
    """The same learner after `number` steps, half frozen, half in evaluation."""
    learner.train(first_group=-1)
    for i, batch in enumerate(tiny_batches(number, first=100)):
        train_step(learner, batch, global_batch=8, hyper=([1e-4, 1e-4, 1e-3], 0.9), noise=(1, 0, i))
    learner.model.body.late.eval()
    torch.manual_seed(3)
    return learner


class Stopped(KeyboardInterrupt):
    pass


def from_the_batches(learner, raised):
    def batches():
        yield from tiny_batches(3)
        raise raised

    return batches()


def between_step_and_update(learner, raised):
    seen = []

    def stop(*_):
        seen.append(None)
        if len(seen) == 4:
            raise raised

    learner.optimizer.register_step_post_hook(stop)
    return tiny_batches()


def in_the_backward_pass(learner, raised):
    seen = []

    def stop(gradient):
        seen.append(None)
        if len(seen) == 4:
            raise raised
        return gradient

    learner.model.head[3].weight.register_hook(stop)  # the head has its gradients then, the body has not
    return tiny_batches()


@pytest.mark.parametrize(
    ("number", "optimizer", "steps", "ending", "raised"),
    [
        ("fp32", "adamw", 0, None, None),
        ("fp32", "adamw", 0, in_the_backward_pass, Stopped()),
        ("fp32", "adamw", 2, from_the_batches, OSError("disk")),
        ("fp32", "lamb", 2, between_step_and_update, Stopped()),
        ("fp32", "lamb", 0, from_the_batches, Stopped()),
        ("fp32", "sgd", 2, in_the_backward_pass, OSError("disk")),
        ("fp16", "adamw", 2, None, None),
        ("fp16", "sgd", 2, between_step_and_update, Stopped()),
        ("fp16", "adamw", 0, between_step_and_update, Stopped()),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_nothing_tells_that_it_was_there(number, optimizer, steps, ending, raised, tmp_path):
    learner = used(tiny_learner(number=number, optimizer=optimizer), steps)
    before = whole(learner)
    if ending is None:
        assert len(tiny_test(learner, tiny_batches(), tmp_path).losses) > 5
    else:
        with pytest.raises(type(raised)):
            tiny_test(learner, ending(learner, raised), tmp_path)
    assert same(before, whole(learner))
    assert (len(learner.optimizer.state) == 0) == (steps == 0)

    # nor does what comes after: a step more is the step that an untouched learner makes
    twin = used(tiny_learner(number=number, optimizer=optimizer), steps)
    for each in (learner, twin):
        batch = next(tiny_batches(first=500))
        train_step(each, batch, global_batch=8, hyper=([1e-3, 1e-3, 1e-2], 0.9), noise=(2, 0, 0))
    assert same(whole(learner), whole(twin))


@pytest.mark.usefixtures("one_thread")
def test_the_groups_are_swept_in_the_ratios_of_training(tmp_path):
    (frozen,) = fine_tune(base_lr=3e-3, groups=3, steps_per_epoch=9, epochs=0, freeze_epochs=1)
    (unfrozen,) = fine_tune(base_lr=3e-3, groups=3, steps_per_epoch=9, epochs=1, freeze_epochs=0)
    for ratios, phase in ((None, frozen), (unfrozen.ratios, unfrozen)):
        learner, seen = tiny_learner(), []
        learner.optimizer.register_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.append({g["layer_group"]: g["lr"] for g in optimizer.param_groups})
        )
        found = tiny_test(learner, tiny_batches(), tmp_path, ratios=ratios)
        assert [rates[2] for rates in seen[: len(found.lrs)]] == pytest.approx(found.lrs)
        lrs, _ = phase.hyper(5)
        for rates in seen:
            assert [rates[i] / rates[2] for i in range(3)] == pytest.approx([lr / lrs[2] for lr in lrs])
    with pytest.raises(ValueError, match="2 ratios for 3 layer groups"):
        tiny_test(tiny_learner(), tiny_batches(), tmp_path, ratios=(0.1, 1.0))


@pytest.mark.parametrize("steps", [19, 101])
def test_it_takes_a_hundred_steps_at_most(steps, tmp_path):
    with pytest.raises(UserError, match=f"--lr-find-steps is {steps}; it must be between 20 and 100"):
        tiny_test(tiny_learner(), tiny_batches(), tmp_path, steps=steps)


@pytest.mark.usefixtures("one_thread")
def test_it_ends_where_the_loss_is_no_number(tmp_path):
    learner, batches = tiny_learner(), list(tiny_batches())
    batches[4].images_NCHW[3] = math.nan
    assert len(tiny_test(learner, iter(batches), tmp_path).losses) == 4
    assert all(torch.isfinite(p).all() for p in learner.model.parameters())


def one_rank_meets_nan(ranks, path):
    """Rank 1's fifth batch is no number."""
    learner = tiny_learner(ranks)
    learner.train(first_group=0)
    before, taken = whole(learner), []

    def batches():
        for batch in tiny_batches(size=8):
            half = slice(4 * ranks.rank, 4 * ranks.rank + 4)
            images_NCHW = batch.images_NCHW[half]
            if ranks.rank == 1 and batch.step == 4:
                images_NCHW[0, 0, 0, 0] = math.nan
            taken.append(batch.step)
            yield replace(batch, images_NCHW=images_NCHW, labels_N=batch.labels_N[half], ids_N=batch.ids_N[half])

    found = tiny_test(learner, batches(), path)
    assert same(before, whole(learner))
    (path / f"rank{ranks.rank}.json").write_text(json.dumps({"taken": taken, "losses": found.losses}))


def test_a_nan_on_one_rank_ends_both_at_that_step(tmp_path):
    on_ranks(2, one_rank_meets_nan, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["taken"] == [0, 1, 2, 3, 4]
    assert len(first["losses"]) == 4


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


def test_another_suggestion_is_taken_where_the_one_wished_for_is_not_there():
    def found(**suggestions):
        return RangeTest(lrs=(), losses=(), smoothed=(), suggestions=suggestions)

    assert found(valley=1.0, balanced=2.0, slide=3.0).choose("slide") == ("slide", 3.0)
    assert found(valley=1.0, balanced=2.0).choose("slide") == ("balanced", 2.0)
    assert found().choose("valley") == ("default", FALLBACK)


GOLDEN = json.loads((Path(__file__).parent / "golden/suggestions.json").read_text())


@pytest.mark.parametrize("curve", GOLDEN, ids=lambda curve: curve["name"])
def test_suggestions_are_fastais(curve):
    steps, low, high = curve["steps"], curve["low"], curve["high"]
    losses = [math.nan if loss is None else loss for loss in curve["losses"]]
    found = suggest([low * (high / low) ** (i / steps) for i in range(len(losses))], losses, steps)
    if curve["says_nothing"]:
        assert found == {}  # fastai gives a number, or an IndexError
        return
    theirs = {name: rate for name, rate in curve["fastai"].items() if rate != "IndexError"}
    assert {name: found[name] for name in found if name != "balanced"} == pytest.approx(theirs, rel=1e-6)
    assert found["balanced"] == pytest.approx(math.sqrt(theirs["valley"] * theirs["minimum"]))
