"""Body, head and layer groups."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import nn

from pipelines.errors import UserError, first_line

TORCHVISION = frozenset(torchvision.models.list_models(module=torchvision.models))
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation, for values in [0, 1], of the data that a body was trained on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """A body, images [N, 3, H, W] to features [N, F, h, w], and a head, features to logits [N, C]."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images_NCHW))


class ConcatPool(nn.Module):
    """Maximum and mean over the positions, side by side: [N, F, h, w] -> [N, 2F] (fastai's AdaptiveConcatPool2d)."""

    def forward(self, features_NFHW: torch.Tensor) -> torch.Tensor:
        return torch.cat([features_NFHW.amax(dim=(2, 3)), features_NFHW.mean(dim=(2, 3))], dim=1)


class MeanPool(nn.Module):
    """Mean over the positions: [N, F, h, w] -> [N, F]."""

    def forward(self, features_NFHW: torch.Tensor) -> torch.Tensor:
        return features_NFHW.mean(dim=(2, 3))


def build_head(kind: str, features: int, classes: int) -> nn.Module:
    """`fastai`: its `create_head`, same defaults, same initialisation. `plain`: mean pooling and one layer."""
    if kind == "plain":
        return nn.Sequential(MeanPool(), nn.Linear(features, classes))
    head = nn.Sequential(
        ConcatPool(),
        nn.BatchNorm1d(2 * features),
        nn.Dropout(0.25),
        nn.Linear(2 * features, 512, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, classes, bias=False),
    )
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return head


def build(name: str, *, head: str, classes: int, size: int) -> Classifier:
    """A classifier with fresh weights, for images of `size` pixels.

    Raises:
        UserError: the name is unknown, or the model makes no feature map [N, F, h, w].
    """
    advice = "Choose one that does, such as resnet34, convnext_tiny or tf_efficientnet_lite0."
    try:
        body = _body(name)
        with torch.inference_mode():
            features_NFHW = body.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--model {name} is not a convolutional classifier, or takes no images of --size {size}: it makes no "
            f"feature map ({first_line(error)}). {advice}"
        ) from None
    if features_NFHW.ndim != 4 or features_NFHW.shape[2] != features_NFHW.shape[3]:
        raise UserError(
            f"--model {name} is not a convolutional classifier: it makes {tuple(features_NFHW.shape)}, no feature map "
            f"[N, F, h, w] that a head could pool. {advice}"
        )
    return Classifier(body.train(), build_head(head, features_NFHW.shape[1], classes))


def statistics(name: str) -> Statistics:
    """The normalisation that the published weights of a body expect."""
    if name in TORCHVISION:
        weights = torchvision.models.get_model_weights(name)
        if not list(weights):
            return Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        transforms = weights["DEFAULT"].transforms()
        return Statistics(mean=tuple(transforms.mean), std=tuple(transforms.std))
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return Statistics(mean=tuple(config.mean), std=tuple(config.std))


def _body(name: str) -> nn.Module:
    check_known(name)
    if name in TORCHVISION:  # first, as in fastai
        return cut(torchvision.models.get_model(name, weights=None))
    return timm.create_model(name, num_classes=0, global_pool="")


def check_known(name: str) -> None:
    """Raise UserError, with similar names, unless torchvision or timm has a classifier of this name."""
    if name in TORCHVISION or timm.is_model(name):
        return
    near = difflib.get_close_matches(name, sorted(TORCHVISION | set(timm.list_models())), n=5)
    raise UserError(
        f"--model {name} is unknown to torchvision and to timm. "
        + (f"Similar names: {', '.join(near)}." if near else "`timm.list_models()` lists the names it has.")
    )


def cut(model: nn.Module) -> nn.Sequential:
    """A torchvision classifier without what follows its feature map, and without auxiliary classifiers on the way."""
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in model.named_children():
        if name in ("AuxLogits", "aux1", "aux2"):
            continue
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear)) or name in ("classifier", "avgpool"):
            break
        kept[name] = child
    return nn.Sequential(kept)


