"""What is exported, and how an export is checked; the command line is generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import UserError
from trainer.apply_config import Weights

Form = Literal["onnx", "torch", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which run, and as what."""

    run: Path
    """Folder of a finished run, as runs/NAME."""
    to: Form = "onnx"
    """`onnx`: for onnxruntime and others. `torch`: a program of torch.export, which needs torch and no code of ours.
    `safetensors`: the weights, for a model that is built by name."""
    weights: Weights = "last"
    """`last`: those that training ended with (their average with --ema). `best`: those of its best epoch, if kept."""
    images: Path | None = None
    """Folder to take the golden images from. Default: the run's own validation images."""
    out: Path | None = None
    """Folder to write; an earlier export in it is replaced. Default: export-onnx (or -torch, …) in the run's folder."""

    def __post_init__(self) -> None:
        _to_paths(self, "run", "images", "out")


@dataclass(frozen=True, kw_only=True)
class CheckExportConfig:
    """Which export, and by which images."""

    export: Path
    """Folder that `onewarp export` wrote."""
    data: Path | None = None
    """Folder of images to compare by. Default: the golden images in the export."""
    limit: int | None = None
    """Most images that are read, evenly spread over the folder. Default: all."""

    def __post_init__(self) -> None:
        _to_paths(self, "export", "data")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit is {self.limit}; it must be 1 or more.")


def _to_paths(config: object, *names: str) -> None:
    """From Python a path may come as a string."""
    for name in names:
        if isinstance(value := getattr(config, name), str):
            object.__setattr__(config, name, Path(value))
