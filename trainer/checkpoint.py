"""Saving a run and taking it up again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

from trainer.loop import Learner


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands; with the seed these are all it needs to go on."""

    epoch: int
    """Epochs done."""
    updates: int
    """Optimiser steps done in the current phase."""
    base_lr: float
    """The rate that the range test or the user chose."""


def save(folder: Path, learner: Learner, position: Position, keep: int = 2) -> Path:
    """Write `folder/epoch-NNNN`; it appears under that name only when it is whole. The newest `keep` are kept."""
    target = folder / f"epoch-{position.epoch:04d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    safetensors.torch.save_file(tensors(learner.model), partial / "model.safetensors")
    torch.save(
        {
            "optimizer": learner.optimizer.state_dict(),
            "scaler": learner.scaler.state_dict(),
            "ema": learner.ema and learner.ema.state_dict(),
        },
        partial / "optimizer.pt",
    )
    (partial / "position.json").write_text(json.dumps(asdict(position)))
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load(folder: Path, learner: Learner) -> Position | None:
    """Restore the newest checkpoint of `folder`, if there is one, unpickling nothing but tensors."""
    found = _all(folder)
    if not found:
        return None
    newest = found[-1]
    device = learner.ranks.device
    learner.model.load_state_dict(safetensors.torch.load_file(newest / "model.safetensors", device=str(device)))
    state = torch.load(newest / "optimizer.pt", map_location=device, weights_only=True)
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.scaler.load_state_dict(state["scaler"])
    if learner.ema is not None:
        learner.ema.load_state_dict(state["ema"])
    return Position(**json.loads((newest / "position.json").read_text()))


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as safetensors wants it: contiguous, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*")) if folder.is_dir() else []
