"""The verb that sends what a run has recorded to Weights & Biases: `wandb-sync`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from trainer.run_folder import RunFolder, absolute


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Which run, and where to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, as runs/NAME; it may never have been tracked."""
    wandb: Literal["online", "offline"] = "online"
    """`offline` writes a folder of wandb's in the run's, as training without a network does."""


def wandb_sync(config: tyro.conf.OmitArgPrefixes[SyncConfig]) -> None:
    """Send a run to Weights & Biases from its journal: after a training without network, login, or wandb at all.

    What is there already is not sent again. The run keeps its id, whoever sends it.
    """
    from trainer import tracking

    console, troubles = Console(), []
    folder = RunFolder(absolute(config.run))
    with console.status("Sending …"):
        tracking.replay(folder, config.wandb, troubles.append)
    for trouble in troubles:
        Console(stderr=True).print(f"onewarp: {trouble}", style="red", markup=False, highlight=False, soft_wrap=True)
    if troubles:
        sys.exit(1)
    console.print(f"sent      {folder.path.name}, {config.wandb}", highlight=False, markup=False, soft_wrap=True)
