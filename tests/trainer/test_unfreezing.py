"""What an optimiser remembers where another set of layers begins to learn: nothing, as in fastai."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.runs import newest
from trainer import models, optim
from trainer.ranks import Ranks
from trainer.schedule import fine_tune
from trainer.worker import run

GOLDEN = json.loads((Path(__file__).parent / "golden/unfreezing.json").read_text())


def tuned(*, forget: bool) -> list[torch.Tensor]:
    """The weights after the same `fine_tune(1, base_lr=0.02)` as fastai's, in batches of 2."""
    body = nn.Sequential(OrderedDict(early=nn.Linear(4, 3), late=nn.Linear(3, 3)))
    model = models.Classifier(body, nn.Linear(3, 2)).double()
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), GOLDEN["before"], strict=True):
            parameter.copy_(torch.tensor(values, dtype=torch.float64))
    images_N4, labels_N = torch.tensor(GOLDEN["images_N4"], dtype=torch.float64), torch.tensor(GOLDEN["labels_N"])
    optimizer = optim.build(model, 0.01, 32, patterns=["body.early", "body.late", "head"])
    for phase in fine_tune(base_lr=0.02, groups=3, steps_per_epoch=7, epochs=1, freeze_epochs=1):
        if forget:
            optim.forget(optimizer)
        models.freeze_to(model, optim.groups_of(optimizer), phase.freeze_to)
        for step in range(7):
            optim.set_hyper(optimizer, *phase.hyper(step))
            part = slice(2 * step, 2 * step + 2)
            nn.functional.cross_entropy(model(images_N4[part]), labels_N[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters())


def test_weights_after_unfreezing_are_fastais():
    after = [torch.tensor(values, dtype=torch.float64) for values in GOLDEN["after"]]
    for ours, theirs in zip(tuned(forget=True), after, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    carried = zip(tuned(forget=False), after, strict=True)
    assert max((ours - theirs).abs().max() for ours, theirs in carried) > 1e-4  # the comparison can tell


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_an_optimiser_that_forgot_steps_like_a_new_one(name):
    def stepped(used: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = models.build("mobilenetv3_small_050", head="plain", classes=3, size=64)
        optimizer = optim.build(model, 0.01, 64, name=name)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        for part in ([0.3, -0.2, 0.1] if used else []) + [0.05]:
            if part == 0.05:
                optim.forget(optimizer)
                with torch.no_grad():
                    for parameter, value in zip(model.parameters(), start, strict=True):
                        parameter.copy_(value)
            optim.set_hyper(optimizer, [1e-2] * 3, 0.9)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, part)
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(stepped(True), stepped(False), strict=True))


def test_the_worker_begins_each_phase_so(prepared):
    path = prepared("run", epochs=1, freeze_epochs=1, lr=1e-3, size=32)
    run(path, "train", Ranks())
    state = safetensors.torch.load_file(newest(path) / "optimizer.safetensors")
    steps = {int(value) for name, value in state.items() if name.endswith("/step")}
    assert steps == {53 // 8}  # the head's, too, is that of the second phase
