"""The optimiser and its parameter groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import timm.optim
import torch
from torch import nn

from trainer.models import NORMS, Classifier, layer_groups, stage_groups
from trainer.ranks import Ranks

Name = Literal["adamw", "sgd", "lamb"]

# Class and register tokens, position embeddings, biases of relative positions: what no recipe of transformers decays.
EMBEDDING = re.compile(r"(.*\.)?(\w+_token\d*|pos_embed\w*|pos_embedding|relative_position_bias_table)")

BETAS, EPS = (0.9, 0.99), 1e-5  # fastai's
CLIP_NORM = {"lamb": 1.0}  # as in its reference implementation; the training step clips, for all optimisers alike


def build(
    model: Classifier,
    weight_decay: float,
    size: int,
    *,
    name: Name = "adamw",
    by_stage: bool = False,
    patterns: Sequence[str] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser over the layer groups, with fastai's constants. Norms, biases, tokens and position embeddings are
    not decayed.

    Each torch parameter group carries `layer_group`, the index of the layer group whose rate it takes.

    Args:
        weight_decay: decoupled: a step with rate lr shrinks a weight by lr * weight_decay (LAMB, as its paper has it,
            counts that into the update whose length it then sets).
        size: height and width of the images, pixels.
        name: `adamw`; `sgd`: with momentum; `lamb`: for large batches (You et al., "Large batch optimization for deep
            learning: training BERT in 76 minutes", 2019; its gradients are to be clipped, see `CLIP_NORM`).
        by_stage: a layer group for each stage (`models.stage_groups`), for layer-wise decay; without it three.
        patterns: the layer groups by name (`models.named_groups`) instead of either.
    """
    plain = {
        id(parameter)
        for module in model.modules()
        for name_, parameter in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name_ == "bias" or parameter.ndim <= 1
    }
    named_by_body = getattr(model.body, "no_weight_decay", set)()  # timm's models tell what is special to them
    plain |= {id(p) for n, p in model.body.named_parameters() if n in named_by_body or EMBEDDING.fullmatch(n)}
    groups = []
    divided = stage_groups(model, size) if by_stage and patterns is None else layer_groups(model, size, patterns)
    for index, parameters in enumerate(divided):
        for decay, members in (
            (weight_decay, [p for p in parameters if id(p) not in plain]),
            (0.0, [p for p in parameters if id(p) in plain]),
        ):
            if members:
                groups.append({"params": members, "weight_decay": decay, "layer_group": index})
    if name == "sgd":
        return timm.optim.SGDW(groups, lr=0.0, momentum=0.9)  # torch's own couples decay and momentum
    if name == "lamb":
        return timm.optim.Lamb(groups, lr=0.0, betas=BETAS, eps=EPS, max_grad_norm=None)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def groups_of(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of each layer group, from the input to the head."""
    groups: list[list[nn.Parameter]] = [[] for _ in {group["layer_group"] for group in optimizer.param_groups}]
    for group in optimizer.param_groups:
        groups[group["layer_group"]] += group["params"]
    return groups


def set_hyper(optimizer: torch.optim.Optimizer, lrs: list[float], momentum: float) -> None:
    """Set the rate of each layer group and the momentum of all: SGD's own, or the first beta of Adam's kin."""
    for group in optimizer.param_groups:
        group["lr"] = lrs[group["layer_group"]]
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Drop all averages of gradients, as fastai does whenever it freezes or unfreezes (`Optimizer.clear_state`).

    What learns next begins with the same age in every layer: averages that the head kept from a phase of its own would
    be of another loss surface, and a rate that starts low again is meant to warm new ones up.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)  # LAMB counts its steps here, also those of groups that were frozen


def average_batch_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Each rank's batch-norms have seen its own images: make the running statistics the mean over ranks.

    Statistics that are the same on all ranks stay what they are, to the bit: sums of 64 bits are exact then.
    """
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(ranks.sum(buffer.double()) / ranks.world_size)
