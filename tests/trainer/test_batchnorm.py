"""Batch-norm over all ranks is torch's own over their images together: values, gradients, statistics, training."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm.layers
import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.plan import rank_slice
from tests.ranks import on_ranks
from tests.runs import newest
from tests.trainer.test_lr_range import everything, same, tiny_batches, tiny_learner, tiny_test
from tests.trainer.test_parity import epochs, losses
from trainer import models, optim
from trainer.batchnorm import synchronised
from trainer.config import TrainConfig
from trainer.loop import train_step
from trainer.models import Classifier
from trainer.ranks import Ranks
from trainer.starting import check_batch
from trainer.worker import run

ACT = partial(timm.layers.BatchNormAct2d, act_layer=nn.SiLU, drop_layer=partial(nn.Threshold, -0.5, -0.5))


def against_torch(ranks, make, shape, dtype, mean, tolerance):
    """Two steps and an evaluation, on this rank's part and, by torch's own module, on all."""
    torch.manual_seed(0)
    whole = make(shape[1]).to(torch.promote_types(dtype, torch.float32))
    ours = synchronised(Classifier(nn.Identity(), copy.deepcopy(whole)), ranks).head
    own = torch.from_numpy(rank_slice(np.arange(shape[0]), ranks.rank, ranks.world_size))
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for _ in range(2):
        x, grad_y = torch.randn(2, *shape, dtype=torch.float64)
        x = (3 * x + mean).to(dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x_all, x_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        y_all, y_own = whole(x_all), ours(x_own)
        close(y_own, y_all[own])
        y_all.backward(grad_y.to(dtype))
        y_own.backward(grad_y[own].to(dtype))
        close(x_own.grad, x_all.grad[own])
        for parameter_all, parameter_own in zip(whole.parameters(), ours.parameters(), strict=True):
            close(ranks.sum(parameter_own.grad), parameter_all.grad)
            parameter_own.grad = parameter_all.grad = None
    assert ours.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        close(ours.state_dict()[name], value)
    ours.load_state_dict(whole.state_dict())
    assert ours.eval()(x_all).equal(whole.eval()(x_all))


def modules(ranks, path):
    check = partial(against_torch, ranks)
    maps, rows = (7, 5, 6, 4), (7, 5)
    for make, shape in ((nn.BatchNorm2d, maps), (nn.BatchNorm1d, rows), (ACT, maps)):
        check(make, shape, torch.float64, 100, 1e-9)
        check(make, shape, torch.float32, 10_000, 3e-2)  # sums of squares would leave nothing of the variance, 9
        check(make, shape, torch.bfloat16, 1, 2e-2)
    check(nn.BatchNorm1d, (ranks.world_size, 5), torch.float64, 0, 1e-9)  # one value on each rank
    check(partial(nn.BatchNorm2d, affine=False), maps, torch.float64, 0, 1e-9)
    check(partial(nn.BatchNorm2d, momentum=None), maps, torch.float64, 0, 1e-9)
    check(partial(nn.BatchNorm2d, track_running_stats=False), (ranks.world_size * 2, 5, 6, 4), torch.float64, 0, 1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_torchs_batch_norm_of_the_whole_batch(tmp_path, world):
    on_ranks(world, modules, tmp_path)


def part(batch, ranks):
    """This rank's part of a global batch."""
    own = rank_slice(np.arange(len(batch.labels_N)), ranks.rank, ranks.world_size)
    return replace(batch, images_NCHW=batch.images_NCHW[own], labels_N=batch.labels_N[own], ids_N=batch.ids_N[own])


def without_dropout(learner):
    """Each rank draws its own dropout: without it, ranks and one alone compute the same."""
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return learner


def phases(ranks, path):
    """Frozen with norms that learn, frozen wholly, then all, with a range test in each: as one rank alone does."""
    alone, learner = without_dropout(tiny_learner()), without_dropout(tiny_learner(ranks))
    names = list(learner.model.state_dict())
    assert synchronised(learner.model, ranks) is learner.model
    assert list(learner.model.state_dict()) == names
    for first_group, train_bn in ((-1, True), (-1, False), (0, True)):
        for each in (alone, learner):
            each.train(first_group=first_group, train_bn=train_bn)
        for batch in tiny_batches(count=4, first=10 * first_group):
            step = partial(train_step, global_batch=8, hyper=([1e-3] * 3, 0.9), noise=(0, 0, batch.step))
            ours, expected = step(learner, part(batch, ranks)), step(alone, batch)
            assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        before = everything(learner)
        swept = tiny_test(learner, (part(batch, ranks) for batch in tiny_batches()), path)
        assert same(before, everything(learner))
        expected = tiny_test(alone, tiny_batches(), path)
        assert len(swept.losses) == len(expected.losses) > 10
        assert swept.losses[:10] == pytest.approx(expected.losses[:10], rel=1e-4)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(learner.model.state_dict()[name], value, rtol=1e-3, atol=2e-4)

    state = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for other in ranks.gather([state]):
        assert same(state, other)
    optim.average_batch_statistics(learner.model, ranks)
    assert same(state, learner.model.state_dict())
    learner.model.eval()
    if ranks.rank == 0:  # one rank alone: it would wait for the others
        learner.model(next(tiny_batches()).images_NCHW)


