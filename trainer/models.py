"""Body, head and layer groups."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import timm.layers
import timm.models
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from pipelines.errors import UserError, first_line

TORCHVISION = frozenset(torchvision.models.list_models(module=torchvision.models))
# They turn images normalised for ImageNet into ones from -1 to 1 in their `forward`, which `cut` leaves behind.
REBASED = ("googlenet", "inception_v3")
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
UNFIT = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError)  # of a model that is asked too much


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation, for values in [0, 1], of the data that a body was trained on."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Classifier(nn.Module):
    """A body, images [N, 3, H, W] to features, and a head, features to logits [N, C].

    Features are a map [N, F, h, w] or [N, h, w, F], or a vector [N, F] where the body pools by itself, as transformers.
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head
        self._order = torch.preserve_format

    def ordered(self, order: torch.memory_format) -> Classifier:
        """The same model, with its filters, and each batch that it is given, in this order in memory."""
        self._order = order
        return self.to(memory_format=order)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images_NCHW.to(memory_format=self._order)))

    @property
    def pooled(self) -> bool:
        """Does the body pool by itself, and the head take a vector?"""
        return isinstance(next(self.head.children(), None), nn.Identity)


class ConcatPool(nn.Module):
    """Maximum and mean over the positions, side by side: map -> [N, 2F] (fastai's AdaptiveConcatPool2d).

    `positions` are the dimensions of the map that are pooled: (2, 3) of [N, F, h, w], (1, 2) of [N, h, w, F].
    """

    def __init__(self, positions: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([features.amax(dim=self.positions), features.mean(dim=self.positions)], dim=1)


class MeanPool(nn.Module):
    """Mean over the positions, as those of `ConcatPool`: map -> [N, F]."""

    def __init__(self, positions: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean(dim=self.positions)


def build_head(kind: str, features: int, classes: int, positions: tuple[int, int] | None = (2, 3)) -> nn.Module:
    """`fastai`: its `create_head`, same defaults, same initialisation. `plain`: mean pooling and one layer.

    Args:
        positions: the dimensions of a map that are pooled; None: the features are a vector, and nothing is.
    """
    if kind == "plain":
        return nn.Sequential(MeanPool(positions) if positions else nn.Identity(), nn.Linear(features, classes))
    pooled = 2 * features if positions else features
    head = nn.Sequential(
        ConcatPool(positions) if positions else nn.Identity(),
        nn.BatchNorm1d(pooled),
        nn.Dropout(0.25),
        nn.Linear(pooled, 512, bias=False),
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
        UserError: the name is unknown, or the model takes no images of this size; sizes near it that fit are told.
    """
    check_known(name)
    try:
        body, features = _probed(name, size)
    except UNFIT as error:
        near = sizes_near(name, size)
        told = (
            f"Sizes near it that fit: {' and '.join(map(str, near))}." if near else "Choose another --size or --model."
        )
        raise UserError(f"--model {name} takes no images of --size {size} ({first_line(error)}). {told}") from None
    if features.ndim == 2:
        return Classifier(body.train(), build_head(head, features.shape[1], classes, None))
    if getattr(body, "output_fmt", "NCHW") == "NHWC":
        return Classifier(body.train(), build_head(head, features.shape[3], classes, (1, 2)))
    return Classifier(body.train(), build_head(head, features.shape[1], classes))


def check_takes(model: Classifier, name: str, size: int) -> None:
    """Raise UserError where a model that was built for one size of images does not take another."""
    training = model.training
    try:
        _check_patches(model.body, size)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except UNFIT as error:
        raise UserError(
            f"--model {name} takes no images of --size {size} beside its last size ({first_line(error)}). Choose other "
            "--sizes, or a model without a fixed size: most that are made of convolutions have none."
        ) from None
    finally:
        model.train(training)


def _probed(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A fresh body, and the features that it makes of an image: a map where it can, else a vector.

    Raises:
        One of UNFIT: it does not take images of this size.
    """
    for pooled in (False, True):
        try:
            body = bare(name, size, pooled=pooled)
            _check_patches(body, size)
            with torch.no_grad():  # not inference_mode: some bodies keep what they compute, and train with it later
                features = body.eval()(torch.zeros(1, 3, size, size))
        except UNFIT:
            if pooled:
                raise
            continue
        if isinstance(features, torch.Tensor) and features.ndim in (2, 4):
            return body, features
    raise ValueError("its features are neither a map nor a vector")


def _check_patches(body: nn.Module, size: int) -> None:
    """Raise ValueError where the last pixels of each side would fill no patch, and the model would not see them."""
    embedding = getattr(body, "patch_embed", None)
    if not isinstance(embedding, timm.layers.PatchEmbed) or embedding.dynamic_img_pad:
        return
    patch = embedding.patch_size[0]
    if size % patch:
        raise ValueError(f"{size} is no multiple of its patches' {patch} pixels")


def bare(name: str, size: int, *, pooled: bool, pretrained: bool = False) -> nn.Module:
    """A classifier's body, made for images of `size` pixels where it must be made for one size.

    Args:
        pooled: keep the model's own pooling: features are a vector. Bodies of torchvision have it where they need it.
        pretrained: with its published weights, downloaded; timm resamples position embeddings to `size`, and
            torchvision has them for the size of the weights (`weights.load` resamples them).
    """
    if name in TORCHVISION:  # first, as in fastai
        if pretrained:
            return cut(torchvision.models.get_model(name, weights="DEFAULT"))
        sized = {"vit": {"image_size": size}, "maxvit": {"input_size": (size, size)}}.get(name.split("_")[0], {})
        return cut(torchvision.models.get_model(name, weights=None, **sized))
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {} if pooled else {"global_pool": ""}
    if config is not None and config.fixed_input_size:
        options["img_size"] = size
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)


def sizes_near(name: str, size: int) -> list[int]:
    """The next sizes below and above that the model takes: multiples of usual patches and windows, or of its own."""

    def fits(candidate: int) -> bool:
        try:
            with torch.device("meta"):  # shapes alone: a large model costs no memory and no arithmetic
                _probed(name, candidate)
        except UNFIT:
            return False
        return True

    own = own_size(name)
    steps = (14, 16, 32, 64, own // 2, own)
    below = sorted({size // step * step for step in steps} - {0, size}, reverse=True)
    above = sorted({(size // step + 1) * step for step in steps})
    found = (next(filter(fits, candidates), None) for candidates in (below, above))
    return [candidate for candidate in found if candidate is not None]


def own_size(name: str) -> int:
    """Height and width, pixels, of the images that the published weights were trained on; 224 where nothing tells."""
    config = None if name in TORCHVISION else timm.get_pretrained_cfg(name)
    return config.input_size[-1] if config else 224


def statistics(name: str) -> Statistics:
    """The normalisation that the published weights of a body expect."""
    if name in TORCHVISION:
        weights = torchvision.models.get_model_weights(name)
        if not list(weights):
            return Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        if name in REBASED:
            return Statistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        transforms = weights["DEFAULT"].transforms()
        return Statistics(mean=tuple(transforms.mean), std=tuple(transforms.std))
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return Statistics(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return Statistics(mean=tuple(config.mean), std=tuple(config.std))


def check_known(name: str) -> None:
    """Raise UserError, with similar names, unless torchvision or timm has a classifier of this name."""
    if name in TORCHVISION:
        return
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:
            tags = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
            raise UserError(
                f"--model {name}: timm has the model, without weights of that name. It has "
                + (f"{', '.join(tags)}." if tags else "none: leave out what follows the dot.")
            ) from None
        return
    near = difflib.get_close_matches(name, sorted(TORCHVISION | set(timm.list_models())), n=5)
    raise UserError(
        f"--model {name} is unknown to torchvision and to timm. "
        + (f"Similar names: {', '.join(near)}." if near else "`timm.list_models()` lists the names it has.")
    )


def cut(model: nn.Module) -> nn.Module:
    """A torchvision classifier without what follows its features, and without auxiliary classifiers on the way."""
    if isinstance(model, VisionTransformer):
        model.heads = nn.Sequential()  # what it computes is no sequence of its parts
        return model
    kept: OrderedDict[str, nn.Module] = OrderedDict()
    for name, child in model.named_children():
        if name in ("AuxLogits", "aux1", "aux2"):
            continue
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear)) or name in ("classifier", "avgpool"):
            break
        kept[name] = nn.Sequential(*child) if isinstance(child, nn.ModuleList) else child
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
    """Three groups, from the input to the head: the early body, the late body, the head.

    Early is what works at 1/8 of the resolution or more: for a ResNet this is fastai's own cut (before layer3). Where
    there is no map, as in a transformer, or its resolution tells nothing, early are the embedding and the first half of
    the blocks. Every parameter lies in exactly one group.

    Args:
        size: height and width of the images, pixels.
        patterns: the groups by name instead: see `named_groups`.

    Raises:
        UserError: the body cannot be divided so, or a parameter would be in no group or in two.
    """
    if patterns is not None:
        return named_groups(model, patterns)
    parts = stages(model.body)
    early, late = _early_and_late(parts, _octaves(model, parts, size))
    if blocks := _blocks(model, early, late):
        half = 1 + (len(blocks) - 1) // 2
        early, late = ([p for block in part for p in block] for part in (blocks[:half], blocks[half:]))
    else:
        early = [*model.body.parameters(recurse=False), *early]
    groups = [early, late, list(model.head.parameters())]
    check_partition(model, groups)
    return groups


def stage_groups(model: Classifier, size: int) -> list[list[nn.Parameter]]:
    """A group for each stage of the body, and one for the head: the groups of layer-wise decay (`schedule.layerwise`).

    A stage is what works at one resolution: a ResNet has conv1 with bn1, layer1, …, layer4. Where there is no map, as
    in a transformer, or its resolution tells nothing, they are the embedding and each block, with the norms after it.

    Raises:
        UserError: as `layer_groups`.
    """
    parts = stages(model.body)
    octaves = _octaves(model, parts, size)
    groups: list[list[nn.Parameter]] = [[]]
    reached = 0
    for (_, module), octave in zip(parts, octaves, strict=True):
        if octave > reached and groups[-1]:
            groups.append([])
        reached = max(octave, reached)
        groups[-1] += module.parameters()
    if not groups[-1]:  # a pooling at the very end
        groups.pop()
    if blocks := _blocks(model, *_early_and_late(parts, octaves)):
        groups = blocks
    else:
        groups[0] = [*model.body.parameters(recurse=False), *groups[0]]
    groups.append(list(model.head.parameters()))
    check_partition(model, groups)
    return groups


def _early_and_late(
    parts: list[tuple[str, nn.Module]], octaves: list[int]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the parts down to 1/8 of the resolution, and those after them."""
    boundary = next((i for i, octave in enumerate(octaves) if octave > 3), len(parts))
    early, late = (
        [p for _, module in some for p in module.parameters()] for some in (parts[:boundary], parts[boundary:])
    )
    return early, late


def _blocks(model: Classifier, early: list[nn.Parameter], late: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The body's blocks, where it is to be divided by them; nothing where the resolution has divided a map's body."""
    whole = early and late and {*map(id, early), *map(id, late)} == {*map(id, model.body.parameters())}
    return [] if whole and not model.pooled else block_groups(model.body)


def block_groups(body: nn.Module) -> list[list[nn.Parameter]]:
    """The embedding and each block, as timm's own matcher of the model tells them apart; nothing for other bodies."""
    if isinstance(body, VisionTransformer):
        matcher = {"stem": r"conv_proj|encoder\.pos_embedding", "blocks": r"encoder\.layers\.encoder_layer_(\d+)"}
    elif callable(own := getattr(body, "group_matcher", None)):
        matcher = own(coarse=False)
    else:
        return []
    if isinstance(matcher, dict):  # a few are functions, and tell each name
        matcher = {**matcher, "rest": [("", (99999,))]}  # timm's number for: with the group before
    named = dict(body.named_parameters())
    tokens = [name for name in named if "." not in name]  # and position embeddings: what the body itself holds is first
    blocks = [[name for name in names if "." in name] for names in timm.models.group_parameters(body, matcher).values()]
    first, *others = [names for names in blocks if names]
    return [[named[name] for name in names] for names in (tokens + first, *others)]


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


def _octaves(model: Classifier, parts: list[tuple[str, nn.Module]], size: int) -> list[int]:
    """How often the resolution is halved at each part's output: 3 is 1/8; 0 too where the output is no map."""
    reached: dict[str, int] = {}

    def note(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, tuple):  # the map, and tokens beside it
                output = output[0]
            if isinstance(output, torch.Tensor) and output.ndim == 4:
                stride = max(1, size // output.shape[2])
                reached[name] = round(math.log2(stride))  # convolutions without padding nibble at the edges: 1/9 is 1/8

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in parts]
    training = model.training
    example_NCHW = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    with torch.no_grad():
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
