"""Each optimiser against its formula, and rates and momentum where they belong."""

import numpy as np
import pytest
import torch

from trainer import models, optim

DECAY = 0.1
WEIGHT, BIAS = "head.1.weight", "head.1.bias"


def steps_of(name, gradients_SN, lrs, momenta):
    """The head's weight and bias after steps with given gradients, everything else without: [S + 1, n] each."""
    torch.manual_seed(0)
    model = models.build("mobilenetv3_small_050", head="plain", classes=3, size=64)
    optimizer = optim.build(model, DECAY, 64, name=name)
    model.double()
    parameters = dict(model.named_parameters())
    untouched = parameters["body.conv_stem.weight"].detach().clone()
    path = {key: [parameters[key].detach().numpy().copy()] for key in (WEIGHT, BIAS)}
    for gradient_N, lr, momentum in zip(gradients_SN, lrs, momenta, strict=True):
        for key in (WEIGHT, BIAS):
            parameters[key].grad = torch.full_like(parameters[key], float(gradient_N))
        optim.set_hyper(optimizer, [0.0, 0.0, lr], momentum)
        optimizer.step()
        for key in (WEIGHT, BIAS):
            path[key].append(parameters[key].detach().numpy().copy())
    assert torch.equal(parameters["body.conv_stem.weight"], untouched)
    return path


GRADIENTS, LRS, MOMENTA = [1e-3, -2e-3, 5e-4, 1e-3], [0.1, 0.2, 0.3, 0.1], [0.95, 0.9, 0.85, 0.9]


def adam_direction(gradients, betas, step):
    """Bias-corrected moments as torch and timm have them: corrected by the betas of the step itself."""
    m = v = 0.0
    for g, beta in zip(gradients[: step + 1], betas, strict=False):
        m, v = beta * m + (1 - beta) * g, 0.99 * v + 0.01 * g * g
    corrected = m / (1 - betas[step] ** (step + 1))
    return corrected / (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-5)


@pytest.mark.parametrize(("key", "decay"), [(WEIGHT, DECAY), (BIAS, 0.0)])
def test_adamw(key, decay):
    path = steps_of("adamw", GRADIENTS, LRS, MOMENTA)[key]
    p = path[0]
    for step, lr in enumerate(LRS):
        p = p * (1 - lr * decay) - lr * adam_direction(GRADIENTS, MOMENTA, step)
        np.testing.assert_allclose(path[step + 1], p, rtol=1e-9)


@pytest.mark.parametrize(("key", "decay"), [(WEIGHT, DECAY), (BIAS, 0.0)])
def test_sgd_has_its_own_momentum_and_decoupled_decay(key, decay):
    path = steps_of("sgd", GRADIENTS, LRS, MOMENTA)[key]
    p, average = path[0], 0.0
    for step, (g, lr, momentum) in enumerate(zip(GRADIENTS, LRS, MOMENTA, strict=True)):
        average = momentum * average + g
        p = p * (1 - lr * decay) - lr * average
        np.testing.assert_allclose(path[step + 1], p, rtol=1e-9)


@pytest.mark.parametrize(("key", "decay"), [(WEIGHT, DECAY), (BIAS, 0.0)])
def test_lamb_moves_a_weight_by_a_share_of_its_length(key, decay):
    path = steps_of("lamb", GRADIENTS, LRS, MOMENTA)[key]
    p = path[0]
    for step, lr in enumerate(LRS):
        update = adam_direction(GRADIENTS, MOMENTA, step) + decay * p
        trust = np.linalg.norm(p) / np.linalg.norm(update) if decay else 1.0  # what is not decayed is not scaled
        p = p - lr * trust * update
        np.testing.assert_allclose(path[step + 1], p, rtol=1e-9)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_every_parameter_has_the_rate_of_its_group(name):
    model = models.build("resnet18", head="fastai", classes=3, size=64)
    optimizer = optim.build(model, DECAY, 64, name=name, by_stage=True)
    stages = models.stage_groups(model, 64)
    assert [{id(p) for p in group} for group in optim.groups_of(optimizer)] == [{id(p) for p in g} for g in stages]
    lrs = [float(i) for i in range(len(stages))]
    optim.set_hyper(optimizer, lrs, 0.87)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rate[id(p)] == i for i, stage in enumerate(stages) for p in stage)
    assert {group["momentum"] if name == "sgd" else group["betas"][0] for group in optimizer.param_groups} == {0.87}