def stages(body: nn.Module) -> list[tuple[str, nn.Module]]:
    """The body's parts in order: its children, with sequences of blocks opened, twice."""

    def opened(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        children = list(module.named_children())
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and children:
            return [(f"{prefix}.{name}", child) for name, child in children]
        return [(prefix, module)]

    parts = list(body.named_children())
    for _ in range(2):
        parts = [part for name, child in parts for part in opened(name, child)]
    return parts


def layer_groups(model: Classifier, size: int, patterns: Sequence[str] | None = None) -> list[list[nn.Parameter]]:
    """Three groups, from the input to the head: body down to 1/8 of the resolution, the rest of the body, head.

    For a ResNet this is fastai's own cut (before layer3). Every parameter lies in exactly one group.

    Args:
        size: height and width of the images, pixels.
        patterns: the groups by name instead: see `named_groups`.

    Raises:
        UserError: the body cannot be divided so, or a parameter would be in no group or in two.
    """
    if patterns is not None:
        return named_groups(model, patterns)
    parts = stages(model.body)
    strides = _strides(model, parts, size)
    boundary = next((i for i, stride in enumerate(strides) if stride > 8), len(parts))
    early = [p for _, module in parts[:boundary] for p in module.parameters()]
    late = [p for _, module in parts[boundary:] for p in module.parameters()]
    groups = [early, late, list(model.head.parameters())]
    check_partition(model, groups)
    return groups


def stage_groups(model: Classifier, size: int) -> list[list[nn.Parameter]]:
    """A group for each stage of the body, which is what works at one resolution, and one for the head.

    A ResNet has conv1 with bn1, layer1, …, layer4 and the head. The groups of layer-wise decay (`schedule.layerwise`).

    Raises:
        UserError: as `layer_groups`.
    """
    parts = stages(model.body)
    groups: list[list[nn.Parameter]] = [[]]
    reached = 0
    for (_, module), stride in zip(parts, _strides(model, parts, size), strict=True):
        octave = round(math.log2(max(stride, 1)))  # convolutions without padding nibble at the edges: 1/2.1 is 1/2
        if octave > reached and groups[-1]:
            groups.append([])
        reached = max(octave, reached)
        groups[-1] += module.parameters()
    if not groups[-1]:  # a pooling at the very end
        groups.pop()
    groups.append(list(model.head.parameters()))
    check_partition(model, groups)
    return groups


def named_groups(model: Classifier, patterns: Sequence[str]) -> list[list[nn.Parameter]]:
    """Groups by regular expressions over the parameters' names, from the input to the head.

    A pattern is matched against the beginning of a name, and ends where a part of the name ends: `body.layer1|body.bn1`
    means `body.layer1.0.conv1.weight` and `body.bn1.bias`, and not `body.layer10.weight`.

    Raises:
        UserError: a pattern is no regular expression or matches nothing, or a parameter has no pattern or several.
    """
    expressions = []
    for pattern in patterns:
        try:
            expressions.append(re.compile(rf"(?:{pattern})(?:\.|$)"))
        except re.error as error:
            raise UserError(f"The layer group {pattern!r} is no regular expression: {error}.") from None
    groups: list[list[nn.Parameter]] = [[] for _ in patterns]
    for name, parameter in model.named_parameters():
        matching = [i for i, expression in enumerate(expressions) if expression.match(name)]
        if len(matching) != 1:
            told = " and ".join(repr(patterns[i]) for i in matching) or "none of them"
            raise UserError(
                f"The layer groups must have each parameter exactly once: {name} is matched by {told}. {_advice(model)}"
            )
        groups[matching[0]].append(parameter)
    for pattern, group in zip(patterns, groups, strict=True):
        if not group:
            raise UserError(f"The layer group {pattern!r} matches no parameter. {_advice(model)}")
    return groups


def _strides(model: Classifier, parts: list[tuple[str, nn.Module]], size: int) -> list[int]:
    """How many pixels of the image lie side by side under one position of each part's output; 0 where it has none."""
    reached: dict[str, int] = {}

    def note(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                reached[name] = size // output.shape[2]

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in parts]
    training = model.training
    example_NCHW = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    with torch.inference_mode():
        model.body.eval()(example_NCHW)
    model.train(training)
    for handle in handles:
        handle.remove()
    return [reached.get(name, 0) for name, _ in parts]


def check_partition(model: Classifier, groups: list[list[nn.Parameter]]) -> None:
    """Every parameter in exactly one group, no group empty; else an error that names the parameter."""
    times: dict[int, int] = {}
    for group in groups:
        for parameter in group:
            times[id(parameter)] = times.get(id(parameter), 0) + 1
    for name, parameter in model.named_parameters():
        count = times.get(id(parameter), 0)
        if count != 1:
            raise UserError(
                f"The model cannot be divided into layer groups: its parameter {name} lies in {count} of them, "
                f"and each must lie in exactly one. {_advice(model)}"
            )
    if not all(groups):
        raise UserError(
            f"The model cannot be divided into {len(groups)} layer groups: one of them has no parameter. "
            f"{_advice(model)}"
        )


def _advice(model: Classifier) -> str:
    """How to name the groups of this very model."""
    names: list[str] = []
    for depth in (2, 3):  # a body may be one sequence of everything
        parts = (".".join(name.split(".")[:depth]) for name, _ in model.body.named_parameters(prefix="body"))
        names = list(dict.fromkeys(parts))
        if len(names) > 1:
            break
    half = len(names) // 2
    patterns = ("|".join(names[:half]), "|".join(names[half:]), "head")
    return "Name the groups by patterns, from the input to the head, as in: --layer-groups " + " ".join(
        shlex.quote(pattern) for pattern in patterns if pattern
    )


def freeze_to(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], n: int, *, train_bn: bool = True) -> None:
    """Train the layer groups from `n` on alone, as fastai's `freeze_to`; a negative `n` counts from the end.

    The norms of frozen groups go on learning, unless `train_bn` is off; their running statistics always do.

    Raises:
        UserError: there is no group `n`, and nothing would learn.
    """
    if not -len(groups) <= n < len(groups):
        raise UserError(
            f"freeze_to({n}) of a model with {len(groups)} layer groups: choose a number from {-len(groups)} to "
            f"{len(groups) - 1}, the first group that learns."
        )
    norms = {
        id(parameter)
        for module in model.modules()
        if train_bn and isinstance(module, NORMS)
        for parameter in module.parameters(recurse=False)
    }
    first = n % len(groups)
    for i, group in enumerate(groups):
        for parameter in group:
            parameter.requires_grad_(i >= first or id(parameter) in norms)


def freeze(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]], *, train_bn: bool = True) -> None:
    """Train the last layer group alone."""
    freeze_to(model, groups, -1, train_bn=train_bn)


def unfreeze(model: nn.Module, groups: Sequence[Sequence[nn.Parameter]]) -> None:
    """Train everything."""
    freeze_to(model, groups, 0)