@pytest.mark.parametrize("world", [2, 3])
def test_phases_and_range_tests_are_those_of_one_rank(tmp_path, world):
    on_ranks(world, phases, tmp_path)


def averaging(ranks, path):
    torch.manual_seed(0)
    mean, variance = torch.rand(2, 1000)
    model = nn.BatchNorm1d(1000)
    model.running_mean.copy_(mean + ranks.rank)
    model.running_var.copy_(variance)
    optim.average_batch_statistics(model, ranks)
    torch.testing.assert_close(model.running_mean, mean + (ranks.world_size - 1) / 2)
    assert model.running_var.equal(variance)  # a third of a sum of three is rounded in 32 bits


def test_averaging_statistics_leaves_equal_ones_alone(tmp_path):
    on_ranks(3, averaging, tmp_path)


def train(ranks, path):
    nn.Dropout.forward = lambda self, input: input  # ty: ignore[invalid-assignment]
    run(path, "train", ranks)


def test_fifty_steps_have_the_losses_of_one_rank(prepared, copies, monkeypatch):
    # SiLU: at the kink of a ReLU, rounding alone can decide a gradient, and with so few images it shows in the loss.
    alone = prepared(
        "alone", model="test_efficientnet", epochs=6, freeze_epochs=2, lr=4e-3, batch=7, ema=0.9, sync_bn=True
    )
    others = {world: copies(alone, f"on-{world}") for world in (2, 3)}
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, input: input)
    run(alone, "train", Ranks())
    one = losses(alone)
    assert len(one) == 8 * (53 // 7) >= 50
    assert one.std() > 0.03
    kept, initial = "model.safetensors", "initial.safetensors"
    for name in ("head.1.weight", "body.bn2.running_var"):  # it learns: what is equal is not what was there
        moved = safetensors.torch.load_file(alone / kept)[name] - safetensors.torch.load_file(alone / initial)[name]
        assert moved.abs().max() > 1e-2
    for world, together in others.items():
        on_ranks(world, train, together)
        np.testing.assert_allclose(losses(together), one, rtol=1e-4)
        for a, b in zip(epochs(alone), epochs(together), strict=True):
            assert a["valid_loss"] == pytest.approx(b["valid_loss"], rel=1e-4)
        for place in (lambda path: path, newest):
            tensors, expected = (safetensors.torch.load_file(place(path) / kept) for path in (together, alone))
            assert list(tensors) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(tensors[name], value, rtol=1e-3, atol=1e-4)


def test_one_rank_keeps_torchs_own_modules():
    model = models.build("mobilenetv3_small_050", head="fastai", classes=3, size=32)
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in synchronised(model, Ranks()).modules()] == kinds


def test_on_gpus_the_modules_are_torchs_with_their_activations(monkeypatch):
    torch.manual_seed(0)
    model = models.build("mobilenetv3_small_050", head="fastai", classes=3, size=32)
    images_NCHW = torch.randn(2, 3, 32, 32)
    before, logits_NC = model.state_dict(), model.eval()(images_NCHW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = synchronised(model, Ranks(world_size=2))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 30
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == list(before)
    assert all(value.data_ptr() == before[name].data_ptr() for name, value in model.state_dict().items())
    assert model(images_NCHW).equal(logits_NC)


def test_each_worker_may_then_have_one_image():
    check_batch(TrainConfig(workers=4, batch=4, sync_bn=True))
    with pytest.raises(UserError, match=r"--batch 4 .* fewer than two images.*, or --sync-bn\."):
        check_batch(TrainConfig(workers=4, batch=4))
    with pytest.raises(UserError, match=r"--batch 3 gives some of the 4 workers no image\."):
        check_batch(TrainConfig(workers=4, batch=3, sync_bn=True))
