"""When a worker was ready to begin: what the start-up of a run is made of."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path


def _begun() -> float:
    """When this process began: field 22 of proc(5)'s stat counts clock ticks since the machine's start."""
    *_, fields = Path("/proc/self/stat").read_text().rpartition(")")
    ticks = int(fields.split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Seconds since 1970."""

    process: float = field(default_factory=_begun)
    """The worker's process began."""
    met: float
    """It was in the process group with the others."""
    imported: float = field(default_factory=time.time)
    """It had imported torch, DALI and what else training needs."""
