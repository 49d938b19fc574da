"""The record of a run: one JSON object a line, written by rank 0 alone, read by everything that shows anything."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Journal:
    """Appends events to `path`, each flushed as a whole line; with `path=None` (other ranks) it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            _cut_partial_line(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; numbers, strings, lists and dicts of them."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _cut_partial_line(path: Path) -> None:
    """A process killed while writing leaves half a line: it is no event, and must not swallow the next one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole events of a journal, in order; an absent journal has none."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole
    return [json.loads(line) for line in lines if line.strip()]


def follow(path: Path, stop: threading.Event, poll: float = 0.1, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Events from byte `offset` on as they are written; ends when `stop` is set and the journal is read to its end."""
    rest = b""
    while True:
        last_look = stop.is_set()
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                chunk = file.read()
            offset += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    yield json.loads(line)
        if last_look:
            return
        stop.wait(poll)
