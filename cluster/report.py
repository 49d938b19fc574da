"""The verb that makes a page of runs: `report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from pipelines.errors import UserError
from trainer.run_folder import RunFolder, absolute


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs, and where to."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, as runs/NAME: one, or several to compare."""
    out: Path | None = None
    """The page to write. Default: report.html in the run's folder; of several, comparison.html here."""


def report(config: tyro.conf.OmitArgPrefixes[ReportConfig]) -> None:
    """Make a page of a run, to show: result, curves, what it confuses, data, time. Of several, a comparison.

    One file that needs no network. `train` writes it at its end.
    """
    from trainer import report as pages

    if not config.runs:
        raise UserError("report wants a run: onewarp report runs/NAME, or several to compare.")
    folders = [RunFolder(absolute(path)) for path in config.runs]
    if len(folders) == 1:
        path = pages.write(folders[0], config.out and absolute(config.out))
    else:
        path = pages.compare(folders, absolute(config.out or Path("comparison.html")))
    Console().print(f"report    {path}", highlight=False, markup=False, soft_wrap=True)
