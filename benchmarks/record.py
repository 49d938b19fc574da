"""What every benchmark writes: each figure with all its samples, and what they were measured on."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from pipelines.errors import UserError
from trainer.version import commit

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "numba", "pillow", "timm")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark is asked."""

    data: str = "breeds"
    """Folder of images, or the name of an embedded data set."""
    threads: int = 2
    """Decoding threads of ours and of DALI, worker processes of the others."""
    quick: bool = False
    """A minute at most, to see that everything runs; its figures mean nothing."""
    json: Path | None = None
    """Write the record here, and its tables beside it in Markdown."""

    def __post_init__(self) -> None:
        # Before anything is measured: a benchmark takes minutes to hours.
        if self.json is None:
            return
        if self.json.suffix in (".md", ".png") or self.json.is_dir():
            raise UserError(f"--json {self.json}: this is where the record goes. Name a file that ends in .json.")
        there = next(folder for folder in self.json.absolute().parents if folder.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise UserError(f"--json {self.json}: {there} is no folder that can be written to. Choose another.")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured quantity: a cell of the table."""

    row: str
    """What was measured, a way for instance."""
    column: str
    """The quantity and its unit."""
    samples: list[float]
    """One for each round or picture."""
    centre: Literal["median", "mean"] = "median"
    """What stands for them."""

    @property
    def value(self) -> float:
        return statistics.median(self.samples) if self.centre == "median" else statistics.fmean(self.samples)

    @property
    def interval(self) -> tuple[float, float, float]:
        """Low, high, and the probability in percent with which they hold the true centre."""
        return median_interval(self.samples) if self.centre == "median" else mean_interval(self.samples)

    @property
    def cell(self) -> str:
        """For a table."""
        low, high, _ = self.interval
        return short(self.value) if low == high else f"{short(self.value)} [{short(low)}, {short(high)}]"


def median_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, coverage in percent): the narrowest pair of order statistics that holds the median in 95% of cases.

    Exact for any continuous distribution of independent samples (David & Nagaraja, "Order Statistics", 2003, 7.1).
    Five samples or fewer have no such pair: then it is their range, and the coverage says how little that is.
    """
    ordered, n = sorted(samples), len(samples)
    below = 0.5**n  # probability that fewer than k + 1 of n samples lie below the median
    k = 0
    while 2 * (more := below + math.comb(n, k + 1) * 0.5**n) <= 0.05 and k + 1 < n - 2 - k:
        below, k = more, k + 1
    return ordered[k], ordered[n - 1 - k], 100 * (1 - 2 * below)


def mean_interval(samples: Sequence[float]) -> tuple[float, float, float]:
    """(low, high, 95): Student's interval; a single sample is its own, and covers nothing."""
    mean, n = statistics.fmean(samples), len(samples)
    if n == 1:
        return mean, mean, 0.0
    error = student(n - 1) * statistics.stdev(samples) / math.sqrt(n)
    return mean - error, mean + error, 95.0


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution with so many degrees of freedom, to 0.2% or better.

    The first are of tables, the others Cornish and Fisher's expansion about the normal quantile z (Abramowitz & Stegun,
    26.7.5).
    """
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


_STUDENT = (12.706, 4.303, 3.182, 2.776)


def short(value: float) -> str:
    """Three figures, or all the digits before the point; 0.994 and 0.9912 want a fourth."""
    if 0.9 <= abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A benchmark's outcome."""

    title: str
    name: str
    """The benchmark's, as `onewarp bench` takes it."""
    options: Options
    figures: list[Figure]
    skipped: dict[str, str]
    """What could not be measured, and why."""
    remarks: tuple[str, ...] = ()
    """How it was measured, in sentences."""
    packages: tuple[str, ...] = ()
    """Distributions whose version matters, beside those of every record."""

    @property
    def _asked(self) -> Options:
        """The options; of the folder its name alone, as a record is read on other machines."""
        return replace(self.options, data=Path(self.options.data).name)

    @property
    def command(self) -> str:
        """The command line that asks for the same again."""
        words = ["onewarp", "bench", self.name]
        for field in fields(self.options):
            value = getattr(self._asked, field.name)
            if field.name != "json" and value != field.default:
                flag = "--" + field.name.replace("_", "-")
                if value is True:
                    words += [flag]
                else:
                    words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
        return shlex.join(words)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "command": self.command,
            "config": {key: value for key, value in asdict(self._asked).items() if key != "json"},
            "figures": [_figure(figure) for figure in self.figures],
            "skipped": self.skipped,
            "remarks": self.remarks,
            "environment": environment(self.packages),
        }

    def markdown(self) -> str:
        """A table with a row for each thing measured, and below it what a reader needs to judge it."""
        columns = list(dict.fromkeys(figure.column for figure in self.figures))
        cells = {(figure.row, figure.column): figure.cell for figure in self.figures}
        lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for row in dict.fromkeys(figure.row for figure in self.figures):
            lines.append(f"| {row} | " + " | ".join(cells.get((row, column), "") for column in columns) + " |")
        counts = sorted({(figure.centre, len(figure.samples), figure.interval[2]) for figure in self.figures})
        centres = ", ".join(
            dict.fromkeys(
                f"{centre} of {n} [{coverage:.0f}% interval]" if n > 1 else "a single measurement"
                for centre, n, coverage in counts
            )
        )
        where = environment(self.packages)
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        notes = [
            f"In each cell: {centres}.",
            *self.remarks,
            *(f"Left out: {name} ({why})." for name, why in self.skipped.items()),
            f"{where['cpu']}, {where['cores']} cores, {', '.join(where['gpus']) or 'no GPU'}, Python "
            f"{where['python']}, {versions}, commit {where['commit']}.",
        ]
        return "\n".join([f"# {self.title}", "", f"    {self.command}", "", *lines, "", *notes, ""])

    def publish(self, *, whole: bool = True) -> None:
        """Print the table; where the options name a file, write the record there and the table beside it.

        One that is not whole yet is written under another name, so that it takes no older one's place.
        """
        print(self.markdown())
        path = self.options.json
        if path is None:
            return
        unfinished = path.with_name(f"{path.stem}-unfinished.json")
        to = path if whole else unfinished
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        to.with_suffix(".md").write_text(self.markdown())
        if whole:
            unfinished.unlink(missing_ok=True)
            unfinished.with_suffix(".md").unlink(missing_ok=True)


def _figure(figure: Figure) -> dict[str, Any]:
    low, high, coverage = figure.interval
    method = "order statistics" if figure.centre == "median" else "Student's t"
    return {
        "row": figure.row,
        "column": figure.column,
        "median": _rounded(statistics.median(figure.samples)),
        **({"mean": _rounded(figure.value)} if figure.centre == "mean" else {}),
        "interval": [_rounded(low), _rounded(high)],
        "coverage_percent": round(coverage, 1),
        "method": method,
        "n": len(figure.samples),
        "samples": [_rounded(sample) for sample in figure.samples],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
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
        "versions": {name: _version(name) for name in dict.fromkeys((*PACKAGES, *packages))},
        "commit": commit(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # another distribution has the same module
        return "unknown"
