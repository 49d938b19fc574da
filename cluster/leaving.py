"""Whether a machine of a training is about to leave the cluster: one that is told to go gives time before it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Set
from contextlib import suppress

from ray._private.state import state

from trainer import stopping

POLL = 1.0  # seconds between two looks


def watch(nodes: Set[str]) -> None:
    """From now on this process is told to stop as soon as Ray drains one of `nodes`.

    Ray Train has a watcher for that. It is a process, which may start later than a machine takes to leave.
    """
    threading.Thread(target=_watch, args=(nodes,), name="leaving", daemon=True).start()


def _watch(nodes: Set[str]) -> None:
    while not nodes & machines():
        time.sleep(POLL)
    stopping.leave()


def machines() -> Set[str]:
    """Those that are leaving: they were told to, and Ray has not heard yet that they are gone."""
    with suppress(Exception):  # the head may be busy, or gone; then there is more to notice than this
        return state.get_draining_nodes().keys()
    return frozenset()
