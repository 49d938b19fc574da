"""The optimiser and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from trainer.models import NORMS, Classifier, layer_groups
from trainer.ranks import Ranks


def build(model: Classifier, weight_decay: float, size: int) -> torch.optim.AdamW:
    """AdamW over the layer groups, with fastai's constants; norms and biases are not decayed.

    Each torch parameter group carries `layer_group`, the index of the layer group whose rate it takes.
    """
    plain = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name == "bias" or parameter.ndim <= 1
    }
    groups = []
    for index, parameters in enumerate(layer_groups(model, size)):
        for decay, members in (
            (weight_decay, [p for p in parameters if id(p) not in plain]),
            (0.0, [p for p in parameters if id(p) in plain]),
        ):
            if members:
                groups.append({"params": members, "weight_decay": decay, "layer_group": index})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-5, fused=True)


def set_hyper(optimizer: torch.optim.Optimizer, lrs: list[float], momentum: float) -> None:
    """Set the rate of each layer group and the momentum of all."""
    for group in optimizer.param_groups:
        group["lr"] = lrs[group["layer_group"]]
        group["betas"] = (momentum, group["betas"][1])


def average_batch_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Each rank's batch-norms have seen its own images: make the running statistics the mean over ranks."""
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            ranks.sum(buffer)
            buffer /= ranks.world_size
