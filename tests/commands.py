"""Commands that start processes of their own, and what they leave running."""

from pathlib import Path

MARK = "ONEWARP_TESTED"  # in the environment of each process that a test's command starts, and of theirs


def left_running(temporary):
    """The processes that a command has started and that are still there."""
    mark, found = f"{MARK}={temporary}".encode(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return found
