"""The verbs that let a model out, and look at it from outside: `export` and `check-export`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from trainer.export_config import CheckExportConfig, ExportConfig


@dataclass(frozen=True, kw_only=True)
class Export(ExportConfig):
    """Of `onewarp export RUN`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True, kw_only=True)
class Check(CheckExportConfig):
    """Of `onewarp check-export EXPORT`."""

    export: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="EXPORT")]


def export(config: tyro.conf.OmitArgPrefixes[Export]) -> None:
    """Write a trained model for others to serve, and with it how an image becomes its input, in words and as code.

    Eight golden images go with it, with the input and the output that belong to them.
    """
    from trainer import exporting  # which takes seconds

    console = Console()
    written = exporting.export(config, console)
    size = written.model.stat().st_size / 1e6
    told = (
        f"export    {written.folder}",
        f"          {written.model.name}, {size:.1f} MB; outputs agree with the run's to {written.difference:.2g} on "
        f"{written.images} golden images",
        f"check     onewarp check-export {shlex.quote(str(written.folder))} --data DIR",
        f"predict   onewarp predict {shlex.quote(str(written.folder))} DIR",
    )
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def check_export(config: tyro.conf.OmitArgPrefixes[Check]) -> None:
    """Apply an export to images read by DALI, Pillow, torchvision and OpenCV, and tell where they differ.

    Exit code 1 where the golden outputs or the golden inputs do not come out again.
    """
    from trainer import checking  # which takes seconds

    console = Console()
    found = checking.check_export(config, console)
    checking.summary(found, console)
    if found.troubles:
        sys.exit(1)
