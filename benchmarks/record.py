"""What every benchmark writes: the figures with each sample, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was measured."""

    name: str
    samples: list[float]
    """One figure for each round."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def environment() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD") + (" + changes" if _git("status", "--porcelain") else ""),
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def write(title: str, unit: str, rows: list[Row], *, config: dict[str, Any], json_file: Path | None) -> None:
    """Print a table of the rows, each as a ratio to the first, and write everything as JSON where a file is named."""
    table = Table(title=title, title_justify="left")
    for heading in ("", f"median {unit}", "min", "max", "n", "first ÷ this"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        ratio = rows[0].median / row.median
        low, high = min(row.samples), max(row.samples)
        table.add_row(
            row.name, f"{row.median:,.0f}", f"{low:,.0f}", f"{high:,.0f}", str(len(row.samples)), f"{ratio:.2f}"
        )
    console = Console(width=110)
    console.print(table)
    where = environment()
    console.print(f"{where['cpu']}, {where['cores']} cores; commit {where['commit']}", highlight=False)
    if json_file is not None:
        record = {
            "title": title,
            "unit": unit,
            "config": config,
            "rows": [{"name": row.name, "median": row.median, "samples": row.samples} for row in rows],
            "environment": where,
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=2) + "\n")
