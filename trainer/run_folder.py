"""Where everything of a run lies."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.manifest import Quarantined
from trainer.config import TrainConfig


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, under `path` (absolute)."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def manifest(self) -> Path:
        """What the data held when the run began, Parquet."""
        return self.path / "manifest.parquet"

    @property
    def quarantine(self) -> Path:
        """The files that were left out, and why: path, tab, reason; absent where every file is good."""
        return self.path / "quarantine.txt"

    @property
    def initial(self) -> Path:
        """The weights that every rank begins with."""
        return self.path / "initial.safetensors"

    @property
    def journal(self) -> Path:
        """The record, JSON lines."""
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The weights at the end."""
        return self.path / "model.safetensors"

    def figure(self, name: str) -> Path:
        return self.path / f"{name}.png"

    def write_quarantine(self, left_out: Iterable[Quarantined]) -> None:
        """List the files that are left out."""
        write_atomic(self.quarantine, "".join(f"{printable(bad.path)}\t{bad.reason}\n" for bad in left_out))

    def read_config(self) -> TrainConfig:
        return TrainConfig.read(self.config)


def printable(path: str) -> str:
    """A path as it is, or escaped in quotes where it holds newlines or bytes that are no text."""
    return path if path.isprintable() else repr(path)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
