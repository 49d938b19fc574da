"""The verb that looks at a cluster before anything is trained on it: `doctor`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster import environment
from pipelines.errors import UserError
from trainer.run_folder import absolute

if TYPE_CHECKING:
    from cluster.checkup import Check
    from cluster.rounds import Link


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What to look at."""

    cluster: bool = False
    """Look at every machine of a Ray cluster: versions, folders, disks, memory, GPUs, clocks, and how they talk."""
    address: str | None = None
    """The cluster: `auto` or HOST:PORT. Default: the one that $RAY_ADDRESS names; else this machine alone."""
    data: Path | None = None
    """Folder of images that each machine is to read."""
    runs: Path = Path("runs")
    """Folder for runs that each machine is to write."""

    def __post_init__(self) -> None:
        if not self.cluster:
            raise UserError(
                "doctor wants a folder of images, to say what binds a training on it here: onewarp doctor DIR; or "
                "--cluster, to look at every machine of a cluster."
            )


def doctor(config: tyro.conf.OmitArgPrefixes[DoctorConfig]) -> None:
    """Say what is slow or wrong, and what to do: `doctor DIR` for a training here, `doctor --cluster` for a cluster.

    With a folder of images it measures what binds a training on them, reading or computing, and tries which switch
    helps. With --cluster it says whether a training can run on every machine, and what to mend where it cannot.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    data = config.data and absolute(config.data)
    console = Console()
    if address is not None:
        os.environ.setdefault(environment.OTHERS, "1")
    from cluster import engine, rounds  # which takes seconds

    with console.status("Looking at each machine …"), engine.at(address):
        checks, links = rounds.examine(data, absolute(config.runs)), rounds.links()
    console.print(table(checks))
    for link in links:
        console.print(_in_words(link), highlight=False, soft_wrap=True)
    ills = _ills(checks) + [
        f"{' and '.join(link.hosts)}: they do not talk by {link.backend}: {link.failed}. To mend it, open all ports "
        "between the machines, or name the network that they share: GLOO_SOCKET_IFNAME, and for GPUs "
        "NCCL_SOCKET_IFNAME."
        for link in links
        if link.failed
    ]
    for ill in ills:
        console.print(ill, style="red", highlight=False, markup=False, soft_wrap=True)
    if ills:
        sys.exit(1)
    console.print("All is well.", highlight=False)


def refuse_the_ill(checks: Sequence[Check]) -> None:
    """Raise UserError where a training would fail on a machine, in the words of `doctor`."""
    ills = _ills(checks)
    if ills:
        more = f" ({len(ills) - 1} more; onewarp doctor --cluster tells them all.)" if len(ills) > 1 else ""
        raise UserError(f"{ills[0]}{more}")


def _ills(checks: Sequence[Check]) -> list[str]:
    return [f"{check.host}: {check.what}: {check.found}. To mend it, {check.fix}." for check in checks if check.fix]


def table(checks: Sequence[Check]) -> Table:
    """A row for each machine, a column for each thing; red is what is to be mended."""
    names = list(dict.fromkeys(check.what for check in checks))
    shown = Table("machine", *names)
    rows: list[list[Check]] = []
    for check in checks:
        if check.what == names[0]:
            rows.append([])
        rows[-1].append(check)
    for row in rows:
        shown.add_row(row[0].host, *(Text(check.found, style="red" if check.fix else "") for check in row))
    return shown


def _in_words(link: Link) -> str:
    how = link.failed or f"{link.milliseconds:.2f} ms, {link.megabytes:,.0f} MB/s"
    return f"{' – '.join(link.hosts)}: {link.backend}: {how}"
