"""The averaged weights: the recurrence, the warm-up, steps that did not happen, and going on."""

import io

import pytest
import torch
from torch import nn

from trainer.ema import Ema
from trainer.models import Classifier


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Flatten())


def wander(model, step):
    """Weights and statistics as after some training step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in (*model.parameters(), model.body[1].running_mean, model.body[1].running_var):
            value.copy_(torch.rand(value.shape, generator=generator))
        model.body[1].num_batches_tracked += 1


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_its_recurrence_with_warm_up(model, decay):
    ema = Ema(model, decay)
    expected = {}
    for n in range(1, 12):
        wander(model, n)
        ema.update(model)
        now = {name: value.double() for name, value in state(model).items()}
        keep = min(decay, 1 - n ** (-2 / 3))
        expected = {name: keep * expected.get(name, 0) + (1 - keep) * value for name, value in now.items()}
        for name, value in ema.model.state_dict().items():
            wanted = now[name] if name.endswith("tracked") else expected[name]
            assert torch.allclose(value.double(), wanted, rtol=1e-5), (n, name)
    assert ema.updates == 11
    assert not any(module.training for module in ema.model.modules())


def test_the_model_that_is_averaged_is_left_alone(model):
    before = state(model)
    ema = Ema(model, 0.9)
    ema.update(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    wander(model, 1)
    assert all(ema.model.state_dict()[name].equal(before[name]) for name in before)


def test_weights_that_stand_still_are_their_own_average_to_the_bit(model):
    ema = Ema(model, 0.999)
    for _ in range(20):
        ema.update(model)
    assert all(value.equal(ema.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_going_on_from_a_checkpoint_changes_nothing(model):
    ema = Ema(model, 0.99)
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(ema.state_dict(), file)
            file.seek(0)
            again = Ema(model, 0.99)
            again.load_state_dict(torch.load(file, weights_only=True))
        wander(model, step)
        ema.update(model)
        if step >= 4:
            again.update(model)
    assert again.updates == ema.updates == 8
    assert all(value.equal(again.model.state_dict()[name]) for name, value in ema.model.state_dict().items())


def test_it_holds_still_when_the_scaler_skips_a_step(model):
    """As the training loop asks the scaler: a scale that fell means a step that did not happen."""
    ema = Ema(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    averages = []
    for gradient in (1.0, float("inf"), 1.0):
        scale = scaler.get_scale()
        loss = sum(parameter.sum() for parameter in model.parameters()) * gradient
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() >= scale:
            ema.update(model)
        averages.append((ema.updates, state(ema.model)))
    assert [updates for updates, _ in averages] == [1, 1, 2]
    weight = "body.0.weight"
    assert averages[0][1][weight].equal(averages[1][1][weight])
    assert not averages[1][1][weight].equal(averages[2][1][weight])


def test_the_mean_of_the_ranks_averages_is_the_average_of_the_mean(model):
    """Batch statistics are the ranks' own while training, and made one before judging."""
    emas = [Ema(model, 0.9) for _ in range(3)]
    mean = Ema(model, 0.9)
    for step in range(6):
        seen = []
        for rank, ema in enumerate(emas):
            wander(model, 10 * step + rank)
            ema.update(model)
            seen.append(state(model))
        model.load_state_dict({name: sum(each[name] for each in seen) / 3 for name in seen[0]})
        mean.update(model)
    for name, value in mean.model.named_buffers():
        if not name.endswith("tracked"):
            together = torch.stack([ema.model.get_buffer(name) for ema in emas]).mean(dim=0)
            assert torch.allclose(together, value, rtol=1e-5)
