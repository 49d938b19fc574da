"""Commands that start processes of their own, and which of those are still there."""

from __future__ import annotations

from pathlib import Path

MARK = "ONEWARP_TESTED"  # in the environment of each process that a command starts, and of theirs


def left_running(mark: str | Path) -> dict[int, bytes]:
    """The command lines, by process id, of those that were started with `MARK` set to `mark`, and are still there."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return found


def workers(mark: str | Path) -> list[int]:
    """The process ids of Ray Train's workers among them."""
    return sorted(pid for pid, words in left_running(mark).items() if b"RayTrainWorker" in words)
